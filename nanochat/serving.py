"""
A model made ready to serve: the same numbers with less work between them.

    ready = make_ready(model, dtype=torch.bfloat16, quantize="int8")
    engine = Engine(ready, tokenizer)

A copy of a plain model, in the dtype it computes in, cast once; the model itself is left as it is.
Layers that read the same input become one product (queries, keys and values; gate and up). On a CPU
with a compiler matrices are packed in the order in which our own products read them
(cpu_kernels.py), in 16 bits where that changes nothing: what was imported or trained in bfloat16
takes half of the memory, and half of the time, as it is. Optionally weights are rounded: to
bfloat16, or those of the blocks to 8-bit integers (int8.py). A pass over modules, as in gpt-fast:
no architecture is named here. Floor 2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanochat import cpu_kernels
from nanochat.common import UserError, warn0
from nanochat.cpu_kernels import PackedLinear
from nanochat.int8 import Int8Linear, is_quantized

QUANTIZE = "none", "bfloat16", "int8"

Made = Callable[[nn.Linear], nn.Module]

# Children of a module that read the same input.
TOGETHER = (("c_q", "c_k", "c_v"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def make_ready(
    model: Any, dtype: torch.dtype | None = None, quantize: str = "none", pack: bool = True
) -> Any:
    """A copy of the model for inference, in `dtype` (None: its own). It has no losses any more
    where matrices are packed, which `pack` allows on a CPU. UserError if `quantize` is none of
    QUANTIZE, or not to be had here."""
    if quantize not in QUANTIZE:
        raise UserError(f"--quantize={quantize} is not known; choose {', '.join(QUANTIZE)}")
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        rotary = ready.rotary  # its angles stay in float32
        tables = rotary.cos, rotary.sin
        ready.to(dtype)
        rotary.cos, rotary.sin = tables
    pack = pack and _can_pack(ready)
    if quantize == "bfloat16" and not pack:
        raise UserError(
            "--quantize=bfloat16 holds the weights of a model that computes in float32 on a CPU, "
            "and needs a C++ compiler; elsewhere use --dtype=bfloat16"
        )
    parts: set[nn.Module] = set()
    for module in ready.modules():
        for names in TOGETHER:
            linears: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _join(linears)
                parts.update(linears)
    if pack:
        _pack(ready, parts, quantize)
    elif quantize == "int8":
        _replace(ready, parts, Int8Linear, None)
    return ready


def _join(linears: list[Any]) -> None:
    """One product for all of them, found by layers.products; their weights become parts of its."""
    joined = nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    joined.in_features = linears[0].in_features
    joined.out_features = sum(linear.out_features for linear in linears)
    weight = torch.cat([linear.weight for linear in linears])
    joined.weight = nn.Parameter(weight, requires_grad=False)
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


def _replace(model: Any, parts: set[nn.Module], inner: Made, outer: Made | None) -> None:
    """Puts what is made of a linear layer, or of joined ones, in its place: of those in the blocks
    by `inner`, of others by `outer`. `parts`: of joined layers."""
    blocks = set(next(m for m in model.modules() if isinstance(m, nn.ModuleList)).modules())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            made = inner if child in blocks else outer
            if made is None:
                continue
            if "joined" in vars(child):
                vars(child)["joined"] = made(vars(child)["joined"])
            if child in parts:
                child._parameters.clear()  # only its size is asked for
            elif is_quantized(child):
                setattr(module, name, made(child))


# ---- matrices as a CPU reads them


def _can_pack(model: Any) -> bool:
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        return False
    problem = cpu_kernels.problem()
    if problem and cpu_kernels.for_this_processor():  # otherwise nobody can do anything about it
        warn0(f"decoding is slower than it could be: {problem}")
    return not problem


def _pack(model: Any, parts: set[nn.Module], quantize: str) -> None:
    """Replaces linear layers, joined ones and a tied head by packed ones, in place. `parts`: of
    joined layers."""
    outside = "none" if quantize == "int8" else quantize  # int8 is for the blocks
    if model.lm_head is None:  # tied: the embedding is read by rows, as the head it is packed
        model.lm_head = _packed(model.head_weight, None, outside)

    def made(linear: nn.Linear, quantize: str) -> nn.Module:
        return _packed(linear.weight, linear.bias, quantize)

    _replace(model, parts, partial(made, quantize=quantize), partial(made, quantize=outside))


def _packed(weight: Tensor, bias: Tensor | None, quantize: str) -> PackedLinear:
    if quantize == "int8":
        return PackedLinear(weight, bias, torch.int8)
    exact = quantize == "bfloat16" or torch.equal(weight.bfloat16().float(), weight)
    return PackedLinear(weight, bias, torch.bfloat16 if exact else torch.float32)
