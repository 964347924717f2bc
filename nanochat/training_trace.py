"""
One training step without a number in it: what each part of it takes in memory.

The model's own code and the optimizer's run on the meta device under memory_trace.py. So an
architecture that was written tomorrow is planned for today, and nothing here knows one. What the
meta device lacks is put in its place: bfloat16 autocast, attention that keeps no scores, the two
reads that need values. The loss is not compiled with the trunk: see compiling.py. Floor 1.75.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanochat.memory_trace import MemoryTrace
from nanochat.models import loss
from nanochat.models.loss import SUM_CHUNK_BYTES, loss_kernel


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


class _WeightedNorm(torch.autograd.Function):
    """RMSNorm with weights as CUDA's kernel has it: keeps input, weights and one float per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _losses_in_place(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """What the kernel of that name in loss.py takes when it is compiled: the losses alone."""
    return torch.empty_like(targets, dtype=torch.float32)


class _IsCuda(TorchFunctionMode):
    """Tensors say that they lie on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


class _StandIns:
    """Functions that take the place of PyTorch's while active: autocast, attention, norms.

    A TorchFunctionMode would not do: it does not reach what the backward pass recomputes."""

    def __init__(self, trace: MemoryTrace, bf16: bool, on_cuda: bool) -> None:
        self.trace, self.bf16, self.on_cuda = trace, bf16, on_cuda
        self.casts: dict[int, Tensor] = {}  # of weights: autocast makes each once a forward pass
        self.in_forward = True
        self.plain = F.linear, F.scaled_dot_product_attention, F.rms_norm

    def __enter__(self) -> _StandIns:
        functions: Any = F
        functions.linear = self._linear
        functions.scaled_dot_product_attention = self._attention
        functions.rms_norm = self._rms_norm
        return self

    def __exit__(self, *error: object) -> None:
        functions: Any = F
        functions.linear, functions.scaled_dot_product_attention, functions.rms_norm = self.plain

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        cast = self._cast
        return self.plain[0](cast(x), cast(weight), None if bias is None else cast(bias))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (self._cast(t) for t in (q, k, v))
        for t in (q, k, v):
            self.trace._fill(t)
        return _Attention.apply(q, k, v)

    def _rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None, eps: float) -> Tensor:
        # Compiled it is fused like anything pointwise
        if weight is None or self.trace.compiled or not self.on_cuda:
            return self.plain[2](x, shape, weight, eps)
        return _WeightedNorm.apply(x, weight)

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
            narrow = torch.bfloat16 if self.bf16 else None
            stack.enter_context(patch.object(loss, "autocast_dtype", lambda device: narrow))
            if self.compiled and self.on_cuda:
                stack.enter_context(loss_kernel(_losses_in_place))
            stack.enter_context(self.trace)
            yield stack.enter_context(_StandIns(self.trace, self.bf16, self.on_cuda))

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
            with trace.part("activations"):
                with patch.object(self.model, "hidden", self._hidden):
                    total = self.model(idx, idx, reduction="sum")
                stand.end_of_forward()
            with trace.part("workspace"):
                self._backward(total)
        return trace.parts

    def _hidden(self, *args: Any) -> Tensor:
        """The trunk, which is what is compiled."""
        if not self.compiled:
            return type(self.model).hidden(self.model, *args)
        trace = self.trace
        with trace.keep_roots():
            trace.compiled = True
            x = type(self.model).hidden(self.model, *args)
            trace.compiled = False
        trace._fill(x)

        def backward_begins(grad: Tensor) -> None:
            trace.compiled = trace.in_backward = True

        x.register_hook(backward_begins)
        return x

    def _backward(self, total: Tensor) -> None:
        before: list[Tensor | None] = []
        if self.compiled and not self.shares:  # else block by block
            # A compiled backward pass gives all gradients at its end, and only then are they added.
            before = [p.grad for p in self.params]
            for p in self.params:
                p.grad = None
        total.backward()
        self.trace.compiled = self.trace.in_backward = False
        for p, grad in zip(self.params, before):
            if grad is not None and p.grad is not None:
                p.grad = grad.add_(p.grad)
