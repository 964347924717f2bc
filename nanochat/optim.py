"""
The optimizer: Muon for the weight matrices, AdamW for everything else, on one rank or many.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by
the nearest orthogonal matrix, so that every direction of the matrix learns at the same speed. The
nearest orthogonal matrix is found by Polar Express (Amsel et al., arXiv 2505.16932); NorMuon (Li et
al., arXiv 2510.05491) then gives the neurons of a matrix equal steps over time; weights decay only
where the step shrinks them anyway (cautious weight decay, arXiv 2510.12402). AdamW is Loshchilov &
Hutter (arXiv 1711.05101).

With N ranks every parameter has one owner. A step has three phases: gradients are summed to their
owners, each owner updates what it owns (and alone keeps its state), updated parameters are sent
back. One rank is the same code with nothing to send. Parameters may have any shape.

All that changes from step to step reaches the arithmetic as tensors, and nothing of it is read back
on the host: on a GPU the step is compiled once and launched without waiting.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.distributed import all_reduce_sum, rank_and_world
from nanochat.schedule import width_lr_scale

# Polar Express: the best quintic of each of five iterations for singular values from 1e-3 to 1
# (their algorithm 1 with a safety factor of 1.02, cushion 0.02; tests/test_optim.py derives them).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_SAFETY = 1.01  # norms in bfloat16 are this inexact, and above 1 the iteration diverges
NORMUON_BETA2 = 0.9


@dataclass
class ParamGroup:
    """Parameters of one kind and their hyperparameters at the peak of the schedule."""

    kind: str  # "muon" | "adamw"
    params: dict[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)  # adamw
    eps: float = 1e-10  # adamw


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximately the nearest orthogonal matrix of each matrix: (..., R, C) -> (..., R, C)."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(dtype)
    x = x.mT if tall else x  # the Gram matrix is then the smaller one
    # Frobenius norm 1 bounds the spectral norm by 1, where the iteration converges.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def neuron_dim(shape: torch.Size) -> int:
    """The dimension along which NorMuon averages: that of the shorter vectors' entries, so that a
    tall matrix has one second moment a row and a wide one one a column."""
    return -1 if shape[-2] >= shape[-1] else -2


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    second: list[Tensor],
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
) -> None:
    """One Muon step of matrices of one shape (R, C), in place.

    `scale` multiplies the gradients; where it is 0 nothing moves. `decay` is the share of the
    weights that goes, learning rate included."""
    alive = scale > 0
    grad = torch.where(alive, torch.stack(grads) * scale, 0.0)  # (n, R, C); 0 * NaN would be NaN
    buffer = torch.stack(momenta)
    buffer = buffer.lerp(grad, (1 - momentum) * alive)
    x = orthogonalize(grad.lerp(buffer, momentum), dtype).to(grad.dtype)  # Nesterov's look ahead
    # NorMuon: divide each neuron's part by its running root mean square, keep the matrix's norm.
    square = x.square().mean(neuron_dim(x.shape), keepdim=True)  # (n, R, 1) or (n, 1, C)
    moments = torch.stack(second).lerp(square, (1 - NORMUON_BETA2) * alive)
    inverse = moments.clamp(min=1e-10).rsqrt()
    kept = (square.sum((-2, -1), keepdim=True) / (square * inverse.square()).sum(
        (-2, -1), keepdim=True
    ).clamp(min=1e-10)).sqrt()  # fmt: skip
    x = x * (inverse * kept)
    # Tall matrices get longer steps, so that outputs move alike whatever the shape.
    step_size = lr * alive * max(1.0, x.size(-2) / x.size(-1)) ** 0.5
    weights = torch.stack(params)
    decayed = weights * (x * weights >= 0) * (decay * alive)
    torch._foreach_copy_(params, list((weights - step_size * x - decayed).unbind()))
    torch._foreach_copy_(momenta, list(buffer.unbind()))
    torch._foreach_copy_(second, list(moments.unbind()))


def adamw_update(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    decay: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    scale: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One AdamW step of a tensor of any shape, in place; bias1 and bias2 are 1 - beta**steps.

    `scale` and `decay` as for muon_update."""
    alive = scale > 0
    grad = torch.where(alive, grad * scale, 0.0)
    exp_avg.lerp_(grad, (1 - betas[0]) * alive)
    exp_avg_sq.lerp_(grad.square(), (1 - betas[1]) * alive)
    step = exp_avg / bias1 / (exp_avg_sq / bias2).sqrt().add(eps)
    p.sub_(p * (decay * alive)).sub_(step * (lr * alive))


class MuonAdamW:
    """See the module docstring. `step` takes what the schedule says for this step."""

    def __init__(self, groups: list[ParamGroup], shard: str = "zero") -> None:
        self.groups, self.shard = groups, shard
        self.state: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of owned parameters only
        self.num_steps = 0  # steps taken, for AdamW's bias correction
        self.rank, self.world_size = rank_and_world()
        self.named = {name: p for group in groups for name, p in group.params.items()}
        self.owner = self._assign_owners()
        self._muon_update: Callable[..., None] = muon_update
        self._adamw_update: Callable[..., None] = adamw_update

    def fuse(self) -> None:
        """Compiles the updates: torch.compile, which takes a while at the first step."""
        self._muon_update = torch.compile(muon_update, dynamic=False)
        self._adamw_update = torch.compile(adamw_update, dynamic=False)

    def _assign_owners(self) -> dict[str, int]:
        """Largest parameter first, each to the rank with the least so far: balanced within one
        parameter, and a pure function of the shapes, so all ranks agree without a word."""
        load = [0] * self.world_size
        owner = {}
        for name, p in sorted(self.named.items(), key=lambda item: (-item[1].numel(), item[0])):
            owner[name] = load.index(min(load))
            load[owner[name]] += p.numel()
        return owner

    def owned(self, group: ParamGroup) -> dict[str, nn.Parameter]:
        """The group's parameters that this rank updates."""
        if self.shard == "none":
            return group.params
        return {n: p for n, p in group.params.items() if self.owner[n] == self.rank}

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
        should hand it to refuse_divergence()."""
        self._reduce_gradients()
        norm = self._global_norm()
        clip = (grad_clip / (norm + 1e-6)).clamp(max=1.0) if grad_clip > 0 else norm.new_ones(())
        scale = torch.where(norm.isfinite(), clip, 0.0)
        self.num_steps += 1
        for group in self.groups:
            lr = group.lr * lr_multiplier
            decay = lr * group.weight_decay * decay_multiplier
            # Numbers would be constants of the compiled step, and each new value compile it again
            rates = (torch.tensor(lr), torch.tensor(decay))
            if group.kind == "muon":
                self._muon(group, rates, torch.tensor(momentum), scale)
            else:
                self._adamw(group, rates, scale)
        self._broadcast_parameters()
        return norm

    def _reduce_gradients(self) -> None:
        for p in self.named.values():
            if p.grad is None:  # not used in this step on this rank, perhaps on another
                p.grad = torch.zeros_like(p)
        if self.world_size > 1 and self.shard == "none":
            self._wait(dist.all_reduce(p.grad, async_op=True) for p in self.named.values())
        elif self.world_size > 1:
            self._wait(
                dist.reduce(p.grad, dst=self.owner[name], async_op=True)  # type: ignore[arg-type]
                for name, p in self.named.items()
            )

    def _global_norm(self) -> Tensor:
        mine = [p.grad for group in self.groups for p in self.owned(group).values()]
        total = torch.zeros((), device=next(iter(self.named.values())).device)
        if mine:
            total = torch.stack(torch._foreach_norm(mine)).float().square().sum()  # type: ignore[arg-type]
        return (total if self.shard == "none" else all_reduce_sum(total)).sqrt()

    def _broadcast_parameters(self) -> None:
        if self.world_size > 1 and self.shard != "none":
            self._wait(
                dist.broadcast(p.data, src=self.owner[name], async_op=True)
                for name, p in self.named.items()
            )

    @staticmethod
    def _wait(works: Iterable[Any]) -> None:
        """Starts all transfers, then waits for all of them."""
        for work in list(works):
            work.wait()

    def _muon(
        self, group: ParamGroup, rates: tuple[Tensor, Tensor], momentum: Tensor, scale: Tensor
    ) -> None:
        """Matrices of one shape go through in one batch."""
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, p in self.owned(group).items():
            by_shape[p.shape].append(name)
        for names in by_shape.values():
            params = [group.params[n] for n in names]
            states = [self._state(n, group) for n in names]
            # bfloat16 is enough for directions, and native on GPUs; elsewhere it is slow or absent.
            dtype = torch.bfloat16 if scale.is_cuda else torch.float32
            self._muon_update(
                params,
                [p.grad for p in params],
                [s["momentum_buffer"] for s in states],
                [s["neuron_moment"] for s in states],
                rates[0],
                momentum,
                rates[1],
                scale,
                dtype,
            )

    def _adamw(self, group: ParamGroup, rates: tuple[Tensor, Tensor], scale: Tensor) -> None:
        bias1, bias2 = (torch.tensor(1 - beta**self.num_steps) for beta in group.betas)
        for name, p in self.owned(group).items():
            state = self._state(name, group)
            self._adamw_update(
                p,
                p.grad,
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

    @staticmethod
    def _empty_state(group: ParamGroup, p: Tensor) -> dict[str, Tensor]:
        """What a parameter of that group remembers, before its first step."""
        if group.kind != "muon":
            return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        shape = list(p.shape)
        shape[neuron_dim(p.shape)] = 1
        return {"momentum_buffer": torch.zeros_like(p), "neuron_moment": p.new_zeros(shape)}

    def _state(self, name: str, group: ParamGroup) -> dict[str, Tensor]:
        if name not in self.state:
            self.state[name] = self._empty_state(group, group.params[name].detach())
        return self.state[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as "<parameter>/<entry>" copies on the CPU, on rank 0 ({} elsewhere).

        It knows nothing of the number of ranks; any number may load it. All ranks must call."""
        result: dict[str, Tensor] = {}
        for group in self.groups:
            for name, p in group.params.items():
                mine = self.shard == "none" or self.owner[name] == self.rank
                # Other ranks' entries are received into tensors of the same shapes
                empty = self._empty_state(group, p.detach()) if not mine else {}
                for entry, held in (self._state(name, group) if mine else empty).items():
                    owner = 0 if self.shard == "none" else self.owner[name]
                    tensor = self._to_rank0(held, owner)
                    if self.rank == 0:
                        result[f"{name}/{entry}"] = tensor.to("cpu", copy=True)
        return result

    def _to_rank0(self, tensor: Tensor, owner: int) -> Tensor:
        """Moves the owner's tensor to rank 0, into what that gives."""
        if owner != 0 and self.rank == owner:
            dist.send(tensor.contiguous(), dst=0)
        elif owner != 0 and self.rank == 0:
            dist.recv(tensor, src=owner)
        return tensor

    def load_state_dict(self, get: Callable[[str], Tensor], num_steps: int) -> None:
        """Takes the owned part of a saved state; `get("<parameter>/<entry>")` reads one tensor."""
        self.num_steps = num_steps
        for group in self.groups:
            for name, p in self.owned(group).items():
                for entry in self._state(name, group):
                    self.state[name][entry] = get(f"{name}/{entry}").to(p.device, copy=True)


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
