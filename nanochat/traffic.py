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
from torch import Tensor

from nanochat.cluster import Cluster
from nanochat.communication import PretendRanks
from nanochat.matrices import pays_to_cut
from nanochat.models import Config, build_model
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.recompute import blocks_of
from nanochat.updates import POLAR_EXPRESS

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Phase = Literal["forward", "backward", "reduce", "update", "spread"]

FLOAT32 = 4  # bytes: weights, gradients and optimizer state, and what is sent of them
HALF = 2  # bytes: bfloat16 or float16, in which FSDP sends a block's weights on GPUs (shard.py)
# Bytes that a fused update moves for each entry: it reads weight, gradient and moments, and writes
# weight and moments, in float32. NorMuon's moment of a neuron is no entry.
MUON_BYTES, ADAMW_BYTES = 5 * FLOAT32, 7 * FLOAT32


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step: `calls` of them over tensors of together `size` bytes.

    The size is that of the whole tensors: what comes together, is cut, or is exchanged."""

    what: str
    op: Op
    calls: int
    size: int
    ranks: int  # that take part
    phase: Phase
    across: bool = False  # one rank of each node, instead of the first so many
    bucket: int = -1  # the one of Work.together that travels; -1: none of them

    def sent(self) -> float:
        """Bytes that a rank sends.

        On a ring it passes on all parts but its own, once to gather or to reduce-scatter, twice for
        both (Thakur, Rabenseifner & Gropp 2005, "Optimization of Collective Communication
        Operations in MPICH", section 4). In an exchange it keeps what is for itself."""
        share = (self.ranks - 1) / self.ranks
        if self.op == "all_to_all":
            return self.size / self.ranks * share
        return self.size * share * (2 if self.op == "all_reduce" else 1)

    def leaves_node(self, cluster: Cluster) -> float:
        """Bytes that leave each node. A ring of all ranks does so once, with what a rank sends;
        rings of one rank of each node leave it once for each of its ranks."""
        if self.across:
            return cluster.per_node * self.sent()
        if self.ranks <= cluster.per_node:
            return 0.0
        if self.op == "all_to_all":
            others = (self.ranks - cluster.per_node) / self.ranks
            return cluster.per_node * self.size / self.ranks * others
        return self.sent()

    def seconds(self, cluster: Cluster) -> float:
        """alpha + beta model (the same paper, section 3): latency of each call, and bytes over
        bandwidth. Calls queue behind each other."""
        if self.ranks < 2:
            return 0.0
        if self.across or self.op == "all_to_all":
            bandwidth = cluster.alone(self.ranks, self.across)
        else:
            bandwidth = cluster.bandwidth(self.ranks)
        latency = cluster.latency(cluster.gpus if self.across else self.ranks)
        rounds = 2 if self.op == "all_reduce" else 1
        return self.calls * rounds * latency + self.sent() / bandwidth


@dataclass(frozen=True)
class Together:
    """Parameters that travel and are updated together: the optimizer's buckets."""

    kind: str  # "muon" | "adamw"
    shapes: list[torch.Size]

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def is_cut(self, ranks: int) -> bool:
        """Whether matrices are cut into stretches (matrices.CutMatrices)."""
        return self.kind == "muon" and pays_to_cut(len(self.shapes), ranks)

    def most(self, ranks: int) -> int:
        """Entries that the rank updates which has most of them: matrices go whole to one rank, or
        each of them is cut; the rest is cut wherever a share ends (communication.Owned)."""
        if self.is_cut(ranks):
            return len(self.shapes) * -(-self.shapes[0].numel() // ranks)
        if self.kind == "muon":
            return -(-len(self.shapes) // ranks) * self.shapes[0].numel()
        return -(-self.numel // ranks)

    def update_seconds(self, ranks: int, shared: bool, cluster: Cluster, share: float) -> float:
        """Of that rank: FLOPs and bytes, one after the other. `shared`: it holds rows of every
        matrix, but orthogonalizes its own alone."""
        entries = -(-self.numel // ranks) if shared else self.most(ranks)
        moved = (MUON_BYTES if self.kind == "muon" else ADAMW_BYTES) * entries
        flops = 0
        if self.kind == "muon":
            flops = -(-len(self.shapes) // ranks) * muon_flops(self.shapes[0])
        return flops / (cluster.gpu.peak * share) + moved / cluster.gpu.hbm


def muon_flops(shape: torch.Size) -> int:
    """FLOPs to orthogonalize one matrix, optim.orthogonalize's: in each iteration the Gram matrix
    of the shorter side r, its square, and their product with the matrix."""
    r, c = sorted(shape)
    return len(POLAR_EXPRESS) * (2 * r * r * c + 2 * r * r * r + 2 * r * r * c)


@dataclass(frozen=True)
class Work:
    """One optimizer step of a model, as far as its traffic and time depend on it."""

    together: list[Together]
    units: list[list[torch.Size]]  # parameters that FSDP gathers at once: each block's, the rest
    flops_per_token: int
    tokens: int  # of the step, over all ranks
    micro_batches: int  # on each rank
    gathered: int = HALF  # bytes of an entry of a block's weight that FSDP gathers
    outside: int = FLOAT32  # the same of what is in no block
    clipped: bool = True  # no update begins before all gradients are there (optim.py)

    @classmethod
    def of(
        cls,
        config: Config,
        tokens: int,
        micro_batches: int,
        gathered: int = HALF,
        clipped: bool = True,
    ) -> Work:
        model = build_model(config, "meta")
        groups = make_optimizer(model, 1.0, 1.0, 1.0).groups
        together = [
            Together(group.kind, [p.shape for p in bucket.params.values()])
            for group, bucket in MuonAdamW(groups, "none", PretendRanks()).buckets
        ]
        blocks: list[list[Tensor]] = [list(block.parameters()) for block in blocks_of(model)]
        inside = {id(p) for block in blocks for p in block}
        rest = [p for p in model.parameters() if id(p) not in inside]
        units = [[p.shape for p in unit] for unit in [*blocks, rest]]
        return cls(
            together, units, model.flops_per_token(), tokens, micro_batches, gathered,
            clipped=clipped,
        )  # fmt: skip


def transfers(work: Work, shard: str, cluster: Cluster) -> Iterator[Transfer]:
    """Every collective of a step; none with one rank. In parameters, a rank sends twice as many
    with none and zero, three times as many a micro-batch with fsdp (Rajbhandari et al. 2020,
    "ZeRO", section 7), and what it takes to bring matrices to their owners and back."""
    ranks = cluster.gpus
    if ranks == 1:
        return
    yield Transfer("trained tokens, all tokens, stopping", "all_reduce", 1, 24, ranks, "reduce")
    yield Transfer("loss", "all_reduce", 1, FLOAT32, ranks, "reduce")
    if shard in ("fsdp", "hsdp"):
        yield from _of_shards(work, shard, cluster)
        return
    for number, one in enumerate(work.together):
        if shard == "none":
            size, calls = FLOAT32 * one.numel, len(one.shapes)
            yield Transfer("gradients", "all_reduce", calls, size, ranks, "reduce", bucket=number)
            continue
        if one.is_cut(ranks):
            yield from _of_matrices(number, one, ranks)
        size = FLOAT32 * ranks * one.most(ranks)  # all stretches are as long as the longest
        yield Transfer("gradients", "reduce_scatter", 1, size, ranks, "reduce", bucket=number)
        yield Transfer("weights", "all_gather", 1, size, ranks, "spread", bucket=number)
    if shard == "zero":
        yield Transfer("norm", "all_reduce", 1, FLOAT32, ranks, "reduce")


def _of_shards(work: Work, shard: str, cluster: Cluster) -> Iterator[Transfer]:
    """A block's weights are gathered for the forward pass and again for the backward pass; those
    outside of the blocks stay in between."""
    phase: Phase
    ranks = cluster.sharing(shard)
    copies, times = cluster.gpus // ranks, work.micro_batches
    last = len(work.units) - 1  # what is in no block
    for number, unit in enumerate(work.units):
        entry = work.gathered if number < last else work.outside
        # FSDP2 cuts along rows, and all ranks' shares are as long as the longest
        mine = sum(-(-shape[0] // ranks) * (shape.numel() // shape[0]) for shape in unit)
        whole = ranks * mine * times
        for phase in ("forward", "backward") if number < last else ("forward",):
            yield Transfer("weights", "all_gather", times, entry * whole, ranks, phase)
        yield Transfer("gradients", "reduce_scatter", times, FLOAT32 * whole, ranks, "backward")
        if copies > 1:  # once a step
            size = FLOAT32 * mine
            yield Transfer("gradients", "all_reduce", 1, size, copies, "backward", across=True)
    yield Transfer("norm", "all_reduce", 1, FLOAT32, ranks, "reduce")
    for number, one in enumerate(work.together):
        if one.kind == "muon":
            yield from _of_matrices(number, one, ranks)


def _of_matrices(number: int, one: Together, ranks: int) -> Iterator[Transfer]:
    """From those that hold parts of each to its owner, and back (matrices.Matrices)."""
    size = FLOAT32 * one.numel
    yield Transfer("matrices to owners", "all_to_all", 1, size, ranks, "update", bucket=number)
    yield Transfer("matrices to parts", "all_to_all", 1, size, ranks, "spread", bucket=number)


# -------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, none of which overlap."""

    passes: float  # forward and backward, over all micro-batches of a rank
    exposed: float  # what is sent during the passes, as far as they do not hide it
    reduce: float  # gradients to those that update, and counts, as far as updates do not hide it
    update: float  # the optimizer on the rank that has the most to do
    spread: float  # what is sent during the update and after it, as far as it is not hidden

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(work: Work, shard: str, cluster: Cluster, share: float) -> StepTime:
    """Seconds of a step. `share`: of the peak that one GPU's passes and matrix products reach.

    With zero, gradients travel when all passes are done, and nothing hides them if they are
    clipped; then buckets are updated in order, and each travels back while the next is updated.
    Without clipping a bucket is updated when it is there, while later ones come. The update is the
    part that more ranks make no shorter once each owns one matrix (Amdahl 1967). With fsdp, the
    next block's weights come while this one computes, and gradients leave likewise: a pass takes as
    long as the longer of the two, and one block's transfer more, at its beginning, which has
    nothing to hide behind (Zhao et al. 2023, arXiv 2304.11277, section 4.3)."""
    passes = work.tokens / cluster.gpus * work.flops_per_token / (cluster.gpu.peak * share)
    found = list(transfers(work, shard, cluster))

    def seconds(phase: Phase, bucket: int | None = None) -> float:
        of_bucket = [t for t in found if bucket is None or t.bucket == bucket]
        return sum(t.seconds(cluster) for t in of_bucket if t.phase == phase)

    exposed = 0.0
    # A backward pass computes twice what a forward pass does
    halves: list[tuple[Phase, float]] = [("forward", passes / 3), ("backward", passes * 2 / 3)]
    for phase, computing in halves:
        first = seconds(phase) / len(work.units)
        exposed += max(0.0, first + seconds(phase) - computing, first)
    ranks, shared = cluster.sharing(shard), shard in ("fsdp", "hsdp")
    # Seconds since the passes: until a bucket's gradients are there; until updates are done so far,
    # of which `update` were spent computing; until all that was sent back is there
    reduced, update = seconds("reduce"), 0.0
    came = reduced if work.clipped else seconds("reduce", -1)
    updated, back = came, reduced + seconds("update")
    for number, one in _in_order(work.together, shared):
        came += 0.0 if work.clipped else seconds("reduce", number)
        takes = one.update_seconds(ranks, shared, cluster, share)
        update, updated = update + takes, max(came, updated) + takes
        if sent := seconds("spread", number):
            back = max(back, updated) + sent
    return StepTime(passes, exposed, updated - update, update, max(0.0, back - updated))


def _in_order(together: list[Together], shared: bool) -> list[tuple[int, Together]]:
    """Buckets, with their numbers, in the order in which they are updated: with fsdp Muon's first,
    which alone send something back."""
    order = list(enumerate(together))
    return sorted(order, key=lambda item: item[1].kind != "muon") if shared else order
