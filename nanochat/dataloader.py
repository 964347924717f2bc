"""
Rows of tokens for training, in an order that is a pure function.

A source gives tokenized documents shard by shard: text (text_source.py), or all conversations of a
mixture (conversation_source.py). A packing plan (packing.py) makes rows of T + 1 tokens of them,
each beginning with bos. Row i of a run depends on (data, seed, i) alone. A step takes the next
rows, a rank its slice, so resuming is exact at any number of ranks and the state is one integer,
plus a bookmark that saves looking at earlier shards again. Floor 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError, print0, seed_from
from nanochat.packing import Documents, Plan, pack, show_rows
from nanochat.progress import track
from nanochat.threads import in_thread

IGNORE = -1  # target that carries no loss
TOO_LITTLE = "the data does not fill one row of {} tokens; lower --max_seq_len or name more data"


class Source(Protocol):
    """Something that gives Documents shard by shard. Most are at hand at once; text is not."""

    fingerprint: str
    cut: bool  # documents may be cut to fill rows (text), or stay whole in padded rows

    def num_shards(self) -> int: ...

    def load(self, shard: int) -> Documents: ...

    def tokens(self, shard: int) -> int:
        """How many tokens a shard has, or about how many."""
        return 0

    def check_disk(self, shards: Sequence[int]) -> None:
        """UserError if there is no room to prepare these shards."""
        return

    def prepare_ahead(self, shards: Sequence[int]) -> None:
        """Begins to prepare these shards in the background, in this order."""
        return


# -------------------------------------------------------------------------------------------------
# Rows in order


@dataclass(frozen=True)
class Bookmark:
    """Where the shard that was read last begins: its place in the sequence, its first row."""

    sequence: int = 0
    first_row: int = 0


@dataclass
class _Shard:
    """A shard that is open: its rows are those of the plan, in row_order."""

    documents: Documents
    plan: Plan
    row_order: np.ndarray


class RowReader:
    """Row i of the run, for any i (cheapest in ascending order)."""

    def __init__(self, source: Source, row_len: int, seed: int, bos: int) -> None:
        self.source, self.row_len, self.seed, self.bos = source, row_len, seed, bos
        self.bookmark = Bookmark()
        self._open: dict[int, _Shard] = {}
        self._next: tuple[int, Future[Any]] | None = None
        self._expected = 0
        self._opened: list[dict[str, Any]] = []

    def expect(self, num_rows: int) -> None:
        """Says how many rows the run will read. UserError if there is no room for the shards they
        come from; when the first is read, preparing the others begins in the background."""
        self._expected = num_rows
        self.source.check_disk(self._shards_ahead())

    def _shards_ahead(self) -> list[int]:
        """The shards of the expected rows from the bookmark on, in order, and rather more."""
        shards: dict[int, None] = {}
        sequence, rows = self.bookmark.sequence, self.bookmark.first_row
        while rows < self._expected and len(shards) < self.source.num_shards():
            _, shard = self._shard_at(sequence)
            shards[shard] = None
            rows += self.source.tokens(shard) * 3 // 4 // self.row_len  # an estimate may be high
            sequence += 1
        return list(shards)

    def opened(self) -> list[dict[str, Any]]:
        """What packing did to each shard that was opened since the last call, for the log."""
        opened, self._opened = self._opened, []
        return opened

    def _shard_at(self, sequence: int) -> tuple[int, int]:
        """(epoch, shard) at a place in the endless sequence; each epoch has its own order."""
        n = self.source.num_shards()
        epoch, k = divmod(sequence, n)
        rng = np.random.default_rng(seed_from(self.seed, "shards", epoch))
        return epoch, int(rng.permutation(n)[k])

    def _prepare(self, sequence: int) -> _Shard:
        epoch, shard = self._shard_at(sequence)
        documents = self.source.load(shard)
        rng = np.random.default_rng(seed_from(self.seed, "documents", epoch, shard))
        order = rng.permutation(len(documents.lengths))
        plan = pack(documents.lengths, order, self.row_len, self.source.cut)
        return _Shard(documents, plan, rng.permutation(len(plan)))

    def _shard(self, sequence: int) -> _Shard:
        """The shard at a place, from the thread that prepares one ahead if it has it."""
        if sequence in self._open:
            return self._open[sequence]
        first_of_run = self._expected > 0
        if first_of_run:
            self.source.prepare_ahead(self._shards_ahead()[1:])
            self._expected = 0
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == sequence:
            opened = ahead[1].result()
        else:
            opened = self._prepare(sequence)
        self._open = {s: o for s, o in self._open.items() if s == sequence - 1}
        self._open[sequence] = opened
        epoch, shard = self._shard_at(sequence)
        packed = opened.plan.summary(self.row_len)
        self._opened.append({"epoch": epoch, "shard": shard, **packed})
        if first_of_run:
            print0(
                f"packing: {packed['rows']:,} rows of {self.row_len:,} tokens in the first shard; "
                f"{packed['cropped']:.2%} of its tokens cropped, {packed['continued']:.1%} in a "
                "row that does not show their document's beginning"
            )
        return opened

    def plan(self, sequence: int) -> tuple[Documents, Plan]:
        """The documents of the shard at a place of the sequence, and the rows that they fill."""
        shard = self._shard(sequence)
        return shard.documents, shard.plan

    def _find(self, row: int) -> tuple[_Shard, int]:
        """The shard that holds a row of the run, and which of its rows that is."""
        if row < self.bookmark.first_row:
            self.bookmark = Bookmark()
        empty = 0  # shards in succession without a row; twice around covers an epoch of them all
        while True:
            shard = self._shard(self.bookmark.sequence)
            local, size = row - self.bookmark.first_row, len(shard.plan)
            if local < size:
                break
            empty = 0 if size else empty + 1
            if empty >= 2 * self.source.num_shards():
                raise UserError(TOO_LITTLE.format(self.row_len))
            self.bookmark = Bookmark(self.bookmark.sequence + 1, row - local + size)
        if local >= size // 2 and self._next is None:
            after = self.bookmark.sequence + 1
            self._next = (after, in_thread(self._prepare, after))
        return shard, local

    def rows_per_epoch(self) -> int:
        """Rows of the first epoch. Prepares every shard."""
        return sum(len(self._shard(k).plan) for k in range(self.source.num_shards()))

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start .. start + count: see read_rows."""
        return self.read_rows(np.arange(start, start + count))

    def read_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ascending number: (tokens, targets), each (n, T) int64.

        Targets are the tokens one further on, -1 where nothing is learned."""
        parts = []
        while len(rows):
            shard, local = self._find(int(rows[0]))
            local_rows = rows - rows[0] + local
            here = int(np.searchsorted(local_rows, len(shard.plan)))
            chosen = shard.row_order[local_rows[:here]]
            parts.append(show_rows(shard.documents, shard.plan, chosen, self.row_len, self.bos))
            rows = rows[here:]
        tokens = np.concatenate([part[0] for part in parts])  # (n, T + 1)
        targets = tokens[:, 1:]
        if not self.source.cut:
            trained = np.concatenate([part[1] for part in parts])
            targets = np.where(trained[:, 1:], targets, IGNORE)
        return tokens[:, :-1], targets

    def boundaries(self, row: int) -> np.ndarray:
        """Where the documents of a row begin among its T inputs, and T (int32): the cu_seqlens of
        attention that is to stay within documents. Padding counts as one more document."""
        shard, local = self._find(row)
        r = shard.row_order[local]
        ends = np.cumsum(shard.plan.pieces[shard.plan.starts[r] : shard.plan.starts[r + 1], 2])
        T = self.row_len - 1
        return np.unique(np.minimum([0, *ends, T], T)).astype(np.int32)


# -------------------------------------------------------------------------------------------------
# Steps


@dataclass
class MicroBatch:
    """One forward and backward pass: (B, T) token ids and targets.

    A step's loss is the sum of loss() over all its micro-batches, divided by the sum of count();
    for another loss a stage has a subclass (dpo.py)."""

    idx: Tensor
    targets: Tensor

    def count(self) -> Tensor:
        """(): what the loss is divided by, in whole numbers: trained tokens."""
        return (self.targets != IGNORE).sum()

    def loss(self, forward: Callable[..., Tensor]) -> Tensor:
        """(): the summed loss. `forward` is that of a model."""
        return forward(self.idx, self.targets, reduction="sum")


class HostBuffer:
    """A step's rows on their way to the device: memory of their own each time."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.rows = torch.empty(0)

    def memory(self) -> Tensor:
        """Where the next rows go: int64, of our shape."""
        return torch.empty(self.shape, dtype=torch.int64)

    def send(self) -> Tensor:
        """The rows on the device."""
        return self.rows.to(self.device)

    def wait(self) -> None:
        """Until the memory may be written again."""


class PinnedBuffer(HostBuffer):
    """The same memory each time, page-locked: a GPU copies from it while the program goes on. It
    may be written again when the event behind the copy has happened."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(shape, device)
        self.pinned, self.copied = self.allocate()

    def allocate(self) -> tuple[Tensor, Any]:
        """The memory and the event."""
        return torch.empty(self.shape, dtype=torch.int64, pin_memory=True), torch.cuda.Event()

    def memory(self) -> Tensor:
        return self.pinned

    def copy(self) -> Tensor:
        """Queues a copy to the device and returns what it will be in."""
        return self.pinned.to(self.device, non_blocking=True)

    def send(self) -> Tensor:
        on_device = self.copy()
        self.copied.record()
        return on_device

    def wait(self) -> None:
        self.copied.synchronize()


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
        buffer_class: type[HostBuffer] | None = None,
    ) -> None:
        self.reader, self.rows_per_step = reader, rows_per_step
        self.rank, self.world_size = rank, world_size
        self._next: tuple[int, Future[Any]] | None = None
        self._bookmarks: dict[int, Bookmark] = {}  # where the reader stood before a step's rows
        num_micro = rows_per_step // (device_batch_size * world_size)
        shape = (2, num_micro, device_batch_size, reader.row_len - 1)  # (idx and targets, M, B, T)
        buffer_class = buffer_class or (PinnedBuffer if device.type == "cuda" else HostBuffer)
        # One is filled while the device may still copy from the other.
        self._buffers = [buffer_class(shape, device) for _ in range(2)]

    def state(self, step: int) -> dict[str, int]:
        """What lets a resumed run open the right shard at once: the bookmark before `step`."""
        return asdict(self._bookmarks.get(step, Bookmark()))

    def load_state(self, state: dict[str, int]) -> None:
        """Takes what state() gave. It saves time; the rows would be the same without."""
        self.reader.bookmark = Bookmark(**state)

    def _fill(self, buffer: HostBuffer, step: int) -> None:
        """Reads this rank's rows of a step into a buffer."""
        earlier = {s: mark for s, mark in self._bookmarks.items() if s >= step - 2}
        self._bookmarks = {**earlier, step: self.reader.bookmark}
        buffer.rows = buffer.memory()
        _, M, B, _ = buffer.shape
        all_ranks = step * self.rows_per_step + np.arange(self.rows_per_step)
        rows = all_ranks.reshape(M, self.world_size, B)[:, self.rank].reshape(-1)
        for kind, values in zip(buffer.rows, self.reader.read_rows(rows)):
            kind.view(M * B, -1).numpy()[:] = values

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's share of optimizer step `step`."""
        full, free = self._buffers
        ahead, self._next = self._next, None
        if ahead is not None:
            ahead[1].result()  # the reader serves one caller at a time
        if ahead is None or ahead[0] != step:
            full.wait()
            self._fill(full, step)
        batches = full.send()  # (2, M, B, T)
        free.wait()  # here and not in the thread: a GPU's events belong to who uses the GPU
        self._next = (step + 1, in_thread(self._fill, free, step + 1))
        self._buffers = [free, full]
        return [MicroBatch(idx, targets) for idx, targets in zip(*batches)]


def eval_rows(reader: RowReader, num_tokens: int) -> int:
    """Rows that hold `num_tokens` of validation, one at least, or all there are. Opens the shards;
    UserError if they fill no row."""
    num_rows = min(max(1, num_tokens // (reader.row_len - 1)), reader.rows_per_epoch())
    if num_rows == 0:
        raise UserError(f"validation: {TOO_LITTLE.format(reader.row_len)} by --val_data")
    return num_rows


def eval_batches(
    reader: RowReader, num_tokens: int, batch_size: int, rank: int, world_size: int, device: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the first `num_tokens` of validation, (B, T) at a time.

    Which rows are read depends neither on the batch size nor on the number of ranks."""
    mine = np.arange(rank, eval_rows(reader, num_tokens), world_size)
    for at in track(range(0, len(mine), batch_size), "validation", "batches"):
        x, y = map(np.ascontiguousarray, reader.read_rows(mine[at : at + batch_size]))
        yield torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
