"""
Step times on paper beside those that others have published, and beside ranks on this machine.

    python -m bench.scale                 # both; a few minutes
    python -m bench.scale --ranks=        # what was published alone; seconds

Published throughput has a machine, a code base and a model of its own: what one GPU reaches alone
is taken from one row of each family (marked *) and the others are predicted from it, so that the
test is of how a step grows with the number of GPUs. nanochat's are predicted from the assumption
that scripts.plan makes, or from its GPU measurement where there is one.

On this machine gloo's ranks send over the loopback device, in a network namespace of their own
where that is allowed, so that its counter is theirs; bandwidth and one rank's time are measured and
the time of several predicted. More ranks than cores share them.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import surroundings
from bench.scale_worker import LENGTH, ROWS, SHARDS, measure, model_config
from nanochat import flags
from nanochat.budget import share_of_peak
from nanochat.cluster import LINK_SHARE, Cluster, Gpu, find_gpu
from nanochat.common import write_json
from nanochat.machine import machine_info
from nanochat.models import Config, GPTConfig, QwenConfig, TurboConfig
from nanochat.plan import Planner, Setup
from nanochat.traffic import FLOAT32, HALF, Together, Work, step_time, transfers

RESULT = Path(__file__).resolve().parent / "results" / "scale.json"


@dataclass
class Args:
    """Compare predicted steps with published and measured ones."""

    ranks: str = "1,2,3,4"
    """Ranks to measure on this machine, joined by commas; empty: none."""
    out: str = str(RESULT)
    """File for the result; empty: none."""


@dataclass(frozen=True)
class Published:
    """A throughput that somebody measured, with AdamW unless it is nanochat's."""

    family: str
    model: str
    config: Config
    gpu: str
    per_node: int
    nodes: int
    shard: str
    rows: int  # of a micro-batch
    micro_batches: int
    tokens_per_second: float  # of a GPU
    source: str
    network: float = 50e9  # bytes/s of a GPU

    @property
    def cluster(self) -> Cluster:
        return Cluster(find_gpu(self.gpu), self.per_node, self.nodes, self.network)

    @functools.cache  # noqa: B019 (a few dozen, which live as long as the program)
    def work(self) -> Work:
        tokens = self.rows * self.micro_batches * self.config.sequence_len * self.cluster.gpus
        work = Work.of(self.config, tokens, self.micro_batches)
        if self.family == "nanochat":
            return work
        shapes = [shape for one in work.together for shape in one.shapes]
        return replace(work, together=[Together("adamw", shapes)], outside=HALF)

    def predicted(self, share: float) -> float:
        """Tokens a second on each GPU, if its passes reach that share of its peak."""
        work = self.work()
        return (
            work.tokens / self.cluster.gpus / step_time(work, self.shard, self.cluster, share).total
        )

    def share(self) -> float:
        """The share that its passes must have reached."""
        low, high = 0.01, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            below = self.predicted(middle) < self.tokens_per_second
            low, high = (middle, high) if below else (low, middle)
        return low


def llama(length: int, layers: int, width: int, mlp: int) -> Config:
    """As Llama 3: heads of 128, 8 of keys and values."""
    return QwenConfig(length, 128_256, layers, width // 128, 8, width, mlp, tied=False)


def mpt(layers: int, width: int) -> Config:
    """As MPT: an MLP of 4 times the width."""
    return GPTConfig(2048, 50_368, layers, width // 128, width // 128, width)


FORGE = "KempnerInstitute/KempnerForge@9f3f03a benchmarks/mfu_scaling (FSDP rows)"
FOUNDRY = "mosaicml/llm-foundry@061f2c7 scripts/train/benchmarking/README.md"
TITAN = "pytorch/torchtitan@31a17bf benchmarks/llama3_h100_202412 (FSDP + compile)"
NANOCHAT = "karpathy/nanochat dev/LEADERBOARD.md, run 1: 16,704 steps in 10,949 s"
FORGE_7B, FORGE_13B = llama(4096, 32, 4096, 14_336), llama(4096, 40, 5120, 17_920)
MPT_1B, MPT_3B, MPT_13B = mpt(24, 2048), mpt(32, 2560), mpt(40, 5120)
LLAMA = llama(8192, 32, 4096, 14_336)
# As OLMo 3: no grouped queries in the 7B, 100,278 tokens padded
OLMO = QwenConfig(8192, 100_352, 32, 32, 32, 4096, 11_008, tied=False)
PUBLISHED = [
    # The first of each family says what one GPU reaches
    Published("KempnerForge 7B", "7B", FORGE_7B, "h200", 1, 1, "none", 4, 2, 10_471, FORGE),
    Published("KempnerForge 7B", "7B", FORGE_7B, "h200", 2, 1, "fsdp", 4, 2, 18_728 / 2, FORGE),
    Published("KempnerForge 7B", "7B", FORGE_7B, "h200", 4, 1, "fsdp", 4, 2, 38_983 / 4, FORGE),
    Published("KempnerForge 7B", "13B", FORGE_13B, "h200", 4, 2, "fsdp", 4, 4, 35_405 / 8,
              FORGE + ", not compiled"),
    Published("llm-foundry 1B", "1B", MPT_1B, "h100", 8, 2, "fsdp", 20, 1, 46_037, FOUNDRY),
    Published("llm-foundry 1B", "1B", MPT_1B, "h100", 8, 4, "fsdp", 20, 1, 45_130, FOUNDRY),
    Published("llm-foundry 1B", "1B", MPT_1B, "h100", 8, 8, "fsdp", 20, 1, 44_402, FOUNDRY),
    Published("llm-foundry 3B", "3B", MPT_3B, "h100", 8, 4, "fsdp", 6, 3, 23_021, FOUNDRY),
    Published("llm-foundry 3B", "3B", MPT_3B, "h100", 8, 8, "fsdp", 6, 3, 22_525, FOUNDRY),
    Published("llm-foundry 13B", "13B", MPT_13B, "h100", 8, 1, "fsdp", 2, 1, 4_792, FOUNDRY),
    Published("llm-foundry 13B", "13B", MPT_13B, "h100", 8, 2, "fsdp", 2, 1, 4_767, FOUNDRY),
    Published("llm-foundry 13B", "13B", MPT_13B, "h100", 8, 4, "fsdp", 2, 1, 4_811, FOUNDRY),
    Published("llm-foundry 13B", "13B", MPT_13B, "h100", 8, 8, "fsdp", 2, 1, 4_800, FOUNDRY),
    Published("torchtitan 8B", "8B", LLAMA, "h100", 8, 1, "fsdp", 2, 1, 6_667, TITAN),
    Published("torchtitan 8B", "8B", LLAMA, "h100", 8, 16, "fsdp", 2, 1, 6_514, TITAN),
]  # fmt: skip
ASSUMED = [
    Published("nanochat", "d24", TurboConfig.from_depth(24, 32_768, 2048), "h100", 8, 1, "zero",
              16, 2, 16_704 * 2**19 / 10_949 / 8, NANOCHAT),
    Published("nanochat", "d26", TurboConfig.from_depth(26, 32_768, 2048), "h100", 8, 1, "zero",
              16, 2, 630_000 / 8, "karpathy/nanochat dev/LOG.md, bfloat16"),
    Published("OLMo 3", "7B", OLMO, "h100", 8, 128, "hsdp", 1, 1, 7_700,
              "recalled, not read; one row of 8,192 a GPU assumed"),
]  # fmt: skip


def compare_published() -> list[dict[str, Any]]:
    """A row for each: predicted beside published, in tokens a second for each GPU."""
    rows: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    for one in [*PUBLISHED, *ASSUMED]:
        first = one in PUBLISHED and one.family not in shares
        if first:
            shares[one.family] = one.share()
            source = "this row"
        elif one in PUBLISHED:
            source = "the family's first row"
        else:
            params = sum(sum(s.numel() for s in unit) for unit in one.work().units)
            found = share_of_peak(one.cluster.gpu.name, params, -1)
            shares[one.family], source = found.value, found.source
        share = shares[one.family]
        predicted = one.predicted(share)
        peak = one.cluster.gpu.peak
        rows.append({
            "family": one.family, "model": one.model, "cluster": str(one.cluster),
            "gpus": one.cluster.gpus, "shard": one.shard,
            "published_tokens_per_second_per_gpu": round(one.tokens_per_second),
            "predicted_tokens_per_second_per_gpu": round(predicted),
            "ratio": None if first else round(predicted / one.tokens_per_second, 3),
            "published_mfu": round(
                one.tokens_per_second * one.work().flops_per_token / peak, 3
            ),
            "share_of_peak": round(share, 3), "share_from": source, "source": one.source,
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{row['family']:<16} {row['model']:<4} {row['cluster']:<20} {row['shard']:<5} "
            f"{row['published_tokens_per_second_per_gpu']:>8,} "
            f"{row['predicted_tokens_per_second_per_gpu']:>8,} {row['ratio'] or '*'}",
            flush=True,
        )
    return rows


# -------------------------------------------------------------------------------------------------
# Ranks on this machine


def compare_measured(numbers: list[int]) -> list[dict[str, Any]]:
    """A row for each number of ranks and --shard: bytes, memory and time, predicted beside
    measured."""
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] | None = None
    for ranks in numbers:
        for shard in SHARDS if ranks > 1 else ("none",):
            found = measure(ranks, shard)
            alone = found if ranks == 1 else alone
            rows.append(beside(found, ranks, shard, alone))
            print({k: v for k, v in rows[-1].items() if not isinstance(v, dict)}, flush=True)
    return rows


def beside(
    found: dict[str, Any], ranks: int, shard: str, alone: dict[str, Any] | None
) -> dict[str, Any]:
    """What was measured, and what was to be expected."""
    tokens, config = ranks * ROWS * LENGTH, model_config()
    work = Work.of(config, tokens, 1, FLOAT32)
    planner = Planner(
        config, Setup("cpu", False, False, ranks, shard=shard, shard_size=ranks), ROWS
    )
    planned = planner.memory(ROWS).optimizer_step
    result = {
        "ranks": ranks, "shard": shard, **found,
        "weights_planned": planned["weights"], "optimizer_planned": planned["optimizer"],
    }  # fmt: skip
    # No GPU's latencies: a call's is in the bandwidth that was measured with calls of this size
    bandwidth = found["bytes_per_second"] or 1.0
    gpu = Gpu("this CPU", 1.0, 1e10, bandwidth / LINK_SHARE, measured_flops=1.0)
    cluster = Cluster(gpu, per_node=ranks)
    found_transfers = list(transfers(work, shard, cluster))
    sent = sum(t.sent() for t in found_transfers)
    # gloo has no reduce-scatter: it reduces everything on every rank, which sends twice as much
    gloo = sent + sum(t.sent() for t in found_transfers if t.op == "reduce_scatter")
    result |= {"sent_by_a_rank": round(sent), "sent_by_a_rank_of_gloo": round(gloo)}
    if found["loopback_bytes"] and gloo:
        result["loopback_to_predicted"] = round(found["loopback_bytes"] / (ranks * gloo), 4)
    if alone is not None:
        crowd = max(1.0, ranks / (machine_info().get("cores") or 1))
        seconds = alone["seconds"] * crowd + gloo / bandwidth
        result["seconds_predicted"] = round(seconds, 4)
        result["seconds_ratio"] = round(seconds / found["seconds"], 3)
    return result


def main(args: Args) -> None:
    published = compare_published()
    numbers = [int(word) for word in args.ranks.split(",") if word]
    measured = compare_measured(numbers)
    if args.out:
        result = {
            **surroundings(),
            "asked": {k: v for k, v in asdict(args).items() if k != "out"},
            "published": published,
            "measured": measured,
        }
        write_json(args.out, result)
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    flags.run(main, Args)
