"""
The report card: what there is to say of a run, put together once, as Markdown and as one page.

The summary comes first, then what most readers look for: results, curves, what the models say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.machine import machine_info
from nanochat.report.again import ranks_of, reproduction
from nanochat.report.html import write_pages
from nanochat.report.plot import run_panels
from nanochat.report.runs import Row, Run, read_rows, read_runs
from nanochat.report.samples import conversations
from nanochat.report.sections import (
    base_section,
    core_rows,
    current,
    evaluation_section,
    newest_rows,
    stage_section,
    summary,
    tokenizer_section,
)
from nanochat.report.tables import duration, in_short, pairs, percent, show

PICTURE = "loss.png"


def write_report(
    folder: Path, out: Path, model_tag: str | None = None, gpu_hour_price: float | None = None
) -> str:
    """Writes the report on the metrics in `folder`, which is report/ of a base directory, and on
    the runs of that directory to `out`, the same as a page beside it (.html, one file, nothing
    loaded from elsewhere), and loss.png. `gpu_hour_price`: dollars.

    Returns the summary table. UserError if there is nothing to report."""
    runs, others = read_runs(folder.parent, model_tag)
    chat, base = read_rows(folder / "chat_eval.jsonl"), read_rows(folder / "base_eval.jsonl")
    trained = read_rows(folder / "tok_train.jsonl")
    overview = summary(runs) if runs else []
    tests = evaluation_section(core_rows(base, runs, model_tag) + chat, runs, model_tag)
    panels = run_panels(runs)
    curves = ["## Curves", "", f"![curves of the stages]({PICTURE})", ""] if panels else []
    tokenizer = tokenizer_section(trained, read_rows(folder / "tok_eval.jsonl"))
    sections = [
        tests,
        curves,
        conversations(folder, runs, current(chat, runs, model_tag)),
        tokenizer,
        ["## Stages", ""] if runs else [],
        *(stage_section(run) for run in runs),
        base_section(base, runs, model_tag),
    ]
    if model_tag and not any(section for section in sections if section is not tokenizer):
        there = f"the runs there are: {', '.join(others)}" if others else "there is no run at all"
        raise UserError(f"{folder} holds no metrics of --model_tag={model_tag}; {there}")
    if not any(sections):
        raise UserError(
            f"{folder} holds no metrics; train something first, for example with "
            "`bash speedrun.sh`, or point NANOCHAT_BASE_DIR at the folder of a run"
        )
    results = newest_rows(base + chat, runs, model_tag)
    lines = [f"# nanochat{f': {runs[-1].tag}' if runs else ''}", ""]
    lines += headlines(runs, results)
    lines += pairs(glance(runs, gpu_hour_price)) + overview
    lines += [line for section in sections for line in section]
    lines += reproduction(
        folder.parent, runs, trained, base + current(chat, runs, model_tag), others
    )
    write_pages(lines, panels, out, PICTURE)
    return "\n".join([*overview, *tests[4:]]).rstrip()


# --------------------------------------------------------------------------------------------------
# summary


def headlines(runs: list[Run], results: dict[Any, Row]) -> list[str]:
    """The few numbers that are looked for first, as they were in the end."""
    found: list[tuple[str, str]] = []
    if runs and (num_params := runs[-1].start.get("num_params")):
        found.append((in_short(num_params), "parameters"))
    tokens = sum(run.last("steps", "tokens") or 0 for run in runs)
    if tokens:
        found.append((in_short(tokens), "tokens seen"))
    bits = [bpb for run in runs if (bpb := run.last("evals", "val_bpb")) is not None]
    if bits:
        found.append((f"{bits[-1]:.4f}", "bits per byte, validation"))
    for (source, _), row in results.items():
        if row.get("core_metric") is not None:
            found.append((show(row["core_metric"]), f"CORE ({source})"))
    for run in runs:
        solved, error = run.last("evals", "pass1"), run.last("evals", "pass1_stderr")
        if solved is not None:
            found.append((percent(solved, error), f"% of unseen problems solved ({run.stage})"))
    return [*(f"- **{value}** {what}" for value, what in found), ""] if found else []


def glance(runs: list[Run], gpu_hour_price: float | None) -> Row:
    """What was trained, on what, how long, and what that cost."""
    said: Row = {}
    if runs:
        model, start = runs[-1].start.get("model") or {}, runs[-1].start
        names = {"n_layer": "layers", "n_embd": "wide", "sequence_len": "tokens of context",
                 "vocab_size": "tokens in the vocabulary"}  # fmt: skip
        shape = [f"{show(model[key])} {name}" for key, name in names.items() if key in model]
        size = f"{show(start['num_params'])} parameters" if start.get("num_params") else ""
        said["model"] = ", ".join(filter(None, [str(model.get("arch", "")), size, *shape]))
        flops = [
            (run.last("steps", "tokens") or 0) * float(run.start.get("flops_per_token") or 0)
            for run in runs
        ]
        tokens = int(sum(run.last("steps", "tokens") or 0 for run in runs))
        steps = sum(run.num_steps for run in runs)
        said["trained on"] = (f"{tokens:,} tokens in " if tokens else "") + f"{steps:,} steps"
        said["trained on"] += f", {sum(flops):.3g} FLOPs" if all(flops) else ""
        said["training time"] = duration(sum(run.seconds or 0.0 for run in runs)) + (
            f", {duration(wall)} with evaluations and saving in between"
            if (wall := sum(run.wall for run in runs)) else ""
        )  # fmt: skip
        said["data"] = "; ".join(f"{run.stage}: {about}" for run in runs if (about := source(run)))
        said["GPU time"] = _gpu_time(runs, gpu_hour_price)
    machine = (runs[-1].start if runs else {}).get("machine") or machine_info()
    said["machine"] = _place(machine)
    unfinished = [run.name for run in runs if not run.end]
    if unfinished:
        said["not ended"] = ", ".join(unfinished)
    return said


def source(run: Run) -> str:
    """In a few words, what a run learned from."""
    args = run.start.get("args") or {}
    if run.stage == "rl":
        return f"problems of {args['task']}" if args.get("task") else ""
    parts = [str(args["data"])] if args.get("data") else []
    if args.get("mixture"):
        names = [re.split(r"[@*]", piece)[0].strip() for piece in str(args["mixture"]).split("|")]
        parts.append(", ".join(names) if len(names) <= 3 else f"{len(names)} tasks")
    if not parts and run.stage == "base":
        parts = ["base_data/"]
    return " and ".join(parts)


def _gpu_time(runs: list[Run], price: float | None) -> str:
    """GPU-hours, for as long as the runs held their GPUs, and dollars at a price for one."""
    used = [run for run in runs if (run.start.get("machine") or {}).get("gpus")]
    hours = sum(max(run.wall, run.seconds or 0.0) * ranks_of(run) for run in used) / 3600
    if not hours:
        return "none: trained without a GPU"
    if price is None:
        return f"{hours:.3g} GPU-hours (their cost: --gpu_hour_price)"
    return f"{hours:.3g} GPU-hours, ${hours * price:,.2f} at ${price:,.2f} each"


def _place(machine: Row) -> str:
    """A machine in one line."""
    gpus = machine.get("gpus") or []
    return ", ".join(
        [
            *(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
            *([str(machine["cpu"])] if machine.get("cpu") else []),
            *([f"{n} core{'s' * (n != 1)}"] if (n := machine.get("cores")) else []),
            *([f"{machine['memory_gib']} GiB memory"] if machine.get("memory_gib") else []),
            *([str(machine["platform"])] if machine.get("platform") else []),
        ]
    )
