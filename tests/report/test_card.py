"""The report card: what is in it, and that it can be made of whatever there is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import UserError
from nanochat.report.__main__ import Args, main
from nanochat.report.card import write_report
from nanochat.report.tables import duration, percent, show, table


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "report").mkdir()
    return tmp_path / "report"


def log_of(folder: Path, stage: str) -> Path:
    """The log of the run d4, in the base directory of this report."""
    return folder.parent / STAGE_FOLDERS[stage] / "d4" / LOG


def append(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def training(folder: Path, stage: str, num_steps: int = 3, **end: Any) -> None:
    """A run's file. Without `end` the run is still going."""
    start = {
        "event": "start", "step": 0, "time": 1.0, "num_params": 1234567, "num_steps": 3,
        "args": {"depth": 4, "matrix_lr": 0.02}, "model": {"n_layer": 4},
        "machine": {"cpu": "Some CPU", "cores": 2, "gpus": ["G", "G"]}, "versions": {"torch": "9"},
    }  # fmt: skip
    steps = [
        {"event": "step", "step": i, "loss": 4.0 / i, "tokens": 100 * i, "seconds": 20.0 * i,
         "tokens_per_second": 5000.0, "mfu": None}
        for i in range(1, num_steps + 1)
    ]  # fmt: skip
    append(log_of(folder, stage), start, *steps)
    if end:
        append(log_of(folder, stage), {"event": "end", "step": num_steps, **end})


def task(source: str, accuracy: float, tag: str = "d4", **more: Any) -> dict[str, Any]:
    about = {"source": source, "model_tag": tag, "step": 3, "task": "gsm8k"}
    return {**about, "accuracy": accuracy, "n": 100, "stderr": 0.05, "chance": 0.0, **more}


def test_a_whole_run(folder: Path) -> None:
    training(folder, "base", seconds=61.0, final={})
    append(log_of(folder, "base"), {"event": "eval", "step": 0, "val_bpb": 3.0})
    append(log_of(folder, "base"), {"event": "eval", "step": 3, "val_bpb": 1.25})
    sample = {"event": "sample", "step": 3, "text": "<|bos|>Hi |\nyou"}
    append(log_of(folder, "base"), sample)
    training(folder, "rl", seconds=30.0, final={})
    append(
        log_of(folder, "rl"),
        {"event": "eval", "step": 0, "pass1": 0.3, "pass1_stderr": 0.02, "problems": 500},
        {"event": "eval", "step": 3, "pass1": 0.4, "pass1_stderr": 0.03, "problems": 500},
        *({"event": "rl", "step": i, "reward": 0.5, "ended": 1.0} for i in range(3)),
    )
    append(folder / "chat_eval.jsonl", task("sft", 0.5), task("rl", 0.6, ended=0.9))
    append(folder / "chat_eval.jsonl", {**task("rl", 0.8), "task": "mmlu", "chance": 0.25})
    append(folder / "tok_train.jsonl", {"vocab_size": 1}, {"vocab_size": 4096})
    core = {"lambada": {"results": 0.5, "centered": 0.5, "n": 10, "stderr": 0.1}}
    about = {"source": "base", "model_tag": "d4", "step": 3}
    append(folder / "base_eval.jsonl", {**about, "val_bpb": 1.5}, {**about, "core_tasks": core})

    shown = write_report(folder, folder / "report.md")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| machine | 2 x G, Some CPU, 2 core(s) |" in lines
    assert "| torch | 9 |" in lines
    assert "| training time | 1m 31s |" in lines
    assert "- **1.2500** bits per byte, validation" in lines
    assert "- **40.0 ± 3.0** % of unseen problems solved (rl)" in lines
    base = "| base | d4 | 1,234,567 | 3 | 300 | 1m 1s | 5,000 | val_bpb 3.0000 -> 1.2500 |"
    assert base in lines
    assert base in [" ".join(line.split()) for line in shown.splitlines()]
    assert any("pass1 0.3000 ± 0.0200 -> 0.4000 ± 0.0300" in line for line in lines)
    assert "| gsm8k | 100 | 0.0 | 50.0 ± 5.0 | 60.0 ± 5.0 |" in lines
    assert "| mmlu | 100 | 25.0 | | 80.0 ± 5.0 |" in lines
    assert "| replies that end by themselves | | | | 90.0 |" in lines
    assert "| vocab_size | 4,096 |" in lines and "| vocab_size | 1 |" not in lines
    assert "| lambada | 10 | 50.0 ± 10.0 | 50.0 |" in lines
    assert "| val_bpb | 1.5 |" in lines  # an older row of the same step adds what the newer lacks
    assert "    <|bos|>Hi | you" in text  # as code: markup in it stays text
    assert "| matrix_lr | 0.02 |" in lines
    assert "In `base_checkpoints/d4/`; `python -m scripts.rerun base/d4` repeats it." in lines


def test_a_run_under_way_says_so(folder: Path) -> None:
    training(folder, "mid", num_steps=2)
    shown = write_report(folder, folder / "report.md")
    assert "2 of 3" in shown and "40s so far" in shown and "loss 2.0000" in shown
    assert "has not ended" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun(folder: Path) -> None:
    training(folder, "base", num_steps=0)
    assert "0 of 3" in write_report(folder, folder / "report.md")
    assert not (folder / "loss.png").exists()
    assert "loss.png" not in (folder / "report.md").read_text(encoding="utf-8")


def test_evaluations_alone_make_a_report(folder: Path) -> None:
    old = {**task("sft", 0.2), "step": 1, "task": "mmlu"}  # of another checkpoint
    append(folder / "chat_eval.jsonl", old, task("sft", 0.1), task("sft", 0.5))
    text = write_report(folder, folder / "report.md")
    assert "50.0 ± 5.0" in text and "10.0" not in text and "mmlu" not in text


def test_the_tag_chooses_runs_and_results(folder: Path) -> None:
    append(folder / "chat_eval.jsonl", task("sft", 0.5), task("sft", 0.7, tag="d8"))
    assert "50.0" in write_report(folder, folder / "report.md", "d4")
    text = write_report(folder, folder / "report.md", "d8")
    assert "70.0" in text and "50.0" not in text


def test_nothing_to_report_is_an_error_with_the_way_out(folder: Path) -> None:
    with pytest.raises(UserError, match="speedrun"):
        write_report(folder, folder / "report.md")
    training(folder, "base")
    with pytest.raises(UserError, match="--model_tag=d9"):
        write_report(folder, folder / "report.md", "d9")
    assert not (folder / "report.md").exists()


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training(folder, "base")
    out = tmp_path / "else" / "card.md"
    main(flags.parse(Args, [f"--out={out}", "--model-tag=d4"]))
    assert out.exists() and out.with_name("loss.png").exists()
    assert "1,234,567" in capsys.readouterr().out


def test_importing_does_not_load_the_plotting_library() -> None:
    import subprocess

    code = "import sys, nanochat.report.card; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (True, "yes"), (1234567, "1,234,567"), (0.123456, "0.1235"), (0.0, "0"),
        (12345.6, "12,346"), (float("nan"), "nan"), ("a|b\nc", "a\\|b c"), ([1], "[1]"),
    ],
)  # fmt: skip
def test_show(value: Any, text: str) -> None:
    assert show(value) == text


def test_durations_and_percentages() -> None:
    assert [duration(s) for s in (None, 9.4, 75, 3600 * 3 + 125)] == ["", "9s", "1m 15s", "3h 2m"]
    assert percent(0.8125, 0.0101) == "81.2 ± 1.0" and percent(None) == ""


def test_tables_align_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", 1000], ["bcdef", 2]]) == [
        "| name  |     n |",
        "|-------|------:|",
        "| a     | 1,000 |",
        "| bcdef |     2 |",
        "",
    ]
