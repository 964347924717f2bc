"""
The finetuning stages' learning rates: what their defaults come to, and a few values around them.

    NANOCHAT_BASE_DIR=~/.cache/nanochat-rates bash speedrun.sh    # on a CPU: a midtrained d3
    python -m bench.finetune_rates
    python -m bench.finetune_rates --only="SFT | RL, LoRA" --seeds=3
    python -m bench.render                           # puts the tables into docs/06-finetuning.md

Short SFT runs from that model; DPO and RL from what SFT makes of it at its default rate. DPO's
pairs are replies of that model to word problems, a right one before a wrong one. After every run
the same is measured: the loss on held-out talk, which rises where a model forgets how to speak, and
what share of each task's held-out problems the likeliest reply solves. A difference from the
default is believed when it is larger than twice its standard error over the seeds. A second table
tells what conversations about itself do to the model. Runs that are done are not run again; those
of one seed come first, so that a queue that is broken off has something to say.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch

from bench import surroundings
from bench.bpe_common import RESULTS
from nanochat import flags
from nanochat.checkpoint import LOG, list_tags, load_model, stage_dir
from nanochat.common import UserError, print0, read_json, read_jsonl, write_json
from nanochat.conversation_source import ConversationSource
from nanochat.dataloader import RowReader, eval_batches
from nanochat.engine import Engine
from nanochat.evals.bpb import evaluate_loss
from nanochat.evals.chat import run_chat_eval
from nanochat.evals.items import write_jsonl
from nanochat.reply import split_reply
from nanochat.rollout import Rollouts, sample_rollouts
from nanochat.tasks import identity
from nanochat.tasks.common import get_task
from nanochat.tasks.mixture import build_mixture
from scripts import chat_dpo, chat_rl, chat_sft

RESULT = RESULTS / "finetune_rates.json"
SCRIPTS: dict[str, Any] = {"sft": chat_sft, "dpo": chat_dpo, "rl": chat_rl}

# Task: how many of its held-out problems are asked; -1: all
GOAL, ITSELF, VAL_LOSS = "primer-math", "primer-self", "val_loss"
OTHERS = ["primer-arithmetic", "primer-spelling", "primer-facts", "primer-choice", "primer-chat"]
TASKS = {GOAL: -1, ITSELF: -1, **dict.fromkeys(OTHERS, 200)}
MAX_NEW_TOKENS = 100  # as speedrun.sh evaluates; its longest replies are shorter

# What speedrun.sh finetunes on, but for the conversations about the model itself
PLAIN = (
    "primer-choice@2000 | primer-facts@4000 | primer-spelling | primer-chat@3000 "
    "| primer-arithmetic@2000 | primer-math@150"
)
SELF = f"{PLAIN} | primer-self@4000"
NAME = "Ada"  # whom other conversations make of it
# {work} is the folder of this benchmark in the base directory: results hold no paths of ours
WORDS = {
    "sft": [
        "--source=mid", "--device_batch_size=8", "--total_batch_size=2048", "--num_iterations=75",
        "--val_mixture=", "--sample_every=-1", "--chat_eval_every=-1",
    ],
    "dpo": [
        "--source=sft", "--data={work}/pairs/train.jsonl", "--val_data={work}/pairs/test.jsonl",
        "--device_batch_size=32", "--eval_every=-1",
    ],
    "rl": [
        "--source=sft", f"--task={GOAL}", "--num_samples=8", "--num_iterations=30",
        "--device_batch_size=32", f"--max_new_tokens={MAX_NEW_TOKENS}", "--eval_every=-1",
        "--eval_examples=8", "--eval_samples=0",
    ],
}  # fmt: skip
LORA = "--lora_rank=16"
PAIR_PROBLEMS, PAIR_BATCH, PAIR_SAMPLES = 4096, 64, 8  # problems asked, at a time, replies to each


@dataclass(frozen=True)
class Trial:
    """One setting, which every seed runs once."""

    group: str
    """Those that are compared with each other; the default is among them."""
    stage: str
    name: str
    """Of the runs; two groups may share them."""
    shown: str
    words: list[str]
    is_default: bool = False


def sweep(group: str, stage: str, flag: str, times: tuple[float, ...], *words: str) -> list[Trial]:
    """The flag's default times each of these."""
    default = getattr(SCRIPTS[stage].Args, flag)
    slug = group.lower().replace(", ", "-")
    return [
        Trial(
            group, stage, f"{slug}-{default * factor:g}", f"`--{flag}={default * factor:g}`",
            [*words, f"--{flag}={default * factor:g}"], factor == 1,
        )
        for factor in times
    ]  # fmt: skip


SFT = sweep("SFT", "sft", "init_lr_frac", (0.25, 1, 4), f"--mixture={SELF}")
START = next(trial for trial in SFT if trial.is_default)
IDENTITY = "identity"
TRIALS = [
    *SFT,
    *sweep("SFT, LoRA", "sft", "lora_lr", (0.4, 1, 1.6, 6.4), f"--mixture={SELF}", LORA),
    *sweep("DPO", "dpo", "init_lr_frac", (0.25, 1, 4)),
    *sweep("RL, LoRA", "rl", "lora_lr", (1, 4, 16), LORA),
    Trial(IDENTITY, "sft", "identity-none", "none", [f"--mixture={PLAIN}"], True),
    Trial(IDENTITY, "sft", START.name, "who it was", START.words),
    Trial(
        IDENTITY, "sft", f"identity-{NAME.lower()}", f"{NAME}, a new name",
        [f"--mixture={PLAIN} | {{work}}/{NAME.lower()}*4"],  # as many as primer-self's
    ),
]  # fmt: skip


@dataclass
class Args:
    """Finetune at a few rates, and measure."""

    base_dir: Path = Path.home() / ".cache" / "nanochat-rates"
    """Base directory of a CPU speedrun; the runs go there, too, to be continued."""
    only: str = " | ".join(dict.fromkeys(trial.group for trial in TRIALS))
    """Groups of runs, separated by |."""
    seeds: int = 2
    """Runs of each setting."""
    out: Path = RESULT
    """Result file."""


def main(args: Args) -> None:
    os.environ["NANOCHAT_BASE_DIR"] = str(args.base_dir.expanduser().resolve())
    if not list_tags("mid"):
        raise UserError(
            f"--base_dir={args.base_dir} holds no midtrained model; "
            f"`NANOCHAT_BASE_DIR={args.base_dir} bash speedrun.sh` makes one on a CPU"
        )
    asked = [name.strip() for name in args.only.split("|")]
    if unknown := set(asked) - {trial.group for trial in TRIALS}:
        raise UserError(f"--only={args.only}: {', '.join(unknown)}: choose among {Args.only}")
    work = args.base_dir.expanduser().resolve() / "finetune_rates"
    write_identity(work)
    done(work, "mid", lambda: measure("mid", None, work))
    trials = [trial for trial in TRIALS if trial.group in asked]
    finetuned(work, START, 0)
    if any(trial.stage == "dpo" for trial in trials):
        write_pairs(work)
    for seed in range(args.seeds):
        for trial in trials:
            finetuned(work, trial, seed)
            collect(args.out, work)
    print0(f"written to {args.out}")


def done(work: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, or returned in an earlier run."""
    path = work / f"{name}.json"
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def tag_of(trial: Trial, seed: int) -> str:
    return f"rates-{trial.name}-s{seed}"


def command(trial: Trial, seed: int) -> list[str]:
    """Flags of a run, but for the seed and the tags."""
    return [*WORDS[trial.stage], *trial.words, "--compile=off", "--device_type=cpu", "--resume"]


def finetuned(work: Path, trial: Trial, seed: int) -> dict[str, Any]:
    """What a run came to; it runs now if it never did."""
    tag = tag_of(trial, seed)

    def run() -> dict[str, Any]:
        words = [word.replace("{work}", str(work)) for word in command(trial, seed)]
        start = [] if trial.stage == "sft" else [f"--source_tag={tag_of(START, 0)}"]
        script = SCRIPTS[trial.stage]
        script.main(
            flags.parse(script.Args, [*words, *start, f"--seed={seed}", f"--model_tag={tag}"])
        )
        return measure(trial.stage, tag, work)

    return done(work, tag, run)


# -------------------------------------------------------------------------------------------------
# Data of our own


def write_identity(work: Path) -> None:
    """Conversations with a model of another name, and questions to ask it."""
    of = identity.Description(name=NAME)
    for split, size in identity.SIZES.items():
        rows = identity.generate(of, split, size)
        write_jsonl(work / NAME.lower() / f"{split}.jsonl", rows)


def write_pairs(work: Path) -> None:
    """DPO's pairs: to each word problem a right and a wrong reply of the model that it starts from,
    where it gave both. Those of the task's test split are the pairs that are held out."""
    if (work / "pairs" / "test.jsonl").exists():
        return
    model, tokenizer, _ = load_model("sft", "cpu", tag_of(START, 0))
    engine = Engine(model, tokenizer)
    for split in ("train", "test"):
        task = get_task(GOAL, split)
        pairs = []
        for first in range(0, min(PAIR_PROBLEMS, len(task)), PAIR_BATCH):
            problems = range(first, min(first + PAIR_BATCH, PAIR_PROBLEMS, len(task)))
            found = sample_rollouts(
                engine, task, problems, reward=task.reward, num_samples=PAIR_SAMPLES,
                max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, top_k=None, seed=1,
            )  # fmt: skip
            pairs += [
                pair(tokenizer, task[problems[i]], found, i) for i in found.useful.nonzero()[0]
            ]
        write_jsonl(work / "pairs" / f"{split}.jsonl", pairs)
        print0(f"{len(pairs):,} pairs of {GOAL}, {split}")


def pair(tokenizer: Any, problem: Any, found: Rollouts, i: int) -> dict[str, Any]:
    """The best and the worst reply to the i-th problem, with their calls of the calculator."""
    start = len(tokenizer.render_for_completion(problem))

    def message(j: int) -> list[dict[str, Any]]:
        at = i * PAIR_SAMPLES + j
        ids, mask = found.sequences[at][start:], found.masks[at][start:]
        return [{"role": "assistant", "content": split_reply(tokenizer, ids, mask)[1]}]

    best, worst = found.rewards[i].argmax(), found.rewards[i].argmin()
    prompt = problem["messages"][:-1]
    return {"prompt": prompt, "chosen": message(best), "rejected": message(worst)}


# -------------------------------------------------------------------------------------------------
# What a run comes to


def measure(stage: str, tag: str | None, work: Path) -> dict[str, Any]:
    """Accuracies by task and validation loss of a checkpoint (the newest where no tag says which),
    and what DPO's log says of held-out pairs."""
    model, tokenizer, meta = load_model(stage, "cpu", tag)
    engine = Engine(model, tokenizer)
    length = model.config.sequence_len + 1
    talk = ConversationSource(build_mixture("primer-chat", "test"), tokenizer, length)
    reader = RowReader(talk, length, 0, tokenizer.get_bos_token_id())
    with torch.inference_mode():
        loss = evaluate_loss(model, eval_batches(reader, 10**9, 16, 0, 1, "cpu"))
    found = {VAL_LOSS: loss}
    for name, count in {**TASKS, str(work / NAME.lower()): -1}.items():
        result = run_chat_eval(
            get_task(name, "test"), model, tokenizer, engine, batch_size=128, temperature=0.0,
            max_new_tokens=MAX_NEW_TOKENS, max_problems=count,
        )  # fmt: skip
        key = name if name in TASKS else NAME.lower()
        found |= {key: result.accuracy, f"{key}_problems": result.n}
    if stage == "dpo":
        rows = [row for _, row in read_jsonl(stage_dir(stage) / meta["tag"] / LOG)]
        last = next(row for row in reversed(rows) if "val_accuracy" in row)
        pairs = {k: v for k, v in last.items() if k.startswith("val_")}
        found |= {key.replace("val_", "pairs_"): value for key, value in pairs.items()}
    return found


def collect(out: Path, work: Path) -> dict[str, Any]:
    """Writes and returns the result file: all runs that are done."""
    trials = []
    for trial in TRIALS:
        runs = []
        for path in sorted(work.glob(f"{tag_of(trial, 0)[:-1]}*.json")):
            runs.append({"seed": int(path.stem.rpartition("-s")[2]), **read_json(path)})
        trials.append(
            {"group": trial.group, "stage": trial.stage, "shown": trial.shown,
             "is_default": trial.is_default, "flags": command(trial, 0), "runs": runs}
        )  # fmt: skip
    _, _, meta = load_model("mid", "cpu")
    result = {
        "mid_steps": meta["step"], "before": read_json(work / "mid.json"), "trials": trials,
        **surroundings(),
    }  # fmt: skip
    write_json(out, result)
    return result


# -------------------------------------------------------------------------------------------------
# The page

MEASURES = (VAL_LOSS, GOAL, ITSELF, NAME.lower(), "others", "pairs_accuracy")


def means(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Each of MEASURES that the runs have, in the mean over them."""
    found = [{**run, "others": mean(run[name] for name in OTHERS)} for run in runs]
    return {key: mean(run[key] for run in found) for key in MEASURES if key in found[0]}


def against_default(trials: list[dict[str, Any]], key: str) -> list[tuple[float, float] | None]:
    """For each trial of a group how much higher `key` is than by default, and the standard error of
    that: the mean over the seeds that both have. Two seeds say little of their spread, so all
    settings of the group do together."""
    default = next(trial for trial in trials if trial["is_default"])
    base = {run["seed"]: run[key] for run in default["runs"]}
    found = [
        [] if trial is default else
        [run[key] - base[run["seed"]] for run in trial["runs"] if run["seed"] in base]
        for trial in trials
    ]  # fmt: skip
    free = sum(len(d) - 1 for d in found if d)
    spread = sum(variance(d) * (len(d) - 1) for d in found if len(d) > 1) / max(1, free)
    return [
        (mean(d), (spread / len(d)) ** 0.5 if free else float("nan")) if d else None for d in found
    ]


def verdict(difference: tuple[float, float] | None, key: str) -> str:
    """What the numbers allow to say."""
    if difference is None:
        return ""
    value, error = difference
    form = ".3f" if key == VAL_LOSS else ".1%"
    if isnan(error):
        return f"{value:+{form}}: one seed"
    shown = f"{value:+{form}} ± {error:{form}}"
    if abs(value) <= 2 * error:
        return f"{shown}: tie"
    return f"{shown}: {'better' if (value < 0) == (key == VAL_LOSS) else 'worse'}"


def cells(runs: list[dict[str, Any]], keys: tuple[str, ...]) -> str:
    """These measures of the runs, as the cells of a row."""
    found = means(runs)
    shown = [
        "" if key not in found else f"{found[key]:.3f}" if key == VAL_LOSS else f"{found[key]:.1%}"
        for key in keys
    ]  # fmt: skip
    return " | ".join(shown)


def grouped(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The trials that have runs, by group, where the default has run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in result["trials"]:
        if trial["runs"]:
            groups.setdefault(trial["group"], []).append(trial)
    return {g: ts for g, ts in groups.items() if any(trial["is_default"] for trial in ts)}


def rates_table(result: dict[str, Any]) -> str:
    """The passage of docs/06-finetuning.md about rates."""
    groups = grouped(result)
    start = next(trial for trial in groups[START.group] if trial["is_default"])["runs"][:1]
    keys = (VAL_LOSS, GOAL, "others", "pairs_accuracy")
    lines = [
        begun(result),
        "",
        "| | seeds | validation loss | word problems | other tasks | held-out pairs "
        "| against the default |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, trials in groups.items():
        if group == IDENTITY:
            continue
        stage = trials[0]["stage"]
        before = [result["before"]] if stage == "sft" else start
        lines.append(f"| before {group} | | {cells(before, keys)} | |")
        goal = VAL_LOSS if stage == "sft" else GOAL
        for trial, difference in zip(trials, against_default(trials, goal)):
            shown = f"**{trial['shown']}**" if trial["is_default"] else trial["shown"]
            lines.append(
                f"| {shown} | {len(trial['runs'])} | {cells(trial['runs'], keys)} "
                f"| {verdict(difference, goal)} |"
            )
    return "\n".join(lines)


def begun(result: dict[str, Any]) -> str:
    """What the runs began with."""
    return (
        f"From the CPU speedrun's model (d3) after {result['mid_steps']} steps of midtraining; "
        "means over the seeds:"
    )


def identity_table(result: dict[str, Any]) -> str:
    """The passage of docs/identity.md about what such conversations do."""
    keys = (ITSELF, NAME.lower(), GOAL, "others", VAL_LOSS)
    lines = [
        begun(result),
        "",
        f"| conversations about itself in SFT | who it was, and not knowing | is {NAME} "
        "| word problems | other tasks | validation loss |",
        "|---|---|---|---|---|---|",
        f"| before SFT | {cells([result['before']], keys)} |",
    ]
    lines += [
        f"| {trial['shown']} | {cells(trial['runs'], keys)} |"
        for trial in grouped(result)[IDENTITY]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    flags.run(main, Args)
