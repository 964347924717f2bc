"""
Matrix products of training in 8 bits: a pass over a plain model.

    fp8 = Fp8(model)                # its large inner linears can compute in 8 bits from now on
    with fp8.on():                  # and do so in here
        model(idx, targets).backward()

Weights stay float32 parameters under their own names. A linear's product is of two tensors rounded
to float8, each times one factor that brings its largest value to the largest that float8 has
(tensorwise, dynamic scaling); the sum over products is exact to float32. Inputs and weights are
rounded to e4m3, which has more digits, gradients to e5m2, which has more range (Micikevicius et al.
2022, arXiv 2209.05433). Outside of on() the linears are plain: evaluation, sampling and export know
nothing of 8 bits. Floor 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # what the hardware's instruction asks of every side of a product
SMALLEST = 128  # below, rounding costs more than the product saves
CAPABILITY = (8, 9)  # of CUDA devices with float8 products: Ada, Hopper and later


def round_to_fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x rounded to float8 at a scale that uses all of its range, the factor that undoes it)."""
    largest = torch.finfo(dtype).max
    amax = x.detach().abs().amax().float()
    scale = largest / amax.clamp(min=1e-12)  # all zeros stay zeros
    scaled = (x.float() * scale).clamp(-largest, largest)  # rounding may go beyond, to NaN
    return scaled.to(dtype), scale.reciprocal()


def _columns(x: Tensor) -> Tensor:
    """The same matrix, stored column by column."""
    return x.t().contiguous().t()


def _product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """(M, K) by rows times (K, N) by columns, the only layout Hopper has, unscaled again."""
    return torch._scaled_mm(
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


class _Fp8Linear(torch.autograd.Function):
    """y = x w^T and its gradients: (N, I), (O, I) -> (N, O). Nothing is rounded twice: what the
    forward pass rounded is kept for the backward pass, in a quarter of float32's memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = round_to_fp8(x, E4M3)
        w8, w_scale = round_to_fp8(weight, E4M3)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.x_dtype, ctx.w_dtype = x.dtype, weight.dtype
        # Fast accumulation drops digits that a gradient needs and an activation does not.
        return _product(x8, x_scale, w8.t(), w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = round_to_fp8(grads[0], E5M2)  # (N, O)
        x_grad = _product(g8, g_scale, _columns(w8), w_scale, ctx.x_dtype, fast=False)  # (N, I)
        w_grad = _product(
            g8.t().contiguous(), g_scale, _columns(x8), x_scale, ctx.w_dtype, fast=False
        )  # (O, I)
        return x_grad, w_grad, None


class _Switch:
    on = False


class Fp8Linear(nn.Linear):
    """A linear layer that computes in float8 while its switch is on, and is plain otherwise."""

    switch: _Switch

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's type if there is one."""
        rows = x.numel() // x.size(-1)
        if not self.switch.on or rows % MULTIPLE:
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Fp8Linear.apply(x.reshape(rows, -1), self.weight, dtype)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


class Fp8:
    """The pass. See the module docstring; `names` are the linears that were changed."""

    def __init__(self, model: Any) -> None:
        self._switch = _Switch()
        self.names: list[str] = []
        # The head is not among the matrices: its rounding is seen by the loss, and gains about 1%
        # (karpathy/nanochat, dev/LOG.md).
        inner = {id(p) for p in model.param_groups()["matrix"]}
        for name, module in model.named_modules():
            if type(module) is nn.Linear and id(module.weight) in inner and fits(module):
                module.__class__ = Fp8Linear  # the module, its parameters and their names stay
                cast(Fp8Linear, module).switch = self._switch
                self.names.append(name)
        if not self.names:
            raise UserError(
                f"--fp8: no linear of this model has sides of at least {SMALLEST} that are "
                f"multiples of {MULTIPLE}; leave --fp8 away"
            )

    @contextmanager
    def on(self) -> Iterator[None]:
        """In here the linears compute in 8 bits, forward and backward."""
        self._switch.on = True
        try:
            yield
        finally:
            self._switch.on = False


def fits(linear: nn.Linear) -> bool:
    """Whether float8 can and should serve for a linear of this size."""
    sides = (linear.in_features, linear.out_features)
    return all(side >= SMALLEST and side % MULTIPLE == 0 for side in sides)


def check_fp8(device: torch.device) -> None:
    """UserError where float8 products do not exist or are wrong: runs small ones and compares."""
    advice = "leave --fp8 away: bfloat16 needs no flag"
    if device.type != "cuda":
        raise UserError(f"--fp8 needs a CUDA device (Ada, Hopper or later), not {device}; {advice}")
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--fp8: {name} has no float8 products; {advice}")
    problem = try_fp8(device)
    if problem:
        raise UserError(f"--fp8: {problem}; {advice}")


def try_fp8(device: torch.device) -> str | None:
    """What is wrong with float8 products on this device, forward or backward; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(*shape, generator=generator).to(device).requires_grad_()
        for shape in ((64, 128), (256, 128), (64, 256))
    )
    exact = F.linear(x, w)
    try:
        rounded = _Fp8Linear.apply(x, w, torch.bfloat16)
        pairs = zip(
            (rounded, *torch.autograd.grad(rounded, (x, w), g.detach().bfloat16())),
            (exact, *torch.autograd.grad(exact, (x, w), g.detach())),
        )
        errors = [float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in pairs]
    except (RuntimeError, ValueError, NotImplementedError) as e:
        return f"a small float8 product fails here ({str(e).splitlines()[0]})"
    # e4m3 rounds each factor by up to 1/16, e5m2 by up to 1/8; sums average that
    if not max(errors) < 0.15:
        return f"small float8 products differ by {max(errors):.0%} from float32's"
    return None
