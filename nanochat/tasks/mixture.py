"""
A training set out of several tasks, written on one line.

    smoltalk | mmlu-aux | gsm8k*2 | spelling@2000

`name@rows` takes at most that many rows, `name*epochs` takes them that often; a name is a known
task, or a file or folder of own rows (custom.py). All conversations are shuffled into one fixed
order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nanochat.common import UserError, seed_from, warn0
from nanochat.conversation import Conversation
from nanochat.tasks.common import Task, get_task


class Ingredient(NamedTuple):
    """One task of a mixture. rows: None for all of them."""

    name: str
    rows: int | None = None
    epochs: int = 1


_INGREDIENT = re.compile(r"(?P<name>[^|]+?)(?:@(?P<rows>[\d_,]+))?(?:\*(?P<epochs>\d+))?")


def parse_mixture(spec: str) -> list[Ingredient]:
    """Reads "name[@rows][*epochs] | ...". Raises UserError with the piece that does not fit."""
    ingredients = []
    for piece in spec.split("|"):
        match = _INGREDIENT.fullmatch(piece.strip())
        name = match["name"].strip() if match else ""
        if not match or not name or "*" in name or name.startswith("@"):
            raise UserError(f"mixture {spec!r}: {piece!r} is not of the form name[@rows][*epochs]")
        rows = int(re.sub("[_,]", "", match["rows"]) or 0) if match["rows"] else None
        epochs = int(match["epochs"] or 1)
        if rows == 0 or epochs == 0:
            raise UserError(f"mixture {spec!r}: {piece.strip()!r} takes nothing; leave it out")
        ingredients.append(Ingredient(name, rows, epochs))
    return ingredients


class MixtureRow(NamedTuple):
    """What a task contributes: rows an epoch, epochs, share of all conversations (0 to 1)."""

    name: str
    rows: int
    epochs: int
    share: float


class TaskMixture(Task):
    """Several tasks as one, in an order that depends on their sizes and the seed alone.

    Which rows `@rows` takes is drawn too: published sets are often sorted by subject."""

    name = "mixture"

    def __init__(
        self, tasks: Sequence[Task], ingredients: Sequence[Ingredient], seed: int = 42
    ) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.rows: list[MixtureRow] = []
        owners, numbers = [], []  # for every conversation: which task, and which of its rows
        for owner, (task, ingredient) in enumerate(zip(tasks, ingredients, strict=True)):
            taken = self._take(task, ingredient, seed)
            owners.append(np.full(len(taken) * ingredient.epochs, owner, dtype=np.int32))
            numbers.append(np.tile(taken, ingredient.epochs))
            self.rows.append(MixtureRow(ingredient.name, len(taken), ingredient.epochs, 0.0))
        order = _permutation(sum(map(len, numbers)), "mixture", seed)
        # (conversations,): the task that each one is of, as an index into `rows`
        self.owners = np.concatenate(owners)[order]
        self._numbers = np.concatenate(numbers)[order]
        self.rows = [r._replace(share=r.rows * r.epochs / len(order)) for r in self.rows]

    @staticmethod
    def _take(task: Task, ingredient: Ingredient, seed: int) -> np.ndarray:
        """The rows that are used, (rows,) int64."""
        if ingredient.rows is None:
            return np.arange(len(task))
        if ingredient.rows > len(task):
            warn0(
                f"{ingredient.name}@{ingredient.rows}: there are only {len(task)} rows; all taken"
            )
        return np.sort(_permutation(len(task), ingredient.name, seed)[: ingredient.rows])

    def num_rows(self) -> int:
        return len(self._numbers)

    def conversation(self, i: int) -> Conversation:
        return self.tasks[self.owners[i]][int(self._numbers[i])]

    def shares(self, counts: np.ndarray) -> list[dict[str, Any]]:
        """What each task gives: rows and epochs of them, its tokens in the packed rows, those that
        are trained on. `counts` (conversations, 3): as describe() takes them."""
        tokens = [counts[self.owners == i].sum(axis=0) for i in range(len(self.rows))]
        return [
            {"name": r.name, "rows": r.rows, "epochs": r.epochs, "tokens": int(t[1]),
             "trained": int(t[2])}
            for r, t in zip(self.rows, tokens)
        ]  # fmt: skip

    def describe(self, counts: np.ndarray | None = None) -> str:
        """A table of the tasks, their rows, epochs and share of the conversations.

        With `counts` (conversations, 3), the tokens of each, those in its row, and those trained
        on, also their share of the tokens, and how many are cut or dropped."""
        table = [["task", "rows", "epochs", "share"]]
        table += [[r.name, f"{r.rows:,}", str(r.epochs), f"{r.share:.1%}"] for r in self.rows]
        table.append(["all", f"{len(self):,}", "", ""])
        if counts is not None:
            table[0] += ["tokens", "share", "trained on", "cut", "dropped"]
            for i, line in enumerate(table[1:]):
                # The last line is of all tasks
                mine = counts if i == len(self.rows) else counts[self.owners == i]
                tokens = mine[:, 1].sum()
                dropped = mine[:, 1] == 0
                cut = (mine[:, 1] < mine[:, 0]) & ~dropped
                line += [
                    f"{tokens:,}", f"{tokens / max(1, counts[:, 1].sum()):.1%}",
                    f"{mine[:, 2].sum() / max(1, tokens):.0%}", f"{cut.sum():,}",
                    f"{dropped.sum():,}",
                ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*table)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if at == 0 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in table
        )


def _permutation(size: int, purpose: str, seed: int) -> np.ndarray:
    """A fixed order of range(size). RandomState's streams are frozen: the same in every numpy."""
    return np.random.RandomState(seed_from(purpose, seed) % 2**32).permutation(size)


def build_mixture(
    spec: str, split: str = "train", seed: int = 42, own: Task | None = None
) -> TaskMixture:
    """Loads the tasks of a spec (it may be empty beside own rows), and mixes them with `own`."""
    ingredients = parse_mixture(spec) if spec.strip() or own is None else []
    tasks: list[Task] = []
    for ingredient in ingredients:
        # The generated tasks are as long as one wishes
        generated = ingredient.name.lower() in ("spelling", "spellingbee") and ingredient.rows
        sizing = {"size": ingredient.rows} if generated else {}
        tasks.append(get_task(ingredient.name, split, **sizing))
    if own is not None:
        tasks.append(own)
        ingredients.append(Ingredient(own.name))
    return TaskMixture(tasks, ingredients, seed)
