"""Reading metrics files: resumed runs, half-written files, and which run is reported on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import append_jsonl
from nanochat.report.runs import read_run, read_runs


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def step(number: int, loss: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "seconds": number * 2.0}


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        {"event": "start", "step": 0, "time": 1.0, "num_params": 7},
        *(step(i, 9.0) for i in (1, 2, 3, 4, 5)),
        {"event": "eval", "step": 2, "val_bpb": 3.0},
        {"event": "eval", "step": 4, "val_bpb": 1.0},
        {"event": "sample", "step": 2, "text": "old"},
        {"event": "end", "step": 5, "seconds": 10.0},
        # Killed and resumed from a checkpoint of step 2: steps 3 to 5 never counted.
        {"event": "start", "step": 2, "time": 2.0, "num_params": 7},
        {"event": "eval", "step": 2, "val_bpb": 2.5},
        {"event": "sample", "step": 2, "text": "new"},
        *(step(i, 8.0) for i in (3, 4)),
    )
    run = read_run(path, "base", "d4")
    assert run.series("steps", "loss") == ([1, 2, 3, 4], [9.0, 9.0, 8.0, 8.0])
    assert run.series("evals", "val_bpb") == ([2], [2.5])
    assert [row["text"] for row in run.samples[2]] == ["new"]
    assert run.end is None and run.num_steps == 4
    assert run.seconds == 8.0  # of the last step, for there is no end


def test_what_was_said_before_the_checkpoint_is_kept(tmp_path: Path) -> None:
    """A run that has ended and is resumed takes no step and asks nothing again."""
    path = write(
        tmp_path / "x.jsonl",
        {"event": "start", "step": 0},
        *(step(i, 9.0) for i in (1, 2)),
        *({"event": "sample", "step": 2, "text": text} for text in ("one", "two")),
        {"event": "start", "step": 2},
        {"event": "end", "step": 2, "seconds": 4.0},
    )
    assert [row["text"] for row in read_run(path, "base", "d4").samples[2]] == ["one", "two"]


def test_evaluations_of_one_step_add_up(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.jsonl",
        {"event": "eval", "step": 3, "val_bpb": 1.0},
        {"event": "eval", "step": 3, "core_metric": 0.1},
    )
    run = read_run(path, "base", "d4")
    assert run.last("evals", "val_bpb") == 1.0 and run.last("evals", "core_metric") == 0.1


def test_a_row_ends_where_its_line_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unicode's own line ends stand in texts unescaped: the logs are written so."""
    path, text = tmp_path / "x.jsonl", "one\u2028two\u2029three\u0085four"
    append_jsonl(path, {"event": "sample", "step": 1, "text": text})
    append_jsonl(path, {"event": "step", "step": 2})
    run = read_run(path, "base", "d4")
    assert [row["text"] for row in run.samples[1]] == [text] and run.num_steps == 2
    assert capsys.readouterr().err == ""


def test_a_torn_file_is_read_as_far_as_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    whole = json.dumps(step(1, 2.0)).encode()
    path.write_bytes(whole + b'\n[1]\n"x"\n{"step": null}\n{"event": "step", "step": 2, "lo\xc3')
    assert read_run(path, "base", "d4").series("steps", "loss") == ([1], [2.0])
    assert f"{path}:5" in capsys.readouterr().err


def test_the_newest_run_of_every_stage_is_chosen(tmp_path: Path) -> None:
    for stage, tag, time in [("base", "d4", 3), ("base", "d2", 5), ("base", "d1", 1),
                             ("rl", "my_own_tag", 2)]:  # fmt: skip
        folder = tmp_path / STAGE_FOLDERS[stage] / tag
        folder.mkdir(parents=True)
        write(folder / LOG, {"event": "start", "step": 0, "time": time})
    (tmp_path / "other_checkpoints" / "d4").mkdir(parents=True)
    write(tmp_path / "other_checkpoints" / "d4" / LOG, {"event": "start", "time": 9})
    (tmp_path / STAGE_FOLDERS["mid"] / "imported").mkdir(parents=True)  # no run: it has no log
    runs, others = read_runs(tmp_path)
    assert [(run.stage, run.tag) for run in runs] == [("base", "d2"), ("rl", "my_own_tag")]
    assert sorted(others) == ["base/d1", "base/d4"]
    runs, others = read_runs(tmp_path, "d4")
    assert [(run.stage, run.tag) for run in runs] == [("base", "d4")]
    assert len(others) == 3


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    assert read_runs(tmp_path / "missing") == ([], [])
