"""
Reinforcement learning's loss, and the model as the policy that it is trained on.

Each sampled token of a reply is made likelier by its reply's advantage. With several steps on the
same replies the model is no longer the one that wrote them: then the ratio of the probabilities
weighs each token, and may be clipped (PPO, arXiv 1707.06347). A penalty can hold the policy near
the model that it began as (GRPO, arXiv 2402.03300). Floor 4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nanochat.common import print0
from nanochat.dataloader import IGNORE, MicroBatch
from nanochat.distributed import local
from nanochat.shard import gathered, sharded_modules, twin

Forward = Callable[..., Tensor]


@dataclass
class PolicyBatch(MicroBatch):
    """Replies to train on. Everything is (B, T) and stands where the targets stand; what is not
    sampled (prompt, tool output, padding) has no target and counts nothing."""

    advantages: Tensor | None = None  # (B, T) or (B, 1), float32
    sampled: Tensor | None = None  # the engine's log-probabilities
    reference: Tensor | None = None  # those of the model that training began with
    old: Tensor | None = None  # those of the first step on these replies; None: this is the first
    now: Tensor | None = None  # those of the last pass, which is the trainer's own

    def loss(self, forward: Callable[..., Tensor]) -> Tensor:
        """(): the summed loss. `forward` is a Policy, which stands in for the model's."""
        return forward(self)


def policy_losses(
    log_probs: Tensor, batch: PolicyBatch, clip: float = 0.0, kl: float = 0.0
) -> Tensor:
    """Each token's loss, 0 where there is no target: (B, T) -> (B, T). Differentiable.

    -min(r A, clip(r, 1 - clip, 1 + clip) A) with r the ratio of the token's probability to what it
    was; clip=0 leaves r alone. Plus kl times r (exp(d) - d - 1) with d how much likelier the token
    is by the reference: never negative, and KL(policy || reference) in the mean (Schulman's k3);
    it is r that makes the gradient, too, that of the divergence (arXiv 2512.02556)."""
    assert batch.advantages is not None
    old = log_probs.detach() if batch.old is None else batch.old
    ratio = (log_probs - old).exp()
    gain = ratio * batch.advantages
    if clip:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * batch.advantages)
    losses = -gain
    if kl and batch.reference is not None:
        d = batch.reference - log_probs
        losses = losses + kl * ratio * (d.exp() - d - 1)
    return torch.where(batch.targets != IGNORE, losses, 0.0)


def within(model: Any, forward: Forward, vocab_size: int) -> Forward:
    """The model's forward with the first `vocab_size` rows of its head alone.

    A model may have more rows than its tokenizer has ids. The engine never samples those, so they
    are no part of what it draws from and must be none of what is trained: else the probabilities
    of the two differ by all that those rows hold."""
    if model.config.vocab_size == vocab_size:
        return forward
    head = model.param_groups()["head"][0]
    name = next(name for name, p in model.named_parameters() if p is head)

    if sharded_modules(model):
        return _within_sharded(model, forward, name, vocab_size)

    def narrow(*args: Any, **kwargs: Any) -> Tensor:
        # The plain module, compiled or not: parameters cannot be exchanged in a compiled one
        return functional_call(model, {name: head[:vocab_size]}, args, kwargs)

    return narrow


class _Inner(nn.Module):
    """A model's forward without what FSDP does before and after it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return type(self.model).forward(self.model, *args, **kwargs)


def _within_sharded(model: Any, forward: Forward, name: str, vocab_size: int) -> Forward:
    """The same where the head is whole only while the model computes."""
    inner = _Inner(model)

    def computing(*args: Any, **kwargs: Any) -> Tensor:
        rows = model.get_parameter(name)[:vocab_size]
        return functional_call(inner, {f"model.{name}": rows}, args, kwargs)

    def narrow(*args: Any, **kwargs: Any) -> Tensor:
        model.forward = computing
        try:
            return forward(*args, **kwargs)
        finally:
            del model.forward

    return narrow


class Policy:
    """The model in training, in the place of its forward in the training step.

    `begin(batches)` makes ready what the next steps train on; their losses then call it, and after
    the first of these steps compared(batches) says how it saw what the engine had sampled."""

    def __init__(
        self,
        model: Any,
        forward: Forward,
        vocab_size: int,
        *,
        clip: float = 0.0,
        kl: float = 0.0,
        reference: Any = None,
    ) -> None:
        """`forward`: the model, or the model compiled. `reference`: see frozen_copy."""
        self.clip, self.kl = clip, kl
        self.forward = within(model, forward, vocab_size)
        self.reference = reference and within(reference, reference, vocab_size)
        self.copy = reference

    @torch.no_grad()
    def begin(self, batches: Sequence[PolicyBatch]) -> None:
        """Gets the reference's log-probabilities, if there is a reference."""
        if self.reference is None:
            return
        # Ranks have unequal numbers of batches
        with gathered(self.copy):
            for batch in batches:
                batch.reference = -self.reference(batch.idx, batch.targets, reduction="none")

    def __call__(self, batch: PolicyBatch) -> Tensor:
        """Sum of the losses of the batch."""
        log_probs = -self.forward(batch.idx, batch.targets, reduction="none")
        batch.now = log_probs.detach()
        return policy_losses(log_probs, batch, self.clip, self.kl).sum()


def compared(batches: Sequence[PolicyBatch]) -> dict[str, float]:
    """What the first step on these replies saw of them, before it moved the weights; to be called
    after it, and what it saw is `old` from then on.

    Sums over the tokens: "tokens", "diff" and "diff_max" of |engine - trainer|, and "kl". It is the
    step's own passes that are looked at, compiled or not: a pass for this alone would cost a
    quarter of the step."""
    found = {"tokens": 0.0, "diff": 0.0, "diff_max": 0.0, "kl": 0.0}
    for batch in batches:
        assert batch.now is not None, "no step has been taken"
        batch.old, kept = batch.now, batch.targets != IGNORE
        if batch.sampled is not None:
            diff = (batch.sampled - batch.now)[kept].abs()
            found["tokens"] += diff.numel()
            found["diff"] += float(diff.sum())
            found["diff_max"] = max(found["diff_max"], float(diff.max()))
        if batch.reference is not None:
            d = (batch.reference - batch.now)[kept]
            found["kl"] += float((d.exp() - d - 1).sum())
    return found


def frozen_copy(model: Any, before_lora: bool = False) -> Any:
    """The model as it is now, for the KL penalty; says what memory that takes. `before_lora`: its
    weights will stand still, and the copy holds the same tensors, unless they are sharded."""
    shared = {id(p): p for p in model.parameters()} if before_lora else {}
    reference = twin(model) if sharded_modules(model) else copy.deepcopy(model, shared)
    reference.requires_grad_(False).eval()
    own = [p for p in reference.parameters() if id(p) not in shared]
    size = sum(local(p).numel() * p.element_size() for p in own)
    print0(f"--kl: a frozen copy of the model takes {size / 2**20:,.0f} MiB")
    return reference
