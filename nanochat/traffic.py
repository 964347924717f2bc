"""
What the ranks of a step send each other, and how long a step takes: bytes and FLOPs, counted.

    transfers()     every collective of one optimizer step, with its bytes
    step_time()     seconds of a step, by what they are spent on

Bytes are exact for what the code does (tests/test_traffic.py listens to real ranks); seconds follow
from them by simple models, each named where it stands. What they leave out: kernels' launches, the
input, evaluation, saving, stragglers, a network that others use, collectives that slow the matrix
products beside them. Floor 2.75.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch

from nanochat.cluster import Cluster
from nanochat.models import Config, build_model
from nanochat.optim import POLAR_EXPRESS, MuonAdamW, make_optimizer

SHARD_MODES = ("none", "zero")
Op = Literal["reduce", "broadcast", "all_reduce", "all_gather", "reduce_scatter"]

FLOAT32 = 4  # bytes: weights, gradients and optimizer state
BFLOAT16 = 2
# Bytes that a fused update moves for each entry: it reads weight, gradient and moments, and writes
# weight and moments, in float32. NorMuon's moment of a neuron is no entry.
MUON_BYTES, ADAMW_BYTES = 5 * FLOAT32, 7 * FLOAT32


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step: `calls` of them over tensors of together `size` bytes.

    The size is that of the whole tensors, before they are cut or after they are put together."""

    what: str
    op: Op
    calls: int
    size: int
    ranks: int  # that take part
    across: bool = False  # one rank of each node, instead of the first so many

    def sent(self) -> float:
        """Bytes that the busiest rank sends.

        On a ring a rank passes on all parts but its own, once to gather or to reduce-scatter, twice
        for both (Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication
        Operations in MPICH", section 4). A chain to or from one rank passes on everything."""
        share = (self.ranks - 1) / self.ranks
        if self.op in ("reduce", "broadcast"):
            return float(self.size) if self.ranks > 1 else 0.0
        return self.size * share * (2 if self.op == "all_reduce" else 1)

    def seconds(self, cluster: Cluster) -> float:
        """alpha + beta model (the same paper, section 3): latency of each call, and bytes over
        bandwidth. Calls of one step queue behind each other."""
        if self.ranks < 2:
            return 0.0
        bandwidth = cluster.across() if self.across else cluster.bandwidth(self.ranks)
        rounds = 2 if self.op == "all_reduce" else 1
        latency = cluster.latency(cluster.nodes * cluster.per_node if self.across else self.ranks)
        return self.calls * rounds * latency + self.sent() / bandwidth


@dataclass(frozen=True)
class Work:
    """One optimizer step of a model, as far as its time depends on it."""

    optimizer: MuonAdamW  # on the meta device
    flops_per_token: int
    tokens: int  # of the step, over all ranks
    micro_batches: int  # on each rank
    layers: int

    @classmethod
    def of(cls, config: Config, tokens: int, micro_batches: int) -> Work:
        model = build_model(config, "meta")
        optimizer = make_optimizer(model, 1.0, 1.0, 1.0)
        return cls(optimizer, model.flops_per_token(), tokens, micro_batches, config.n_layer)

    def owners(self, ranks: int) -> list[list[tuple[str, torch.Size]]]:
        """(kind, shape) of the parameters that each of so many ranks updates."""
        self.optimizer.world_size = ranks
        owner = self.optimizer._assign_owners()
        found: list[list[tuple[str, torch.Size]]] = [[] for _ in range(ranks)]
        for group in self.optimizer.groups:
            for name, p in group.params.items():
                found[owner[name]].append((group.kind, p.shape))
        return found


def transfers(work: Work, shard: str, cluster: Cluster) -> Iterator[Transfer]:
    """Every collective of a step, in order; none with one rank."""
    ranks = cluster.gpus
    named = work.optimizer.named
    size, many = FLOAT32 * sum(p.numel() for p in named.values()), len(named)
    if ranks == 1:
        return
    yield Transfer("trained tokens, all tokens, stopping", "all_reduce", 1, 3 * 8, ranks)
    yield Transfer("loss", "all_reduce", 1, FLOAT32, ranks)
    if shard == "none":
        yield Transfer("gradients", "all_reduce", many, size, ranks)
    elif shard == "zero":
        yield Transfer("gradients", "reduce", many, size, ranks)
        yield Transfer("norm", "all_reduce", 1, FLOAT32, ranks)
        yield Transfer("weights", "broadcast", many, size, ranks)


# -------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, none of which overlap."""

    passes: float  # forward and backward, over all micro-batches of a rank
    exposed: float  # what is sent during the passes, as far as nothing hides it
    reduce: float  # gradients to their owners, and the counts
    update: float  # the optimizer on the rank that has the most to do
    spread: float  # updated weights back

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def update_seconds(shapes: list[tuple[str, torch.Size]], cluster: Cluster, share: float) -> float:
    """Seconds of one rank's updates: the larger of FLOPs and bytes of each (a roofline: Williams et
    al. 2009), since the matrix products of one matrix hide no other's traffic."""
    gpu, seconds = cluster.gpu, 0.0
    for kind, shape in shapes:
        moved = (MUON_BYTES if kind == "muon" else ADAMW_BYTES) * shape.numel()
        flops = muon_flops(shape) if kind == "muon" else 0
        seconds += flops / (gpu.peak * share) + moved / gpu.hbm
    return seconds


def muon_flops(shape: torch.Size) -> int:
    """FLOPs to orthogonalize one matrix, optim.orthogonalize's: in each iteration the Gram matrix
    of the shorter side r, its square, and their product with the matrix."""
    r, c = sorted(shape)
    return len(POLAR_EXPRESS) * (2 * r * r * c + 2 * r * r * r + 2 * r * r * c)


def step_time(work: Work, shard: str, cluster: Cluster, share: float) -> StepTime:
    """Seconds of a step. `share`: of the peak that one GPU's passes reach alone.

    Work and traffic are not overlapped where the code waits for them: gradients are reduced when
    all passes are done, the update begins when all gradients are there, and so on. So the update is
    the part that more ranks make no shorter (Amdahl 1967) once each owns one parameter."""
    passes = work.tokens / cluster.gpus * work.flops_per_token / (cluster.gpu.peak * share)
    before, after = 0.0, 0.0
    for transfer in transfers(work, shard, cluster):
        if transfer.op == "broadcast":
            after += transfer.seconds(cluster)
        else:
            before += transfer.seconds(cluster)
    owners = work.owners(1 if shard == "none" else cluster.gpus)
    slowest = max(update_seconds(shapes, cluster, share) for shapes in owners)
    return StepTime(passes, 0.0, before, slowest, after)
