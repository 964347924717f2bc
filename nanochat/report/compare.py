"""
Two runs side by side: what is different about them, where each got to, and what it took.

Made of their logs alone, so a run may be unfinished, longer than the other, or of another machine.
What does not compare (bits per byte of other validation data, losses of other tokenizers) is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.record import find_log, first_start
from nanochat.report.html import write_pages
from nanochat.report.plot import COLOURS, Panel, limit, smoothed, thinned
from nanochat.report.runs import Row, Run, read_run
from nanochat.report.tables import duration, in_short, show, table

AXES = ("steps", "tokens", "seconds")


@dataclass(frozen=True)
class Measure:
    """One thing that runs are compared by: where in the log it is, and which way is better."""

    key: str
    kind: str  # of rows: steps, evals, rl
    label: str
    falls: bool = True


MEASURES = (
    Measure("val_bpb", "evals", "validation bits per byte"),
    Measure("val_loss", "evals", "validation loss"),
    Measure("pass1", "evals", "held-out problems solved", falls=False),
    Measure("core_metric", "evals", "CORE", falls=False),
    Measure("reward", "rl", "reward, smoothed", falls=False),
    Measure("loss", "steps", "training loss, smoothed"),
)
NOT_A_DIFFERENCE = {"model_tag", "run", "repeats", "resume", "resume_from_step", "dry_run"}


def load_run(name: str) -> Run:
    """The run of that folder, log or name, "elsewhere" included; UserError if it is none."""
    log = find_log(name)
    start = first_start(log)
    run = read_run(log, start["stage"], log.parent.name)
    if not run.steps:
        raise UserError(f"{log}: this run has not taken a step yet; there is nothing to compare")
    return run


# -------------------------------------------------------------------------------------------------
# Curves


def curve(run: Run, measure: Measure, axis: str) -> tuple[list[float], list[float]]:
    """(x, y): a measurement over steps, tokens, or seconds of training. Noisy ones are smoothed."""
    steps, values = run.series(measure.kind, measure.key)
    if measure.kind != "evals":
        values = smoothed(values)
    if axis == "steps":
        return [float(s) for s in steps], values
    taken, amounts = run.series("steps", axis)
    if not taken:
        return [], []
    # Between the logged steps nothing happens; before the first one there was nothing.
    at = np.interp(steps, [0, *taken], [0.0, *amounts])
    return at.tolist(), values


def reached(run: Run, measure: Measure, target: float, axis: str) -> float | None:
    """How many steps, tokens or seconds it took to `target` for the first time, between two
    measurements by a straight line; None if it never did."""
    x, y = curve(run, measure, axis)
    sign = 1.0 if measure.falls else -1.0
    before: tuple[float, float] | None = None
    for at, value in zip(x, y):
        if not math.isfinite(value):
            continue
        if sign * value <= sign * target:
            if before is None or before[1] == value:
                return at
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (at - before[0])
        before = (at, value)
    return None


def last(run: Run, measure: Measure) -> float | None:
    """Where a run got to: the last value of the curve that is a number."""
    values = [v for v in curve(run, measure, "steps")[1] if math.isfinite(v)]
    return values[-1] if values else None


def shared_measures(runs: tuple[Run, Run]) -> list[Measure]:
    """What both have measured; an RL run's loss says nothing."""
    found = [m for m in MEASURES if all(last(run, m) is not None for run in runs)]
    return [m for m in found if m.key != "loss" or not any(run.rl for run in runs)]


# -------------------------------------------------------------------------------------------------
# Text


def compare_text(a: Run, b: Run, picture: str | None = None) -> str:
    """The comparison as Markdown: results, what either took to the other's end, differences.
    `picture`: the name of the curves', to stand among them."""
    runs, names = (a, b), labels(a, b)
    lines = [f"# {' and '.join(names)}", "", "## Results", ""]
    lines += [*table(["", *names], results(runs))]
    for measure in shared_measures(runs):
        lines.append("- " + _race(a, b, names, measure))
        lines.append("- " + _race(b, a, (names[1], names[0]), measure))
    lines += ["", *(f"- {warning}" for warning in warnings(a, b))]
    if picture is not None:
        lines += ["", "## Curves", "", f"![curves of {' and '.join(names)}]({picture})"]
    different = list(differences(a.start, b.start))
    lines += ["", "## What is different", ""]
    lines += table(["", *names], different) if different else ["Nothing that decides a run."]
    return "\n".join(lines)


def labels(a: Run, b: Run) -> tuple[str, str]:
    """Their names; with letters where these are the same."""
    return (a.name, b.name) if a.name != b.name else (f"A {a.name}", f"B {b.name}")


def differences(a: Row, b: Row) -> Iterator[list[Any]]:
    """[what, value, other value] of everything in the first rows of two logs that differs: flags
    as resolved, shape, data, start, code, versions, machine."""
    parts: dict[str, Callable[[Row], Any]] = {
        "--": lambda row: row.get("args"),
        "model: ": lambda row: row.get("model"),
        "data: ": lambda row: row.get("data"),
        "": lambda row: {
            k: row.get(k)
            for k in ("tokenizer_fingerprint", "started_from", "validation", "world_size",
                      "threads", "num_params", "num_steps")
        },
        "code: ": lambda row: row.get("code"),
        "version: ": lambda row: row.get("versions"),
        "machine: ": lambda row: row.get("machine"),
        "environment: ": lambda row: row.get("environment"),
    }  # fmt: skip
    for prefix, part in parts.items():
        one, two = part(a) or {}, part(b) or {}
        for key in dict.fromkeys([*one, *two]):
            skip = prefix == "--" and key in NOT_A_DIFFERENCE
            if one.get(key) != two.get(key) and not skip:
                yield [prefix + key, one.get(key), two.get(key)]


def warnings(a: Run, b: Run) -> Iterator[str]:
    """Which numbers of the two do not mean the same."""
    one, two = a.start, b.start
    if a.stage != b.stage:
        yield f"These are different stages ({a.stage} and {b.stage}): little can be compared."
    if one.get("tokenizer_fingerprint") != two.get("tokenizer_fingerprint"):
        # The fingerprint of validation text covers its tokenizer, so it says nothing here.
        yield (
            "The tokenizers differ: losses per token do not compare; bits per byte do if the "
            "validation text is the same, which the logs cannot tell."
        )
    elif (one.get("data") or {}).get("val") != (two.get("data") or {}).get("val") or one.get(
        "validation"
    ) != two.get("validation"):
        yield "The validation data differ: bits per byte and validation losses do not compare."
    tokens = [show((row.get("args") or {}).get("eval_tokens")) for row in (one, two)]
    if tokens[0] != tokens[1]:
        yield f"They were evaluated on {tokens[0]} and {tokens[1]} tokens (--eval_tokens)."
    if one.get("machine") != two.get("machine"):
        yield "The machines differ: seconds do not compare."


def results(runs: tuple[Run, Run]) -> Iterator[list[Any]]:
    """[what, value, other value] of where the runs got to; a last line for what one alone has."""
    yield ["state", *("ended" if run.end else "not ended" for run in runs)]
    yield ["steps", *(run.num_steps for run in runs)]
    tokens = [run.last("steps", "tokens") for run in runs]
    yield ["tokens", *(None if n is None else int(n) for n in tokens)]
    per_token = [run.start.get("flops_per_token") for run in runs]
    yield ["FLOPs", *(f"{n * f:.3e}" if n and f else None for n, f in zip(tokens, per_token))]
    yield ["time", *(duration(run.seconds) for run in runs)]
    yield ["tokens/s, median", *(_median(run, "tokens_per_second") for run in runs)]
    if any(run.last("steps", "mfu") is not None for run in runs):
        yield ["MFU, median", *(_median(run, "mfu") for run in runs)]
    for measure in MEASURES:
        ends = [last(run, measure) for run in runs]
        if any(end is not None for end in ends):
            yield [measure.label, *ends]


def _median(run: Run, key: str) -> float | None:
    values = run.series("steps", key)[1]
    return float(np.median(values)) if values else None


def _race(run: Run, other: Run, names: tuple[str, str], measure: Measure) -> str:
    """One line: what `run` took to get where `other` ended."""
    target = last(other, measure)
    assert target is not None  # of a shared measure
    what = f"{names[0]} {{}} the final {measure.label} of {names[1]} ({target:.4f})"
    parts = []
    for axis in AXES:
        mine, total = reached(run, measure, target, axis), _whole(other, measure, axis)
        if mine is None:
            if axis == "steps":
                return what.format("does not reach")
            continue
        share = f" ({mine / total:.2f} x as many)" if total else ""
        parts.append(f"{mine:,.0f} {axis}{share}")
    return f"{what.format('reaches')} after {', '.join(parts)}"


def _whole(run: Run, measure: Measure, axis: str) -> float | None:
    """What the run had taken when it was last measured."""
    x = curve(run, measure, axis)[0]
    return x[-1] if x else None


# -------------------------------------------------------------------------------------------------
# Curves and pages


def comparison_panels(a: Run, b: Run) -> list[Panel]:
    """Every shared measure over steps, tokens and seconds."""
    return [
        Panel(
            f"{measure.label.split(',')[0]} over {axis}",
            partial(_draw, runs=(a, b), what=measure, axis=axis),
        )
        for measure in shared_measures((a, b))
        for axis in AXES
    ]


def _draw(axes: Any, runs: tuple[Run, Run], what: Measure, axis: str) -> None:
    for run, label, colour in zip(runs, labels(*runs), (COLOURS["base"], COLOURS["rl"])):
        x, y = curve(run, what, axis)
        style = "o-" if what.kind == "evals" else "-"
        axes.plot(*thinned(x, y), style, color=colour, lw=1.6, ms=3, label=label)
    axes.xaxis.set_major_formatter(in_short)
    axes.set_xlabel(axis)
    # Where a loss falls from that of no knowledge, the end of the curves is what is looked at: the
    # first tenth may leave the picture.
    ends = [v for y in (curve(run, what, "steps")[1] for run in runs) for v in y[len(y) // 10 :]]
    if what.falls and len(ends) > 10:
        limit(axes, ends)


def write_comparison(a: Run, b: Run, out: Path) -> list[Path]:
    """Writes the text, as Markdown and as a page, and the curves, if the runs share a measure, all
    under the name of `out`, whatever of them it names; returns what was written."""
    out = out.with_suffix(".png")
    panels = comparison_panels(a, b)
    text = compare_text(a, b, out.name if panels else None)
    write_pages([text], panels, out.with_suffix(".md"), out.name, columns=len(AXES))
    return [out.with_suffix(".md"), out.with_suffix(".html"), *([out] if panels else [])]
