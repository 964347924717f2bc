"""
The loss of next-token prediction without its logits: chunk by chunk, never all of (N, V) at once.

With 65,536 tokens the logits of one row of 2,048 take half a gigabyte in float32, and a CPU spends
its time carrying them to memory and back. So positions are taken a chunk at a time: logits, cap,
cross-entropy; and where the loss is their sum, the gradients at once: what comes from above is
one number that can be multiplied in later (the way of Liger Kernel, arXiv 2410.10989). Where each
position's loss is wanted its gradient is not known yet, and the backward pass computes the chunk
again.

layers.token_losses is the door. Shape letters: see layers.py; N rows are positions, C those of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.models.attention import autocast_dtype

# Bytes of a chunk's logits in float32. On a CPU they should stay in its cache; on a GPU they must
# only be few beside everything else, and the chunks few too: compiled, their loop is unrolled.
SUM_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
# Where a kernel leaves the gradient in the logits' place, they are all that there is, and in what
# they are multiplied in. Few chunks are better still: each adds to the whole gradient of the head.
IN_PLACE_CHUNK_BYTES = 1 << 30
# Each chunk reads the whole head: below this many rows that is what takes the time.
MIN_CHUNK_ROWS = 128
# When every row's loss is wanted, a second chunk costs all their logits a second time. It must save
# real memory.
ROWS_CHUNK_BYTES = 512 << 20


def rows_of_chunk(x: Tensor, head: Tensor, reduction: str) -> int:
    """How many rows (positions) to take at a time: (N, D), (V, D)."""
    device = x.device.type
    if reduction != "none" and device != "cpu" and _kernel_for(x) and _needs_gradient(x, head):
        row = head.size(0) * _compute_dtype(x, head).itemsize
        return max(MIN_CHUNK_ROWS, IN_PLACE_CHUNK_BYTES // row)
    return chunk_rows(head.size(0), device, reduction)


def chunk_rows(vocab_size: int, device: str, reduction: str) -> int:
    """The same where chunks are made of float32, on a device of this type ("cpu", "cuda", ...)."""
    size = SUM_CHUNK_BYTES.get(device, SUM_CHUNK_BYTES["cuda"])
    if reduction == "none":
        size = ROWS_CHUNK_BYTES
    return max(MIN_CHUNK_ROWS, size // (4 * vocab_size))


def sum_of_losses(
    x: Tensor, head: Tensor, targets: Tensor, softcap: float, chunk: int, all_kept: bool = False
) -> Tensor:
    """Sum of the cross-entropies in nats: (N, D), (V, D), (N,) -> ().

    Rows whose target is -1 count nothing; `all_kept` promises that there is none. Differentiable
    once, in x and head."""
    if not _needs_gradient(x, head) or _compute_dtype(x, head) == torch.float16:
        # In float16 a gradient below 6e-8 is zero, as those of unlikely tokens are unless the loss
        # is scaled up first: there the scale has to be known, and that is in the backward pass.
        return losses_of_rows(x, head, targets, softcap, chunk).sum()
    return _SumOfLosses.apply(x, head, targets, softcap, chunk, all_kept)


def losses_of_rows(x: Tensor, head: Tensor, targets: Tensor, softcap: float, chunk: int) -> Tensor:
    """Cross-entropies in nats, 0 where the target is -1: (N, D), (V, D), (N,) -> (N,).

    Differentiable once, in x and head; the backward pass computes each chunk's logits again."""
    if _needs_gradient(x, head):
        return _LossesOfRows.apply(x, head, targets, softcap, chunk)
    return _forward(x, head, targets, softcap, chunk)


def _needs_gradient(x: Tensor, head: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or head.requires_grad)


def _compute_dtype(x: Tensor, head: Tensor) -> torch.dtype:
    """What F.linear would multiply in here: autocast's dtype, if that is on. It is asked once, and
    the casts are written out, because it is off again in the backward pass."""
    if dtype := autocast_dtype(x.device.type):
        return dtype
    if x.dtype != head.dtype:
        raise ValueError(f"hidden states are {x.dtype}, the head is {head.dtype}, no autocast")
    return x.dtype


def _forward(x: Tensor, head: Tensor, targets: Tensor, softcap: float, chunk: int) -> Tensor:
    dtype = _compute_dtype(x, head)
    x, head = x.to(dtype), head.to(dtype)
    rows = zip(x.split(chunk), targets.split(chunk))
    return torch.cat([_chunk(x_c, head, t_c, softcap)[0] for x_c, t_c in rows])


def _chunk(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, ...]:
    """(C, D), (V, D), (C,) -> losses (C,), log-probabilities (C, V), tanh of the cap (C, V).

    All in float32 or wider: tanh and the exponentials lose what decides in anything narrower. Only
    fresh tensors are changed in place."""
    logits = F.linear(x, head)
    logits = capped = logits.to(_wide(logits.dtype))  # (C, V)
    if softcap:
        capped = logits.div_(softcap).tanh_()
        logits = capped * softcap
    logp = logits.log_softmax(-1)  # (C, V)
    kept = targets != -1
    wanted = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]  # (C,)
    return torch.where(kept, -wanted, 0.0), logp, capped


def _slopes(
    logp: Tensor, capped: Tensor, targets: Tensor, softcap: float, scale: Tensor | None
) -> Tensor:
    """Gradient of the losses, each times its scale (C,), in the uncapped logits: (C, V).

    The softmax, less one at the target; times the cap's own slope, 1 - tanh^2."""
    slopes = logp.exp_()
    at = targets.clamp(min=0)[:, None]  # (C, 1)
    slopes.scatter_add_(1, at, slopes.new_full((1, 1), -1.0).expand_as(at))
    if scale is not None:
        slopes = slopes.mul_(scale[:, None])
    if softcap:
        slopes = slopes.addcmul_(slopes, capped.square_(), value=-1)
    return slopes


def losses_in_place(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """(C, V) logits, not capped, (C,) -> losses (C,); in the logits' place their gradient.

    What _chunk and _slopes compute, but without a gather or a scatter, so that a compiler makes one
    kernel of it, which reads logits and writes slopes. With a gather in it, it kept the float32
    log-probabilities of every chunk, to look up all the wanted ones at the end."""
    wide = logits.to(_wide(logits.dtype))
    capped = torch.tanh(wide / softcap) if softcap else wide
    scores = capped * softcap if softcap else wide  # (C, V)
    log_sum = scores.logsumexp(-1, keepdim=True)  # (C, 1)
    at = targets[:, None]
    is_target = torch.arange(logits.size(1), device=logits.device) == at  # (C, V)
    wanted = torch.where(is_target, scores, 0.0).sum(-1, keepdim=True)
    slopes = (scores - log_sum).exp() - is_target.to(scores.dtype)
    if softcap:
        slopes = slopes * (1 - capped.square())
    kept = at != -1
    logits.copy_(torch.where(kept, slopes, 0.0))
    return torch.where(kept, log_sum - wanted, 0.0)[:, 0]


_kernels: list[Callable[..., Tensor]] = []  # the last one is used


@contextmanager
def loss_kernel(kernel: Callable[..., Tensor]) -> Iterator[None]:
    """In here sums of losses go through `kernel`, which is losses_in_place, compiled. Not on a CPU,
    where PyTorch's own kernels are faster than the compiler's."""
    _kernels.append(kernel)
    try:
        yield
    finally:
        _kernels.pop()


def _kernel_for(x: Tensor) -> Callable[..., Tensor] | None:
    if torch.compiler.is_compiling():
        return losses_in_place
    return _kernels[-1] if _kernels and x.device.type != "cpu" else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Gradients:
    """Collects the gradients in x and head over the chunks.

    The head's is summed in float32 whatever is multiplied in: in bfloat16 each addition would round
    to 8 bits, and once the sum is 256 times a chunk's share that share would vanish. One matmul
    over all rows rounds once. Where the master weight is float32 it is the gradient itself, so it
    costs no memory either."""

    def __init__(self, head: Tensor, needs: tuple[bool, bool]) -> None:
        self.head, self.needs = head, needs
        self.of_x: list[Tensor] = []
        self.of_head = head.new_zeros(head.shape, dtype=_wide(head.dtype)) if needs[1] else None

    def add(self, slopes: Tensor, x: Tensor) -> None:
        """Of one chunk: (C, V), (C, D)."""
        slopes = slopes.to(x.dtype)
        if self.needs[0]:
            self.of_x.append(slopes @ self.head)  # (C, D)
        if self.of_head is None:
            return
        if self.of_head.dtype == x.dtype:
            self.of_head.addmm_(slopes.T, x)  # (V, D): without a second one beside it
        else:
            self.of_head += slopes.T @ x

    def result(self, x: Tensor, head: Tensor) -> tuple[Tensor | None, Tensor | None]:
        of_x = torch.cat(self.of_x).to(x.dtype) if self.needs[0] else None
        return of_x, None if self.of_head is None else self.of_head.to(head.dtype)


class _SumOfLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float, chunk: int, kept: bool
    ) -> Tensor:
        dtype = _compute_dtype(x, head)
        x_low, head_low = x.to(dtype), head.to(dtype)
        gradients = _Gradients(head_low, ctx.needs_input_grad[:2])
        losses = []
        kernel = _kernel_for(x)
        for x_c, t_c in zip(x_low.split(chunk), targets.split(chunk)):
            if kernel:
                slopes = F.linear(x_c, head_low)  # (C, V), the logits yet
                nll = kernel(slopes, t_c, softcap)
            else:
                nll, logp, capped = _chunk(x_c, head_low, t_c, softcap)
                scale = None if kept else (t_c != -1).to(logp.dtype)
                slopes = _slopes(logp, capped, t_c, softcap, scale)
                del logp, capped
            losses.append(nll)
            gradients.add(slopes, x_c)
            del slopes  # before there is the next chunk's
        ctx.save_for_backward(*gradients.result(x, head))
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_head = (
            # Multiplied in float32: the factor, one over the number of tokens for one, would
            # otherwise be rounded to bfloat16 and every gradient be off by as much.
            None if saved is None else (saved.to(_wide(saved.dtype)) * grads[0]).to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return of_x, of_head, None, None, None, None


class _LossesOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(x, head, targets)
        ctx.softcap, ctx.chunk, ctx.dtype = softcap, chunk, _compute_dtype(x, head)
        return _forward(x, head, targets, softcap, chunk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, head, targets = ctx.saved_tensors
        x_low, head_low = x.to(ctx.dtype), head.to(ctx.dtype)
        gradients = _Gradients(head_low, ctx.needs_input_grad[:2])
        scale = torch.where(targets != -1, grads[0], 0.0)  # (N,)
        pieces = (x_low.split(ctx.chunk), targets.split(ctx.chunk), scale.split(ctx.chunk))
        for x_c, t_c, s_c in zip(*pieces):
            _, logp, capped = _chunk(x_c, head_low, t_c, ctx.softcap)
            slopes = _slopes(logp, capped, t_c, ctx.softcap, s_c)
            del logp, capped
            gradients.add(slopes, x_c)
            del slopes
        return *gradients.result(x, head), None, None, None
