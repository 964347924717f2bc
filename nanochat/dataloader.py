"""
Rows of tokens for training, in an order that is a pure function.

A source (a text shard, or all conversations of a mixture) is tokenized once into flat ids with
document offsets. A packing plan fits documents into rows of T + 1 tokens: every row starts at the
beginning of a document, the best fitting one comes next. Row i of a run depends on (data, seed, i)
alone. A step takes the next rows, a rank its slice, so resuming is exact at any number of ranks and
the state is one integer, plus a bookmark that saves looking at earlier shards again. Floor 2.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.common import (
    UserError,
    atomic_write,
    fingerprint,
    get_base_dir,
    read_json,
    seed_from,
    write_json,
)
from nanochat.dataset import Keep, iter_texts
from nanochat.packing import Documents, Plan, pack

MIN_SHARD = 8 << 20  # bytes: smaller files are packed together, or each would waste its last row
IGNORE = -1  # target that carries no loss
TOO_LITTLE = "the data does not fill one row of {} tokens; lower --max_seq_len or name more data"


class Source(Protocol):
    """Something that gives Documents shard by shard."""

    fingerprint: str
    crop: bool  # fill rows by cropping a document (text), or pad them (conversations)

    def num_shards(self) -> int: ...
    def load(self, shard: int) -> Documents: ...


# -------------------------------------------------------------------------------------------------
# Sources


class TextSource:
    """Text files, each (small ones together) tokenized once into memory-mapped ids on disk."""

    crop = True

    def __init__(
        self, files: Sequence[Path], tokenizer: Any, keep: Keep = "all", cache: Path | None = None
    ) -> None:
        self.shards, self.tokenizer, self.keep = _group(files), tokenizer, keep
        self.cache = cache or get_base_dir() / "token_cache"
        # What a shard's ids depend on. The names of the files do not matter, their order does.
        self.keys = [
            fingerprint(tokenizer.fingerprint, keep, *map(_file_fingerprint, shard))
            for shard in self.shards
        ]
        self.fingerprint = fingerprint(*self.keys)

    def num_shards(self) -> int:
        return len(self.shards)

    def load(self, shard: int) -> Documents:
        name = self.shards[shard][0].name.split(".")[0]
        folder = self.cache / f"{name}-{self.keys[shard]}"
        return _open_documents(folder) or self._prepare(self.shards[shard], folder)

    def _prepare(self, paths: list[Path], folder: Path) -> Documents:
        """Tokenizes files into a temporary folder, then renames it: all of it, or nothing."""
        bos = self.tokenizer.get_bos_token_id()
        chunks: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for path in paths:
            before = len(lengths)
            for texts in _batched(iter_texts([path], keep=self.keep), 2048):
                ids, offsets = self.tokenizer.encode_batch(texts, prepend=bos)
                chunks.append(ids)
                lengths.append(np.diff(offsets))
            if len(lengths) == before and self.keep == "all":
                raise UserError(f"{path} holds no documents; remove it or name others")
        if not lengths:
            raise UserError(
                f"{paths[0]} has too few documents to give some to training and some to "
                "validation; add text, or name a validation file by --val_data"
            )
        tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            with atomic_write(tmp / "ids.npy") as f:
                np.save(f, np.concatenate(chunks))
            with atomic_write(tmp / "offsets.npy") as f:
                offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
                np.save(f, offsets)
            meta = {"documents": len(offsets) - 1, "tokens": int(offsets[-1])}
            write_json(tmp / "meta.json", meta)
            try:
                tmp.rename(folder)
            except OSError:  # another process was faster (its copy is the same), or a torn one
                if _open_documents(folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    tmp.rename(folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        documents = _open_documents(folder)
        if documents is None:
            raise UserError(f"{folder} was damaged right after it was written; check the disk")
        return documents


class ConversationSource:
    """Conversations of a task or mixture, rendered and masked, held in memory as one shard."""

    crop = False

    def __init__(self, task: Any, tokenizer: Any, row_len: int) -> None:
        # (conversations, 3) int64: its tokens, those in a row (0: dropped), those trained on
        self.counts = np.zeros((len(task), 3), dtype=np.int64)
        ids_list, trained_list, lengths = [], [], []
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        for i in range(len(task)):
            ids, mask = tokenizer.render_conversation(task[i])
            trained = tokenizer.trained_mask(ids, mask)
            self.counts[i, 0] = len(ids)
            ids, trained = ids[:row_len], trained[:row_len]  # its beginning is kept
            if not any(trained):  # nothing to learn from: it would only take room
                continue
            self.counts[i, 1:] = len(ids), sum(trained)
            ids_list.append(np.asarray(ids, dtype=dtype))
            trained_list.append(np.asarray(trained, dtype=np.uint8))
            lengths.append(len(ids))
        if not lengths:
            raise UserError(
                f"none of {len(task)} conversations has a trained token among its first {row_len}; "
                "raise --max_seq_len or use other data"
            )
        self.documents = Documents(
            np.concatenate(ids_list),
            np.cumsum([0, *lengths], dtype=np.int64),
            np.concatenate(trained_list),
        )
        digest = hashlib.sha256(self.documents.ids.tobytes())
        digest.update(self.documents.offsets.tobytes())
        digest.update(self.documents.trained.tobytes())  # type: ignore[union-attr]
        self.fingerprint = digest.hexdigest()[:16]
        self.row_len = row_len

    def account(self) -> str:
        """How many conversations were kept, cut and dropped, and why, in a sentence."""
        whole, shown, _ = self.counts.T
        dropped, long = shown == 0, whole > self.row_len
        said = (
            f"conversations: {(~dropped).sum():,} kept, of which {(~dropped & long).sum():,} "
            f"cut to {self.row_len:,} tokens (--max_seq_len); {dropped.sum():,} dropped"
        )
        why = (
            f", with nothing to learn from ({(dropped & long).sum():,}: the assistant's first "
            f"word comes after the cut; {(dropped & ~long).sum():,}: it says nothing)"
        )
        return said + why if dropped.any() else said

    def num_shards(self) -> int:
        return 1

    def load(self, shard: int) -> Documents:
        return self.documents


def _group(files: Sequence[Path]) -> list[list[Path]]:
    """The files in order, as shards of at least MIN_SHARD bytes (the last one may be smaller)."""
    shards: list[list[Path]] = []
    size = MIN_SHARD
    for path in files:
        if size >= MIN_SHARD:
            shards.append([])
            size = 0
        shards[-1].append(path)
        size += path.stat().st_size
    return shards


def _file_fingerprint(path: Path) -> str:
    """Stands for the content of a file. Of parquet, size, head and tail do: the tail is its table
    of contents. Of text, where one letter may be edited, every byte counts."""
    if not path.name.endswith(".parquet"):
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(1 << 16)
        f.seek(max(0, size - (1 << 16)))
        return fingerprint(str(size), head, f.read())


def _open_documents(folder: Path) -> Documents | None:
    """The tokenized documents in a cache folder; None where it is missing or torn."""
    try:
        meta = read_json(folder / "meta.json")
        ids = np.load(folder / "ids.npy", mmap_mode="r")
        offsets = np.load(folder / "offsets.npy")
        whole = (len(ids), len(offsets) - 1, int(offsets[-1])) == (
            meta["tokens"], meta["documents"], meta["tokens"],
        )  # fmt: skip
    except (OSError, ValueError, EOFError, LookupError, TypeError, UserError):
        return None
    return Documents(ids, offsets) if whole else None


def _batched(items: Iterator[str], n: int) -> Iterator[list[str]]:
    return iter(lambda: list(itertools.islice(items, n)), [])  # until a batch is empty


# -------------------------------------------------------------------------------------------------
# Rows in order


@dataclass(frozen=True)
class Bookmark:
    """Where the shard that was read last begins: its place in the sequence, its first row."""

    sequence: int = 0
    first_row: int = 0


class RowReader:
    """Row i of the run, for any i (cheapest in ascending order)."""

    def __init__(self, source: Source, row_len: int, seed: int, pad_id: int) -> None:
        self.source, self.row_len, self.seed, self.pad_id = source, row_len, seed, pad_id
        self.bookmark = Bookmark()
        self._open: dict[int, tuple[Documents, Plan, np.ndarray]] = {}
        self._ahead = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Any]] | None = None

    def _shard_at(self, sequence: int) -> tuple[int, int]:
        """(epoch, shard) at a place in the endless sequence; each epoch has its own order."""
        n = self.source.num_shards()
        epoch, k = divmod(sequence, n)
        rng = np.random.default_rng(seed_from(self.seed, "shards", epoch))
        return epoch, int(rng.permutation(n)[k])

    def _prepare(self, sequence: int) -> tuple[Documents, Plan, np.ndarray]:
        epoch, shard = self._shard_at(sequence)
        documents = self.source.load(shard)
        rng = np.random.default_rng(seed_from(self.seed, "documents", epoch, shard))
        order = rng.permutation(len(documents.lengths))
        plan = pack(documents.lengths, order, self.row_len, self.source.crop)
        return documents, plan, rng.permutation(len(plan))

    def _shard(self, sequence: int) -> tuple[Documents, Plan, np.ndarray]:
        """The shard at a place, from the thread that prepares one ahead if it has it."""
        if sequence not in self._open:
            if self._next is not None and self._next[0] == sequence:
                opened = self._next[1].result()
            else:
                opened = self._prepare(sequence)
            self._open = {s: o for s, o in self._open.items() if s == sequence - 1}
            self._open[sequence] = opened
            self._next = (sequence + 1, self._ahead.submit(self._prepare, sequence + 1))
        return self._open[sequence]

    def plan(self, sequence: int) -> tuple[Documents, Plan]:
        """The documents of the shard at a place of the sequence, and the rows that they fill."""
        return self._shard(sequence)[:2]

    def rows_per_epoch(self) -> int:
        """Rows of the first epoch. Prepares every shard."""
        return sum(len(self._prepare(k)[1]) for k in range(self.source.num_shards()))

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start .. start + count: (tokens, targets), each (count, T) int64.

        Targets are the tokens one further on, -1 where nothing is learned."""
        tokens = np.full((count, self.row_len), self.pad_id, dtype=np.int64)
        trained = np.zeros((count, self.row_len), dtype=bool)
        for r in range(count):
            self._fill(start + r, tokens[r], trained[r])
        targets = np.where(trained[:, 1:], tokens[:, 1:], IGNORE)
        return tokens[:, :-1], targets

    def _fill(self, row: int, tokens: np.ndarray, trained: np.ndarray) -> None:
        if row < self.bookmark.first_row:
            self.bookmark = Bookmark()
        empty = 0  # shards in succession without a row; twice around covers an epoch of them all
        while True:
            documents, plan, row_order = self._shard(self.bookmark.sequence)
            local = row - self.bookmark.first_row
            if local < len(plan):
                break
            empty = 0 if len(plan) else empty + 1
            if empty >= 2 * self.source.num_shards():
                raise UserError(TOO_LITTLE.format(self.row_len))
            self.bookmark = Bookmark(self.bookmark.sequence + 1, row - local + len(plan))
        r = row_order[local]
        at = 0
        for doc, length in plan.pieces[plan.starts[r] : plan.starts[r + 1]]:
            first = documents.offsets[doc]
            tokens[at : at + length] = documents.ids[first : first + length]
            if documents.trained is None:
                trained[at : at + length] = True
            else:
                trained[at : at + length] = documents.trained[first : first + length]
            at += length


@dataclass
class MicroBatch:
    """One forward and backward pass: (B, T) token ids and targets; optionally loss weights."""

    idx: Tensor
    targets: Tensor
    weights: Tensor | None = None  # (B, T) float32, multiplies each token's loss


class StepLoader:
    """The micro-batches of each optimizer step for this rank, one step prepared ahead."""

    def __init__(
        self,
        reader: RowReader,
        rows_per_step: int,
        device_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.reader, self.rows_per_step, self.device = reader, rows_per_step, device
        self.device_batch_size, self.rank, self.world_size = device_batch_size, rank, world_size
        self._ahead = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[Any]] | None = None
        self._bookmarks: dict[int, Bookmark] = {}  # where the reader stood before a step's rows

    def state(self, step: int) -> dict[str, int]:
        """What lets a resumed run open the right shard at once: the bookmark before `step`."""
        return asdict(self._bookmarks.get(step, Bookmark()))

    def load_state(self, state: dict[str, int]) -> None:
        """Takes what state() gave. It saves time; the rows would be the same without."""
        self.reader.bookmark = Bookmark(**state)

    def _rows(self, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        earlier = {s: mark for s, mark in self._bookmarks.items() if s >= step - 2}
        self._bookmarks = {**earlier, step: self.reader.bookmark}
        first = step * self.rows_per_step
        size, stride = self.device_batch_size, self.device_batch_size * self.world_size
        return [
            self.reader.read(first + at + self.rank * size, size)
            for at in range(0, self.rows_per_step, stride)
        ]

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's share of optimizer step `step`."""
        if self._next is not None and self._next[0] == step:
            rows = self._next[1].result()
        else:
            if self._next is not None:
                self._next[1].result()  # the reader serves one caller at a time
            rows = self._rows(step)
        self._next = (step + 1, self._ahead.submit(self._rows, step + 1))
        return [MicroBatch(self._to_device(x), self._to_device(y)) for x, y in rows]

    def _to_device(self, array: np.ndarray) -> Tensor:
        # A fresh tensor each time: no buffer that a queued copy could still be reading.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


def eval_batches(
    reader: RowReader, num_tokens: int, batch_size: int, rank: int, world_size: int, device: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `num_tokens` of validation, (B, T) at a time.

    Which rows are read depends neither on the batch size nor on the number of ranks."""
    num_rows = min(max(1, num_tokens // (reader.row_len - 1)), reader.rows_per_epoch())
    if num_rows == 0:
        raise UserError(f"validation: {TOO_LITTLE.format(reader.row_len)} by --val_data")
    mine = range(rank, num_rows, world_size)
    for at in range(0, len(mine), batch_size):
        rows = [reader.read(i, 1) for i in mine[at : at + batch_size]]
        x, y = (np.concatenate(parts) for parts in zip(*rows))
        yield torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
