"""base_eval as one runs it: what is asked for is measured, and written as one row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.common import UserError, read_jsonl
from nanochat.evals import bundle
from nanochat.evals.bpb import BitsPerByte
from scripts import base_eval
from scripts.base_eval import PROMPTS, Args
from tests.evals.test_core import write_bundle
from tests.scripts.checkpoints_for_tests import save_tiny
from tests.tokenizers_for_tests import TEXT

FLAGS = ["--device-type=cpu", "--split_tokens=512", "--device_batch_size=2"]


@pytest.fixture
def base(own_base_dir: Path) -> Path:
    save_tiny(own_base_dir, "base")
    for name in ("a.jsonl", "b.jsonl"):
        path = own_base_dir / "base_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": f"{name} {TEXT}"}) + "\n", encoding="utf-8")
    return own_base_dir


def run(*argv: str) -> None:
    base_eval.main(flags.parse(Args, argv))


def rows_of(base: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(base / "report" / "base_eval.jsonl")]


def test_everything(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(base / "eval_bundle")
    run(*FLAGS)
    (row,) = rows_of(base)
    assert (row["source"], row["model_tag"], row["step"]) == ("base", "tiny", 7)
    assert row["val_bpb"] > 1
    assert row["train_bpb"] > 1
    assert len(row["samples"]) == len(PROMPTS) + 4
    assert row["samples"][0].startswith(PROMPTS[0])
    assert -1 <= row["core_metric"] <= 1
    assert row["core_tasks"]["my_schema"]["n"] == 3
    assert {"chance", "control", "majority", "stderr"} <= set(row["core_tasks"]["my_schema"])
    items = base / "report" / "base_eval" / "base_tiny_7" / "my_schema.jsonl"
    assert len(list(read_jsonl(items))) == 3
    assert "CORE" in capsys.readouterr().out


def test_only_what_is_asked_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*FLAGS, "--eval=bpb")  # needs no bundle
    run(*FLAGS, "--eval=sample")
    first, second = rows_of(base)
    measured = {f"{split}_{key}" for split in ("train", "val") for key in BitsPerByte._fields}
    assert set(first) == {"source", "model_tag", "step", "typed", *measured}
    assert 0 < first["val_stderr"] < first["val_bpb"] and first["val_num_bytes"] > 100
    assert set(second) == {"source", "model_tag", "step", "typed", "samples"}


def test_bundle_that_cannot_be_had(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise UserError("no network in tests")

    monkeypatch.setattr(bundle, "download", offline)
    with pytest.raises(UserError, match="eval_bundle, and getting it failed: no network in tests"):
        run(*FLAGS)


@pytest.mark.parametrize("value", ["core,bits", "", ","])
def test_unknown_kinds(value: str, base: Path) -> None:
    with pytest.raises(UserError, match="choose of core, bpb, sample"):
        run(*FLAGS, f"--eval={value}")
