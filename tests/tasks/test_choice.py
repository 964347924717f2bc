"""How a multiple-choice question is put and judged."""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from nanochat.tasks.choice import MultipleChoice, RestatedChoice, render_choice
from nanochat.tasks.common import Row, Rows


def task(*rows: Row) -> MultipleChoice:
    return MultipleChoice(Rows([("file", list(rows), None)]))


def test_prompt_letter_by_letter() -> None:
    prompt = render_choice("What barks?", ["a cat", "a dog"])
    assert prompt == "What barks?\n- a cat=A\n- a dog=B\nAnswer with the letter only."


@pytest.mark.parametrize("answer", [1, "B", "b", " B "])
def test_conversation(answer: object) -> None:
    mc = task({"question": "What barks?", "choices": ["a cat", "a dog"], "answer": answer})
    conversation = mc[0]
    assert mc.eval_type == "categorical"
    assert conversation["messages"][1] == {"role": "assistant", "content": "B"}
    assert conversation["letters"] == ["A", "B"]
    assert mc.evaluate(conversation, "B")
    assert mc.evaluate(conversation, " B\n")
    assert not mc.evaluate(conversation, "A")
    assert mc.reward(conversation, "B") == 1.0
    assert mc.reward(conversation, "") == 0.0


def test_restated_choice_wants_the_whole_line() -> None:
    row = {"question": "What barks?", "choices": ["a cat", "a dog"], "answer": 1, "restate": True}
    mc = RestatedChoice(Rows([("file", [row], None)]))
    conversation = mc[0]
    assert mc.eval_type == "generative"
    ask, reply = (m["content"] for m in conversation["messages"])
    assert ask == "What barks?\n- a cat=A\n- a dog=B\nAnswer with the line."
    assert reply == conversation["expected"] == "- a dog=B"
    assert conversation["letters"] == ["A", "B"]  # one of so many lines: the chance level
    assert mc.evaluate(conversation, "- a dog=B")
    for wrong in ("B", "- a dog=A", "- a cat=B", "- a dog=B.", ""):
        assert not mc.evaluate(conversation, wrong)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "x", "choices": ["a", "b"], "answer": 2},
        {"question": "x", "choices": ["a", "b"], "answer": -1},
        {"question": "x", "choices": ["a", "b"], "answer": True},
        {"question": "x", "choices": ["a", "b"], "answer": "C"},
        {"question": "x", "choices": ["a", "b"], "answer": None},
        {"question": "x", "choices": ["a"], "answer": 0},
        {"question": "x", "choices": ["a", 2], "answer": 0},
        {"question": "x", "choices": "ab", "answer": 0},
        {"choices": ["a", "b"], "answer": 0},
    ],
)
def test_bad_rows_are_named(row: Row) -> None:
    with pytest.raises(UserError, match="file: row 0"):
        task(row)[0]
