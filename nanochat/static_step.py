"""
A step of decoding on fixed memory: what can be compiled, and captured as a CUDA graph.

`decode` is one token for every row, as a function of tensors alone: the ids, where they stand, and
the memory of a KVCache, which it writes to. No number of it is on the host, so that one graph
serves every position. It costs what the rows' memory has room for, not what they hold: of positions
behind a row's end keys are read, and hidden by the mask. Floor 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.kv_cache import KVCache


class StaticCache:
    """Fixed memory for one more token of each row. What layers.KVCacheLike says, for T = 1."""

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], ids: Tensor | None, at: Tensor
    ) -> None:
        """`layers`: (B, K, S, E) keys and values; `ids`: (B, 1 + S), see KVCache; `at`: (B,), where
        the new tokens stand."""
        self.layers, self.ids, self.at = layers, ids, at
        self.rows = torch.arange(at.size(0), device=at.device)
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, T: int) -> Tensor:
        return self.at[:, None]  # (B, 1)

    def end(self, T: int) -> int:
        return self.layers[0][0].size(2)

    def mask(self, T: int, window: int | None = None) -> Tensor:
        if window not in self._masks:
            keys = torch.arange(self.end(T), device=self.at.device)  # (S,)
            visible = keys <= self.at[:, None]  # (B, S)
            if window is not None:
                visible = visible & (keys > self.at[:, None] - window)
            self._masks[window] = visible[:, None, None]  # (B, 1, 1, S)
        return self._masks[window]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys, values

    def previous(self, idx: Tensor) -> Tensor:
        assert self.ids is not None
        self.ids[self.rows, self.at + 1] = idx[:, 0]
        return self.ids[self.rows, self.at][:, None]

    def advance(self, T: int) -> None:
        """Its owner counts."""


def decode(
    model: Any, idx: Tensor, at: Tensor, layers: list[tuple[Tensor, Tensor]], ids: Tensor | None
) -> Tensor:
    """(B, 1) ids, (B,) positions, memory of B rows -> (B, V) float32 logits."""
    x = model.hidden(idx, StaticCache(layers, ids, at))  # (B, 1, D)
    return model.logits(x[:, -1])


def memory(cache: KVCache, rows: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """The first rows of a cache's memory, for `decode`."""
    layers = [(kv[0][:rows], kv[1][:rows]) for kv in cache.layers if kv is not None]
    return layers, None if cache.ids is None else cache.ids[:rows]
