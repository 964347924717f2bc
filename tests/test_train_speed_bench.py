"""bench/train_speed.py: what it measures, what it makes of the answers, and a run of its worker."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import train_speed, train_speed_worker
from nanochat import distributed
from nanochat.common import UserError
from nanochat.dataloader import RowReader


def answers(*seconds: float) -> list[dict[str, Any]]:
    return [{"seconds": s, "faults": 10 * i, "peak_gib": i} for i, s in enumerate(seconds)]


def facts(peak_flops: float | None = None) -> dict[str, Any]:
    return {
        "num_params": 7_340_032, "flops_per_token": 1000, "peak_flops": peak_flops,
        "computing": "float32", "threads": 1,
    }  # fmt: skip


def test_sizes() -> None:
    assert train_speed.parse_size("turbo-d12") == ("turbo", 12)
    assert train_speed.parse_size("qwen2.5-d4") == ("qwen2.5", 4)
    assert train_speed.parse_size("qwen2.5-0.5b") == ("qwen2.5-0.5b", 0)
    for wrong in ("gpt", "gpt-d0", "gpt-dx", "llama-d4", "d4", ""):
        with pytest.raises(UserError, match=r"gpt-d4.*qwen2\.5-0\.5b"):
            train_speed.parse_size(wrong)


def test_what_is_measured_on_a_cpu() -> None:
    cases = train_speed.cpu_cases(["gpt-d4", "turbo-d4"], ["SSSL", "L"])
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert [case.name for case in cases if case.window] == ["peer d4 SSSL", "peer d4 L"]
    eager = [case for case in cases if not case.compile and case.keep_memory]
    assert [(case.arch, case.depth) for case in eager] == [("gpt", 4), ("turbo", 4)]
    assert sum(not case.keep_memory for case in cases) == 1
    assert not any(case.window for case in train_speed.cpu_cases(["gpt-d4"], []))


def test_a_row_is_the_median_of_its_rounds() -> None:
    row = train_speed.measured("x", 8192, 2, answers(4.0, 40.0, 2.0), facts())
    assert row["seconds_per_step"] == [2.0, 20.0, 1.0] and row["median_seconds"] == 2.0
    assert row["tokens_per_second"] == 4096 and row["mfu"] is None
    assert row["faults_per_step"] == 5 and row["peak_gib"] == 2
    assert train_speed.measured("x", 8192, 1, answers(1.0), facts(8192e4))["mfu"] == 0.1


def test_shares_add_up() -> None:
    found = train_speed.shares({"whole": 2.0, "passes": 1.5, "trunk": 0.5})
    assert (found["trunk"], found["head and loss"], found["optimizer"]) == (0.25, 0.5, 0.25)


def test_ratios_are_within_rounds() -> None:
    def row(name: str, tokens: int, *seconds: float) -> dict[str, Any]:
        return train_speed.measured(name, tokens, 1, answers(*seconds), facts())

    # The machine was half as fast in the second round: medians of all would say another thing.
    ours = row("gpt-d4", 8192, 1.0, 2.0, 1.0)
    rows = [
        ours,
        row("peer d4 SSSL", 8192, 1.5, 3.0, 9.0),
        row("peer d4 SSSL", 4096, 1.0, 1.0, 1.0),
    ]
    train_speed.add_ratios(rows)
    assert ours["times_the_peer"] == {"peer d4 SSSL": 1.5}
    assert all("times_the_peer" not in peer for peer in rows[1:])
    ours["parts"] = train_speed.shares({"whole": 2.0, "passes": 1.5, "trunk": 0.5})
    lines = train_speed.table_of(rows).splitlines()
    assert "1.50" in lines[1] and "head and loss 50%" in lines[2] and len(lines) == 5


def test_rounds_are_of_about_the_same_length() -> None:
    assert train_speed.steps_a_round(100.0) == 1
    assert 10 <= train_speed.steps_a_round(0.1) <= 20


def test_a_peer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkout"):
        train_speed.main(train_speed.Args(device_type="cpu", peer=tmp_path))


def test_a_micro_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    args = train_speed.Args(device_type="cpu")
    train_speed.fill_in(args)
    case = train_speed.Case("gpt-d4", "gpt", 4)
    with pytest.raises(UserError, match="not a multiple"):
        train_speed.command_of(case, args, 8192, 3, tmp_path)


def test_the_peer_gets_our_shape(tmp_path: Path) -> None:
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "gpt.py").touch()
    args = train_speed.Args(device_type="cpu", peer=tmp_path, vocab_size=512)
    train_speed.fill_in(args)
    case = train_speed.Case("peer", "peer", 4, window="L")
    spec = json.loads(train_speed.command_of(case, args, 8192, 8, tmp_path)[-1])
    assert (spec["n_embd"], spec["n_head"], spec["rows"]) == (256, 4, 16)
    assert spec["vocab_size"] == 512 and np.load(spec["ids"]).max() < 512


def test_made_up_documents_fill_rows() -> None:
    source = train_speed_worker.MadeUp(300)
    x, y = RowReader(source, 65, 1, train_speed_worker.BOS).read(0, 4)
    assert x.shape == y.shape == (4, 64) and (x[:, 0] == train_speed_worker.BOS).all()
    assert (x[:, 1:] == y[:, :-1]).all() and x.max() < 300


def test_the_worker_takes_steps_whole_and_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    spec = {
        "arch": "gpt", "depth": 1, "seq_len": 32, "vocab_size": 300, "tokens_per_step": 128,
        "rows": 2, "compile": False,
    }  # fmt: skip
    info = distributed.DistInfo(0, 0, 1, torch.device("cpu"))
    run = train_speed_worker.Run(spec, info)
    embedding = run.model.transformer.wte.weight

    def moved(part: str) -> bool:
        before = embedding.detach().clone()
        questions, said = io.StringIO(json.dumps({"steps": 1, "part": part})), io.StringIO()
        for line in questions:
            asked = json.loads(line)
            train_speed_worker.say(said, run.take(asked["steps"], asked["part"]))
        answer = json.loads(said.getvalue())
        assert answer["seconds"] > 0 and answer["faults"] >= 0 and answer["peak_gib"] > 0
        return not torch.equal(before, embedding)

    assert moved("whole") and not moved("passes") and not moved("trunk") and moved("whole")
    assert run.trainer.state.step == 4
    rest = io.StringIO(json.dumps({"profile": str(tmp_path / "table.txt")}) + "\n")
    said = io.StringIO()
    train_speed_worker.serve(run, rest, said)
    facts_line, profile_line = map(json.loads, said.getvalue().splitlines())
    assert facts_line["num_params"] == sum(p.numel() for p in run.model.parameters())
    assert "aten::" in Path(profile_line["profile"]).read_text(encoding="utf-8")
