"""Two runs side by side: what differs, who got where first, and what is no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat import flags
from nanochat.checkpoint import LOG, run_dir
from nanochat.common import UserError
from nanochat.report.compare import (
    MEASURES,
    compare_text,
    comparison_panels,
    curve,
    load_run,
    reached,
    shared_measures,
    write_comparison,
)
from scripts.compare import Args, main

BPB = MEASURES[0]


def write_run(tag: str, bpb: list[float], stage: str = "base", **start: Any) -> str:
    """A run with an evaluation every 10 steps of 100 tokens and half a second; not ended."""
    path = run_dir(stage, tag) / LOG
    path.parent.mkdir(parents=True)
    args = {"depth": 4, "matrix_lr": 0.02, "model_tag": tag}
    row = {
        "event": "start", "stage": stage, "step": 0, "args": args, "num_steps": 40,
        "flops_per_token": 1000, "machine": {"cpu": "C"}, "versions": {"torch": "2"},
        "data": {"train": "t", "val": "v"}, "tokenizer_fingerprint": "x",
    }  # fmt: skip
    rows: list[dict[str, Any]] = [{**row, **start, "args": {**args, **start.get("args", {})}}]
    for i, value in enumerate(bpb):
        if i:
            rows += [
                {"event": "step", "step": s, "loss": 2 * value, "tokens": 100 * s,
                 "seconds": 0.5 * s, "tokens_per_second": 200.0}
                for s in range(10 * i - 9, 10 * i + 1)
            ]  # fmt: skip
        rows.append({"event": "eval", "step": 10 * i, "val_bpb": value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{stage}/{tag}"


def test_tokens_to_the_others_end_by_hand() -> None:
    """Fast is at 2.0 half way between its evaluations at 1,000 (2.5) and 2,000 tokens (1.5)."""
    fast = load_run(write_run("fast", [4.0, 2.5, 1.5]))
    slow = load_run(write_run("slow", [4.0, 3.0, 2.5, 2.0]))
    assert curve(fast, BPB, "tokens") == ([0, 1000, 2000], [4.0, 2.5, 1.5])
    assert curve(fast, BPB, "seconds")[0] == [0, 5, 10]
    assert reached(fast, BPB, 2.0, "tokens") == pytest.approx(1500)
    assert reached(fast, BPB, 2.0, "seconds") == pytest.approx(7.5)
    assert reached(slow, BPB, 1.5, "tokens") is None
    assert reached(slow, BPB, 4.0, "steps") == 0  # it began there
    text = compare_text(fast, slow)
    assert (
        "base/fast reaches the final validation bits per byte of base/slow (2.0000) after 15 steps "
        "(0.50 x as many), 1,500 tokens (0.50 x as many), 8 seconds (0.50 x as many)" in text
    )
    assert "base/slow does not reach the final validation bits per byte of base/fast (1.5" in text
    assert "| 2.000e+06 | 3.000e+06 |" in text  # FLOPs: tokens times 1,000
    assert "not ended" in text and "Nothing that decides a run." in text


def test_the_text_does_not_take_the_pictures_place(tmp_path: Path) -> None:
    runs = [load_run(write_run(tag, [4.0, 2.0])) for tag in ("a", "b")]
    written = write_comparison(runs[0], runs[1], tmp_path / "both.md")
    assert sorted(path.suffix for path in written) == [".html", ".md", ".png"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert "](both.png)" in (tmp_path / "both.md").read_text(encoding="utf-8")


def test_what_rises_is_reached_from_below() -> None:
    accuracy = next(m for m in MEASURES if m.key == "pass1")
    run = load_run(write_run("d4", [4.0, 2.0, 1.0]))
    run.evals = {10: {"pass1": 0.1}, 20: {"pass1": 0.5}}
    assert reached(run, accuracy, 0.3, "tokens") == pytest.approx(1500)
    assert reached(run, accuracy, 0.6, "tokens") is None


def test_a_value_that_is_no_number_is_passed_over() -> None:
    run = load_run(write_run("nan", [4.0, float("nan"), 2.0]))
    assert reached(run, BPB, 3.0, "tokens") == pytest.approx(1000)
    assert BPB in shared_measures((run, run))


def test_differences_and_what_does_not_compare() -> None:
    a = write_run("a", [4.0, 2.0], args={"eval_tokens": 500})
    b = write_run(
        "b", [4.0, 2.0], args={"matrix_lr": 0.03, "eval_tokens": 900}, machine={"cpu": "D"},
        data={"train": "t", "val": "w"},
    )  # fmt: skip
    text = compare_text(load_run(a), load_run(b))
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert ["--matrix_lr", "0.02", "0.03"] in rows and ["machine: cpu", "C", "D"] in rows
    assert ["data: val", "v", "w"] in rows
    assert not [row for row in rows if row[0] in ("--depth", "--model_tag", "data: train")]
    for warning in ("validation data differ", "machines differ", "500 and 900 tokens"):
        assert warning in text
    c = write_run("c", [4.0, 2.0], tokenizer_fingerprint="y", data={"train": "u", "val": "w"})
    text = compare_text(load_run(a), load_run(c))
    assert "tokenizers differ" in text and "validation data differ" not in text


def test_one_command_prints_and_draws(
    own_base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run("a", [4.0, 2.0, 1.9]), write_run("b", [4.0, 3.0, 2.0, 1.8])
    main(flags.parse(Args, [a, str(run_dir("base", "b"))]))
    picture = own_base_dir / "report" / "compare_base_a_base_b.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = picture.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "What is different" in page  # two measures over three axes
    said = capsys.readouterr().out
    text = picture.with_suffix(".md").read_text(encoding="utf-8")
    assert "## Results" in text and text.splitlines()[0] in said and str(picture) in said
    out = tmp_path / "x" / "y.png"
    main(flags.parse(Args, ["a", str(run_dir("base", "b") / LOG), f"--out={out}"]))
    assert out.exists() and out.with_suffix(".md").exists()
    assert b != a


def test_runs_without_a_measure_in_common_have_no_picture(tmp_path: Path) -> None:
    rl = load_run(write_run("a", [4.0, 2.0], stage="rl"))
    rl.evals, rl.rl = {}, {3: {"reward": 0.5}}
    base = load_run(write_run("a", [4.0, 2.0]))
    assert shared_measures((rl, base)) == []
    assert not comparison_panels(rl, base)
    assert write_comparison(rl, base, tmp_path / "none.png") == [
        *(tmp_path / name for name in ("none.md", "none.html"))
    ]
    assert not (tmp_path / "none.png").exists()
    assert "different stages" in compare_text(rl, base)


def test_what_is_no_run_is_refused_by_name(own_base_dir: Path, tmp_path: Path) -> None:
    write_run("d4", [4.0, 2.0])
    with pytest.raises(UserError, match=r"d9 is no run: .* one of the runs in .*: base/d4$"):
        load_run("d9")
    with pytest.raises(UserError, match=r"is no run: it has no log\.jsonl"):
        load_run(str(tmp_path))
    write_run("d4", [4.0, 2.0], stage="mid")
    with pytest.raises(UserError, match="d4 names 2 runs: say base/d4 or mid/d4"):
        load_run("d4")
    other = tmp_path / "chat_eval.jsonl"
    for content in ('{"task": "mmlu"}\n', "", "no json\n", '{"event": "start", "stage": "x"}\n'):
        other.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"chat_eval\.jsonl is no run's log"):
            load_run(str(other))
    write_run("new", [4.0])
    with pytest.raises(UserError, match="not taken a step yet"):
        load_run("base/new")
