"""
Keys and values of every layer for the rows of a batch, each with its own length.

    cache = KVCache(model.config.n_layer, batch=2)
    model(prompt, kv_cache=cache)      # (2, T) ids, padded on the right
    cache.set_lengths([3, 5])          # the padding is forgotten
    model(idx, kv_cache=cache)         # (2, 1): what comes next in each row

Rows are padded on the right, and causality hides what stands behind a row's end until it is
overwritten. Memory is taken for many positions at once: half as many again as are needed, or for
`room` positions from the start, so that a reply grows the cache a few times at most. Floor 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def int64(values: Sequence[Any], device: torch.device | str = "cpu") -> Tensor:
    """Numbers from the host, as deep as they are nested; five times as fast as torch.tensor, which
    in a small model's step of decoding is felt."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)


class KVCache:
    """What a model of ours asks of a cache is layers.KVCacheLike; the rest is the engine's.

    Tensors are (B or more, K, S, E) in the dtype the model computes in; rows and S grow by
    allocation and copy. Models that ask for previous() have their tokens held too."""

    def __init__(
        self,
        n_layer: int,
        batch: int,
        device: torch.device | str = "cpu",
        room: int = 0,
        most: int = 0,
    ) -> None:
        """`room` positions of `most` rows: what there is memory for from the first pass on."""
        self.device, self.room, self.most = device, room, most
        self.lengths = [0] * batch  # tokens held by each row; on the host, so no sync is needed
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        # (B, 1 + S): -1, which stands before every row, then the row's tokens.
        self.ids: Tensor | None = None
        # Of the pass under way, as every layer asks for the same.
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._positions: dict[int, Tensor] = {}

    # ---- what a model asks for

    def positions(self, T: int) -> Tensor:
        """(B, T): where the next T tokens of each row stand."""
        if T not in self._positions:
            # Not int64(): torch.compile would make constants of NumPy's numbers
            lengths = torch.tensor(self.lengths, device=self.device)
            self._positions[T] = lengths[:, None] + torch.arange(T, device=self.device)
        return self._positions[T]

    def end(self, T: int) -> int:
        """One more than the last of these positions in any row."""
        return max(self.lengths) + T

    def mask(self, T: int, window: int | None = None) -> Tensor | None:
        """(B, 1, T, S): True where a new token may look: `window` positions back, its own included
        (None: all the way). None: plain causal, and if T is 1 all that is held is visible."""
        shortest, longest = min(self.lengths), max(self.lengths)
        plain = longest == 0 or (T == 1 and shortest == longest)
        if plain and (window is None or window >= longest + T):
            return None
        if (T, window) not in self._masks:
            keys = torch.arange(self.end(T), device=self.device)  # (S,)
            at = self.positions(T)[:, :, None]  # (B, T, 1)
            visible = keys <= at  # (B, T, S)
            if window is not None:
                visible = visible & (keys > at - window)
            self._masks[T, window] = visible[:, None]
        return self._masks[T, window]

    def previous(self, idx: Tensor) -> Tensor:
        """(B, T) ids of the pass under way -> (B, T) ids of the tokens before them in their rows,
        -1 before a row's first. For models that mix a token with the one before.

        Such a model must ask in every pass, or the tokens of the others are unknown: ValueError if
        the cache was filled without being asked."""
        B, T = idx.shape
        end = self.end(T)
        if self.ids is None and end > T:
            raise ValueError("previous() of a cache that was filled without being asked for it")
        if self.ids is None or self.ids.size(1) < 1 + end or self.ids.size(0) < B:
            self._grow_ids(idx, B, end)
        assert self.ids is not None
        rows, at = torch.arange(B, device=idx.device)[:, None], self.positions(T)
        self.ids[rows, at + 1] = idx
        return self.ids[rows, at]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, E) keys and values; returns all of them, (B, K, S, E)."""
        B, _, T, _ = k.shape
        end = self.end(T)
        held = self.layers[layer]
        if held is None or held[0].size(2) < end or held[0].size(0) < B:
            held = self.layers[layer] = self._grown(held, k, B, end)
        keys, values = held[0][:B], held[1][:B]
        for cache, new in ((keys, k), (values, v)):
            if min(self.lengths) == max(self.lengths):
                cache[:, :, end - T : end] = new
            else:
                rows = torch.arange(B, device=k.device)[:, None]  # (B, 1)
                # A slice between two indices moves behind them: (B, T, K, E)
                cache[rows, :, self.positions(T)] = new.transpose(1, 2).to(cache.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        """The T tokens of the pass that has ended now count as held."""
        self.set_lengths([n + T for n in self.lengths])

    # ---- what its owner does

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Says how much each row holds: after a padded prompt, its true lengths."""
        self.lengths, self._masks, self._positions = list(lengths), {}, {}

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows, in this order; a row may be named more than once."""
        self.set_lengths([self.lengths[r] for r in rows])
        index = torch.tensor(rows, device=self.device)
        self.layers = [
            None if kv is None else (kv[0].index_select(0, index), kv[1].index_select(0, index))
            for kv in self.layers
        ]
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index)

    def append(self, other: KVCache, rows: Sequence[int]) -> None:
        """Takes copies of these rows of another cache of the same model, after its own."""
        n, m = len(self.lengths), len(rows)
        lengths = [other.lengths[r] for r in rows]
        longest = max(lengths)
        end = max(longest, *self.lengths) if self.lengths else longest
        index = torch.tensor(rows, device=self.device)
        for layer, theirs in enumerate(other.layers):
            if theirs is None:
                continue
            held = self.layers[layer]
            if held is None or held[0].size(0) < n + m or held[0].size(2) < end:
                held = self.layers[layer] = self._grown(held, theirs[0], n + m, end)
            for mine, new in zip(held, theirs):
                mine[n : n + m, :, :longest] = new[:, :, :longest].index_select(0, index)
        if other.ids is not None:
            if self.ids is None or self.ids.size(0) < n + m or self.ids.size(1) < 1 + end:
                self._grow_ids(other.ids, n + m, end)
            assert self.ids is not None
            self.ids[n : n + m, 0] = -1
            new = other.ids[:, : 1 + longest].index_select(0, index)
            self.ids[n : n + m, : 1 + longest] = new
        self.set_lengths([*self.lengths, *lengths])

    def remove(self, row: int) -> None:
        """The last row takes the place of this one."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        if row != last:
            for held in self.layers:
                for tensor in held or ():
                    tensor[row, :, :length] = tensor[last, :, :length]
            if self.ids is not None:
                self.ids[row] = self.ids[last]
        lengths = list(self.lengths)
        lengths[row] = length
        self.set_lengths(lengths[:last])

    def row(self, row: int, T: int) -> KVCache:
        """One row as a cache of its own, with room for T more tokens, in the same memory. What is
        written to it counts here when its length is set here."""
        self.reserve(len(self.lengths), self.lengths[row] + T)
        view = KVCache(len(self.layers), 1, self.device)
        view.layers = [
            held and (held[0][row : row + 1], held[1][row : row + 1]) for held in self.layers
        ]
        view.ids = None if self.ids is None else self.ids[row : row + 1]
        view.lengths = [self.lengths[row]]
        return view

    # ---- memory

    def reserve(self, rows: int, end: int) -> None:
        """Has memory for that many rows of that many positions, if it has any."""
        for layer, held in enumerate(self.layers):
            if held is not None and (held[0].size(0) < rows or held[0].size(2) < end):
                self.layers[layer] = self._grown(held, held[0], rows, end)
        if self.ids is not None and (self.ids.size(0) < rows or self.ids.size(1) < 1 + end):
            self._grow_ids(self.ids, rows, end)

    def _grow_ids(self, like: Tensor, rows: int, end: int) -> None:
        old = self.ids
        width, rows = 1 + self._size(end), max(rows, self.most)
        if old is not None:
            rows = max(rows, old.size(0))
            width = old.size(1) if old.size(1) > end else width
        self.ids = like.new_full((rows, width), -1)
        if old is not None:
            self.ids[: old.size(0), : old.size(1)] = old

    def _size(self, end: int) -> int:
        """Room for `end` positions and half as many again, in chunks of 64."""
        return max(-(-(end * 3 // 2) // 64) * 64, self.room)

    def _grown(
        self, held: tuple[Tensor, Tensor] | None, like: Tensor, rows: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Memory for that many rows (at least) and positions, with what was held copied into it."""
        _, K, _, E = like.shape
        size, rows = self._size(end), max(rows, self.most)
        if held is not None:
            rows = max(rows, held[0].size(0))
            size = held[0].size(2) if held[0].size(2) >= end else size
        fresh = (like.new_zeros(rows, K, size, E), like.new_zeros(rows, K, size, E))
        if held is not None:
            for old, new in zip(held, fresh):
                new[: old.size(0), :, : old.size(2)] = old
        return fresh
