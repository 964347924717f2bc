"""
Evaluates a chat model on tasks: multiple choice, word problems, programs, spelling, your own.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i rl -a "gsm8k|primer-arithmetic" -x 200
    python -m scripts.chat_eval --hf=Qwen/Qwen2.5-0.5B-Instruct -a "GSM8K|MMLU"  # or a folder
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

Task names are those of nanochat/tasks, or folders and files of own rows; always their test split.
The results do not depend on the batch size or the number of processes. One row a task is appended
to report/chat_eval.jsonl; every question with its replies is in report/chat_eval/. "control" is
what the same replies score on other questions: what is not above it is habit, not knowledge.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table

from nanochat import distributed, flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, append_jsonl, get_base_dir, is_rank0, print0, warn0
from nanochat.engine import Engine
from nanochat.evals.chat import EvalResult, run_chat_eval
from nanochat.evals.hf_folder import TransformersModel, load_hf
from nanochat.execution import allow_weak_sandbox
from nanochat.precision import autocast
from nanochat.tasks.common import get_task

# ChatCORE is the mean over exactly these, each centred at its chance level
CHATCORE = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval", "spellingbee")


@dataclass
class Args(flags.PrecisionFlags):
    """Evaluate a chat model on tasks."""

    source: Annotated[flags.Source, flags.alias("-i")] = "sft"
    """Stage of the model: base, mid, sft, rl or dpo."""
    model_tag: Annotated[str | None, flags.alias("-g")] = None
    """Tag of the model; default: the newest."""
    step: Annotated[int | None, flags.alias("-s")] = None
    """Step of the checkpoint; default: the last."""
    hf: str | None = None
    """Evaluate this Hugging Face folder or model of the hub (of our architectures) instead."""
    task_name: Annotated[str, flags.alias("-a")] = "|".join(CHATCORE)
    """Tasks, joined by |; names of tasks, or folders and files of own rows."""
    temperature: Annotated[float, flags.alias("-t")] = 0.0
    """0 takes the likeliest token."""
    top_k: Annotated[int, flags.alias("-k")] = 50
    """Sample among so many likeliest tokens; 0: among all."""
    max_new_tokens: Annotated[int, flags.alias("-m")] = 512
    """Longest reply."""
    num_samples: Annotated[int, flags.alias("-n")] = 1
    """Replies a problem; it is solved if one of them is right."""
    batch_size: Annotated[int, flags.alias("-b")] = 8
    """Problems at a time on one process."""
    max_problems: Annotated[int, flags.alias("-x")] = -1
    """Problems a task, drawn at random; -1: all."""
    seed: int = 42
    """Seed of the problems drawn and the replies sampled."""
    weak_sandbox: bool = False
    """Run model-written programs (humaneval) even where the kernel cannot wall them in."""


def main(args: Args) -> None:
    with distributed.session(args.device_type, args.seed) as info:
        evaluate(args, info)


def evaluate(args: Args, info: distributed.DistInfo) -> list[EvalResult]:
    """Evaluates every task, prints the table, appends the rows."""
    if args.num_samples > 1 and args.temperature == 0:
        warn0("--num_samples above 1 gives the same reply each time at --temperature=0")
    allow_weak_sandbox(args.weak_sandbox)
    # The tasks first: a misspelled name should not wait for the model to load
    names = [name.strip() for name in args.task_name.split("|") if name.strip()]
    if not names:
        raise UserError(f"--task_name={args.task_name!r} names no task")
    tasks = [get_task(name, "test") for name in names]
    source = args.source if args.hf is None else "hf"
    if args.hf is not None:
        model, tokenizer, meta = load_hf(args.hf, info.device)
        if isinstance(model, TransformersModel):
            raise UserError(f"--hf={args.hf}: only models of our architectures can be talked to")
    else:
        model, tokenizer, meta = load_model(args.source, info.device, args.model_tag, args.step)
    engine = Engine(model, tokenizer)
    tag, step = meta["tag"], meta["step"]
    print0(f"evaluating {source} {tag}, step {step}")

    report = get_base_dir() / "report"
    about = {"source": source, "model_tag": tag, "step": step, "typed": flags.typed(args)}
    results = []
    for name, task in zip(names, tasks):
        stem = re.sub(r"[^\w.-]+", "_", f"{source}_{tag}_{step}_{task.name}")
        items_path = report / "chat_eval" / f"{stem}.jsonl"
        with autocast(info.device, args.dtype):
            result = run_chat_eval(
                task, model, tokenizer, engine, batch_size=args.batch_size,
                num_samples=args.num_samples, max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, top_k=args.top_k or None,
                max_problems=args.max_problems, seed=args.seed,
                items_path=items_path, control=True,
            )  # fmt: skip
        result.name = name
        results.append(result)
        print0(
            f"{name}: {result.accuracy:.2%} +- {result.stderr:.2%} of {result.n}; every question "
            f"with its replies: {items_path}"
        )
        if is_rank0():
            row = {
                **about, "task": task.name, "accuracy": result.accuracy, "n": result.n,
                "stderr": result.stderr, "chance": result.chance, "control": result.control,
                "ended": result.ended_share, "seed": args.seed,
                "items": str(items_path.relative_to(get_base_dir())),
                "num_samples": args.num_samples, "temperature": args.temperature,
            }  # fmt: skip
            append_jsonl(report / "chat_eval.jsonl", row)
    chatcore = chatcore_metric(results)
    if chatcore is not None and is_rank0():
        append_jsonl(
            report / "chat_eval.jsonl",
            {**about, "task": "ChatCORE", "accuracy": chatcore, "stderr": chatcore_stderr(results)},
        )
    if is_rank0():
        Console().print(results_table(results, f"{source} {tag}, step {step}"))
    if chatcore is not None:
        print0(f"ChatCORE {chatcore:.4f} +- {chatcore_stderr(results):.4f}")
    return results


def chatcore_metric(results: list[EvalResult]) -> float | None:
    """Mean of the six tasks, each 0 at chance and 1 at perfect; None if one was not evaluated."""
    centered = {result.name.lower(): result.centered for result in results}
    if not set(CHATCORE) <= set(centered):
        return None
    return sum(centered[name] for name in CHATCORE) / len(CHATCORE)


def chatcore_stderr(results: list[EvalResult]) -> float:
    """Standard error of that mean; the tasks are independent of each other."""
    squares = [(r.stderr / (1 - r.chance)) ** 2 for r in results if r.name.lower() in CHATCORE]
    return math.sqrt(sum(squares)) / len(CHATCORE)


def results_table(results: list[EvalResult], title: str) -> Table:
    """The results as one sees them: percent, with what is needed to judge them."""
    table = Table(title=title)
    table.add_column("task")
    for column in ("accuracy %", "+- %", "n", "chance %", "control %", "centred", "ended %"):
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r.name, f"{100 * r.accuracy:.2f}", f"{100 * r.stderr:.2f}", f"{r.n:,}",
            f"{100 * r.chance:.1f}", "" if r.control is None else f"{100 * r.control:.1f}",
            f"{r.centered:+.4f}",
            "" if r.ended_share is None else f"{100 * r.ended_share:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    flags.run(main, Args)
