"""base_train as one runs it: where tokenized text is kept changes nothing that is trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nanochat import text_source
from nanochat.checkpoint import LOG, run_dir
from nanochat.common import UserError, read_jsonl
from tests.terminals_for_tests import on_a_terminal
from tests.tiny_world import BASE_FLAGS, make_world, run_stage

FLAGS = [*BASE_FLAGS, "--num_iterations=3", "--eval_every=-1"]


def rows(event: str, tag: str) -> list[dict[str, Any]]:
    path = run_dir("base", tag) / LOG
    return [row for _, row in read_jsonl(path) if row["event"] == event]


def test_the_cache_elsewhere_or_none_gives_the_same_run(
    own_base_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_world(own_base_dir)
    monkeypatch.setattr(text_source, "MIN_SHARD", 1)  # several shards, as real data has
    cache = tmp_path / "elsewhere"
    run_stage("base_train", *FLAGS, "--model_tag=stream", "--stream")
    assert "no token cache" in capsys.readouterr().out
    assert not (own_base_dir / "token_cache").exists()
    run_stage("base_train", *FLAGS, "--model_tag=elsewhere", f"--token_cache_dir={cache}")
    out = capsys.readouterr().out
    assert f"token cache {cache}" in out and "% of its tokens cropped" in out
    assert list(cache.glob("*/ids.bin")) and not (own_base_dir / "token_cache").exists()
    losses = [[row["loss"] for row in rows("step", tag)] for tag in ("stream", "elsewhere")]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    (shard, *_) = rows("shard", "stream")
    assert shard["epoch"] == 0 and 0 <= shard["cropped"] < 0.05 < shard["continued"]

    monkeypatch.setattr(text_source, "free_bytes", lambda folder: 100)
    with pytest.raises(UserError, match=r"--token_cache_dir.*--stream"):
        run_stage("base_train", *FLAGS, "--model_tag=full")


def test_each_step_is_a_line_in_a_log_and_the_same_line_on_a_terminal(
    own_base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_world(own_base_dir)
    line = (
        r"base step {}/3 \| loss \d\.\d{{4}} \| val_bpb \d\.\d{{4}} \| [\d,]+ tok/s \| "
        r"[\d:]+ (?:s|min), [\d:]+ (?:s|min) left"
    )
    flags = [*BASE_FLAGS, "--num_iterations=3", "--eval_every=2"]
    run_stage("base_train", *flags)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for step in (1, 2, 3):
        assert len(re.findall(rf"(?m)^{line.format(step)}$", out)) == 1
    program = "import sys; from tests.tiny_world import run_stage; run_stage(*sys.argv[1:])"
    shown = on_a_terminal(program, "base_train", *flags, "--model_tag=again")
    assert re.search(rf"━ {line.format(2)}", shown)  # beside a bar
    assert re.search(rf"\x1b\[2K{line.format(3)}\r\n", shown)  # and the last one stays
    assert re.search(r"\x1b\[2Kbase step 2: val_bpb \d\.\d{4}\r\n", shown)


def test_what_the_end_will_need_is_asked_for_at_the_beginning(
    own_base_dir: Path, tmp_path: Path
) -> None:
    """Evaluated at the end alone, before the only checkpoint: an error there would cost the run."""
    make_world(own_base_dir)
    short = tmp_path / "short.txt"
    short.write_text("Too short for a row.", encoding="utf-8")
    (next((own_base_dir / "eval_bundle" / "eval_data" / "primer").iterdir())).unlink()
    for flag, said in (
        (f"--val_data={short}", "validation: the data does not fill one row"),
        ("--core_metric_every=1000", "its rows .* are missing"),
    ):
        with pytest.raises(UserError, match=said):
            run_stage("base_train", *FLAGS, flag)
    assert not run_dir("base", "d2").exists()
