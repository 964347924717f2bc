"""
Weights as 8-bit integers, a scale for each row: half of bfloat16's memory traffic in decoding.

    quantize_linears(model)   # every linear layer of the blocks; embeddings, head and norms stay

Symmetric, by the largest magnitude of each output row (absmax), as in gpt-fast's weight-only int8.
Activations stay as they are: a weight is multiplied as the integer that it is and the product
scaled afterwards, which is the same sum. Its price in bits per byte is measured by
bench/decode_speed.py. Floor 0.75.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) floats -> the same as int8, and the (out,) float32 scales."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127  # a row of zeros stays zeros
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights."""

    weight: Tensor  # (out, in) int8
    scale: Tensor  # (out,) in the dtype of the activations

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = rounded(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # On a GPU the cast is fused into the product where the step is compiled; on a CPU without
        # kernels of ours (cpu_kernels.py) this saves memory, and takes longer.
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def is_quantized(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer of the blocks is one of those. Small ones (gates) stay as they are: they cost
    nothing."""
    return type(linear) is nn.Linear and min(linear.weight.shape) >= 16


def quantize_linears(model: Any) -> int:
    """Replaces the linear layers inside of the blocks, in place; returns how many."""
    count = 0
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for module in blocks.modules():
        for name, child in list(module.named_children()):
            if is_quantized(child):
                setattr(module, name, Int8Linear(child))
                count += 1
    return count
