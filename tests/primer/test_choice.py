"""Multiple choice: one right answer, four different choices, and sets on one side of the split."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from nanochat.conversation import check_conversation
from nanochat.primer.choice import (
    KINDS,
    choice,
    fact_choice,
    letters_conversation,
    letters_document,
)
from nanochat.primer.relations import FACTS
from nanochat.primer.split import held_out_choices


def rows(test: bool, count: int = 1500) -> list[dict[str, Any]]:
    rng = Random(3)
    return [choice(rng, test) for _ in range(count)]


@pytest.mark.parametrize("test", [False, True])
def test_four_different_choices_and_a_valid_answer(test: bool) -> None:
    for row in rows(test):
        assert len(set(row["choices"])) == 4
        assert 0 <= row["answer"] < 4


def test_answers_are_spread_over_the_letters() -> None:
    counts = Counter(row["answer"] for row in rows(False))
    assert all(0.2 < counts[i] / 1500 < 0.3 for i in range(4))


@pytest.mark.parametrize("test", [False, True])
def test_the_marked_answer_is_the_right_one(test: bool) -> None:
    seen = Counter()
    for row in rows(test):
        right = row["choices"][row["answer"]]
        others = [c for c in row["choices"] if c != right]
        ask = row["question"]
        seen[row["subject"]] += 1
        if row["subject"] == "copy":
            assert right in ask and not any(f" {c}" in ask for c in others)
        elif row["subject"] == "kind":
            kind = next(k for k in KINDS if ask.endswith((f"{k}?", f"{k}.")))
            assert [c for c in row["choices"] if c in KINDS[kind]] == [right]
    assert len(seen) == 4


@pytest.mark.parametrize("test", [False, True])
def test_every_set_is_on_its_side_of_the_split(test: bool) -> None:
    for row in rows(test):
        if row["subject"] == "copy":
            assert held_out_choices("copy", row["choices"]) == test


@pytest.mark.parametrize("test", [False, True])
def test_letters_are_restated_in_another_order(test: bool) -> None:
    rng = Random(5)
    for _ in range(200):
        row = check_conversation(letters_conversation(rng, test), "row")
        ask, reply = (m["content"] for m in row["messages"])
        *lines, wanted = ask.split("\n")
        words = [line.removeprefix("- ").split("=")[0] for line in lines]
        assert [line.split("=")[1] for line in lines] == list("ABCD")
        assert sorted(reply.split("\n")) == sorted(lines) and row["expected_exact"] == reply
        asked = [line.removeprefix("- ").split("=")[0] for line in reply.split("\n")]
        assert wanted == f"Give the lines of {', '.join(asked)}."
        assert held_out_choices("letters", words) == test
    document = letters_document(rng).split("\n")
    assert document[4] == "" and sorted(document[:4]) == sorted(document[5:])


def test_only_one_choice_is_true_for_a_fact() -> None:
    rng = Random(0)
    for relation, x in FACTS:
        row = fact_choice(rng, fact=(relation, x))
        assert row["choices"][row["answer"]] == relation.facts[x]
        assert row["choices"].count(relation.facts[x]) == 1


def test_no_set_of_choices_of_a_fact_is_in_both_splits() -> None:
    rng = Random(0)
    for fact in FACTS[::7]:
        sets = [
            {frozenset(fact_choice(rng, test, fact)["choices"]) for _ in range(30)}
            for test in (False, True)
        ]
        assert not sets[0] & sets[1]
