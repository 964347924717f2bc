"""
What is allocated on PyTorch's meta device, where tensors have shapes and no memory: how much, when,
and what it is for.

A dispatch mode sees every operation, notes the size of each new storage and when it is given back,
and keeps the moment at which the most was held. training_trace.py has it watch a training step.

Compiled models are followed with a simple rule instead of the compiler, which takes a minute: what
a pointwise operation makes is fused into its readers. It takes memory only when a matrix product or
attention reads it; the backward pass finds it there, and makes again what was never written.
Floor 1.5.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operations that fill memory also when compiled: the rest is pointwise, a view, or a reduction.
_HEAVY = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.embedding_dense_backward.default, aten.index_put.default, aten.index_put_.default,
    aten.empty.memory_format, aten.new_empty.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default,
}  # fmt: skip


@dataclass(eq=False)
class _Again:
    """A tensor that the backward pass makes again, and what it needs for that."""

    shape: Any
    stride: Any
    dtype: torch.dtype
    roots: list[Tensor]
    kept: Tensor | None = None  # itself, if it was written to memory anyway


class MemoryTrace(TorchDispatchMode):
    """Counts bytes of the tensors that are made while it is active, by what they are for.

    `peak` and `parts` (bytes by part) are those of the fullest moment so far."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation loads the compiler: seconds

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.compiled = self.in_backward = False
        self.current: dict[str, int] = defaultdict(int)
        self.parts: dict[str, int] = {}
        self.peak = self.total = 0
        self._part = "weights"
        self._live: dict[int, tuple[Any, int, str]] = {}  # storage -> (weak reference, bytes, part)
        self._fused: dict[int, Any] = {}  # the same of those that take no memory yet
        self._roots: dict[int, dict[int, Tensor]] = {}  # what a storage can be made again from
        self._packed: list[tuple[_Again, Tensor]] = []  # by the operation that comes next

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside is for that."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:  # a value is wanted: any will do
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:  # nothing is left out: the worst case
            shape = (args[0].numel(), args[0].ndim)
            return torch.empty(shape, dtype=torch.int64, device=args[0].device)
        heavy = func in _HEAVY
        packed, self._packed = self._packed, []
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if heavy:
            for t in inputs:
                self._fill(t)
            if self.in_backward:  # the stream's gradient is written between the products
                for key in list(self._fused):
                    self._write(key)
            for again, t in packed:
                if t.untyped_storage()._cdata in self._live:
                    again.kept = t
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t, inputs if self.compiled and not heavy else None)
        return out

    # ---- the account

    def restart(self) -> None:
        """Forgets the peak, not what is held."""
        self.peak, self.parts = self.total, dict(self.current)

    def _note(self, t: Tensor, sources: list[Tensor] | None = None) -> None:
        """Accounts for a tensor, if its storage is new. One with `sources` is fused: it takes no
        memory until _fill, and can be made again from them."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._fused:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key))
        logits = t.ndim > 1 and t.size(-1) == self.vocab_size and self._part != "weights"
        name = "logits" if logits else self._part
        if sources is None:
            self._hold(key, reference, storage.nbytes(), name)
            return
        self._fused[key] = (reference, storage.nbytes(), name)
        roots: dict[int, Tensor] = {}
        for source in sources:
            k = source.untyped_storage()._cdata
            roots.update(self._roots.get(k, {k: source}))
        self._roots[key] = roots

    def _hold(self, key: int, reference: Any, size: int, name: str) -> None:
        self._live[key] = (reference, size, name)
        self.current[name] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.parts = self.total, dict(self.current)

    def _fill(self, t: Any) -> None:
        """A fused tensor is read by what needs it in memory."""
        if isinstance(t, Tensor):
            key = t.untyped_storage()._cdata
            if key in self._fused:
                self._write(key)

    def _write(self, key: int) -> None:
        """A fused tensor goes to memory, and is read from there from now on."""
        self._roots.pop(key, None)
        self._hold(key, *self._fused.pop(key))

    def _drop(self, key: int) -> None:
        self._fused.pop(key, None)
        self._roots.pop(key, None)
        _, size, name = self._live.pop(key, (None, 0, self._part))
        self.current[name] -= size
        self.total -= size

    def rename(self, t: Tensor, name: str) -> None:
        """Says anew what a tensor is for, and that it is in memory."""
        self._fill(t)
        key = t.untyped_storage()._cdata
        reference, size, old = self._live[key]
        self._live[key] = (reference, size, name)
        self.current[old] -= size
        self.current[name] += size

    def forget(self, t: Tensor) -> None:
        """Counts a tensor no more, whose memory is accounted for elsewhere."""
        self.rename(t, "elsewhere")
        key = t.untyped_storage()._cdata
        reference, size, _ = self._live[key]
        self._live[key] = (reference, 0, "elsewhere")
        self.total -= size
        self.current["elsewhere"] = 0

    def keep_roots(self) -> Any:
        """For the forward pass of a compiled model: what was not written to memory is not kept, but
        made again."""

        def pack(t: Tensor) -> Any:
            key = t.untyped_storage()._cdata
            if key in self._live or key not in self._roots:
                return t
            again = _Again(t.shape, t.stride(), t.dtype, list(self._roots[key].values()))
            self._packed.append((again, t))
            return again

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, _Again):
                return kept
            if kept.kept is not None:
                return kept.kept
            with _disable_current_modes():
                t = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device="meta")
            self._note(t, kept.roots)
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
