"""
LoRA: train small matrices beside large ones that stand still (Hu et al. 2021, arXiv 2106.09685).

A linear y = W x becomes y = W x + (alpha / rank) B A x, with A (rank, in) and B (out, rank). Only A
and B get gradients and optimizer state, so that a model trains where its weights fit but Adam's
three copies of them do not. B is zero at the start: the first step sees the model as it was.

    python -m scripts.chat_sft --source=base --lora_rank=16
    python -m scripts.hf_export --source=sft --out=tuned         # merged: a plain model

    optimizer = adapt(model, args)     # a pass over a plain model; args are LoraFlags

A checkpoint of such a run holds W, A and B, which is what an exact resume needs. Whoever loads it
into a plain model (chat, evaluation, export, the next stage) gets W + (alpha / rank) B A under the
plain names: see merged_rows and checkpoint.load_weights. Floor 2.25.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError, print0
from nanochat.optim import MuonAdamW, ParamGroup
from nanochat.recompute import blocks_of

SUFFIXES = (".lora_a", ".lora_b", ".lora_scale")


@dataclass
class LoraFlags:
    """Training of small matrices beside frozen weights."""

    lora_rank: int = 0
    """LoRA: freeze the weights and train matrices of this rank beside those of the blocks (8 to 64
    are usual), for less memory; 0: train all weights."""
    lora_alpha: float = 32.0
    """LoRA's matrices count alpha / rank times."""
    lora_lr: float = 5e-4
    """AdamW learning rate of LoRA's matrices at its peak, whatever --init_lr_frac says. Narrow
    models bear more (docs/06-finetuning.md)."""


class LoraLinear(nn.Linear):
    """A linear layer with LoRA's two matrices beside its own, which gets no gradient."""

    lora_a: nn.Parameter  # (rank, in)
    lora_b: nn.Parameter  # (out, rank)
    lora_scale: Tensor  # (): alpha / rank; a buffer, so that a checkpoint says how to merge

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in autocast's type if there is one."""
        y = F.linear(x, self.weight, self.bias)
        return y + self.lora_scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: Any, rank: int, alpha: float, seed: int = 0) -> int:
    """Freezes the model and puts LoRA's matrices beside the linears of its blocks, attention and
    MLP; returns how many. Those with a side of no more than `rank` are left: nothing would be
    small about it. A depends on the seed alone, whatever the device.

    UserError if the rank leaves no linear."""
    if rank < 1:
        raise UserError(f"--lora_rank={rank} must be at least 1, or 0 to train all weights")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    count = 0
    for block in blocks_of(model):
        for module in block.modules():
            if type(module) is nn.Linear and min(module.weight.shape) > rank:
                # The module, its weight and its names stay; see recompute.py for why a class
                module.__class__ = LoraLinear
                _add_matrices(cast(LoraLinear, module), rank, alpha, generator)
                count += 1
    if not count:
        raise UserError(
            f"--lora_rank={rank}: no matrix in the model's blocks has both sides above that; use a "
            "smaller rank, or --lora_rank=0 to train all weights"
        )
    return count


def _add_matrices(linear: LoraLinear, rank: int, alpha: float, generator: torch.Generator) -> None:
    """A is Gaussian, with outputs as large as its inputs; B is zero."""
    device = linear.weight.device
    if device.type == "meta":  # to plan memory: only shapes count
        a = torch.empty(rank, linear.in_features, device=device)
    else:
        a = torch.randn(rank, linear.in_features, generator=generator).to(device)
    linear.lora_a = nn.Parameter(a * linear.in_features**-0.5)
    linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
    linear.register_buffer("lora_scale", torch.full((), alpha / rank, device=device))


def lora_optimizer(model: Any, lr: float, shard: str = "zero") -> MuonAdamW:
    """AdamW, as in the paper, of what has gradients, and of nothing else. Muon's steps would be of
    full rank in A and B, whose product alone means something."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return MuonAdamW([ParamGroup("adamw", params, lr, betas=(0.9, 0.999), eps=1e-8)], shard)


def adapt(model: Any, args: Any) -> MuonAdamW:
    """Adds LoRA to the model as the flags say (LoraFlags and TrainFlags), prints how much is
    trained, and returns the optimizer."""
    if args.fp8:
        raise UserError("--fp8 computes in the matrices that --lora_rank freezes; leave --fp8 away")
    num_params = sum(p.numel() for p in model.parameters())
    count = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    optimizer = lora_optimizer(model, args.lora_lr, args.shard)
    trained = sum(p.numel() for p in optimizer.named.values())
    print0(
        f"LoRA of rank {args.lora_rank} beside {count} matrices: {trained:,} parameters are "
        f"trained, {num_params:,} stand still ({trained / num_params:.2%})"
    )
    return optimizer


def has_lora(names: Any) -> bool:
    """Whether there are LoRA's matrices among the names of a state dict."""
    return any(name.endswith(SUFFIXES) for name in names)


def merged_rows(
    get: Callable[[str], Tensor],
    names: Container[str],
    name: str,
    rows: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Those rows (first, one past the last) of the tensor of that name that `get` gives; if there
    are LoRA's matrices beside it among `names`, merged with them, as a plain model has it."""
    tensor = get(name)
    if not tensor.ndim:
        return tensor
    some, stem = slice(*rows), name.removesuffix(".weight")
    if f"{stem}.lora_a" not in names:
        return tensor[some]
    a, b, scale = (get(stem + suffix) for suffix in SUFFIXES)
    merged = (tensor[some].to(device), b[some].to(device), a.to(device))
    return torch.addmm(*merged, alpha=float(scale))
