"""
Activation checkpointing: less memory for more arithmetic (Chen et al. 2016, arXiv 1604.06174).

A pass over a plain model. A recomputed module keeps its input only, and the backward pass runs it
again to have what lay between. `mlp` does so with the wide MLPs, where most of the memory is, for
about a tenth of a step's matrix products; `block` with whole blocks, for almost a third. The last
product of a recomputed module is not run again: nothing in its own backward pass needs its result.

Weights, their names and gradients stay what they were, to the bit. Floor 1.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Mode = Literal["none", "mlp", "block"]
MODES: tuple[Mode, ...] = get_args(Mode)  # in order of their cost in time


def recompute(model: Any, mode: Mode) -> None:
    """Has the model's MLPs ("mlp"), its blocks ("block") or nothing ("none") recomputed from now
    on, wherever there are gradients and no cache. The mode before is undone. ValueError for another
    one than now of a model that is sharded, whose classes are FSDP's."""
    for block in blocks_of(model):
        for name, module in (("mlp", block.mlp), ("block", block)):
            is_wanted, now = name == mode, hasattr(type(module), "plain")
            if is_wanted == now:
                continue
            if hasattr(block, "unshard"):
                raise ValueError(f"a sharded model cannot change to recompute {mode!r}")
            plain: Any = getattr(type(module), "plain", type(module))
            module.__class__ = _recomputed(plain) if is_wanted else plain


def blocks_of(model: nn.Module) -> list[Any]:
    """The model's blocks: the longest list of modules that each have an `mlp`."""
    lists = [
        list(m)
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) > 0 and all(hasattr(b, "mlp") for b in m)
    ]
    return max(lists, key=len)


@functools.cache
def _recomputed(plain: Any) -> Any:
    """The same class with a forward that keeps its input only.

    A class and not a wrapping module, so that names in a state dict stay; and not a patched
    `forward` of the instance, which torch.compile would trace anew for every block."""

    class Recomputed(plain):
        def forward(self, x: torch.Tensor, *rest: Any) -> Any:
            if not torch.is_grad_enabled():  # evaluation, with a cache or without
                return plain.forward(self, x, *rest)
            # The models draw no random numbers, so there is no generator's state to put back.
            return checkpoint(
                lambda x: plain.forward(self, x, *rest),
                x,
                use_reentrant=False,
                preserve_rng_state=False,
            )

    Recomputed.plain = plain
    Recomputed.__name__ = Recomputed.__qualname__ = plain.__name__
    return Recomputed
