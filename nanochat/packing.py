"""
Packing documents into rows of one length: nothing lost, nothing padded, few documents cut.

A document longer than a row fills rows of its own as far as it goes; its end, and every shorter
document, are packed together so that they fill rows exactly: one that fits, or two that do
together, are nearly always among the thousand that wait. Where none do, one is cut, and what is
left of it waits with the others. What goes on with a document in another row begins with bos like
everything else (bench/packing.py measures this against dropping what is cut).

Pure functions of numbers; dataloader.py makes training rows of them. Floor 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Piece = tuple[int, int, int]  # document, first, length

PACK_BUFFER = 1000  # pieces at most among which the best fit is looked for


@dataclass
class Documents:
    """Tokenized documents: document d is ids[offsets[d] : offsets[d + 1]].

    `trained` (uint8, one per id) says which tokens carry loss; None: all of them."""

    ids: np.ndarray  # uint16 or uint32
    offsets: np.ndarray  # int64, (documents + 1,)
    trained: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass
class Plan:
    """Rows as pieces of documents: row r is pieces[starts[r] : starts[r + 1]].

    A piece (document, first, length) shows `length` tokens of a document from its token `first` on.
    Where `first` is not 0, that token is shown already, in another row, and bos takes its place."""

    pieces: np.ndarray  # int64, (pieces, 3)
    starts: np.ndarray  # int64, (rows + 1,)
    cropped: int  # tokens of documents that no row shows, not counting bos

    def __len__(self) -> int:
        return len(self.starts) - 1

    def summary(self, row_len: int) -> dict[str, float]:
        """What packing did: the share of the documents' tokens that no row shows, and the shares of
        the rows' tokens that are padding, or whose row does not show their document's beginning."""
        length, continued = self.pieces[:, 2], self.pieces[:, 1] > 0
        shown, room = int(length.sum()), max(1, len(self) * row_len)
        total = shown - len(length) + self.cropped
        return {
            "rows": len(self),
            "cropped": self.cropped / max(1, total),
            "padded": 1 - shown / room,
            "continued": int(length[continued].sum()) / room,
        }


class _Waiting:
    """Pieces (document, first, length) that wait for a place in a row.

    The lengths that occur are the bits of two whole numbers, one of them mirrored: which is the
    longest that fits, and which two fill the room together, are then single operations on long
    integers, however many pieces wait. Of equal lengths, the one that came last goes first."""

    def __init__(self, row_len: int) -> None:
        self.row_len, self.count = row_len, 0
        self.by_length: list[list[Piece]] = [[] for _ in range(row_len + 1)]
        self.present = 0  # bit n: a piece of n tokens is here
        self.mirrored = 0  # bit row_len - n: the same

    def put(self, piece: Piece) -> None:
        length = piece[2]
        if not self.by_length[length]:
            self._switch(length)
        self.by_length[length].append(piece)
        self.count += 1

    def take(self, length: int) -> Piece:
        piece = self.by_length[length].pop()
        if not self.by_length[length]:
            self._switch(length)
        self.count -= 1
        return piece

    def _switch(self, length: int) -> None:
        """Whether there are pieces of a length has changed."""
        self.present ^= 1 << length
        self.mirrored ^= 1 << (self.row_len - length)

    def shortest(self) -> int:
        return (self.present & -self.present).bit_length() - 1

    def best(self, room: int) -> tuple[int, ...]:
        """Lengths to take next: one or two that fill the room, else the longest that fits."""
        if self.present >> room & 1:
            return (room,)
        # Bit a of what is left of the mirrored number: a piece of room - a tokens is here
        pairs = self.present & (self.mirrored >> (self.row_len - room))
        if room % 2 == 0 and len(self.by_length[room // 2]) == 1:
            pairs &= ~(1 << (room // 2))  # it is no pair with itself
        if pairs:
            longer = pairs.bit_length() - 1
            return longer, room - longer
        fitting = self.present & ((1 << room) - 1)
        return (fitting.bit_length() - 1,) if fitting else ()


def pack(lengths: np.ndarray, order: np.ndarray, row_len: int, cut: bool) -> Plan:
    """Packs documents, taken in `order`, into rows of row_len tokens, the first of them bos.

    With `cut`, documents are cut where they do not fit and every row is full; the tokens of a last
    row that cannot be filled are left out, as are documents of a bos alone. Otherwise documents
    stay whole (none may be longer than a row) and rows are padded."""
    assert row_len >= 2, f"a row of {row_len} tokens has nothing to predict"
    assert cut or lengths.max(initial=0) <= row_len, "a document longer than a row must be cut"
    # A row holds row_len - 1 tokens besides its bos: so many rows a document fills by itself
    full, rest = np.divmod(lengths[order] - 1, row_len - 1)
    docs = np.repeat(order, full)
    nth = np.arange(len(docs)) - np.repeat(np.cumsum(full) - full, full)
    rows_alone = np.stack([docs, nth * (row_len - 1), np.full_like(docs, row_len)], axis=1)
    ends = np.stack([order, full * (row_len - 1), rest + 1], axis=1)
    ends = ends[(rest > 0) if cut else (full == 0)]

    # Far fewer than there are: else every epoch would fill the same rows.
    buffer_size = max(1, min(PACK_BUFFER, len(order) // 4))
    pieces, starts = _pack_ends(zip(*ends.T.tolist()), row_len, cut, buffer_size)
    numbers = np.fromiter(itertools.chain.from_iterable(pieces), np.int64, 3 * len(pieces))
    both = np.concatenate([rows_alone, numbers.reshape(-1, 3)])
    all_starts = np.concatenate([np.arange(len(docs)), len(docs) + np.asarray(starts)])
    cropped = int((lengths[order] - 1).sum() - (both[:, 2] - 1).sum())
    return Plan(both, all_starts.astype(np.int64), cropped)


def _pack_ends(
    upcoming: Iterator[Piece], row_len: int, cut: bool, buffer_size: int
) -> tuple[list[Piece], list[int]]:
    """(pieces, starts) of the rows that pieces of at most row_len tokens fill together."""
    pieces: list[Piece] = []
    starts = [0]
    waiting = _Waiting(row_len)
    while True:
        room = row_len
        while room > 0:
            while waiting.count < buffer_size and (piece := next(upcoming, None)):
                waiting.put(piece)
            if not waiting.count:
                break
            lengths = waiting.best(room)
            for length in lengths:
                pieces.append(waiting.take(length))
                room -= length
            if not lengths:
                if not cut:
                    break
                # The shortest one: of it, most stays together in one row or the other
                document, first, length = waiting.take(waiting.shortest())
                pieces.append((document, first, room))
                waiting.put((document, first + room - 1, length - room + 1))  # after another bos
                room = 0
        if len(pieces) == starts[-1]:
            return pieces, starts  # an empty row: the end
        if cut and room > 0:
            del pieces[starts[-1] :]
            return pieces, starts
        starts.append(len(pieces))


def show_rows(
    documents: Documents, plan: Plan, rows: np.ndarray, row_len: int, bos: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(tokens, trained) of some rows of a plan: (n, row_len) int64, and bool where the documents
    say what is trained. What no piece fills is bos, and not trained."""
    first, count = plan.starts[rows], plan.starts[rows + 1] - plan.starts[rows]
    document, skipped, length = plan.pieces[_ranges(first, count)].T
    where = _ranges(documents.offsets[document] + skipped, length)
    tokens = documents.ids[where].astype(np.int64)
    tokens[(np.cumsum(length) - length)[skipped > 0]] = bos
    if len(tokens) == len(rows) * row_len and documents.trained is None:
        return tokens.reshape(-1, row_len), None
    ends = np.cumsum(length)[np.cumsum(count) - 1]
    there = np.arange(row_len) < np.diff(ends, prepend=0)[:, None]  # (n, row_len)
    padded = np.full(there.shape, bos, dtype=np.int64)
    padded[there] = tokens
    trained = there.copy()
    if documents.trained is not None:
        trained[there] = documents.trained[where] > 0
    return padded, trained


def _ranges(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """All of first[0] .. first[0] + length[0], then all of first[1] .., and so on."""
    before = np.cumsum(length) - length
    return np.repeat(first - before, length) + np.arange(length.sum())
