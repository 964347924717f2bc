"""
What mid_train and chat_sft train on by default, to the row: a change shows here, and in a review.
"""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.tasks import mixture as mixtures
from nanochat.tasks.common import REGISTRY, Task, get_task
from nanochat.tasks.mixture import Ingredient, build_mixture, parse_mixture
from scripts import chat_sft, mid_train

# Rows of the published training sets
SIZES = {"smoltalk": 460_341, "mmlu-aux": 99_842, "gsm8k": 7_473, "arc-easy": 2_251,
         "arc-challenge": 1_119, "identity": 1_000}  # fmt: skip


class Counted(Task):
    """So many rows, without the rows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def num_rows(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            mid_train.MIXTURE,
            [
                Ingredient("smoltalk"), Ingredient("mmlu-aux"), Ingredient("gsm8k"),
                Ingredient("spelling", 200_000), Ingredient("spellingbee", 80_000),
                Ingredient("identity", epochs=2),
            ],
        ),
        (
            chat_sft.MIXTURE,
            [
                Ingredient("arc-easy"), Ingredient("arc-challenge"), Ingredient("gsm8k"),
                Ingredient("smoltalk", 10_000), Ingredient("spelling", 300),
                Ingredient("spellingbee", 300), Ingredient("identity"),
            ],
        ),
        (
            mid_train.VAL_MIXTURE,
            [Ingredient("smoltalk", 5_000), Ingredient("mmlu", 5_000), Ingredient("gsm8k", 400)],
        ),
        (chat_sft.VAL_MIXTURE, [Ingredient("smoltalk", 2_000)]),
    ],
    ids=["mid", "sft", "mid validation", "sft validation"],
)  # fmt: skip
def test_default_mixtures(spec: str, expected: list[Ingredient]) -> None:
    assert parse_mixture(spec) == expected


@pytest.mark.parametrize(
    ("spec", "rows", "total"),
    [
        (
            mid_train.MIXTURE,
            {"smoltalk": 460_341, "mmlu-aux": 99_842, "gsm8k": 7_473, "spelling": 200_000,
             "spellingbee": 80_000, "identity": 2_000},
            849_656,
        ),
        (
            chat_sft.MIXTURE,
            {"arc-easy": 2_251, "arc-challenge": 1_119, "gsm8k": 7_473, "smoltalk": 10_000,
             "spelling": 300, "spellingbee": 300, "identity": 1_000},
            22_443,
        ),
    ],
    ids=["mid", "sft"],
)  # fmt: skip
def test_how_many_conversations_that_is(
    spec: str, rows: dict[str, int], total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the published sets in full."""

    def counted(name: str, split: str, size: int | None = None) -> Task:
        assert split in REGISTRY[name].splits
        return Counted(size if size is not None else SIZES[name])

    monkeypatch.setattr(mixtures, "get_task", counted)
    mixture = build_mixture(spec)
    assert {row.name: row.rows * row.epochs for row in mixture.rows} == rows
    assert len(mixture) == total


@pytest.mark.parametrize("module", [mid_train, chat_sft])
def test_the_tasks_to_be_measured_by_have_answers(module: Any) -> None:
    for name in module.CHAT_TASKS.split("|"):
        assert "test" in REGISTRY[name.strip()].splits and name.strip() != "smoltalk"


def test_the_default_identity_needs_no_file() -> None:
    assert len(get_task("identity", "train")) == SIZES["identity"]
