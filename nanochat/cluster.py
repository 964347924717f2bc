"""
GPUs and what joins them, for arithmetic on paper: no device is asked.

Numbers are the makers' data sheets, in units of ten. What of a link's rate arrives (LINK_SHARE) is
an assumption, as is the network, which is a flag. Floor 1.75.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.machine import peak_flops
from nanochat.shard import shard_size

# Share of a link's rate that large messages reach. NCCL's own tests report 0.8 to 0.9 of it.
LINK_SHARE = 0.8
# Seconds to start a collective on a ring, and for each hop of it: NCCL's table of the `Simple`
# protocol, from which it chooses its algorithms (NVIDIA/nccl, src/graph/tuning.cc, 2.2x).
START, LINK_HOP, NETWORK_HOP = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str  # as in machine.PEAK_FLOPS
    memory: float  # bytes
    hbm: float  # bytes/s of its memory
    link: float  # bytes/s each way to the others of a node: NVLink, or PCI Express
    measured_flops: float | None = None  # of what is in no table

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        found = self.measured_flops or peak_flops(self.name)
        assert found is not None, self.name
        return found


GPUS = {
    gpu.name.lower().replace(" ", ""): gpu
    for gpu in (
        Gpu("B200", 180e9, 8.0e12, 900e9),
        Gpu("H200", 141e9, 4.8e12, 450e9),
        Gpu("H100", 80e9, 3.35e12, 450e9),
        Gpu("A100", 80e9, 2.04e12, 300e9),
        Gpu("MI300X", 192e9, 5.3e12, 448e9),
        Gpu("L40S", 48e9, 0.864e12, 32e9),
        Gpu("L4", 24e9, 0.3e12, 32e9),
        Gpu("RTX 5090", 32e9, 1.79e12, 64e9),
        Gpu("RTX 4090", 24e9, 1.01e12, 32e9),
        Gpu("RTX 3090", 24e9, 0.936e12, 32e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name ("h100", "RTX 4090"); UserError with the known ones if there is none."""
    key = name.lower().replace(" ", "").replace("_", "").replace("-", "")
    if key not in GPUS:
        raise UserError(f"--gpu={name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[key]


@dataclass(frozen=True)
class Cluster:
    """So many GPUs of one kind: `per_node` in a node, each with its own way out of it."""

    gpu: Gpu
    per_node: int = 8
    nodes: int = 1
    network: float = 50e9  # bytes/s each way for each GPU: 400 Gb/s
    copy: int = -1  # GPUs over which hsdp shares out one copy of the weights; -1: those of a node

    @property
    def gpus(self) -> int:
        return self.per_node * self.nodes

    def sharing(self, shard: str) -> int:
        """GPUs over which --shard shares out weights (fsdp, hsdp) or updates (zero)."""
        if shard == "hsdp":
            return shard_size(shard, self.gpus, self.copy if self.copy > 0 else self.per_node)
        return 1 if shard == "none" else self.gpus

    def bandwidth(self, ranks: int) -> float:
        """Bytes/s that a rank sends on a ring of the first so many ranks, while it receives. A ring
        leaves each node once, and NCCL lays as many rings as there are ways out: together they
        carry what one link does, or as much as the ways out."""
        link, ways_out = self.gpu.link, self.per_node * self.network
        return LINK_SHARE * (link if ranks <= self.per_node else min(link, ways_out))

    def alone(self, ranks: int, across: bool) -> float:
        """Bytes/s that a rank sends to each of the others by itself, or on a ring of one rank of
        each node (`across`): what leaves the node takes its own way out."""
        out = across or ranks > self.per_node
        return LINK_SHARE * (min(self.gpu.link, self.network) if out else self.gpu.link)

    def latency(self, ranks: int) -> float:
        """Seconds until the first byte has been all the way round that ring."""
        between = max(0, -(-ranks // self.per_node) - 1)  # hops from node to node
        return START + (ranks - 1 - between) * LINK_HOP + between * NETWORK_HOP

    def __str__(self) -> str:
        many = f"{self.nodes} nodes of {self.per_node}" if self.nodes > 1 else f"{self.per_node}"
        return f"{many} x {self.gpu.name}"
