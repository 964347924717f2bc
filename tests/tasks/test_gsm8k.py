"""The answer after ####, and calculator annotations as tool calls."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from nanochat.common import UserError
from nanochat.execution import calculate
from nanochat.tasks.common import Rows, read_rows
from nanochat.tasks.gsm8k import GSM8K, extract_answer, extract_lenient, solution_parts
from tests.tasks.answers_for_tests import FRAMES, LENIENT, NUMBERS, STRICT, Case
from tests.tasks.data_for_tests import shared


@pytest.mark.parametrize(("kind", "cases"), STRICT, ids=[kind for kind, _ in STRICT])
def test_spellings_of_an_answer(kind: str, cases: tuple[Case, ...]) -> None:
    read = [(text, extract_answer(text)) for text, _ in cases]
    assert [case for case in read if case not in cases] == []


def test_any_number_in_any_frame() -> None:
    for frame in FRAMES:
        for number, value in NUMBERS:
            assert extract_answer(frame.format(number)) == value, frame.format(number)


def test_there_are_hundreds_of_them() -> None:
    assert sum(len(cases) for _, cases in STRICT) > 200 and len(NUMBERS) * len(FRAMES) > 300


def test_an_answer_in_a_reply_that_does_not_know_the_format() -> None:
    read = [(text, extract_lenient(text)) for text, _ in LENIENT]
    assert [case for case in read if case not in LENIENT] == []
    for _, cases in STRICT:  # where the format is kept, nothing else counts
        for text, value in cases:
            if value is not None:
                assert extract_lenient(text) == value


@pytest.mark.parametrize(
    "babble",
    ["#### " + "1,23" * 5000, "$ " * 9000, "*" * 20000, "- " * 9000, "####" * 5000, "1 " * 9000,
     "#### " + "\\boxed{" * 4000, "answer is " * 2000, "1" * 20000, "1," * 9000],
)  # fmt: skip
def test_babble_takes_no_time(babble: str) -> None:
    """Nothing in the patterns goes back and forth over a long reply: that would take minutes."""
    began = time.process_time()
    extract_answer(babble)
    extract_lenient(babble)
    assert time.process_time() - began < 3


def test_annotations_become_tool_calls() -> None:
    parts = solution_parts("48/2 = <<48/2=24>>24 clips.\n#### 24")
    assert parts == [
        {"type": "text", "text": "48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 clips.\n#### 24"},
    ]
    assert solution_parts("<<1+1=2>>") == [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]


def test_evaluate() -> None:
    task = GSM8K(Rows([("file", [{"question": "q", "answer": "a\n#### 1,000"}], None)]))
    conversation = task[0]
    assert task.evaluate(conversation, "So #### $1000.00.")
    assert not task.evaluate(conversation, "1000")
    assert not task.evaluate(conversation, "#### 100")
    assert (task.reward(conversation, "#### 1000"), task.reward(conversation, "")) == (1.0, 0.0)


@pytest.mark.parametrize("answer", ["no number", 5, None, ""])
def test_bad_rows_are_named(answer: object) -> None:
    with pytest.raises(UserError, match="file: row 0"):
        GSM8K(Rows([("file", [{"question": "q", "answer": answer}], None)]))[0]


def test_every_real_row() -> None:
    """The calculator gives what the data set's annotations say, but for its own roundings."""
    task = GSM8K(read_rows([shared("gsm8k") / "train.jsonl"]))
    calls = agree = 0
    for i in range(0, len(task), 10):
        conversation = task[i]
        parts = conversation["messages"][1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        assert "<<" not in text
        assert task.evaluate(conversation, text)
        for call, output in pairwise(parts):
            if call["type"] == "python":
                calls += 1
                agree += calculate(call["text"]) == calculate(output["text"])
    assert calls > 2000
    assert agree / calls > 0.97
