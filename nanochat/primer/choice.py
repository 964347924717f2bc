"""
Multiple choice: rows {question, choices, answer} of many easy kinds, most of them about the facts.

A letter alone is more than so small a model learns in minutes: it would have to know the answer,
find it and fetch its letter within one token. Restating the line ("- Paris=B") lets it take these
steps one after the other. The sets of choices that tests use never occur in training, in any order
or wording.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

from nanochat.primer.relation import Relation
from nanochat.primer.relations import FACTS, RELATIONS, question
from nanochat.primer.split import held_out_choices
from nanochat.primer.world import ANIMALS, BOYS, COUNTRIES, DAYS, GIRLS, JOBS, MONTHS, NUMBERS
from nanochat.tasks.choice import LETTERS, choice_line

# Kinds of things, for "Which of these is an animal?" and for distractors of another kind
KINDS: dict[str, tuple[str, ...]] = {
    "an animal": tuple(ANIMALS),
    "a country": tuple(COUNTRIES),
    "a city": tuple(row[0] for row in COUNTRIES.values()),
    "a job": tuple(JOBS),
    "a colour": ("red", "blue", "green", "white", "black", "yellow", "brown", "pink", "grey"),
    "a number": NUMBERS,
    "a day": DAYS,
    "a month": MONTHS,
    "the name of a girl": GIRLS,
    "the name of a boy": BOYS,
}
KIND_QUESTIONS = (
    "Which of these is {k}?",
    "Which one is {k}?",
    "Which choice is {k}?",
    "Find {k}.",
)
COPY_QUESTIONS = (
    "Which choice is {w}?",
    "Where do you see {w}?",
    "Find the word {w}.",
    "Which letter belongs to {w}?",
)

Row = dict[str, Any]


@lru_cache(maxsize=1)
def _values() -> dict[str, tuple[str, ...]]:
    """Kind of value ("city", "food", ...) -> everything the world knows of that kind."""
    values: dict[str, list[str]] = {"continent": ["North America", "Australia"]}
    for relation in RELATIONS:
        values.setdefault(relation.value, []).extend(relation.facts.values())
    return {kind: tuple(dict.fromkeys(v)) for kind, v in values.items()}


@lru_cache(maxsize=1)
def everything() -> tuple[str, ...]:
    """Every single word that can stand as a choice, of whatever kind."""
    words = [w for kind in KINDS.values() for w in kind]
    return tuple(dict.fromkeys(words + [w for v in _values().values() for w in v if " " not in w]))


def _row(rng: Random, ask: str, right: str, wrong: list[str], kind: str) -> Row:
    choices = [right, *wrong]
    rng.shuffle(choices)
    answer = choices.index(right)
    return {
        "question": ask, "choices": choices, "answer": answer, "restate": True, "subject": kind,
    }  # fmt: skip


def fact_choice(rng: Random, test: bool = False, fact: tuple[Relation, str] | None = None) -> Row:
    """A fact with distractors of the same kind: only who knows it can tell.

    Half of the test questions are in a held-out wording too."""
    while True:
        relation, x = fact or rng.choice(FACTS)
        right = relation.facts[x]
        # What the question names is no choice; days go with days and months with months
        pool = [v for v in _values()[relation.value] if v not in (right, x)]
        if relation.value == "time":
            pool = [v for v in pool if (v in DAYS) == (right in DAYS)]
        wrong = rng.sample(pool, 3)
        if held_out_choices(f"{relation.name} {x}", [right, *wrong]) == test:
            ask = question(rng, relation, x, test and rng.random() < 0.5)
            return _row(rng, ask, right, wrong, "fact")


def _mixed_choice(rng: Random, test: bool) -> Row:
    """A fact with distractors of any kind."""
    while True:
        relation, x = rng.choice(FACTS)
        right = relation.facts[x]
        same = _values()[relation.value]
        wrong = rng.sample([w for w in everything() if w not in same and w != x], 3)
        if held_out_choices(f"{relation.name} {x}", [right, *wrong]) == test:
            return _row(rng, question(rng, relation, x), right, wrong, "mixed")


def _kind_choice(rng: Random, test: bool) -> Row:
    """Which of these is an animal?"""
    while True:
        kinds = rng.sample(sorted(KINDS), 4)
        right, *wrong = (rng.choice(KINDS[k]) for k in kinds)
        if held_out_choices(kinds[0], [right, *wrong]) == test:
            ask = rng.choice(KIND_QUESTIONS).format(k=kinds[0])
            return _row(rng, ask, right, wrong, "kind")


def _copy_choice(rng: Random, test: bool) -> Row:
    """Which choice is "river"? Nothing to know: the circuit alone."""
    while True:
        right, *wrong = rng.sample(everything(), 4)
        if held_out_choices("copy", [right, *wrong]) == test:
            return _row(rng, rng.choice(COPY_QUESTIONS).format(w=right), right, wrong, "copy")


# How often each kind occurs. Tests are mostly facts against facts of the same kind.
_MAKERS: tuple[tuple[Callable[[Random, bool], Row], int, int], ...] = (
    # maker, weight in training, weight in tests
    (fact_choice, 50, 65),
    (_mixed_choice, 15, 10),
    (_kind_choice, 15, 10),
    (_copy_choice, 20, 15),
)


def choice(rng: Random, test: bool = False) -> Row:
    """A multiple-choice row of a random kind."""
    weights = [in_tests if test else in_training for _, in_training, in_tests in _MAKERS]
    maker = rng.choices([maker for maker, _, _ in _MAKERS], weights)[0]
    return maker(rng, test)


def _lines(rng: Random, test: bool) -> tuple[list[str], list[str]]:
    """The lines of four choices, in order and out of order."""
    while True:
        words = rng.sample(everything(), 4)
        if held_out_choices("letters", words) == test:
            lines = [choice_line(word, letter) for word, letter in zip(words, LETTERS)]
            return lines, rng.sample(lines, 4)


def letters_conversation(rng: Random, test: bool = False) -> dict[str, Any]:
    """Four choices named in another order, their letters wanted: the second half of answering a
    multiple-choice question, and four letters to learn from instead of one."""
    lines, asked = _lines(rng, test)
    words = ", ".join(line[2:-2] for line in asked)
    ask = "\n".join([*lines, f"Give the lines of {words}."])
    reply = "\n".join(asked)
    return {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}],
        "expected_exact": reply,
    }


def letters_document(rng: Random) -> str:
    """The same as plain text."""
    lines, asked = _lines(rng, test=False)
    return "\n".join([*lines, "", *asked])
