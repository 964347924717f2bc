"""
Weights as 8-bit integers, a scale for each row: half of bfloat16's memory traffic in decoding.

    Int8Linear(linear)   # in a linear layer's place, as serving.py has it in the blocks

Symmetric, by the largest magnitude of each output row (absmax), as in gpt-fast's weight-only int8.
Activations stay as they are: a weight is multiplied as the integer that it is and the product
scaled afterwards, which is the same sum. Its price in bits per byte is measured by
bench/decode_speed.py. Floor 0.75.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floats -> the same as int8, and the (out,) float32 scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127  # a row of zeros stays zeros
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, for inference."""

    weight: Tensor  # (out, in) int8
    scale: Tensor  # (out,) float32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        if x.numel() == self.in_features and torch.compiler.is_compiling():
            # One row, as a sum that becomes one kernel and reads each weight once, as it is
            y = (self.weight * x.flatten().float()).sum(-1).view(*x.shape[:-1], -1)
        else:
            # The weights are written out once more, in the dtype of x. Times the scale in float32:
            # in that of x inductor would take PyTorch's _weight_int8pack_mm, which on a GPU has a
            # thread for each product, and reads weights in no order.
            y = F.linear(x, self.weight.to(x.dtype)).float()
        y = y * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def is_quantized(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer of the blocks is one of those. Small ones (gates) stay as they are: they cost
    nothing."""
    return type(linear) is nn.Linear and min(linear.weight.shape) >= 16
