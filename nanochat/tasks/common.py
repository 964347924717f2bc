"""
What every task has in common: the Task class, the registry, and where rows come from.

A task is a list of conversations that knows a right reply from a wrong one. Adding one is a file
with a class and a `load(split, ...)` function, and a row in REGISTRY.
"""

from __future__ import annotations

import bisect
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanochat.common import UserError, get_base_dir, read_jsonl
from nanochat.conversation import Conversation, check_conversation
from nanochat.dataset import ROW_SUFFIXES

Row = dict[str, Any]

# -----------------------------------------------------------------------------
# The class


class Task:
    """Conversations with right answers; start, stop and step take a part of them, as in a slice.

    Subclasses give `num_rows()`, `conversation(i)` and, if there are right answers, `evaluate`."""

    name = "task"
    eval_type: Literal["generative", "categorical"] = "generative"
    """generative: the model writes a reply. categorical: it picks one of the row's "letters"."""

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(f"{self.name}: no rows are selected by {start=}, {stop=}, {step=}")
        self.start, self.stop, self.step = start, stop, step

    def num_rows(self) -> int:
        """Rows before slicing."""
        raise NotImplementedError

    def conversation(self, i: int) -> Conversation:
        """Row i, before slicing, as a conversation that passes check_conversation."""
        raise NotImplementedError

    def _selected(self) -> range:
        total = self.num_rows()
        return range(self.start, total if self.stop is None else min(self.stop, total), self.step)

    def __len__(self) -> int:
        return len(self._selected())

    def __getitem__(self, index: int) -> Conversation:
        return self.conversation(
            self._selected()[index]
        )  # IndexError past the end: iteration stops

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        """Whether `reply`, the text that the assistant wrote, is right."""
        raise UserError(f"{self.name} is there to train on: it has no right answers to evaluate by")

    def reward(self, conversation: Conversation, reply: str) -> float:
        """What reinforcement learning gets for `reply`: 1 if right, else 0."""
        return float(self.evaluate(conversation, reply))


class RowTask(Task):
    """A task over rows of files or of a hub data set; `convert` makes a row a conversation."""

    def __init__(self, rows: Rows, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        super().__init__(start, stop, step)
        self.rows = rows

    def num_rows(self) -> int:
        return len(self.rows)

    def convert(self, row: Row, where: str) -> Conversation:
        """The row as a conversation. Raises UserError naming `where` if it does not fit."""
        raise NotImplementedError

    def conversation(self, i: int) -> Conversation:
        where = self.rows.where(i)
        return check_conversation(self.convert(self.rows[i], where), where)


def field(row: Row, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """row[key], which must be of `kind`; the UserError says what was found instead."""
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        names = "/".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        shown = repr(value) if key in row else f"only {', '.join(row) or 'nothing'}"
        raise UserError(f'{where}: expected "{key}" to be {names}, found {shown[:120]}')
    return value


# -----------------------------------------------------------------------------
# Rows


class Rows:
    """Rows of one or several files, in order, each knowing where it stands."""

    def __init__(self, parts: Sequence[tuple[str, Sequence[Row], Sequence[int] | None]]) -> None:
        """parts: (file or data set, its rows, their line numbers if it has lines)."""
        self._parts = [part for part in parts if len(part[1])]
        self._ends: list[int] = []  # running totals, to find the part that holds a row
        for _, rows, _ in self._parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = bisect.bisect_right(self._ends, i)
        return part, i - (self._ends[part - 1] if part else 0)

    def __getitem__(self, i: int) -> Row:
        part, offset = self._find(i)
        row = self._parts[part][1][offset]
        if not isinstance(row, dict):
            raise UserError(f"{self.where(i)}: expected an object, found {repr(row)[:80]}")
        return row

    def where(self, i: int) -> str:
        """ "file.jsonl:12", or "file.parquet: row 12" (rows count from 0, lines from 1)."""
        part, offset = self._find(i)
        label, _, lines = self._parts[part]
        return f"{label}:{lines[offset]}" if lines is not None else f"{label}: row {offset}"


class ChosenRows(Rows):
    """Some of the rows of another."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Row:
        return self._rows[self._numbers[i]]

    def where(self, i: int) -> str:
        return self._rows.where(self._numbers[i])


class _TableRows(Sequence[Row]):
    """An Arrow table as a sequence of dicts, each made when it is asked for."""

    def __init__(self, table: Any) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, i: Any) -> Any:
        return self.table.slice(i, 1).to_pylist()[0]


def read_rows(paths: Sequence[Path]) -> Rows:
    """The rows of parquet and jsonl files. Raises UserError with the path of a broken one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts: list[tuple[str, Sequence[Row], Sequence[int] | None]] = []
    for path in paths:
        if not path.name.endswith(ROW_SUFFIXES):
            kinds = ", ".join(ROW_SUFFIXES)
            raise UserError(f"{path}: conversations and problems are read from {kinds} files")
        if path.suffix == ".parquet":
            try:
                # partitioning=None: a folder name like "split=test" must not become a column
                parts.append((str(path), _TableRows(pq.read_table(path, partitioning=None)), None))
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"{path} is not a readable parquet file: {e}") from e
        else:
            numbered = list(read_jsonl(path))
            parts.append((str(path), [row for _, row in numbered], [n for n, _ in numbered]))
    rows = Rows(parts)
    if not len(rows):
        raise UserError(f"{', '.join(map(str, paths))}: no rows in there")
    return rows


_SHARD = re.compile(r"-(\d+)-of-(\d+)\.(?:parquet|jsonl|jsonl\.gz|jsonl\.zst)$")


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder: <split>.parquet, <split>.jsonl (or .jsonl.gz, .jsonl.zst),
    or all of its shards named <split>-00000-of-00004.parquet. Empty if there are none; UserError if
    shards are missing."""
    for suffix in ROW_SUFFIXES:
        whole = folder / f"{split}{suffix}"
        if whole.is_file():
            return [whole]
        shards = sorted(folder.glob(f"{split}-*-of-*{suffix}"))
        shards = [p for p in shards if _SHARD.fullmatch(p.name.removeprefix(split))]
        if shards:
            match = _SHARD.search(shards[0].name)
            wanted = int(match[2]) if match else 0
            if len(shards) != wanted:
                found = ", ".join(p.name for p in shards)
                raise UserError(f"{folder}: {wanted} shards of {split} expected, found {found}")
            return shards
    return []


class Hub(NamedTuple):
    """A data set on the hub: datasets.load_dataset(path, config, split=split)."""

    path: str
    config: str | None
    split: str


def load_rows(folders: Sequence[str], split: str, hub: Hub, file_names: Sequence[str] = ()) -> Rows:
    """Rows from the first of `folders` under task_data/ that has the split, else from the hub.

    `file_names`: what the split's files may be called, if not by the split's name. Raises UserError
    that names both places when neither has it."""
    base = get_base_dir() / "task_data"
    for folder in folders:
        for file_name in file_names or (split,):
            files = split_files(base / folder, file_name)
            if files:
                return read_rows(files)
    try:
        return Rows([(f"{hub.path} {hub.split}", _from_hub(hub), None)])
    except ModuleNotFoundError:
        raise  # of the library itself
    except Exception as e:  # the hub library raises dozens of kinds, all meaning: not to be had
        config = f" ({hub.config})" if hub.config else ""
        raise UserError(
            f"split {split!r} is neither in {base / folders[0]}/ (as {split}.parquet or "
            f"{split}.jsonl) nor to be had from the hub as {hub.path}{config}: "
            f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}. Put the file there, "
            "or go online"
        ) from e


def _from_hub(hub: Hub) -> Sequence[Row]:
    from datasets import load_dataset

    return load_dataset(hub.path, hub.config, split=hub.split)


# -----------------------------------------------------------------------------
# The registry


class Entry(NamedTuple):
    """A known task: its module here, its splits, and arguments of the module's load()."""

    module: str
    splits: tuple[str, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 -- never changed


REGISTRY: dict[str, Entry] = {
    "smoltalk": Entry("smoltalk", ("train", "test")),
    "mmlu": Entry("mmlu", ("test", "dev", "validation")),
    "mmlu-aux": Entry("mmlu", ("train",), {"auxiliary": True}),
    "arc-easy": Entry("arc", ("train", "validation", "test"), {"subset": "ARC-Easy"}),
    "arc-challenge": Entry("arc", ("train", "validation", "test"), {"subset": "ARC-Challenge"}),
    "gsm8k": Entry("gsm8k", ("train", "test")),
    "humaneval": Entry("humaneval", ("test",)),
    "spelling": Entry("spellingbee", ("train", "test"), {"simple": True}),
    "spellingbee": Entry("spellingbee", ("train", "test")),
    "identity": Entry("identity", ("train", "test")),
}


def get_task(name: str, split: str = "train", **kwargs: Any) -> Task:
    """The task of that name: one of REGISTRY (in any case), or a folder or file of own rows.

    kwargs: start, stop, step; `size` for the generated spelling tasks. Raises UserError for a split
    that the task does not have, before anything is loaded."""
    entry = REGISTRY.get(name.lower())
    if entry is None:
        load: Callable[..., Task] = importlib.import_module("nanochat.tasks.custom").load
        return load(name, split, **kwargs)
    if split not in entry.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(entry.splits)}")
    load = importlib.import_module(f"nanochat.tasks.{entry.module}").load
    task = load(split, **entry.kwargs, **kwargs)
    task.name = name.lower()
    return task
