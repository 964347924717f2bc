"""
The optimizer: Muon for the weight matrices, AdamW for everything else, on one rank or many.

With N ranks every element of the state has one owner, unless --shard=none. A step has three phases:
the reductions of all gradients are started; as each arrives it is updated and its parameters' way
back is started; all are waited for at the end (nanochat/communication.py). One rank is the same
code with nothing to send. Between the first two phases stands the global norm, by which gradients
are clipped or refused. Parameters may have any shape. Where they are sharded, a matrix's momentum
is too; the matrix comes together with its owner to be orthogonalised, once. The arithmetic:
nanochat/updates.py. Floor 2.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.communication import Bucket, Owned, Ranks, Sharded, ShardedMatrices
from nanochat.distributed import local, shard_group
from nanochat.schedule import width_lr_scale
from nanochat.updates import (
    adamw_update,
    direction,
    look_ahead,
    move,
    muon_update,
    neuron_dim,
    stretch_of,
)


@dataclass
class ParamGroup:
    """Parameters of one kind and their hyperparameters at the peak of the schedule."""

    kind: str  # "muon" | "adamw"
    params: dict[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)  # adamw
    eps: float = 1e-10  # adamw


class MuonAdamW:
    """See the module docstring. `step` takes what the schedule says for this step.

    `shard`: none or zero, for parameters that every rank has; those that are sharded say so
    themselves. `ranks` takes the place of those of this run, to plan memory."""

    def __init__(
        self, groups: list[ParamGroup], shard: str = "zero", ranks: Ranks | None = None
    ) -> None:
        self.groups = groups
        self.state: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of this rank's parts only
        self.num_steps = 0  # steps taken, for AdamW's bias correction
        self.named = {name: p for group in groups for name, p in group.params.items()}
        self.ranks = ranks or Ranks.of(list(self.named.values()))
        self.buckets = [(g, b) for g in groups for b in make_buckets(g, shard, self.ranks)]
        self.fused = False

    def fuse(self) -> None:
        """Compiles the updates: torch.compile, which takes a while at the first step."""
        self.fused = True

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        return (compiled(function) if self.fused else function)(*args)

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def step(
        self,
        lr_multiplier: float,
        momentum: float = 0.95,
        grad_clip: float = 0.0,
        decay_multiplier: float = 1.0,
    ) -> Tensor:
        """Takes one step with gradients summed over ranks; returns their global norm, a 0-d tensor.

        The norm is that of the whole gradient, after the sum, so it and the clipping are the same
        at any number of ranks. If it is not finite nothing moves: whoever reads it on the host
        should hand it to refuse_divergence(). Gradients are used up: call zero_grad() before the
        next backward pass."""
        for _, bucket in self.buckets:
            bucket.reduce()
        for _, bucket in self.buckets:
            bucket.wait()
        norm = self._global_norm()
        clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else norm.new_ones(())
        scale = torch.where(norm.isfinite(), clip, 0.0)
        self.num_steps += 1
        # Numbers would be constants of the compiled step, and each new value compile it again
        how = {
            id(g): (
                torch.tensor(g.lr * lr_multiplier),
                torch.tensor(g.lr * lr_multiplier * g.weight_decay * decay_multiplier),
            )
            for g in self.groups
        }
        for group, bucket in self.buckets:
            if isinstance(bucket, ShardedMatrices):
                self._gather(group, bucket, torch.tensor(momentum), scale)
        for group, bucket in self.buckets:
            if isinstance(bucket, ShardedMatrices):
                self._orthogonalize(group, bucket, scale)
            elif group.kind == "muon":
                self._muon(group, bucket, how[id(group)], torch.tensor(momentum), scale)
            else:
                self._adamw(group, bucket, how[id(group)], scale)
            bucket.give_back()
        for group, bucket in self.buckets:
            bucket.finish()
            if isinstance(bucket, ShardedMatrices):
                stretch = stretch_of(next(iter(bucket.params.values())).shape)
                self._run(move, bucket.weights, bucket.at_shards(), *how[id(group)], scale, stretch)
        return norm

    def _global_norm(self) -> Tensor:
        total = torch.zeros((), device=local(next(iter(self.named.values()))).device)
        if mine := [g for _, bucket in self.buckets for g in bucket.grads]:
            total = torch.stack(torch._foreach_norm(mine)).float().square().sum()
        if self.ranks.size > 1 and not all(bucket.sees_all for _, bucket in self.buckets):
            self.ranks.all_reduce(total).wait()
        return total.sqrt()

    def _muon(
        self,
        group: ParamGroup,
        bucket: Bucket,
        rates: tuple[Tensor, Tensor],
        momentum: Tensor,
        scale: Tensor,
    ) -> None:
        """Whole matrices of one shape go through in one batch."""
        states = [self._state(n, group, bucket) for n in bucket.names]
        if states:
            self._run(
                muon_update,
                bucket.weights,
                bucket.grads,
                [s["momentum_buffer"] for s in states],
                [s["neuron_moment"] for s in states],
                rates[0],
                momentum,
                rates[1],
                scale,
                _muon_dtype(scale),
            )

    def _gather(
        self, group: ParamGroup, bucket: ShardedMatrices, momentum: Tensor, scale: Tensor
    ) -> None:
        momenta = [self._state(n, group, bucket)["momentum_buffer"] for n in bucket.names]
        bucket.to_owners(self._run(look_ahead, bucket.grads, momenta, momentum, scale))

    def _orthogonalize(self, group: ParamGroup, bucket: ShardedMatrices, scale: Tensor) -> None:
        x = bucket.at_owner()
        if bucket.owned:
            second = [self._state(n, group, bucket)["neuron_moment"] for n in bucket.owned]
            x = self._run(direction, x, second, scale, _muon_dtype(scale))
        bucket.to_shards(x)

    def _adamw(
        self, group: ParamGroup, bucket: Bucket, rates: tuple[Tensor, Tensor], scale: Tensor
    ) -> None:
        bias1, bias2 = (torch.tensor(1 - beta**self.num_steps) for beta in group.betas)
        for name, p, grad in zip(bucket.names, bucket.weights, bucket.grads):
            state = self._state(name, group, bucket)
            self._run(
                adamw_update,
                p,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                *rates,
                bias1,
                bias2,
                scale,
                group.betas,
                group.eps,
            )

    # ---------------------------------------------------------------------------------------------
    # State

    def _state(self, name: str, group: ParamGroup, bucket: Bucket) -> dict[str, Tensor]:
        """This rank's parts of what a parameter remembers."""
        if name not in self.state:
            p = local(group.params[name].detach())
            for entry, shape in state_shapes(group, name).items():
                if part := bucket.part(name, entry, shape):
                    self.state[name][entry] = p.new_zeros(bucket.local_shape(name, part, shape))
        return self.state[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as "<parameter>/<entry>" copies on the CPU, on rank 0 ({} elsewhere).

        It knows nothing of the number of ranks, nor of --shard; any may load it. One tensor at a
        time comes together on rank 0's device. All ranks must call."""
        result: dict[str, Tensor] = {}
        if not self.ranks.has_rank0:
            return result
        for group, bucket in self.buckets:
            for name, p in bucket.params.items():
                mine = self._state(name, group, bucket)
                for entry, shape in state_shapes(group, name).items():
                    whole = self.ranks.to_rank0(
                        mine.get(entry), bucket.held(name, entry, shape), shape, local(p.detach())
                    )
                    if whole is not None:
                        result[f"{name}/{entry}"] = whole.to("cpu", copy=whole.device.type == "cpu")
        return result

    def load_state_dict(self, get: Callable[[str], Tensor], num_steps: int) -> None:
        """Takes this rank's parts of a saved state; `get("<parameter>/<entry>")` gives a tensor,
        of which no more is read than those (checkpoint.optim_reader maps the file)."""
        self.num_steps = num_steps
        for group, bucket in self.buckets:
            for name in bucket.params:
                state = self._state(name, group, bucket)
                for entry, held in state.items():
                    shape = state_shapes(group, name)[entry]
                    part = bucket.part(name, entry, shape)
                    assert part is not None
                    whole = get(f"{name}/{entry}").reshape(-1)
                    state[entry] = (
                        whole[part.start : part.stop].view(held.shape).to(held.device, copy=True)
                    )


def state_shapes(group: ParamGroup, name: str) -> dict[str, list[int]]:
    """What a parameter of that group remembers, whole."""
    shape = list(group.params[name].shape)
    if group.kind != "muon":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    moment = list(shape)
    moment[neuron_dim(group.params[name].shape)] = 1
    return {"momentum_buffer": shape, "neuron_moment": moment}


# AdamW parameters of fewer elements travel together: a transfer takes some time however small it is
SMALL = 1 << 20


def make_buckets(group: ParamGroup, shard: str, ranks: Ranks) -> list[Bucket]:
    """The group's parameters as they travel: matrices of one shape together, which are updated in
    one batch; other large ones alone, small ones together."""
    params = list(group.params.items())
    if not params:
        return []
    together: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, p in params:
        key = p.shape if group.kind == "muon" else (name if p.numel() >= SMALL else None)
        together[key][name] = p
    load = [0] * ranks.size
    # The largest first, so that the smaller ones even out what the ranks own
    sets = sorted(together.values(), key=lambda s: -next(iter(s.values())).numel())
    is_muon = group.kind == "muon"
    if shard_group(params[0][1]) is not None:
        return [ShardedMatrices(s, ranks, load) if is_muon else Sharded(s, ranks) for s in sets]
    if shard == "none" or ranks.size == 1:
        return [Bucket(s, ranks) for s in sets]
    return [Owned(s, ranks, is_muon, load) for s in sets]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _muon_dtype(like: Tensor) -> torch.dtype:
    """bfloat16 is enough for directions, and native on GPUs; elsewhere it is slow or absent."""
    return torch.bfloat16 if like.is_cuda else torch.float32


def refuse_divergence(norm: float, step: int) -> None:
    """UserError if the norm that a step returned is not finite; that step has moved nothing."""
    if not math.isfinite(norm):
        raise UserError(
            f"the gradient of step {step} has norm {norm}; lower --matrix_lr, "
            "--embedding_lr and --unembedding_lr, or set --grad_clip=1.0"
        )


# How each kind of parameter that a model names (param_groups) is optimized by AdamW: which rate, in
# what share, with which betas. Rates of tables and head are for width 768 and fall with its root.
@dataclass(frozen=True)
class AdamWKind:
    rate: str  # "embedding_lr" | "unembedding_lr" | "scalar_lr"
    share: float = 1.0
    betas: tuple[float, float] = (0.8, 0.95)


ADAMW_KINDS = {
    "embedding": AdamWKind("embedding_lr"),
    "value_embedding": AdamWKind("embedding_lr", 0.5),
    "head": AdamWKind("unembedding_lr"),
    "vector": AdamWKind("unembedding_lr"),  # norm weights and biases
    "residual_scale": AdamWKind("scalar_lr", 0.01),  # each moves the whole stream
    "embedding_scale": AdamWKind("scalar_lr", betas=(0.96, 0.95)),
    "gate": AdamWKind("scalar_lr", 2.0),
}


def make_optimizer(
    model: Any,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    lr_frac: float = 1.0,
    scalar_lr: float = 0.1,
    shard: str = "zero",
) -> MuonAdamW:
    """The optimizer for a model of ours. AdamW rates are for width 768 and scale by 1/sqrt(width);
    `lr_frac` scales all of them (finetuning). Only matrices decay: rows of tables that are seldom
    seen would fade."""
    names = {id(p): name for name, p in model.named_parameters()}
    width = width_lr_scale(model.config.n_embd)
    rates = {
        "embedding_lr": embedding_lr * width,
        "unembedding_lr": unembedding_lr * width,
        "scalar_lr": scalar_lr,
    }
    groups = []
    for kind, tensors in model.param_groups().items():
        params = {names[id(p)]: p for p in tensors}
        if kind == "matrix":
            groups.append(ParamGroup("muon", params, matrix_lr * lr_frac, weight_decay))
            continue
        how = ADAMW_KINDS[kind]
        lr = rates[how.rate] * how.share * lr_frac
        groups.append(ParamGroup("adamw", params, lr, betas=how.betas))
    return MuonAdamW(groups, shard)
