"""
What a pretraining run takes: tokens, text, disk, memory, hours, dollars. Before it is begun.

Length, batch, rates and memory are those of the run itself, by the same functions (recipe.py,
schedule.py, plan.py); hours are a model's (traffic.py) and as good as its assumptions. Floor 3.75.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nanochat.cluster import Cluster
from nanochat.common import get_base_dir, read_json
from nanochat.flags import HorizonFlags
from nanochat.machine import peak_flops
from nanochat.models import SIZES, Config, build_model, config_to_dict, make_config
from nanochat.optim import make_optimizer, state_shapes
from nanochat.plan import (
    CUDA_RESERVE,
    GPU_MICRO_BATCH_TOKENS,
    Memory,
    Planner,
    Setup,
    candidates,
    fitting,
)
from nanochat.recipe import settle_horizon
from nanochat.schedule import grad_accum_steps
from nanochat.shards import LAST_SHARD, SHARD_BYTES, SHARD_CHARS
from nanochat.tokenizer import get_tokenizer
from nanochat.traffic import FLOAT32, HALF, StepTime, Work, step_time, transfers

CHARS_PER_TOKEN = 4.8  # of the default data set, with 65,536 tokens of its own
PRICE = 3.0  # dollars for a GPU and hour: about what 8 H100 are let for
DEFAULT_VOCAB = 65_536
QWEN_VOCAB = 151_665  # ids of Qwen2.5's tokenizer
SHARDS = LAST_SHARD  # for training; the last one is validation
# Share of its peak that a GPU reaches in the passes, where it was not measured: karpathy/nanochat
# reports 41% (d12) to 51% (d32) in bfloat16 on 8 H100; its d24, 4.33e19 FLOPs in 10,949 s
# (dev/LEADERBOARD.md, run 1), is at 50%.
ASSUMED_SHARE = 0.45
SPEEDS = Path(__file__).resolve().parent.parent / "bench" / "results" / "train_speed.json"


@dataclass(frozen=True)
class Run:
    """What scripts.base_train does with the same flags on so many ranks."""

    name: str
    config: Config
    params: dict[str, int]  # by kind, as Trainer logs them
    flops_per_token: int
    num_steps: int
    tokens_per_step: int
    chosen: str  # what settle_horizon says about the flags that were not typed

    @property
    def num_params(self) -> int:
        return sum(self.params.values())

    @property
    def tokens(self) -> int:
        return self.num_steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        return float(self.tokens) * self.flops_per_token


def plan_run(
    args: HorizonFlags, arch: str, depth: int, vocab_size: int, length: int, ranks: int
) -> Run:
    """The run; fills in what `args` leaves open, as base_train does."""
    config, tag = make_config(arch, depth, vocab_size, length)
    model, said = build_model(config, "meta"), list[str]()
    num_steps = settle_horizon(args, model, length * ranks, said.append)
    params = {kind: sum(p.numel() for p in ps) for kind, ps in model.param_groups().items()}
    name = tag if arch in (*SIZES, "gpt") else f"{arch} {tag}"
    flops = model.flops_per_token()
    return Run(name, config, params, flops, num_steps, args.total_batch_size, " ".join(said))


def vocabulary(tokenizer: str | None) -> tuple[int, str]:
    """(ids of the tokenizer that base_train would take, where the number is from)."""
    if tokenizer == "qwen2.5":
        return QWEN_VOCAB, "Qwen2.5's tokenizer"
    folder = get_base_dir() / "tokenizer"
    if tokenizer is None and not folder.exists():
        return DEFAULT_VOCAB, "tok_train's default; no tokenizer has been trained yet"
    return get_tokenizer(tokenizer).get_vocab_size(), tokenizer or str(folder)


# -------------------------------------------------------------------------------------------------
# Data and disk


def disk_bytes(
    run: Run, shards: int, chars_per_token: float, checkpoints: int, stream: bool
) -> dict[str, int]:
    """Bytes of so many shards and the validation shard, of their tokens, and of checkpoints."""
    tokens = int(shards * SHARD_CHARS / chars_per_token)
    width = 2 if run.config.vocab_size <= 2**16 else 4  # token_cache.py: uint16 or uint32
    return {
        "text": (shards + 1) * SHARD_BYTES,
        "token cache": 0 if stream else tokens * width,
        "checkpoints": checkpoints * checkpoint_bytes(run.config),
    }


def checkpoints_kept(args: HorizonFlags, num_steps: int) -> int:
    """Checkpoints that lie on the disk at once: those that are kept, and one that is written."""
    saves = 1 if args.save_every < 1 else math.ceil(num_steps / args.save_every)
    return saves if args.keep_last < 0 else min(saves, args.keep_last + 1)


def checkpoint_bytes(config: Config) -> int:
    """Bytes of the tensors of one checkpoint: weights and optimizer state in float32."""
    model = build_model(config, "meta")
    numbers = sum(p.numel() for p in model.parameters())
    for group in make_optimizer(model, 1.0, 1.0, 1.0).groups:
        for name in group.params:
            numbers += sum(math.prod(shape) for shape in state_shapes(group, name).values())
    return FLOAT32 * numbers


# -------------------------------------------------------------------------------------------------
# Memory and time


def memory_limit(cluster: Cluster) -> int:
    """Bytes of one GPU that tensors may take."""
    return int(cluster.gpu.memory) - CUDA_RESERVE


def setups(args: HorizonFlags, cluster: Cluster, compare: bool) -> list[Setup]:
    """How a rank may hold its part of the run there, in the order in which base_train tries them;
    with `compare` followed by all other values of --shard."""
    # As plan.setup_of finds it on such a GPU
    half, compiled = args.dtype != "float32", args.compile != "off"
    setup = Setup("cuda", half, compiled, cluster.gpus)
    found = candidates(args, setup, cluster.per_node)
    others: list[Literal["none", "fsdp", "hsdp"]] = ["none", "fsdp", "hsdp"]
    for shard in others if compare and args.shard == "auto" and cluster.gpus > 1 else ():
        if shard != "hsdp" or cluster.nodes > 1:
            found += candidates(replace(args, shard=shard), setup, cluster.per_node)
    return list({each.shard: each for each in found}.values())


def memory_of(run: Run, setup: Setup, cluster: Cluster, args: HorizonFlags) -> Memory | None:
    """One GPU's memory with the micro-batch and recomputing that base_train would choose; None if
    nothing fits."""
    length = run.config.sequence_len
    rows = max(1, run.tokens_per_step // length // cluster.gpus)
    planner = Planner(run.config, setup, rows)
    return fitting(planner, args, memory_limit(cluster), GPU_MICRO_BATCH_TOKENS, length)


@dataclass(frozen=True)
class Share:
    """The share of its peak that one GPU reaches in the passes, and where the number is from."""

    value: float
    source: str


def share_of_peak(gpu: str, num_params: int, typed: float, speeds: Path = SPEEDS) -> Share:
    """`typed` if it is positive; else what was measured on a GPU of that peak, at the model whose
    size is nearest; else ASSUMED_SHARE."""
    if typed > 0:
        return Share(typed, "as typed")
    found = read_json(speeds) if speeds.exists() else {"table": []}
    rows = [
        row for row in found["table"] if row.get("mfu") and row["peak_flops"] == peak_flops(gpu)
    ]
    if not rows:
        return Share(ASSUMED_SHARE, f"an assumption: none was measured on {gpu}")
    near = min(rows, key=lambda row: abs(math.log(row["num_params"] / num_params)))
    return Share(near["mfu"], f"measured on {found['machine']['gpus'][0]} with {near['name']}")


# -------------------------------------------------------------------------------------------------
# Everything


@dataclass(frozen=True)
class Budget:
    """One run on one cluster. `memory` by --shard; `step` is None where nothing fits."""

    run: Run
    cluster: Cluster
    chars_per_token: float
    disk: dict[str, int]
    memory: dict[str, Memory | None]
    shard: str
    share: Share
    step: StepTime | None
    sent: float  # bytes in a step, by the rank that sends most
    price: float  # dollars for a GPU and hour

    @property
    def characters(self) -> float:
        return self.run.tokens * self.chars_per_token

    @property
    def shards(self) -> int:
        """Shards of the default data set that hold the run's text; perhaps more than there are."""
        return math.ceil(self.characters / SHARD_CHARS)

    @property
    def chosen_memory(self) -> Memory | None:
        return self.memory[self.shard]

    @property
    def hours(self) -> float | None:
        """Of training steps alone."""
        return None if self.step is None else self.step.total * self.run.num_steps / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.hours is None else self.hours * self.cluster.gpus * self.price

    @property
    def tokens_per_second(self) -> float | None:
        """Over all GPUs."""
        return None if self.step is None else self.run.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float | None:
        """As Trainer logs it: the model's FLOPs of a step, of the GPUs' peak."""
        rate, peak = self.tokens_per_second, self.cluster.gpu.peak * self.cluster.gpus
        return None if rate is None else rate * self.run.flops_per_token / peak

    @property
    def warning(self) -> str:
        """What the default data set lacks; empty if it suffices."""
        if self.shards <= SHARDS:
            return ""
        have = SHARDS * SHARD_CHARS / self.chars_per_token
        return (
            f"the default data set is too small: {self.shards:,} shards are wanted, there are "
            f"{SHARDS:,}, {have / 1e9:.0f}B tokens, which would be seen "
            f"{self.run.tokens / have:.1f} times. --target_param_data_ratio="
            f"{have / self.run.num_params:.1f} is all of it once; or bring more by --data"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        run, step = self.run, self.step
        return {
            "name": run.name,
            "config": config_to_dict(run.config),
            "params": run.params,
            "num_params": run.num_params,
            "flops_per_token": run.flops_per_token,
            "num_steps": run.num_steps,
            "total_batch_size": run.tokens_per_step,
            "tokens": run.tokens,
            "flops": run.flops,
            "characters": self.characters,
            "shards": self.shards,
            "shards_there_are": SHARDS,
            "disk_bytes": self.disk,
            "gpu": self.cluster.gpu.name,
            "gpus": self.cluster.gpus,
            "nodes": self.cluster.nodes,
            "memory_limit": memory_limit(self.cluster),
            "memory": {k: m and asdict(m) | {"total": m.total} for k, m in self.memory.items()},
            "shard": self.shard,
            "gb_a_gpu": self.chosen_memory and self.chosen_memory.total / 1e9,
            "share_of_peak": asdict(self.share),
            "step_seconds": step and asdict(step) | {"total": step.total},
            "bytes_sent_per_step": self.sent,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hours": self.hours,
            "price": self.price,
            "dollars": self.dollars,
            "warning": self.warning,
        }  # fmt: skip


def make_budget(
    args: HorizonFlags,
    run: Run,
    cluster: Cluster,
    *,
    mfu: float = -1.0,
    price: float = PRICE,
    chars_per_token: float = CHARS_PER_TOKEN,
    stream: bool = False,
    compare: bool = True,
) -> Budget:
    """The budget of a run on a cluster, with the flags it was planned for. mfu: see share_of_peak.
    `compare`: the memory of every --shard, and not of the one alone that would be taken."""
    memory: dict[str, Memory | None] = {}
    for setup in setups(args, cluster, compare):
        memory[setup.shard] = memory_of(run, setup, cluster, args)
        if memory[setup.shard] is not None and not compare:
            break
    shard = next((name for name, found in memory.items() if found), next(iter(memory)))
    share = share_of_peak(cluster.gpu.name, run.num_params, mfu)
    step, sent = None, 0.0
    if (chosen := memory[shard]) is not None:
        length = run.config.sequence_len
        micro = grad_accum_steps(run.tokens_per_step, chosen.batch, length, cluster.gpus)
        gathered = FLOAT32 if args.dtype == "float32" else HALF
        work = Work.of(run.config, run.tokens_per_step, micro, gathered, args.grad_clip > 0)
        step = step_time(work, shard, cluster, share.value)
        sent = sum(transfer.sent() for transfer in transfers(work, shard, cluster))
    there = min(SHARDS, math.ceil(run.tokens * chars_per_token / SHARD_CHARS))
    checkpoints = checkpoints_kept(args, run.num_steps)
    disk = disk_bytes(run, there, chars_per_token, checkpoints, stream)
    return Budget(run, cluster, chars_per_token, disk, memory, shard, share, step, sent, price)
