"""
The order of the data: rows as a pure function of (data, seed, i), any number of ranks.

The slow twin is `naive_rows`, which computes all rows from the first, in the order that the
docstrings promise.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.common import UserError, seed_from
from nanochat.dataloader import (
    IGNORE,
    Bookmark,
    HostBuffer,
    PinnedBuffer,
    RowReader,
    StepLoader,
    eval_batches,
)
from nanochat.packing import Documents
from tests.test_packing import naive_pack

CPU = torch.device("cpu")
PAD = 1 << 20  # an id that no document has: padding, and the bos of what goes on with a document


class FakeSource:
    """Shards of documents with the lengths given. Every token of all of them has an id of its own:
    a row shows which documents it is made of."""

    fingerprint = "fake"

    def __init__(self, shards: list[list[int]], cut: bool = True) -> None:
        self.cut = cut
        self.shards: list[Documents] = []
        self.loaded: list[int] = []
        first = 0
        for lengths in shards:
            ids = np.arange(first, first + sum(lengths), dtype=np.uint32)
            offsets = np.cumsum([0, *lengths], dtype=np.int64)
            # Of conversations, the second half of each is trained on
            trained = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
            self.shards.append(Documents(ids, offsets, None if cut else trained))
            first += sum(lengths)
        self.starts = {int(s.ids[at]) for s in self.shards for at in s.offsets[:-1]}
        self.num_tokens = first

    def num_shards(self) -> int:
        return len(self.shards)

    def load(self, shard: int) -> Documents:
        self.loaded.append(shard)
        return self.shards[shard]


# ---- rows


def naive_rows(source: FakeSource, row_len: int, seed: int, epochs: int) -> list[list[int]]:
    """All rows of the first epochs, in order, from the first document on."""
    rows = []
    for epoch in range(epochs):
        n = source.num_shards()
        for shard in np.random.default_rng(seed_from(seed, "shards", epoch)).permutation(n):
            documents = source.shards[shard]
            lengths = documents.lengths.tolist()
            rng = np.random.default_rng(seed_from(seed, "documents", epoch, int(shard)))
            order = rng.permutation(len(lengths)).tolist()
            packed = naive_pack(lengths, order, row_len, source.cut)
            for r in rng.permutation(len(packed)):
                row: list[int] = []
                for doc, first, length in packed[r]:
                    at = int(documents.offsets[doc]) + first
                    ids = documents.ids[at : at + length].tolist()
                    row += [PAD, *ids[1:]] if first else ids
                rows.append(row)
    return rows


def read_tokens(reader: RowReader, start: int, count: int) -> list[list[int]]:
    """Whole rows: the tokens and, put back, the last one, which is a target only."""
    tokens, targets = reader.read(start, count)
    return np.concatenate([tokens, targets[:, -1:]], axis=1).tolist()


def three_shards() -> FakeSource:
    rng = random.Random(5)
    return FakeSource([[rng.randint(1, 40) for _ in range(n)] for n in (60, 45, 80)])


def test_rows_are_those_of_the_slow_twin_across_shards_and_epochs() -> None:
    source = three_shards()
    expected = naive_rows(source, 16, seed=3, epochs=3)
    reader = RowReader(source, 16, seed=3, bos=PAD)
    assert read_tokens(reader, 0, len(expected)) == expected
    per_epoch = len(naive_rows(source, 16, seed=3, epochs=1))
    assert reader.rows_per_epoch() == per_epoch
    assert len(expected) > 2 * per_epoch


@pytest.mark.parametrize("seed", range(5))
def test_rows_read_in_any_order_are_the_same(seed: int) -> None:
    source = three_shards()
    expected = naive_rows(source, 16, seed=3, epochs=3)
    reader = RowReader(source, 16, seed=3, bos=PAD)
    rng = random.Random(seed)
    for _ in range(40):
        start = rng.randrange(len(expected) - 8)
        count = rng.randint(1, 8)
        assert read_tokens(reader, start, count) == expected[start : start + count]
    # And by a reader that has seen nothing else, as after a resume
    start = rng.randrange(len(expected) - 8)
    assert read_tokens(RowReader(source, 16, 3, PAD), start, 8) == expected[start : start + 8]


def test_every_row_starts_with_bos_and_is_full() -> None:
    source = three_shards()
    reader = RowReader(source, 16, seed=0, bos=PAD)
    tokens, targets = reader.read(0, reader.rows_per_epoch())
    starts = source.starts | {PAD}  # a document's first token, or what goes on with one
    assert set(tokens[:, 0].tolist()) <= starts
    assert PAD in tokens[:, 0] and source.starts & set(tokens[:, 0].tolist())
    assert IGNORE not in targets
    assert tokens.dtype == targets.dtype == np.int64
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])  # the target is the next token
    # Where a row's tokens do not simply go on, something else begins, at its first token.
    jumps = tokens[:, 1:][(np.diff(tokens, axis=1) != 1) & (tokens[:, :-1] != PAD)]
    assert set(jumps.tolist()) <= starts


def test_an_epoch_shows_each_token_once_and_the_next_one_in_another_order() -> None:
    source = three_shards()
    reader = RowReader(source, 16, seed=0, bos=PAD)
    first = read_tokens(reader, 0, reader.rows_per_epoch())
    bos = source.starts | {PAD}
    shown = Counter(token for row in first for token in row if token not in bos)
    assert set(shown.values()) == {1}
    assert len(shown) > source.num_tokens - len(source.starts) - 3 * 16  # but for three last rows
    second = read_tokens(reader, len(first), len(first))
    assert first != second
    # Nor the same rows in another order: documents meet new neighbours.
    mixed = [
        {tuple(row) for row in rows if sum(token in bos for token in row) > 1}
        for rows in (first, second)
    ]
    assert len(mixed[0]) > 20 and len(mixed[0] & mixed[1]) < len(mixed[0]) / 4


def test_seeds_give_different_orders_and_equal_ones_the_same() -> None:
    rows = [read_tokens(RowReader(three_shards(), 16, seed, PAD), 0, 30) for seed in (1, 1, -1, 2)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2] and rows[0] != rows[3]


def test_shards_are_opened_in_turn_and_not_all_at_once() -> None:
    source = FakeSource([[20] * 40 for _ in range(10)])
    reader = RowReader(source, 16, seed=0, bos=PAD)
    per_shard = len(reader._shard(0).plan)
    reader.read(0, per_shard // 2)
    assert len(source.loaded) == 1
    reader.read(per_shard // 2, 1)  # past the middle the next one is prepared, in a thread
    assert reader._next is not None
    reader._next[1].result()
    assert len(source.loaded) == 2
    reader.read(per_shard, 1)
    assert len(source.loaded) == 2
    shards = [shard["shard"] for shard in reader.opened()]
    assert shards == source.loaded and reader.opened() == []


def test_what_is_expected_is_prepared_ahead() -> None:
    source = FakeSource([[16] * 8 for _ in range(10)])
    asked: list[list[int]] = []
    source.tokens = lambda shard: 16 * 8  # type: ignore[attr-defined]
    source.check_disk = source.prepare_ahead = asked.append  # type: ignore[attr-defined]
    reader = RowReader(source, 16, seed=0, bos=PAD)
    in_order = [reader._shard_at(k)[1] for k in range(30)]
    reader.expect(20)
    # 20 rows come from 3 shards; one more in case the estimate is too high
    assert asked == [in_order[:4]]
    # A resumed run is somewhere else; the shard it reads first is not left to the background
    reader.bookmark = Bookmark(sequence=2, first_row=16)
    reader.read(17, 1)
    reader.read(18, 1)
    assert asked[1:] == [in_order[3:3]]
    # More than there is: all of it, once, from where the run stands
    reader = RowReader(source, 16, seed=0, bos=PAD)
    reader.expect(10_000)
    reader.bookmark = Bookmark(sequence=25, first_row=200)
    reader.read(200, 1)
    assert asked[2] == in_order[:10]
    assert (
        asked[3]
        == list(dict.fromkeys(in_order[25:30] + [reader._shard_at(k)[1] for k in range(30, 40)]))[
            1:
        ]
    )


def test_data_that_fills_no_row_is_an_error_not_an_endless_search() -> None:
    for shards in ([[3, 4]], [[3], [5, 2], [1]]):
        reader = RowReader(FakeSource(shards), 16, seed=0, bos=PAD)
        with pytest.raises(UserError, match="16 tokens; lower --max_seq_len"):
            reader.read(0, 1)
    # One shard of several may be too small.
    reader = RowReader(FakeSource([[3], [16], [2]]), 16, seed=0, bos=PAD)
    assert read_tokens(reader, 0, 5) == [list(range(3, 19))] * 5


def test_an_error_of_a_later_shard_comes_when_it_is_its_turn() -> None:
    source = FakeSource([[16] * 4, [16] * 4])
    reader = RowReader(source, 16, seed=0, bos=PAD)
    _, bad = reader._shard_at(1)
    good_load = source.load

    def load(shard: int) -> Documents:
        if shard == bad:
            raise UserError("bad.parquet is damaged")
        return good_load(shard)

    source.load = load  # type: ignore[method-assign]
    reader.read(0, 4)
    with pytest.raises(UserError, match=r"bad\.parquet"):
        reader.read(4, 1)


def test_padding_and_masked_tokens_carry_no_target() -> None:
    rng = random.Random(1)
    source = FakeSource([[rng.randint(1, 16) for _ in range(50)]], cut=False)
    reader = RowReader(source, 16, seed=0, bos=PAD)
    tokens, targets = reader.read(0, reader.rows_per_epoch())
    documents = source.shards[0]
    trained = dict(zip(documents.ids.tolist(), documents.trained.tolist()))  # type: ignore[union-attr]
    next_tokens = np.concatenate([tokens[:, 1:], targets[:, -1:]], axis=1)
    for following, target in zip(next_tokens.flat, targets.flat):
        assert target == (following if trained.get(int(following), 0) else IGNORE)
    assert PAD in tokens  # the case at hand did occur
    assert PAD not in targets
    # Every trained token is a target once, but those that a row begins with.
    expected = sum(trained.values()) - sum(trained[int(t)] for t in tokens[:, 0])
    assert (targets != IGNORE).sum() == expected


# ---- steps and ranks


def gather(source: FakeSource, step: int, world_size: int, batch_size: int) -> list[list[int]]:
    """The rows of a step over all ranks, in the order of the micro-batches."""
    per_rank = []
    for rank in range(world_size):
        reader = RowReader(source, 16, seed=3, bos=PAD)
        loader = StepLoader(reader, 24, batch_size, rank, world_size, CPU)
        per_rank.append(loader.step(step))
    rows = []
    for micro in zip(*per_rank, strict=True):
        for batch in micro:
            assert batch.idx.shape == batch.targets.shape == (batch_size, 15)
            assert batch.idx.is_contiguous() and batch.targets.is_contiguous()
            rows += torch.cat([batch.idx, batch.targets[:, -1:]], dim=1).tolist()
    return rows


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize(
    ("world_size", "batch_size"),
    [(1, 24), (1, 4), (2, 3), (3, 8), (3, 2), (4, 6), (4, 1), (8, 3), (8, 1)],
)
def test_a_step_is_the_same_rows_at_any_number_of_ranks_and_batch_size(
    step: int, world_size: int, batch_size: int
) -> None:
    source = three_shards()
    expected = naive_rows(source, 16, seed=3, epochs=3)[24 * step : 24 * step + 24]
    assert len(expected) == 24
    assert gather(source, step, world_size, batch_size) == expected


def test_steps_in_and_out_of_order() -> None:
    expected = naive_rows(three_shards(), 16, seed=3, epochs=4)
    loader = StepLoader(RowReader(three_shards(), 16, 3, PAD), 8, 8, 0, 1, CPU)
    for step in (0, 1, 2, 10, 11, 3, 3, 4):  # as it runs, after a resume, and again
        (batch,) = loader.step(step)
        assert batch.idx.tolist() == [row[:-1] for row in expected[8 * step : 8 * step + 8]]


class LateBuffer(PinnedBuffer):
    """A device that copies as late as it is allowed to: when somebody waits for the copy."""

    waits = True

    def allocate(self) -> tuple[torch.Tensor, Any]:
        self.queued: list[torch.Tensor] = []
        return torch.empty(self.shape, dtype=torch.int64), self

    def copy(self) -> torch.Tensor:
        self.queued.append(torch.full(self.shape, -7))
        return self.queued[-1]

    def record(self) -> None: ...

    def synchronize(self) -> None:
        for target in self.queued if self.waits else []:
            target.copy_(self.pinned)
        self.queued = []

    @classmethod
    def rows_of_steps(cls, steps: list[int]) -> list[list[list[int]]]:
        loader = StepLoader(RowReader(three_shards(), 16, 3, PAD), 8, 4, 0, 1, CPU, cls)
        batches = [loader.step(step) for step in steps]
        for buffer in loader._buffers:
            buffer.wait()
        return [[row for batch in step for row in batch.idx.tolist()] for step in batches]


class HastyBuffer(LateBuffer):
    """The same device, without anybody who waits for it while there is something to do."""

    def wait(self) -> None:
        if len(self.queued) > 1:
            self.synchronize()


def test_a_slow_device_never_sees_a_buffer_overwritten() -> None:
    expected = naive_rows(three_shards(), 16, seed=3, epochs=4)
    steps = [0, 1, 2, 3, 7, 8, 2, 3, 3, 4]  # in order, after a resume, and again
    rows = [[row[:-1] for row in expected[8 * step : 8 * step + 8]] for step in steps]
    assert LateBuffer.rows_of_steps(steps) == rows
    assert HastyBuffer.rows_of_steps(steps) != rows  # the test would notice


def test_on_a_cpu_every_step_has_memory_of_its_own() -> None:
    loader = StepLoader(RowReader(three_shards(), 16, 3, PAD), 8, 8, 0, 1, CPU)
    assert type(loader._buffers[0]) is HostBuffer
    (first,) = loader.step(0)
    before = first.idx.clone()
    for step in range(1, 5):
        loader.step(step)
    assert torch.equal(first.idx, before)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_rows() -> None:
    loader = StepLoader(RowReader(three_shards(), 16, 3, PAD), 8, 4, 0, 1, torch.device("cuda", 0))
    assert type(loader._buffers[0]) is PinnedBuffer
    expected = naive_rows(three_shards(), 16, seed=3, epochs=4)
    batches = [loader.step(step) for step in range(6)]
    for step, of_step in enumerate(batches):
        rows = [row for batch in of_step for row in batch.idx.tolist()]
        assert rows == [row[:-1] for row in expected[8 * step : 8 * step + 8]]


# ---- boundaries


@pytest.mark.parametrize("cut", [True, False])
def test_boundaries_are_where_documents_begin(cut: bool) -> None:
    rng = random.Random(2)
    source = FakeSource([[rng.randint(1, 40 if cut else 16) for _ in range(60)]], cut=cut)
    reader = RowReader(source, 16, seed=0, bos=PAD)
    padded = 0
    for row in range(reader.rows_per_epoch()):
        tokens = reader.read(row, 1)[0][0].tolist()
        begins = [t for t in range(15) if tokens[t] in source.starts or tokens[t] == PAD]
        if not cut:  # padding is one document more
            begins = [t for t in begins if t == 0 or tokens[t] != PAD or tokens[t - 1] != PAD]
            padded += tokens[-1] == PAD
        found = reader.boundaries(row)
        assert found.dtype == np.int32
        assert found.tolist() == [*begins, 15]
    assert cut or padded > 3


# ---- validation


def evaluated(num_tokens: int, world_size: int, batch_size: int) -> list[list[int]]:
    rows = []
    for rank in range(world_size):
        reader = RowReader(three_shards(), 16, seed=0, bos=PAD)
        for idx, targets in eval_batches(reader, num_tokens, batch_size, rank, world_size, CPU):
            assert 1 <= len(idx) <= batch_size
            assert idx.shape == targets.shape
            rows += torch.cat([idx, targets[:, -1:]], dim=1).tolist()
    return sorted(rows)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (2, 4), (3, 1), (4, 100), (40, 3)])
def test_validation_reads_the_same_rows_at_any_batch_size_and_number_of_ranks(
    world_size: int, batch_size: int
) -> None:
    rows = evaluated(32 * 15, world_size, batch_size)
    assert rows == sorted(naive_rows(three_shards(), 16, seed=0, epochs=1)[:32])


def test_validation_ends_with_the_data_and_is_never_nothing() -> None:
    whole_epoch = sorted(naive_rows(three_shards(), 16, seed=0, epochs=1))
    assert evaluated(10**9, 2, 5) == whole_epoch
    assert len(evaluated(1, 1, 5)) == 1
    reader = RowReader(FakeSource([[3]]), 16, seed=0, bos=PAD)
    with pytest.raises(UserError, match=r"validation: .*16 tokens.*--val_data"):
        next(eval_batches(reader, 100, 4, 0, 1, CPU))
