"""
Packing: what a plan must always keep, worked examples, and slow twins.

`naive_pack` looks at every waiting piece, and at every two of them, for each place;
`naive_rows_of` writes a row piece by piece.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from nanochat import packing
from nanochat.packing import Documents, Piece, Plan, pack, show_rows

BOS = 1 << 20  # an id that no document has


def random_lengths(rng: random.Random, row_len: int, cut: bool) -> list[int]:
    """Document lengths of one of several kinds: short, long, equal, mixed."""
    longest = rng.choice([2, row_len // 2 + 1, row_len, 4 * row_len])
    if not cut:
        longest = min(longest, row_len)
    equal = rng.random() < 0.2
    return [longest if equal else rng.randint(1, longest) for _ in range(rng.randint(1, 120))]


def naive_pack(lengths: list[int], order: list[int], row_len: int, cut: bool) -> list[list[Piece]]:
    """Rows of (document, first, length), as the docstrings promise them."""
    rows: list[list[Piece]] = []
    waiting: list[Piece] = []
    for doc in order:
        first = 0
        while lengths[doc] - first >= row_len:
            rows.append([(doc, first, row_len)])
            first += row_len - 1  # its last token is seen again, as bos
        if lengths[doc] - first > 1 or (not cut and first == 0):
            waiting.append((doc, first, lengths[doc] - first))
    buffer: list[Piece] = []  # in order of arrival
    buffer_size = max(1, min(packing.PACK_BUFFER, len(order) // 4))

    def take(length: int) -> Piece:
        """The piece of that length that came last."""
        at = max(i for i, piece in enumerate(buffer) if piece[2] == length)
        return buffer.pop(at)

    while True:
        row: list[Piece] = []
        room = row_len
        while room:
            while waiting and len(buffer) < buffer_size:
                buffer.append(waiting.pop(0))
            there = Counter(piece[2] for piece in buffer)
            two = [a for a in there if (there - Counter([a]))[room - a] > 0]
            fitting = [a for a in there if a <= room]
            if room in there:
                row.append(take(room))
            elif two:
                row += [take(max(two)), take(room - max(two))]
            elif fitting:
                row.append(take(max(fitting)))
            elif there and cut:
                doc, first, length = take(min(there))
                row.append((doc, first, room))
                buffer.append((doc, first + room - 1, length - room + 1))
            else:
                break
            room = row_len - sum(piece[2] for piece in row)
        if row and (room == 0 or not cut):
            rows.append(row)
        if not row or (room and cut):
            return rows


def rows_of(plan: Plan) -> list[list[Piece]]:
    pieces = [tuple(piece) for piece in plan.pieces.tolist()]
    return [pieces[a:b] for a, b in zip(plan.starts.tolist(), plan.starts[1:].tolist())]


# ---- plans


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_packing_keeps_its_promises(seed: int, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    row_len = rng.choice([2, 3, 7, 16, 50])
    monkeypatch.setattr(packing, "PACK_BUFFER", rng.choice([1, 3, 1000]))
    lengths = random_lengths(rng, row_len, cut)
    order = rng.sample(range(len(lengths)), len(lengths))
    plan = pack(np.array(lengths), np.array(order), row_len, cut)
    rows = rows_of(plan)
    assert rows == naive_pack(lengths, order, row_len, cut)

    # Besides the bos that each piece begins with, every token is shown once, or counted as cropped.
    shown = Counter((d, t) for row in rows for d, f, n in row for t in range(f + 1, f + n))
    assert set(shown.values()) <= {1}
    assert len(shown) + plan.cropped == sum(lengths) - len(lengths)
    assert all(row for row in rows)
    if cut:
        assert all(sum(n for *_, n in row) == row_len for row in rows)  # nothing is padded
        # No more is lost than a last row
        assert plan.cropped < row_len
    else:
        assert all(sum(n for *_, n in row) <= row_len for row in rows)
        assert sorted(piece for row in rows for piece in row) == [
            (doc, 0, n) for doc, n in enumerate(lengths)
        ]  # all, whole


def test_worked_examples() -> None:
    # A row holds 9 tokens behind its bos. The document of 25 fills two rows and leaves 6 tokens,
    # which make a piece of 7 with their bos. It waits with 4, 3 and 6 others: 7 and 3 fill a row.
    lengths = np.array([25, 4, 3, 6, *[10] * 12])
    rows = rows_of(pack(lengths, np.arange(16), 10, cut=True))
    assert rows[:2] == [[(0, 0, 10)], [(0, 9, 10)]]
    assert rows[2:14] == [[(doc, 0, 10)] for doc in range(4, 16)]
    assert rows[14:] == [[(0, 18, 7), (2, 0, 3)], [(3, 0, 6), (1, 0, 4)]]
    # Neither one nor two fill a row of 10: the longest that fits goes first, and the other one is
    # cut. The rest of it, 4 tokens behind a bos, waits for company that never comes.
    plan = pack(np.array([7, 7]), np.array([1, 0]), 10, cut=True)
    assert rows_of(plan) == [[(1, 0, 7), (0, 0, 3)]]
    assert plan.cropped == 4
    assert plan.summary(10) == {"rows": 1, "cropped": 4 / 12, "padded": 0, "continued": 0}
    padded = pack(np.array([7, 7]), np.array([1, 0]), 10, cut=False)
    assert rows_of(padded) == [[(1, 0, 7)], [(0, 0, 7)]]
    assert padded.summary(10)["padded"] == pytest.approx(0.3)


def test_packing_loses_nothing_and_hardly_cuts_what_fits() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.3, 1.0, 8000), 5, 20_000).astype(int)  # like web text
    summary = pack(lengths, rng.permutation(len(lengths)), 2049, cut=True).summary(2049)
    assert summary["cropped"] < 0.001
    # What exceeds a row must be without its beginning whatever one does; little more is.
    unavoidable = np.clip(lengths - 2049, 0, None).sum() / lengths.sum()
    assert unavoidable < summary["continued"] < unavoidable + 0.01
    # Documents that must stay whole are padded little.
    whole = pack(np.minimum(lengths, 2049), rng.permutation(len(lengths)), 2049, cut=False)
    assert whole.summary(2049)["padded"] < 0.01


def test_what_cannot_be_packed_is_refused_not_looped_over() -> None:
    with pytest.raises(AssertionError, match="longer than a row"):
        pack(np.array([5, 11]), np.arange(2), 10, cut=False)
    with pytest.raises(AssertionError, match="nothing to predict"):
        pack(np.array([5, 11]), np.arange(2), 1, cut=True)
    assert len(pack(np.array([1, 1, 1]), np.arange(3), 10, cut=True)) == 0
    assert len(pack(np.array([], dtype=np.int64), np.arange(0), 10, cut=True)) == 0


# ---- rows


def naive_rows_of(
    documents: Documents, plan: Plan, row: int, row_len: int
) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    trained: list[bool] = []
    for doc, first, length in rows_of(plan)[row]:
        at = int(documents.offsets[doc]) + first
        ids = documents.ids[at : at + length].tolist()
        tokens += [BOS, *ids[1:]] if first else ids
        flags = documents.trained
        trained += [True] * length if flags is None else (flags[at : at + length] > 0).tolist()
    padding = row_len - len(tokens)
    return tokens + [BOS] * padding, trained + [False] * padding


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_rows_are_those_of_the_slow_twin(seed: int, cut: bool) -> None:
    rng = random.Random(seed)
    row_len = rng.choice([7, 16])
    lengths = [row_len, *random_lengths(rng, row_len, cut)]
    ids = np.arange(sum(lengths), dtype=np.uint16)
    flags = None if cut else np.array([rng.random() < 0.5 for _ in ids], dtype=np.uint8)
    documents = Documents(ids, np.cumsum([0, *lengths]), flags)
    plan = pack(documents.lengths, np.arange(len(lengths)), row_len, cut)
    chosen = np.array([rng.randrange(len(plan)) for _ in range(9)])
    tokens, trained = show_rows(documents, plan, chosen, row_len, BOS)
    assert tokens.dtype == np.int64 and tokens.shape == (9, row_len)
    for i, row in enumerate(chosen):
        expected, expected_trained = naive_rows_of(documents, plan, row, row_len)
        assert tokens[i].tolist() == expected
        assert (trained is None) == cut
        if trained is not None:
            assert trained[i].tolist() == expected_trained
