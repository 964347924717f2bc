"""
One training step without a number in it: what is allocated, when, and what it is for.

The model's own code and the optimizer's run on PyTorch's meta device, where tensors have shapes and
no memory. A dispatch mode sees every operation, notes the size of each new storage and when it is
given back, and keeps the moment at which the most was held. So an architecture that was written
tomorrow is planned for today, and nothing here knows one. What the meta device lacks is put in its
place: bfloat16 autocast, attention that keeps no scores, the two reads that need values.

Compiled models are followed with a simple rule instead of the compiler, which takes a minute: what
a pointwise operation makes is fused into its readers. It takes memory only when a matrix product or
attention reads it, and is never kept for the backward pass, but made again. Floor 1.5.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nanochat.models.loss import SUM_CHUNK_BYTES

aten = torch.ops.aten

# Operations that fill memory also when compiled: the rest is pointwise, a view, or a reduction.
_HEAVY = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.embedding_dense_backward.default, aten.index_put.default, aten.index_put_.default,
    aten.empty.memory_format, aten.new_empty.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default,
}  # fmt: skip


class _Attention(torch.autograd.Function):
    """Attention as flash kernels have it: keeps inputs, output and one float per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Kernels lay the output out as (B, T, H, E), so that merging the heads copies nothing.
        B, H, T, _ = q.shape
        out = q.new_empty((B, T, H, v.size(-1))).transpose(1, 2)  # (B, H, T, E)
        lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        return tuple(t.new_empty(t.shape) for t in (q, k, v))


class _IsCuda(TorchFunctionMode):
    """Tensors say that they lie on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


class _StandIns:
    """Functions that take the place of PyTorch's while active: autocast, attention.

    A TorchFunctionMode would not do: it does not reach what the backward pass recomputes."""

    def __init__(self, trace: MemoryTrace, bf16: bool) -> None:
        self.trace, self.bf16 = trace, bf16
        self.casts: dict[int, Tensor] = {}  # of weights: autocast makes each once a forward pass
        self.in_forward = True
        self.plain = F.linear, F.scaled_dot_product_attention

    def __enter__(self) -> _StandIns:
        functions: Any = F
        functions.linear = self._linear
        functions.scaled_dot_product_attention = self._attention
        return self

    def __exit__(self, *error: object) -> None:
        functions: Any = F
        functions.linear, functions.scaled_dot_product_attention = self.plain

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        cast = self._cast
        return self.plain[0](cast(x), cast(weight), None if bias is None else cast(bias))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Attention.apply(self._cast(q), self._cast(k), self._cast(v))

    def _cast(self, t: Tensor) -> Tensor:
        if not self.bf16 or t.dtype != torch.float32:
            return t
        if not (t.is_leaf and t.requires_grad):
            return t.to(torch.bfloat16)
        if id(t) in self.casts:
            return self.casts[id(t)]
        with self.trace.part("bf16 copies of weights"):
            copy = t.to(torch.bfloat16)
        if self.in_forward:
            self.casts[id(t)] = copy
        return copy

    def end_of_forward(self) -> None:
        """Where autocast forgets its copies. What is recomputed later makes its own."""
        self.casts.clear()
        self.in_forward = False


@dataclass(eq=False)
class _Again:
    """A tensor that the backward pass makes again, and what it needs for that."""

    shape: Any
    stride: Any
    dtype: torch.dtype
    roots: list[Tensor]


class MemoryTrace(TorchDispatchMode):
    """Counts bytes of the tensors that are made while it is active, by what they are for.

    `peak` and `parts` (bytes by part) are those of the fullest moment so far."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation loads the compiler: seconds

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.compiled = vocab_size, False
        self.current: dict[str, int] = defaultdict(int)
        self.parts: dict[str, int] = {}
        self.peak = self.total = 0
        self._part = "weights"
        self._live: dict[int, tuple[Any, int, str]] = {}  # storage -> (weak reference, bytes, part)
        self._fused: dict[int, Any] = {}  # the same of those that take no memory yet
        self._roots: dict[int, dict[int, Tensor]] = {}  # what a storage can be made again from

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
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if heavy:
            for t in inputs:
                self._fill(t)
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
        """For the forward pass of a compiled model: what can be made again is not kept."""

        def pack(t: Tensor) -> Any:
            roots = self._roots.get(t.untyped_storage()._cdata)
            if roots is None:
                return t
            return _Again(t.shape, t.stride(), t.dtype, list(roots.values()))

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, _Again):
                return kept
            with _disable_current_modes():
                t = torch.empty_strided(kept.shape, kept.stride, dtype=kept.dtype, device="meta")
            self._note(t, kept.roots)
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class TrainingTrace:
    """Traces training steps of one model and the optimizer's share of one rank.

    `model` lies on the meta device. `bf16`: matrix products and attention run under autocast.
    `on_cuda`: what tensors say when they are asked. `accumulates`: a step has several
    micro-batches, so that gradients are there already when one begins.

    `shares` are what a rank holds of the parameters if they are sharded: the optimizer's. Then the
    micro-batch's parts lack weights and gradients, which come and go."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        bf16: bool = False,
        on_cuda: bool = False,
        compiled: bool = False,
        accumulates: bool = True,
        shares: Sequence[Any] = (),
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.bf16, self.on_cuda = bf16, on_cuda
        self.compiled, self.accumulates = compiled, accumulates
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.trace = MemoryTrace(model.config.vocab_size)
        self.shares = shares
        # LoRA's matrices are whole on every rank, beside frozen weights in shares
        self.whole = [] if any(share.requires_grad for share in shares) else self.params
        for t in [*model.parameters(), *model.buffers()]:
            self.trace._note(t)
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._accumulated)
        if shares:
            kept = {id(p) for p in self.whole}
            for t in model.parameters():
                if id(t) not in kept:
                    self.trace.forget(t)
            for share in shares:
                self.trace._note(share.held)
        # The state of an optimizer is what its first step leaves behind; the second shows its peak.
        with self._tracing():
            for part in ("optimizer", "workspace of the optimizer"):
                self._gradients()
                self.trace.restart()
                with self.trace.part(part):
                    self.optimizer.step(1.0, grad_clip=1.0)
        self.optimizer_parts = self.trace.parts
        for share in shares:
            share.grad = None
            self.trace.forget(share.held)

    @contextmanager
    def _tracing(self) -> Iterator[_StandIns]:
        with ExitStack() as stack:
            # Whatever is compiled in there runs as it is written. Only if something was compiled:
            # else this would load the compiler.
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.on_cuda:
                stack.enter_context(_IsCuda())
            # The loss takes as many positions at a time as suit the device that is traced
            there = SUM_CHUNK_BYTES["cuda" if self.on_cuda else "cpu"]
            stack.enter_context(patch.dict(SUM_CHUNK_BYTES, meta=there))
            stack.enter_context(self.trace)
            yield stack.enter_context(_StandIns(self.trace, self.bf16))

    def _accumulated(self, p: Tensor) -> None:
        """A gradient is there; a sharded one is on its way to those that hold its rows."""
        assert p.grad is not None
        if self.whole:
            self.trace.rename(p.grad, "gradients")
        else:
            self.trace.forget(p.grad)
            p.grad = None

    def _gradients(self) -> None:
        with self.trace.part("gradients"):
            for share in self.shares:
                if share.requires_grad:
                    share.grad = torch.empty_like(share.held)
            for p in self.whole:
                p.grad = torch.empty_like(p)

    def micro_batch(self, batch: int, length: int) -> dict[str, int]:
        """Bytes by part at the fullest moment of forward and backward of (batch, length) tokens."""
        trace = self.trace
        with self._tracing() as stand:
            for p in self.params:
                p.grad = None
            if self.accumulates and self.whole:
                self._gradients()
            trace.restart()
            idx = torch.empty((batch, length), dtype=torch.int64, device="meta")
            trace.compiled = self.compiled
            with trace.part("activations"):
                with trace.keep_roots() if self.compiled else nullcontext():
                    loss = self.model(idx, idx, reduction="sum")
                stand.end_of_forward()
            with trace.part("workspace"):
                self._backward(loss)
            trace.compiled = False
        return trace.parts

    def _backward(self, loss: Tensor) -> None:
        if not self.compiled or self.shares:  # block by block
            loss.backward()
            return
        # A compiled backward pass gives all gradients at its end, and only then are they added.
        before = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        loss.backward()
        self.trace.compiled = False
        for p, grad in zip(self.params, before):
            if grad is not None and p.grad is not None:
                p.grad = grad.add_(p.grad)
