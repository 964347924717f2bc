"""
The optimizer: Muon for the weight matrices, AdamW for everything else, on one rank or many.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by
the nearest orthogonal matrix, found by a few Newton-Schulz steps, so that every direction of the
matrix learns at the same speed. AdamW is Loshchilov & Hutter (arXiv 1711.05101).

With N ranks every parameter has one owner. A step has three phases: gradients are summed to their
owners, each owner updates what it owns (and alone keeps its state), updated parameters are sent
back. One rank is the same code with nothing to send. Parameters may have any shape.
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

# Quintic Newton-Schulz coefficients: steepest slope at zero that still keeps singular values
# within about [0.7, 1.2] (Jordan et al.).
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


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
    a, b, c = NS_COEFFICIENTS
    tall = x.size(-2) > x.size(-1)
    x = x.to(dtype)
    x = x.mT if tall else x  # the Gram matrix is then the smaller one
    # Frobenius norm 1 bounds the spectral norm by 1, where the iteration converges.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class MuonAdamW:
    """See the module docstring. `step` takes what the schedule says for this step."""

    def __init__(self, groups: list[ParamGroup]) -> None:
        self.groups = groups
        self.state: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of owned parameters only
        self.num_steps = 0  # steps taken, for AdamW's bias correction
        self.rank, self.world_size = rank_and_world()
        self.named = {name: p for group in groups for name, p in group.params.items()}
        self.owner = self._assign_owners()

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
        return {n: p for n, p in group.params.items() if self.owner[n] == self.rank}

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def step(self, lr_multiplier: float, momentum: float = 0.95, grad_clip: float = 0.0) -> float:
        """Takes one step with gradients summed over ranks; returns their global norm.

        The norm is that of the whole gradient, after the sum, so it and the clipping are the same
        at any number of ranks. A gradient that is not finite is a UserError before anything moves.
        """
        self._reduce_gradients()
        norm = self._global_norm()
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient of step {self.num_steps} has norm {norm}; lower --matrix_lr, "
                "--embedding_lr and --unembedding_lr, or set --grad_clip=1.0"
            )
        scale = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip > 0 else 1.0
        self.num_steps += 1
        for group in self.groups:
            params = self.owned(group)
            if scale != 1.0:
                for p in params.values():
                    p.grad.mul_(scale)  # type: ignore[union-attr]
            if group.kind == "muon":
                self._muon(params, group, group.lr * lr_multiplier, momentum)
            else:
                self._adamw(params, group, group.lr * lr_multiplier)
        self._broadcast_parameters()
        return norm

    def _reduce_gradients(self) -> None:
        for p in self.named.values():
            if p.grad is None:  # not used in this step on this rank, perhaps on another
                p.grad = torch.zeros_like(p)
        if self.world_size > 1:
            self._wait(
                dist.reduce(p.grad, dst=self.owner[name], async_op=True)  # type: ignore[arg-type]
                for name, p in self.named.items()
            )

    def _global_norm(self) -> float:
        mine = [p.grad for n, p in self.named.items() if self.owner[n] == self.rank]
        device = next(iter(self.named.values())).device
        total = torch.zeros((), device=device)
        for grad in mine:
            total += grad.float().square().sum()  # type: ignore[union-attr]
        return float(all_reduce_sum(total).sqrt())

    def _broadcast_parameters(self) -> None:
        if self.world_size > 1:
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
        self, params: dict[str, nn.Parameter], group: ParamGroup, lr: float, momentum: float
    ) -> None:
        """Nesterov momentum, orthogonalised; matrices of one shape go through in one batch."""
        by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, p in params.items():
            by_shape[p.shape].append(name)
        for shape, names in by_shape.items():
            updates = []
            for name in names:
                grad = params[name].grad
                assert grad is not None
                state = self.state[name]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(grad, 1 - momentum)
                updates.append(grad.lerp(buffer, momentum))
            # bfloat16 is enough for directions, and native on GPUs; elsewhere it is slow or absent.
            dtype = torch.bfloat16 if updates[0].is_cuda else torch.float32
            directions = orthogonalize(torch.stack(updates), dtype)
            # Tall matrices get longer steps, so that outputs move alike whatever the shape.
            step_size = lr * max(1.0, shape[0] / shape[1]) ** 0.5
            for name, direction in zip(names, directions):
                p = params[name]
                p.mul_(1 - lr * group.weight_decay)
                p.add_(direction.to(p.dtype), alpha=-step_size)

    def _adamw(self, params: dict[str, nn.Parameter], group: ParamGroup, lr: float) -> None:
        beta1, beta2 = group.betas
        for name, p in params.items():
            state, grad = self.state[name], p.grad
            assert grad is not None
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            p.mul_(1 - lr * group.weight_decay)
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            bias1 = 1 - beta1**self.num_steps
            bias2 = 1 - beta2**self.num_steps
            denominator = (state["exp_avg_sq"] / bias2).sqrt_().add_(group.eps)
            p.addcdiv_(state["exp_avg"], denominator, value=-lr / bias1)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as "<parameter>/<entry>" copies on the CPU, on rank 0 ({} elsewhere).

        It knows nothing of the number of ranks; any number may load it. All ranks must call."""
        result: dict[str, Tensor] = {}
        for group in self.groups:
            entries = ("momentum_buffer",) if group.kind == "muon" else ("exp_avg", "exp_avg_sq")
            for name, p in group.params.items():
                for entry in entries:
                    held = self.state[name].get(entry) if self.owner[name] == self.rank else None
                    tensor = self._to_rank0(held, p, self.owner[name])
                    if self.rank == 0:
                        result[f"{name}/{entry}"] = tensor.to("cpu", copy=True)
        return result

    def _to_rank0(self, held: Tensor | None, like: Tensor, owner: int) -> Tensor:
        """Moves the owner's tensor (zeros if it has none yet) to rank 0."""
        tensor = held if held is not None else torch.zeros_like(like)
        if owner != 0 and self.rank == owner:
            dist.send(tensor.contiguous(), dst=0)
        elif owner != 0 and self.rank == 0:
            dist.recv(tensor, src=owner)
        return tensor

    def load_state_dict(self, get: Callable[[str], Tensor], num_steps: int) -> None:
        """Takes the owned part of a saved state; `get("<parameter>/<entry>")` reads one tensor."""
        self.num_steps = num_steps
        for group in self.groups:
            entries = ("momentum_buffer",) if group.kind == "muon" else ("exp_avg", "exp_avg_sq")
            for name, p in self.owned(group).items():
                for entry in entries:
                    self.state[name][entry] = get(f"{name}/{entry}").to(p.device, copy=True)


def make_optimizer(
    model: Any,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    lr_frac: float = 1.0,
) -> MuonAdamW:
    """The optimizer for a model of ours. AdamW rates are for width 768 and scale by 1/sqrt(width);
    `lr_frac` scales all of them (finetuning)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        kind: {names[id(p)]: p for p in params} for kind, params in model.param_groups().items()
    }
    adam_scale = width_lr_scale(model.config.n_embd) * lr_frac
    return MuonAdamW(
        [
            ParamGroup("muon", groups["matrix"], matrix_lr * lr_frac, weight_decay),
            ParamGroup("adamw", groups["embedding"], embedding_lr * adam_scale, weight_decay),
            ParamGroup("adamw", groups["head"], unembedding_lr * adam_scale, weight_decay),
            # Norm weights and biases: the head's rate, never decayed.
            ParamGroup("adamw", groups["vector"], unembedding_lr * adam_scale),
        ]
    )
