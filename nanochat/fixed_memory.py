"""
One token for every row on fixed memory: what can be compiled, and captured as a CUDA graph.

`decode` is a function of tensors alone: the ids, where they stand, and the memory of a KVCache,
which it writes to. No number of it is on the host, so that one program serves every position. It
costs what the rows' memory has room for, not what they hold: of positions behind a row's end keys
are read, and hidden by the mask. Floor 1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.models.layers import one_query


class Memory(NamedTuple):
    """The memory of a KVCache's first B rows."""

    layers: list[tuple[Tensor, Tensor]]  # (B, K, S or more, E) keys and values
    ids: Tensor | None  # (B, 1 + S or more)
    places: Tensor  # (S,): 0, 1, 2...: the positions that are looked at
    alone: bool = False  # one row, and `places` ends where it ends


class StaticCache:
    """Fixed memory for one more token of each row. What layers.KVCacheLike says, for T = 1."""

    def __init__(
        self, memory: Memory, at: Tensor, one_query: Callable[..., Tensor] = one_query
    ) -> None:
        """`at`: (B,), where the new tokens stand. `one_query`: their attention on a CPU."""
        self.one_query = one_query
        (self.layers, self.ids, self.places, self.alone), self.at = memory, at
        self.rows = torch.arange(at.size(0), device=at.device)
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, T: int) -> Tensor:
        return self.at[:, None]  # (B, 1)

    def end(self, T: int) -> int:
        return self.places.size(0)

    def mask(self, T: int, window: int | None = None) -> Tensor | None:
        if self.alone and window is None:
            return None  # all that is looked at is its own
        if window not in self._masks:
            visible = self.places <= self.at[:, None]  # (B, S)
            if window is not None:
                visible = visible & (self.places > self.at[:, None] - window)
            self._masks[window] = visible[:, None, None]  # (B, 1, 1, S)
        return self._masks[window]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys[:, :, : self.end(1)], values[:, :, : self.end(1)]

    def previous(self, idx: Tensor) -> Tensor:
        assert self.ids is not None
        self.ids[self.rows, self.at + 1] = idx[:, 0]
        return self.ids[self.rows, self.at][:, None]

    def advance(self, T: int) -> None:
        """Its owner counts."""


def decode(
    model: Any,
    idx: Tensor,
    at: Tensor,
    memory: Memory,
    one_query: Callable[..., Tensor] = one_query,
) -> Tensor:
    """(B, 1) ids, (B,) positions, memory of B rows -> (B, V) float32 logits."""
    x = model.hidden(idx, StaticCache(memory, at, one_query))  # (B, 1, D)
    return model.logits(x[:, -1])
