"""
One thing changed at a time: what each part of turbo and of its training is worth.

    python -m bench.learning_trials --data=../shared/data/fineweb_like
    python -m bench.learning_trials --data=... --trials="base | no smear" --seeds=5
    python -m bench.learning_trials --data=... --tokens=2457600 --batch=4096 \
        --trials="base | rates x 0.67" --seeds=1 --out=bench/results/learning_trials_long.json
    python -m bench.render                          # puts the table into bench/LEARNING.md

Each trial is a whole run of scripts.base_train at d4 with its own schedule and one change to the
code or the flags. A difference is believed when it is larger than twice its standard error over
the seeds. Runs that are done are not run again; those of one seed come first, so that a queue that
is broken off has something to say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench import surroundings
from bench.learning import ensure_tokenizer, run, run_record
from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.dataloader import MicroBatch, RowReader, StepLoader
from nanochat.models import turbo
from nanochat.train import Trainer
from scripts import base_train

REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "bench" / "results" / "learning_trials.json"
TOKENS, BATCH, ROW, EVAL_TOKENS = 409_600, 2048, 512, 131_072


@dataclass
class Trial:
    """A change: flags for base_train, and a function that makes it in this process."""

    what: str
    flags: list[str] = field(default_factory=list)
    change: Callable[[ExitStack], None] = lambda stack: None
    any_length: bool = True  # not only for runs of TOKENS


def set_to(owner: Any, name: str, value: Any) -> Callable[[ExitStack], None]:
    """The change that replaces one name."""
    return lambda stack: stack.enter_context(patch.object(owner, name, value))


def frozen(value: float, *names: str) -> Callable[[ExitStack], None]:
    """The change that fixes these parameters of the model at a value."""
    init, groups = turbo.Turbo.init_weights, turbo.Turbo.param_groups

    def init_weights(model: Any, generator: torch.Generator | None = None) -> None:
        init(model, generator)
        for name in names:
            model.get_parameter(name).data.fill_(value)

    def param_groups(model: Any) -> dict[str, list[torch.Tensor]]:
        left_out = {id(model.get_parameter(name)) for name in names}
        kept = {k: [p for p in ps if id(p) not in left_out] for k, ps in groups(model).items()}
        return {k: ps for k, ps in kept.items() if ps}

    def change(stack: ExitStack) -> None:
        stack.enter_context(patch.object(turbo.Turbo, "init_weights", init_weights))
        stack.enter_context(patch.object(turbo.Turbo, "param_groups", param_groups))

    return change


def tail_average(share: float) -> Callable[[ExitStack], None]:
    """The change that evaluates, at the end, the mean of the weights over the last `share` of the
    steps in place of the last ones."""
    average: dict[str, torch.Tensor] = {}
    count = 0
    take, is_due = Trainer.step, Trainer.is_due

    def step(trainer: Trainer, *args: Any) -> None:
        nonlocal count
        take(trainer, *args)
        if trainer.state.step > (1 - share) * trainer.num_steps:
            count += 1
            for name, p in trainer.model.named_parameters():
                mean_so_far = average.setdefault(name, p.detach().clone())
                mean_so_far.lerp_(p.detach(), 1 / count)

    def due(trainer: Trainer, every: int, *, at_start: bool = False) -> bool:
        if trainer.state.step >= trainer.num_steps:
            for name, p in trainer.model.named_parameters():
                p.data.copy_(average[name])
        return is_due(trainer, every, at_start=at_start)

    def change(stack: ExitStack) -> None:
        stack.enter_context(patch.object(Trainer, "step", step))
        stack.enter_context(patch.object(Trainer, "is_due", due))

    return change


def batch_ramp(small_steps: int, factor: int) -> Callable[[ExitStack], None]:
    """The change that makes every step but the first `small_steps` take `factor` batches: the same
    rows in the same order, a batch that grows."""
    take = StepLoader.step

    def step(loader: StepLoader, number: int) -> list[MicroBatch]:
        first, later = min(number, small_steps), max(0, number - small_steps)
        begin = first + later * factor
        blocks = range(begin, begin + (1 if number < small_steps else factor))
        copies = ((b.idx.clone(), b.targets.clone()) for i in blocks for b in take(loader, i))
        return [MicroBatch(*copy) for copy in copies]  # the loader uses its buffers again

    return set_to(StepLoader, "step", step)


def second_epoch(reshuffled: bool) -> Callable[[ExitStack], None]:
    """The change that trains on the first half of the rows twice, in the second epoch in the same
    order or in another."""
    half = TOKENS // 2 // ROW
    order = np.random.default_rng(0).permutation(half) if reshuffled else np.arange(half)
    read = RowReader.read_rows

    def read_rows(reader: RowReader, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.where(rows < half, rows, order[rows % half])  # validation has fewer rows
        ascending = np.argsort(wanted)
        idx, targets = read(reader, wanted[ascending])
        back = np.argsort(ascending)
        return idx[back], targets[back]

    return set_to(RowReader, "read_rows", read_rows)


def beginnings_only() -> Callable[[ExitStack], None]:
    """The change that leaves out every training row that goes on with a document of another row:
    what packing by cropping would learn from."""
    prepare = RowReader._prepare

    def without_rest(reader: RowReader, sequence: int) -> Any:
        shard = prepare(reader, sequence)
        if reader.source.num_shards() == 1:  # validation
            return shard
        continued = np.logical_or.reduceat(shard.plan.pieces[:, 1] > 0, shard.plan.starts[:-1])
        kept = shard.row_order[~continued[shard.row_order]]
        # The plan's length is how many rows there are, so the others' places are filled again
        return replace(shard, row_order=np.resize(kept, len(shard.plan)))

    return set_to(RowReader, "_prepare", without_rest)


def rate_by_frequency(power: float) -> Callable[[ExitStack], None]:
    """The change that multiplies the embedding's rate, for each token, by how often it came so far
    (in units of the mean) to this power, at least by 1/4 and at most by 4."""
    take = Trainer.step
    counts: dict[str, torch.Tensor] = {}

    def step(trainer: Trainer, batches: list[MicroBatch], *args: Any) -> None:
        weight = trainer.model.wte.weight
        seen = counts.setdefault("seen", torch.zeros(weight.size(0)))
        for batch in batches:
            seen += torch.bincount(batch.idx.flatten(), minlength=len(seen))
        before = weight.detach().clone()
        take(trainer, batches, *args)
        factor = (seen / seen.mean()).clamp(min=1e-3).pow(power).clamp(0.25, 4)
        with torch.no_grad():
            weight.copy_(before + factor[:, None] * (weight - before))

    return set_to(Trainer, "step", step)


TRIALS = {
    "base": Trial("turbo as it is"),
    "no windows": Trial(
        "all layers see the whole row",
        change=set_to(turbo.TurboConfig, "layer_window", lambda self, layer: None),
    ),
    "no backout": Trial("backout fixed at 0", change=frozen(0.0, "backout_scale")),
    "qk 1.0": Trial("QK scale 1, not 1.2", change=set_to(turbo, "QK_SCALE", 1.0)),
    "qk 1.4": Trial("QK scale 1.4", change=set_to(turbo, "QK_SCALE", 1.4)),
    "rope 10k": Trial("RoPE base 10,000, not 100,000", change=set_to(turbo, "ROPE_THETA", 1e4)),
    "no value embeddings": Trial(
        "no value embeddings",
        change=set_to(turbo.TurboConfig, "has_value_embedding", lambda self, layer: False),
    ),
    "no smear": Trial("smear fixed at 0", change=frozen(0.0, "smear_scale", "smear_gate.weight")),
    "no x0": Trial(
        "nothing of the embedding in later layers", change=frozen(0.0, "embedding_scale")
    ),
    "no residual scalars": Trial(
        "the stream's scalars fixed at 1", change=frozen(1.0, "residual_scale")
    ),
    "tail average 10%": Trial(
        "mean of the weights of the last tenth of the steps", change=tail_average(0.1)
    ),
    "tail average 25%": Trial(
        "mean of the weights of the last quarter, the rate ending at 20%",
        ["--final_lr_frac=0.2"],
        tail_average(0.25),
    ),
    "batch ramp": Trial(
        "1,024 tokens a step for a quarter of the tokens, then 2,048",
        ["--total_batch_size=1024", "--num_iterations=250"],
        batch_ramp(100, 2),
        any_length=False,
    ),
    "constant momentum": Trial(
        "Muon's momentum 0.95 throughout",
        change=set_to(base_train, "muon_momentum", lambda step: 0.95),
    ),
    "no clipping": Trial("gradients are not clipped", ["--grad_clip=0"]),
    "no weight decay": Trial("no weight decay", ["--weight_decay=0"]),
    "rates x 1.5": Trial(
        "all rates x 1.5",
        ["--embedding_lr=0.45", "--unembedding_lr=0.012", "--matrix_lr=0.03", "--scalar_lr=0.15"],
    ),
    "rates x 0.67": Trial(
        "all rates x 0.67",
        ["--embedding_lr=0.2", "--unembedding_lr=0.0053", "--matrix_lr=0.0133",
         "--scalar_lr=0.067"],
    ),
    "batch 1024": Trial(
        "1,024 tokens a step", ["--total_batch_size=1024", "--num_iterations=400"],
        any_length=False,
    ),
    "batch 4096": Trial(
        "4,096 tokens a step", ["--total_batch_size=4096", "--num_iterations=100"],
        any_length=False,
    ),
    "head x 2": Trial("the head's rate x 2", ["--unembedding_lr=0.016"]),
    "warmup 10": Trial("warmup of 10 steps, not 40", ["--warmup_steps=10"]),
    "warmup 80": Trial("warmup of 80 steps", ["--warmup_steps=80"]),
    "scalars 0.5": Trial("the scalars' rate 0.5, not 0.1", ["--scalar_lr=0.5"]),
    "same epoch twice": Trial(
        "half of the text twice, in the same order", change=second_epoch(reshuffled=False),
        any_length=False,
    ),
    "reshuffled": Trial(
        "half of the text twice, reshuffled", change=second_epoch(reshuffled=True),
        any_length=False,
    ),
    "beginnings only": Trial(
        "only rows that show documents from their beginning", change=beginnings_only()
    ),
    "frequent faster": Trial(
        "embedding's rate by a token's frequency, to the power 1/4", change=rate_by_frequency(0.25)
    ),
    "rare faster": Trial(
        "embedding's rate by a token's frequency, to the power -1/4",
        change=rate_by_frequency(-0.25),
    ),
    "gpt": Trial("the GPT with the same training", ["--arch=gpt"]),
}  # fmt: skip


@dataclass
class Args:
    """Run trials, or one of them in this process."""

    data: Path | None = None
    """Folder of parquet shards with a `text` column; the last one is validation."""
    base_dir: Path = Path.home() / ".cache" / "nanochat-learning"
    """Where tokenizer, token cache and runs go, to be continued."""
    trials: str = " | ".join(TRIALS)
    """Names, separated by |."""
    seeds: int = 3
    """Runs of each."""
    tokens: int = TOKENS
    """Tokens of each run."""
    batch: int = BATCH
    """Tokens of a step."""
    out: Path = RESULT
    """Result file."""


def command(name: str, seed: int, args: Args) -> tuple[str, list[str]]:
    """(tag, flags for base_train) of a trial with a seed; a trial's own flags win."""
    trial, data = TRIALS[name], (args.data or Path()).resolve()
    tag = f"trial-{name.replace(' ', '-').replace('%', '')}-s{seed}"
    plain = [
        "--arch=turbo", "--depth=4", f"--max_seq_len={ROW}", f"--total_batch_size={args.batch}",
        f"--num_iterations={args.tokens // args.batch}", f"--eval_tokens={EVAL_TOKENS}",
        "--eval_every=100000", "--core_metric_every=-1", "--sample_every=-1", "--compile=off",
        f"--seed={seed}", f"--data={data}",
    ]  # fmt: skip
    if (args.tokens, args.batch) == (TOKENS, BATCH):
        plain.append("--grad_clip=1")  # as when most of these were run
    else:
        tag += f"-{args.tokens}-{args.batch}"
    plain.append(f"--model_tag={tag}")
    typed = {flag.split("=")[0] for flag in trial.flags}
    return tag, [f for f in plain if f.split("=")[0] not in typed] + trial.flags


def main(args: Args) -> None:
    names = [name.strip() for name in args.trials.split("|")]
    for name in names:
        if name not in TRIALS:
            raise UserError(f"--trials={name}: choose among {', '.join(TRIALS)}")
        if args.tokens != TOKENS and not TRIALS[name].any_length:
            raise UserError(f"--trials={name} is made for --tokens={TOKENS}, not {args.tokens}")
    if args.data is None or not list(args.data.glob("*.parquet")):
        raise UserError(f"--data={args.data} holds no parquet shards")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(args.base_dir)}
    ensure_tokenizer(env, args.base_dir, args.data)
    for seed in range(args.seeds):
        for name in names:
            tag, words = command(name, seed, args)
            log = args.base_dir / "base_checkpoints" / tag / "log.jsonl"
            if run_record(log) is None:
                run(env, "bench.learning_trials", f"--one={name}", "--", *words)
            collect(args, names)


def collect(args: Args, names: list[str]) -> None:
    """Writes the result file from the logs of all runs that are done."""
    rows = []
    for name in names:
        found = []
        for seed in range(args.seeds):
            tag, words = command(name, seed, args)
            record = run_record(args.base_dir / "base_checkpoints" / tag / "log.jsonl")
            if record is not None:
                found.append({"seed": seed, **record})
        shown = [w for w in words if not w.startswith(("--data=", "--model_tag=", "--seed="))]
        if found:
            rows.append({"trial": name, "what": TRIALS[name].what, "flags": shown, "runs": found})
    about = {"tokens": args.tokens, "batch": args.batch}
    write_json(args.out, {**surroundings(), **about, "trials": rows})
    for row in compared(rows):
        print0(
            f"{row['trial']:<22} {row['bpb']:.4f}  {row['difference']:+.4f} +- {row['error']:.4f}"
        )


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each trial its mean bits per byte, and the difference from "base" with its standard error
    over the seeds that both have: a seed decides rows and weights, so pairs are compared."""
    base = {r["seed"]: r["final"] for row in rows if row["trial"] == "base" for r in row["runs"]}
    result = []
    for row in rows:
        own = {r["seed"]: r["final"] for r in row["runs"]}
        differences = [own[s] - base[s] for s in own if s in base]
        if not differences:
            continue
        n = len(differences)
        error = stdev(differences) / n**0.5 if n > 1 else float("nan")
        result.append(
            {"trial": row["trial"], "what": row["what"], "seeds": n, "bpb": mean(own.values()),
             "difference": mean(differences), "error": error}
        )  # fmt: skip
    return result


def verdict(row: dict[str, Any]) -> str:
    """What the numbers allow to say."""
    if row["trial"] == "base":
        return ""
    if row["seeds"] == 1:
        return "one seed"
    if abs(row["difference"]) <= 2 * row["error"]:
        return "tie"
    return "better" if row["difference"] < 0 else "worse"


def table(result: dict[str, Any]) -> str:
    """The passage of bench/LEARNING.md."""
    tokens, batch = result.get("tokens", TOKENS), result.get("batch", BATCH)
    lines = [
        f"{tokens:,} tokens, {batch:,} a step, d4, bits per byte over {EVAL_TOKENS:,} tokens;",
        "difference from the first row, paired by seed, with its standard error.",
        "",
        "| changed | bits per byte | difference | seeds | |",
        "|---|---|---|---|---|",
    ]
    for row in compared(result["trials"]):
        difference = "" if row["trial"] == "base" else f"{row['difference']:+.4f}"
        if difference and row["seeds"] > 1:
            difference += f" ± {row['error']:.4f}"
        lines.append(
            f"| {row['what']} | {row['bpb']:.4f} | {difference} | {row['seeds']} | {verdict(row)} |"
        )
    return "\n".join(lines)


def run_one(name: str, words: list[str]) -> None:
    """The run of one trial, in this process."""
    with ExitStack() as stack:
        TRIALS[name].change(stack)
        base_train.main(flags.parse(base_train.Args, words))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("--one="):
        run_one(sys.argv[1].removeprefix("--one="), sys.argv[3:])
    else:
        flags.run(main, Args)
