"""
Plans a pretraining run: parameters, tokens, text, disk, memory, hours, dollars.

    python -m scripts.plan                                 # a table of sizes, on 8 H100
    python -m scripts.plan --depth=20
    python -m scripts.plan --size=7b --gpu=h200 --nodes=4 --price=3.5
    python -m scripts.plan --depth=12 --gpu=rtx4090 --gpus=1 --target_param_data_ratio=40
    python -m scripts.plan --scale                         # 8, 64 and 512 GPUs

Takes the flags of scripts.base_train that decide what a run is, and plans that run. Parameters,
FLOPs, steps, batch and memory are what it will print, by the same functions; hours are a model's
(nanochat/traffic.py), whose assumptions are flags and are shown.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nanochat import flags
from nanochat.budget import (
    CHARS_PER_TOKEN,
    DEFAULT_VOCAB,
    PRICE,
    SHARDS,
    Budget,
    make_budget,
    memory_limit,
    plan_run,
    vocabulary,
)
from nanochat.cluster import Cluster, find_gpu
from nanochat.common import UserError
from nanochat.plan import gb

SIZES = ("--depth=12", "--depth=20", "--depth=26", "--size=0.5b", "--size=1.5b", "--size=7b")
ORDER = ("none", "zero", "fsdp", "hsdp")  # the less a GPU holds, the later
SCALED = ("--depth=20", "--size=1.5b", "--size=7b")


@dataclass
class Args(flags.HorizonFlags, flags.CacheFlags):
    """Plan a pretraining run. Without --depth, --arch or --size: a table of sizes."""

    arch: str | None = None
    """As scripts.base_train's."""
    depth: int | None = None
    """As scripts.base_train's."""
    size: Literal["0.5b", "1.5b", "3b", "7b"] | None = None
    """A published size of Qwen2.5 with its own tokenizer: --arch=qwen2.5-<size>
    --tokenizer=qwen2.5."""
    max_seq_len: int = 2048
    """Tokens in a row."""
    tokenizer: str | None = None
    """As scripts.base_train's: its ids are the rows of the embedding."""
    vocab_size: int = -1
    """Ids of the tokenizer; -1: of the one that scripts.base_train would take."""
    gpu: str = "h100"
    """Kind of GPU (nanochat/cluster.py has the list)."""
    gpus: int = 8
    """GPUs of a node."""
    nodes: int = 1
    """Nodes."""
    network: float = 400.0
    """Gb/s of each GPU's way out of its node (InfiniBand, RoCE, Ethernet)."""
    mfu: float = -1.0
    """Share of its peak that one GPU reaches alone; -1: as bench/train_speed.py measured it on
    such a GPU, else an assumption."""
    price: float = PRICE
    """Dollars for one GPU and hour (about what 8 H100 cost by the hour)."""
    chars_per_token: float = CHARS_PER_TOKEN
    """Characters that one token stands for (scripts.tok_eval measures it)."""
    scale: bool = False
    """Predict a step on 1, 8 and 64 nodes instead."""
    json: bool = False
    """Print one JSON document instead of tables."""


def main(args: Args) -> None:
    if min(args.gpus, args.nodes) < 1:
        raise UserError(f"--gpus={args.gpus} and --nodes={args.nodes} must be at least 1")
    one = args.depth is not None or args.arch is not None or args.size is not None
    words = [""] if one else SCALED if args.scale else SIZES
    every_nodes = (1, 8, 64) if args.scale else (args.nodes,)
    budgets = [budget_of(args, word, nodes) for word in words for nodes in every_nodes]
    if args.json:
        print(json.dumps([budget.as_dict() for budget in budgets], indent=2))
        return
    if args.scale:
        show_scale(budgets)
    elif one:
        show_one(budgets[0], args)
    else:
        show_many(budgets)
    assumptions(budgets, args)


def budget_of(args: Args, word: str, nodes: int) -> Budget:
    """The budget of one run; `word` is a flag that says which, of those that were not typed."""
    args = replace(args)  # what was not typed gets filled in
    if word:
        name, value = word.removeprefix("--").split("=")
        setattr(args, name, int(value) if name == "depth" else value)
        # A table is of the recipe's tokenizer, not of what happens to lie in the base directory
        if name == "depth" and args.vocab_size < 0:
            args.vocab_size = DEFAULT_VOCAB
    if args.size is not None:
        args.arch, args.tokenizer = f"qwen2.5-{args.size}", args.tokenizer or "qwen2.5"
    if args.vocab_size < 0:
        args.vocab_size = vocabulary(args.tokenizer)[0]
    cluster = Cluster(find_gpu(args.gpu), args.gpus, nodes, args.network * 1e9 / 8, args.shard_size)
    depth = 20 if args.depth is None else args.depth
    run = plan_run(args, args.arch or "gpt", depth, args.vocab_size, args.max_seq_len, cluster.gpus)
    return make_budget(
        args, run, cluster, mfu=args.mfu, price=args.price, chars_per_token=args.chars_per_token,
        stream=args.stream, compare=not word,
    )  # fmt: skip


# ---- tables


def show_one(b: Budget, args: Args) -> None:
    run = b.run
    facts = table(f"{run.name} on {b.cluster}", "what", "how much")
    for kind, number in run.params.items():
        if number:
            facts.add_row(f"parameters: {kind}", f"{number:,}")
    rows: list[tuple[str, Any]] = [
        ("parameters", f"{run.num_params:,}"),
        ("FLOPs a token", f"{run.flops_per_token:,}"),
        ("tokens", f"{run.tokens:,}"),
        ("tokens a parameter", f"{run.tokens / run.num_params:.1f}"),
        ("steps", f"{run.num_steps:,}"),
        ("tokens a step", f"{run.tokens_per_step:,}"),
        ("FLOPs", f"{run.flops:.3g}"),
        ("characters", f"{b.characters:.3g}"),
        ("shards to download", f"{b.shards:,}"),
        *((f"disk: {name}, GB", gb(size)) for name, size in b.disk.items()),
        ("disk, GB", gb(sum(b.disk.values()))),
    ]
    for name, value in rows:
        facts.add_row(name, value)
    show(facts)
    show(memory_table(b))
    show_time(b)
    for line in (run.chosen, b.warning):
        if line:
            print(line)


def memory_table(b: Budget) -> Table:
    limit = gb(memory_limit(b.cluster))
    heads = ("micro-batch", "recompute", "weights", "gradients", "optimizer", "the rest", "GB")
    made = table(f"memory of one GPU, of {limit} GB", "--shard", *heads)
    for shard, memory in sorted(b.memory.items(), key=lambda item: ORDER.index(item[0])):
        if memory is None:
            made.add_row(shard, "nothing fits", *[""] * 6)
            continue
        parts = memory.fullest
        three = [parts.get(name, 0) for name in ("weights", "gradients", "optimizer")]
        sizes = [*three, memory.total - sum(three), memory.total]
        made.add_row(shard, str(memory.batch), memory.mode, *map(gb, sizes))
    return made


def show_time(b: Budget) -> None:
    if b.step is None:
        return
    made = table(f"time, --shard={b.shard}", "what", "how much")
    for name, seconds in asdict(b.step).items():
        made.add_row(f"a step: {name}, s", f"{seconds:.4f}")
    made.add_row("a step, s", f"{b.step.total:.4f}")
    made.add_row("tokens a second", f"{b.tokens_per_second:,.0f}")
    made.add_row("MFU", f"{b.mfu:.1%}")
    made.add_row("hours", f"{b.hours:,.2f}")
    made.add_row("dollars", f"{b.dollars:,.0f}")
    show(made)


def show_many(budgets: list[Budget]) -> None:
    made = table(
        f"pretraining on {budgets[0].cluster}", "model", "parameters", "tokens", "FLOPs",
        "characters", "shards", "disk, GB", "--shard", "rows", "recompute", "GB of GPU", "hours",
        "dollars",
    )  # fmt: skip
    for b in budgets:
        run, memory = b.run, b.chosen_memory
        fits = [b.shard, str(memory.batch), memory.mode, gb(memory.total)] if memory else ["-"] * 4
        time = [f"{b.hours:,.1f}", f"{b.dollars:,.0f}"] if memory else ["-"] * 2
        made.add_row(
            run.name, f"{run.num_params / 1e6:,.0f}M", f"{run.tokens / 1e9:.1f}B",
            f"{run.flops:.2g}", f"{b.characters / 1e9:,.0f}B",
            f"{b.shards:,}" + (" (!)" if b.shards > SHARDS else ""),
            f"{sum(b.disk.values()) / 1e9:,.0f}", *fits, *time,
        )  # fmt: skip
    show(made)
    for b in budgets:
        if b.warning:
            print(f"{b.run.name}: {b.warning}")


def show_scale(budgets: list[Budget]) -> None:
    heads = ("GPUs", "--shard", "rows", "GB", "passes", "exposed", "reduce", "update", "spread",
             "step, s", "tokens/s a GPU", "MFU", "GB sent")  # fmt: skip
    made = table(f"one step on {budgets[0].cluster.gpu.name}, seconds", "model", *heads)
    for b in budgets:
        memory, name = b.chosen_memory, b.run.name
        if memory is None or b.step is None:
            made.add_row(name, str(b.cluster.gpus), "nothing fits", *[""] * 11)
            continue
        made.add_row(
            name, str(b.cluster.gpus), b.shard, str(memory.batch), gb(memory.total),
            *(f"{seconds:.4f}" for seconds in asdict(b.step).values()), f"{b.step.total:.4f}",
            f"{(b.tokens_per_second or 0) / b.cluster.gpus:,.0f}", f"{b.mfu:.1%}", gb(b.sent),
        )  # fmt: skip
    show(made)


def assumptions(budgets: list[Budget], args: Args) -> None:
    b = budgets[0]
    print(
        f"Assumed: {b.share.value:.0%} of {b.cluster.gpu.peak / 1e12:,.0f} TFLOP/s in the passes "
        f"({b.share.source}; --mfu), {b.cluster.gpu.link / 1e9:,.0f} GB/s to GPUs of the node, "
        f"{args.network:,.0f} Gb/s out of it for each (--network), of which 80% arrives; "
        f"${args.price:g} for a GPU and hour (--price); {args.chars_per_token:g} characters a token"
    )


def table(title: str, *heads: str) -> Table:
    """An empty table; all columns but the first hold numbers."""
    box = SIMPLE_HEAD if sys.stdout.isatty() else None
    made = Table(heads[0], title=title, title_justify="left", box=box)
    for head in heads[1:]:
        made.add_column(head, justify="right")
    return made


def show(made: Table) -> None:
    """For people on a terminal, in lines that are not cut elsewhere."""
    console = Console() if sys.stdout.isatty() else Console(width=200, color_system=None)
    console.print(made)


if __name__ == "__main__":
    flags.run(main, Args)
