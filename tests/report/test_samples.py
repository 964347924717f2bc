"""What the models said: taken from logs and files of replies, chosen without regard to who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanochat.report.runs import Row, Run
from nanochat.report.samples import asked, conversations, reply_in, reply_of

START, END = "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>", "<|assistant_end|>"


def sampled(stage: str, ended: bool = True, **by_step: str) -> Run:
    """A run that sampled one reply to "Hi" at each of the steps: s0="Hello"."""
    run = Run(stage, "d4", start={"args": {"sample_prompts": "Hi"}})
    run.samples = {int(k[1:]): [{"text": f"{START}{v}{END}"}] for k, v in by_step.items()}
    run.steps = {max(run.samples): {}}
    run.end = {"event": "end"} if ended else None
    return run


def rows_of(lines: list[str]) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


def test_the_same_words_before_and_after_each_stage(tmp_path: Path) -> None:
    mid = sampled("mid", s0="the the", s5="Hey", s9="Hello")
    sft = sampled("sft", s0="Hello", s9="Hello there")
    rl = sampled("rl", ended=False, s0="Hello!", s4="Hello?")
    rows = rows_of(conversations(tmp_path / "report", [mid, sft, rl], []))
    assert [row for row in rows if row[0]] == [
        ["before mid", "`the the`"],
        ["after mid", "`Hello`"],  # which is before sft, too
        ["after sft", "`Hello there`"],
        ["before rl", "`Hello!`"],
        ["rl, step 4", "`Hello?`"],
    ]


def test_calls_and_ends_are_readable() -> None:
    call = "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>"
    assert reply_in(f"{START}So {call}2.{END}", "Hi") == "So [1+1 = 2] 2."
    assert reply_in(f"{START}So 2", "Hi") == "So 2 …"
    assert (
        reply_in("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>", "Hi")
        == "Yo"
    )
    assert reply_in("<|bos|>A dog says woof.", "A dog says") == " woof."
    parts = [{"type": "text", "text": "So "}, {"type": "python", "text": "1+1"},
             {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]  # fmt: skip
    assert reply_of({"replies": [{"reply": parts}]}) == "So [1+1 = 2] 2."
    assert reply_of({"reply": "B"}) == "B" and reply_of({"replies": []}) == ""


def test_samples_of_unknown_prompts_are_not_paired() -> None:
    run = sampled("mid", s0="x")
    run.start["args"]["sample_prompts"] = "Hi|Ho"
    assert asked(run) == {} and asked(Run("mid", "d4")) == {}


def write_items(base: Path, source: str, *items: Row) -> Row:
    path = base / "report" / f"{source}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return {"task": "t", "source": source, "items": f"report/{source}.jsonl"}


def item(index: int, correct: bool, prompt: str = "", **more: Any) -> Row:
    reply = {"reply": f"reply {index}", "correct": correct}
    return {"index": index, "prompt": prompt or f"question {index}", "replies": [reply],
            "correct": correct, "expected": ["x"], **more}  # fmt: skip


def test_a_question_that_the_stages_do_not_agree_about(tmp_path: Path) -> None:
    """Whoever of them is right; that all were asked, and that is short."""
    long = "l" * 1000
    results = [
        write_items(tmp_path, "sft", item(0, True), item(1, True, long), item(3, True),
                    item(4, False)),
        write_items(tmp_path, "rl", item(0, True), item(1, False, long), item(2, True),
                    item(3, False), item(4, True)),
    ]  # fmt: skip
    lines = conversations(tmp_path / "report", [], results)
    assert "**`question 3`** (t, where `x` is right)" in lines
    assert [row for row in rows_of(lines) if row[0]] == [
        ["sft", "right", "`reply 3`"], ["rl", "wrong", "`reply 3`"],
    ]  # fmt: skip
    (_, *same) = [write_items(tmp_path, s, item(0, False), item(1, False)) for s in ("mid", "sft")]
    assert "**`question 0`** (t, where `x` is right)" in conversations(
        tmp_path / "report", [], same
    )


def test_replies_are_read_from_the_base_directory_alone(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_items(tmp_path, "sft", item(0, True))
    for path in ("../report/sft.jsonl", str(tmp_path / "report" / "sft.jsonl"), "gone.jsonl"):
        row = {"task": "t", "source": "sft", "items": path}
        assert conversations(base / "report", [], [row]) == []
