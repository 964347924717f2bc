"""
The report's curves: one panel a subject, drawn once for two readers.

A panel is drawn into a PNG beside the Markdown, all of them together, and each for itself into the
page as SVG, whose colours are names of the page's (var(--ink)): it follows its light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write
from nanochat.report.runs import Run
from nanochat.report.tables import in_short

COLOURS = {"base": "#2f6690", "mid": "#8a5a9e", "sft": "#1f8a70", "rl": "#c8642b", "dpo": "#b03a5b"}
_MARK = "#33312e"  # validation, in every panel
_GREY = "#7a756d"
_LINE = "#e6e2db"
_EDGE = "#bdb7ad"
_PAPER = "#ffffff"
# What these colours are called on the page.
_NAMES = {
    **{colour: stage for stage, colour in COLOURS.items()},
    _MARK: "ink", _GREY: "soft", _LINE: "line", _EDGE: "edge", _PAPER: "bg", "#000000": "ink",
}  # fmt: skip
_SIZE = (4.2, 2.7)  # inches of a panel: its letters are read at about this width, on a phone too
MAX_POINTS = 1000  # of a curve: more cannot be seen, and a page has many curves


@dataclass(frozen=True)
class Panel:
    """A subject, with its unit, and what draws it on matplotlib's axes."""

    title: str
    draw: Callable[[Any], None]


# -------------------------------------------------------------------------------------------------
# The panels of a report


def run_panels(runs: Sequence[Run]) -> list[Panel]:
    """Loss or reward of every stage, bits per byte, then what all stages share; where logged."""
    panels = []
    for run in runs:
        if run.rl:
            panels.append(Panel(f"{run.stage} {run.tag}: reward", _drawn(_curve, run)))
        elif run.series("steps", "loss")[1]:
            per = "pair" if run.stage == "dpo" else "token"
            title = f"{run.stage} {run.tag}: loss, nats per {per}"
            panels.append(Panel(title, _drawn(_curve, run)))
        if run.series("evals", "val_bpb")[1]:
            panels.append(Panel(f"{run.stage} {run.tag}: bits per byte", _drawn(_bits, run)))
    shared = (
        ("lr_mul", "learning rate, share of its peak", 1.0),
        ("tokens_per_second", "tokens per second", 1.0),
        ("mfu", "model FLOPs utilization, %", 100.0),
        ("memory_gib", "memory, highest so far, GiB", 1.0),
    )
    for key, title, scale in shared:
        if any(_over_time(run, key)[1] for run in runs):
            panels.append(Panel(title, _drawn(_stages, runs, key, scale)))
    return panels


def _drawn(draw: Callable[..., None], *what: Any) -> Callable[[Any], None]:
    return lambda axes: draw(axes, *what)


def _curve(axes: Any, run: Run) -> None:
    """One stage: the raw curve pale, its running mean strong, validation as dots."""
    steps, values = run.series(*(("rl", "reward") if run.rl else ("steps", "loss")))
    colour = COLOURS[run.stage]
    smooth = smoothed(values)
    noisy = smooth is not values
    label = "reward" if run.rl else "training"
    axes.plot(*thinned(steps, values), color=colour, lw=0.8 if noisy else 1.8,
              alpha=0.3 if noisy else 1.0, label=None if noisy else label)  # fmt: skip
    if noisy:
        axes.plot(*thinned(steps, smooth), color=colour, lw=1.8, label=label)
    key, what = ("pass1", "held-out problems solved") if run.rl else ("val_loss", "validation")
    tested = run.series("evals", key)
    _dots(axes, *tested, what)
    if not run.rl:
        # The first steps fall from ln(vocabulary); whole they would flatten all that follows.
        start = len(values) // 50
        noise = [v for v in values[start:] if math.isfinite(v)]
        seen = [*smooth[start:], *tested[1][1:], *(np.percentile(noise, [1, 99]) if noise else [])]
        limit(axes, seen)
    axes.set_xlabel("step")


def _bits(axes: Any, run: Run) -> None:
    """Bits per byte of held-out text; the first one, of no knowledge, lies above the panel."""
    steps, values = run.series("evals", "val_bpb")
    _dots(axes, steps, values, "validation")
    if len(values) > 3:
        limit(axes, values[1:])
    axes.set_xlabel("step")


def _dots(axes: Any, steps: list[int], values: list[float], label: str) -> None:
    """The measurements on held-out data, if there are any, with the last one's value."""
    if not steps:
        return
    axes.plot(steps, values, "o-", color=_MARK, ms=3.5, lw=0.9, label=label)
    axes.annotate(
        f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, 7), textcoords="offset points",
        ha="right", fontsize=9, color=_MARK, fontweight="bold",
        bbox={"facecolor": _PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    axes.margins(y=0.15)


def _over_time(run: Run, key: str) -> tuple[list[float], list[float]]:
    """(seconds of training, values) of a measurement of the steps."""
    steps = [row for _, row in sorted(run.steps.items())]
    pairs = [
        (float(row["seconds"]), float(row[key]))
        for row in steps
        if isinstance(row.get("seconds"), (int, float)) and isinstance(row.get(key), (int, float))
    ]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _stages(axes: Any, runs: Sequence[Run], key: str, scale: float) -> None:
    """All stages, one after the other, over the time they took."""
    total = sum(run.seconds or 0.0 for run in runs)
    unit, name = next((u for u in ((3600.0, "hours"), (60.0, "minutes")) if total > 2 * u[0]),
                      (1.0, "seconds"))  # fmt: skip
    begin = 0.0
    for run in runs:
        seconds, values = _over_time(run, key)
        if key in ("tokens_per_second", "mfu"):
            # The first steps compile and warm up; one that waited is no trend.
            values = smoothed(values)
            seconds, values = seconds[len(seconds) // 50 :], values[len(values) // 50 :]
        x = [(begin + s) / unit for s in seconds]
        axes.plot(*thinned(x, [scale * v for v in values]), color=COLOURS[run.stage], lw=1.8,
                  label=run.stage)  # fmt: skip
        begin += run.seconds or 0.0
    highest = max(
        (v for line in axes.lines for v in line.get_ydata() if math.isfinite(v)), default=0
    )
    axes.set_ylim(0, 1.1 * highest or 1)
    axes.yaxis.set_major_formatter(in_short)
    axes.set_xlabel(f"{name} of training, all stages")


def limit(axes: Any, values: list[float]) -> None:
    """Shows what is between the least and the greatest of these; the rest may leave the panel."""
    seen = [v for v in values if math.isfinite(v)]
    if seen and max(seen) > min(seen):
        margin = max(seen) - min(seen)
        axes.set_ylim(min(seen) - 0.06 * margin, max(seen) + 0.12 * margin)


# -------------------------------------------------------------------------------------------------
# Curves


def smoothed(values: list[float]) -> list[float]:
    """Centred running mean over about a fifteenth of the run; the values themselves if few.

    A step whose value is not finite counts for nothing."""
    if len(values) < 40:
        return values
    x = np.array(values)
    finite = np.isfinite(x)
    window = np.ones(2 * max(2, len(x) // 30) + 1)
    total = np.convolve(np.where(finite, x, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return (total / np.maximum(count, 1.0)).tolist()


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about MAX_POINTS of a curve, evenly taken, the last one always."""
    every = -(-len(x) // MAX_POINTS) or 1
    kept = sorted({*range(0, len(x), every), *([len(x) - 1] if x else [])})
    return [x[i] for i in kept], [y[i] for i in kept]


# -------------------------------------------------------------------------------------------------
# Pictures


def save_panels(panels: Sequence[Panel], out: Path, columns: int = 2) -> bool:
    """Draws the panels side by side to the PNG file `out`; False, and no file, without any."""
    if not panels:
        return False
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(_SIZE[0] * columns, _SIZE[1] * rows)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", pad=20)
        _finish(axes, panel)
    save_figure(figure, out)
    return True


def svg(panel: Panel, name: str) -> str:
    """The panel as an SVG element for a page, without its title, in the page's colours. `name`
    keeps its ids apart from those of the page's other pictures."""
    import matplotlib

    figure = new_figure(*_SIZE)
    _finish(figure.add_subplot(1, 1, 1), panel)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Letters stay letters, in the page's font; ids do not change from one time to the next.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"(font: [^;\"']*?\d(?:\.\d+)?px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for colour, variable in _NAMES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'(<svg [^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    return re.sub(r'(<svg [^>]*?) height="[^"]*pt"', r'\1 aria-hidden="true"', text, count=1)


def _finish(axes: Any, panel: Panel) -> None:
    """The curves with what all panels have: a quiet frame, a grid, a legend where there are two."""
    axes.grid(axis="y", color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    frame(axes, ("left", "bottom"))
    panel.draw(axes)
    axes.xaxis.label.set(color=_GREY, fontsize=9)
    labels = [label for label in axes.get_legend_handles_labels()[1] if label]
    if len(labels) > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(labels), fontsize=9,
            frameon=False, labelcolor=_GREY, handlelength=1.2, columnspacing=1.2, borderpad=0.2,
        )  # fmt: skip


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, for add_subplot."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout: Any = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)  # inches
    return Figure(figsize=(width, height), dpi=160, layout=layout)


def save_figure(figure: Any, out: Path) -> None:
    """Writes it as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(out) as f:
        f.write(picture.getvalue())


def frame(axes: Any, kept: tuple[str, ...]) -> None:
    """Leaves these sides of the box, in a quiet grey."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in kept)
        spine.set_color(_EDGE)
    axes.tick_params(colors=_GREY, labelsize=8)
