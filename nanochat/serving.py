"""
A model made ready to serve: the same numbers with less work between them.

    ready = make_ready(model, dtype=torch.bfloat16, quantize="int8")
    engine = Engine(ready, tokenizer)

A copy of a plain model, in the dtype it computes in, cast once; the model itself is left as it is.
Layers that read the same input become one product (queries, keys and values; gate and up). On a CPU
small weights are laid out in memory as the product with a few rows reads them fastest, and large
ones multiplied from the side that suits the number of rows. Optionally the weights of the blocks
are kept as 8-bit integers (int8.py). A pass over modules, as in gpt-fast: no architecture is named
here. Floor 2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.int8 import quantize_linears
from nanochat.models.layers import large_product

LARGE_BYTES = 2 * 2**20, 8 * 2**20  # about a core's own cache, and what pays to turn round

# Children of a module that read the same input.
TOGETHER = (("c_q", "c_k", "c_v"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def make_ready(model: Any, dtype: torch.dtype | None = None, quantize: str = "none") -> Any:
    """A copy of the model for inference, in `dtype` (None: its own). UserError if `quantize` is
    neither "none" nor "int8"."""
    if quantize not in ("none", "int8"):
        raise UserError(f"--quantize={quantize} is not known; choose none or int8")
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        rotary = ready.rotary  # its angles stay in float32
        tables = rotary.cos, rotary.sin
        ready.to(dtype)
        rotary.cos, rotary.sin = tables
    if quantize == "int8":
        quantize_linears(ready)
    done: set[nn.Module] = set()
    for module in ready.modules():
        for names in TOGETHER:
            linears: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _join(linears)
                done.update(linears)
    for module in ready.modules():
        if type(module) is nn.Linear and module not in done:
            _arrange(module)
    return ready


class LargeLinear(nn.Linear):
    """A linear layer whose matrix is large, see layers.large_product."""

    def forward(self, x: Tensor) -> Tensor:
        return large_product(x, self.weight, self.bias)


def _arrange(linear: nn.Linear) -> None:
    """Makes a layer's product with a few rows fast: on a CPU, with MKL in float32, as measured by
    bench/products.py. Matrices that fit into a core's cache are stored by columns; those some times
    as large become a LargeLinear; the largest are read as they are, whatever one does."""
    weight = linear.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    if weight.nbytes <= LARGE_BYTES[0]:
        linear.weight = nn.Parameter(weight.t().contiguous().t(), requires_grad=False)
    elif weight.nbytes <= LARGE_BYTES[1]:
        linear.__class__ = LargeLinear


def _join(linears: list[Any]) -> None:
    """One product for all of them, found by layers.products; their weights become parts of its."""
    joined = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    joined.in_features = linears[0].in_features
    joined.out_features = sum(linear.out_features for linear in linears)
    weight = torch.cat([linear.weight for linear in linears])
    joined.weight = nn.Parameter(weight, requires_grad=False)
    _arrange(joined)
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
        joined.bias = nn.Parameter(bias, requires_grad=False)
    start = 0
    for linear in linears:
        end = start + linear.out_features
        linear.weight = nn.Parameter(joined.weight[start:end], requires_grad=False)
        if joined.bias is not None:
            linear.bias = nn.Parameter(joined.bias[start:end], requires_grad=False)
        start = end
    # Not as a child: the model's parameters stay those that its checkpoint names.
    linears[0].__dict__["joined"] = joined
