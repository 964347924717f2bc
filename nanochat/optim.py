"""
The optimizer: Muon for the weight matrices, AdamW for everything else, on one rank or many.

With N ranks every element of the state has one owner, unless --shard=none. A step has three phases:
the reductions of all gradients are started; as each arrives it is updated and its parameters' way
back is started; all are waited for at the end (nanochat/communication.py). One rank is the same
code with nothing to send. Clipping parts the first two phases: it needs the norm of the whole
gradient, so no update can begin before the last reduction is over (of a bucket that is there the
norm is computed meanwhile). With --grad_clip=0 all three overlap, and the norm is only reported.
Parameters may have any shape. Where they are sharded, a matrix's momentum is too; the matrix comes
together with its owner to be orthogonalised, once. The arithmetic: nanochat/updates.py. Floor 2.
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
from nanochat.communication import Bucket, Owned, Ranks, Sharded
from nanochat.distributed import local, shard_group
from nanochat.matrices import CutMatrices, Matrices, ShardedMatrices, pays_to_cut
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
        at any number of ranks. If it is not finite nothing moves, or, without clipping, nothing of
        those buckets whose gradient is not: whoever reads it on the host should hand it to
        refuse_divergence(). Gradients are used up: call zero_grad() before the next backward
        pass."""
        for _, bucket in self.buckets:
            bucket.reduce()
        self.num_steps += 1
        # Numbers would be constants of the compiled step, and each new value compile it again
        how = {
            id(g): (
                torch.tensor(g.lr * lr_multiplier),
                torch.tensor(g.lr * lr_multiplier * g.weight_decay * decay_multiplier),
            )
            for g in self.groups
        }
        mu = torch.tensor(momentum)
        norm, scales = _Norm(self), list[Tensor]()
        if grad_clip > 0:
            for _, bucket in self.buckets:
                norm.arrived(bucket)
            total = norm.start().read()
            clip = (grad_clip / (total + 1e-6)).clamp(max=1.0)
            scales = [torch.where(total.isfinite(), clip, 0.0)] * len(self.buckets)
        for number, (group, bucket) in enumerate(self.buckets):
            if grad_clip <= 0:
                scales.append(norm.arrived(bucket))
            if isinstance(bucket, Matrices):
                self._gather(group, bucket, mu, scales[number])
                continue
            if group.kind == "muon":
                self._muon(group, bucket, how[id(group)], mu, scales[number])
            else:
                self._adamw(group, bucket, how[id(group)], scales[number])
            bucket.give_back()
        if grad_clip <= 0:
            norm.start()
        apart = [(g, b, s) for (g, b), s in zip(self.buckets, scales) if isinstance(b, Matrices)]
        for group, matrices, scale in apart:
            self._orthogonalize(group, matrices, scale)
        for group, matrices, scale in apart:
            x, stretch = matrices.at_shards(), stretch_of(matrices.shape)
            self._run(move, matrices.weights, x, *how[id(group)], scale, stretch)
            matrices.give_back()
        for _, bucket in self.buckets:
            bucket.finish()
        return norm.read()

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

    def _gather(self, group: ParamGroup, bucket: Matrices, momentum: Tensor, scale: Tensor) -> None:
        momenta = [self._state(n, group, bucket)["momentum_buffer"] for n in bucket.names]
        bucket.to_owners(self._run(look_ahead, bucket.grads, momenta, momentum, scale))

    def _orthogonalize(self, group: ParamGroup, bucket: Matrices, scale: Tensor) -> None:
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


class _Norm:
    """The global norm of a step's gradients, out of those of its parts as they arrive."""

    def __init__(self, optimizer: MuonAdamW) -> None:
        self.ranks, self.buckets = optimizer.ranks, optimizer.buckets
        self.total = torch.zeros((), device=local(next(iter(optimizer.named.values()))).device)
        self._parts: list[Tensor] = []
        self._work: Any = None

    def arrived(self, bucket: Bucket) -> Tensor:
        """Waits for a bucket's gradients. 1 if those of this rank are finite, else 0."""
        bucket.wait()
        norms = list(torch._foreach_norm(bucket.grads)) if bucket.grads else []
        self._parts += norms
        return torch.stack(norms).isfinite().all().float() if norms else torch.ones_like(self.total)

    def start(self) -> _Norm:
        """When all buckets are there: starts to sum over the ranks."""
        if self._parts:
            self.total = torch.stack(self._parts).float().square().sum()
        if self.ranks.size > 1 and not all(bucket.sees_all for _, bucket in self.buckets):
            self._work = self.ranks.all_reduce(self.total)
        return self

    def read(self) -> Tensor:
        """The norm, a 0-d tensor."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self.total.sqrt()


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
    return [
        CutMatrices(s, ranks, load)
        if is_muon and pays_to_cut(len(s), ranks.size)
        else Owned(s, ranks, is_muon, load)
        for s in sets
    ]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _muon_dtype(like: Tensor) -> torch.dtype:
    """bfloat16 is enough for directions, and native on GPUs; elsewhere it is slow or absent."""
    return torch.bfloat16 if like.is_cuda else torch.float32


def refuse_divergence(norm: float, step: int) -> None:
    """UserError if the norm that a step returned is not finite: its weights are not to be kept."""
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
