"""The report's picture: one panel a stage, loss on the way down, reward on the way up."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write
from nanochat.report.runs import Run

COLOURS = {"base": "#2f6690", "mid": "#8a5a9e", "sft": "#1f8a70", "rl": "#c8642b", "dpo": "#b03a5b"}
_MARK = "#33312e"  # validation, in every panel
_GREY = "#7a756d"


def plot_runs(runs: list[Run], out: Path) -> bool:
    """Draws the runs' curves to the PNG file `out`; False, and no file, if there are none."""
    panels = [run for run in runs if run.steps or run.rl]
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.6 * columns, 3.5 * rows)
    for i, run in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, i + 1), run)
    save_figure(figure, out)
    return True


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, for add_subplot."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display needed
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout: Any = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    return Figure(figsize=(width, height), dpi=160, layout=layout)


def save_figure(figure: Any, out: Path) -> None:
    """Writes it as PNG, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(out) as f:
        f.write(picture.getvalue())


def _panel(axes: Any, run: Run) -> None:
    """One stage: the raw curve pale, its running mean strong, validation as dots."""
    kind, key = ("rl", "reward") if run.rl else ("steps", "loss")
    steps, values = run.series(kind, key)
    colour = COLOURS[run.stage]
    smooth = smoothed(values)
    noisy = smooth is not values
    axes.plot(steps, values, color=colour, lw=0.8 if noisy else 1.8, alpha=0.3 if noisy else 1.0)
    if noisy:
        axes.plot(steps, smooth, color=colour, lw=1.8)
    per = "pair" if run.stage == "dpo" else "token"
    name = "reward" if run.rl else f"training loss (nats per {per})"
    axes.set_title(f"{run.stage}  {run.tag}", loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(name, fontsize=9, color=colour)
    axes.set_xlabel("step", fontsize=9, color=_GREY)
    axes.grid(axis="y", color="#e6e2db", lw=0.8)
    axes.set_axisbelow(True)
    frame(axes, ("left", "bottom"))
    if not run.rl:
        _cut_start(axes, smooth)
    _validation(axes, run)


def _validation(axes: Any, run: Run) -> None:
    """Dots for the measurements on held-out data, if there are any. What is of the same kind as
    the curve shares its axis; bits per byte get their own."""
    steps, values = run.series("evals", "val_bpb")
    label = "validation bits per byte"
    if run.rl:
        steps, values = run.series("evals", "pass1")
        label = "held-out problems solved"
    elif steps:
        axes = axes.twinx()
        axes.set_ylabel(label, fontsize=9, color=_MARK)
        frame(axes, ("right",))
    else:
        steps, values = run.series("evals", "val_loss")
        label = "validation loss"
    if not steps:
        return
    axes.plot(steps, values, "o-", color=_MARK, ms=3.5, lw=0.8, label=label)
    axes.annotate(
        f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, 7), textcoords="offset points",
        ha="right", fontsize=9, color=_MARK, fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    axes.margins(y=0.15)
    axes.legend(loc="best" if run.rl else "upper right", fontsize=8, frameon=False)


def frame(axes: Any, kept: tuple[str, ...]) -> None:
    """Leaves these sides of the box, in a quiet grey."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in kept)
        spine.set_color("#bdb7ad")
    axes.tick_params(colors=_GREY, labelsize=8)


def _cut_start(axes: Any, smooth: list[float]) -> None:
    """The first steps fall from ln(vocabulary); shown whole they would flatten all that follows."""
    start = len(smooth) // 50
    rest = [v for v in smooth[start:] if math.isfinite(v)]
    if start and rest and max(rest) > min(rest):
        axes.set_ylim(top=max(rest) + 0.05 * (max(rest) - min(rest)))


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
