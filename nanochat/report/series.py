"""A series of runs as points of a scaling law, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.report.plot import COLOURS, frame, new_figure, save_figure
from nanochat.report.runs import Run
from nanochat.scaling import Exponent, Optimum, PowerLaw

_CYCLE = tuple(COLOURS.values())


@dataclass
class Point:
    """What one run of a series came to."""

    tag: str
    num_params: int
    scaling_params: int  # matrices and head: what is multiplied with every token
    tokens: int
    flops: float  # tokens times FLOPs per token, forward and backward
    val_bpb: float
    seconds: float | None
    target_flops: float | None = None


def point_of(run: Run, target_flops: float | None = None) -> Point:
    """The end of a run that has ended. UserError if it has no final evaluation."""
    measured = run.evals.get(run.num_steps, {}).get("val_bpb")
    if measured is None:
        raise UserError(f"{run.name} has no val_bpb at its last step, {run.num_steps}")
    tokens = int(run.last("steps", "tokens") or 0)
    parts = run.start["params"]
    return Point(
        run.tag,
        run.start["num_params"],
        parts["matrix"] + parts["head"],
        tokens,
        float(tokens * run.start["flops_per_token"]),
        float(measured),
        run.seconds,
        target_flops,
    )


def draw_series(points: list[Point], law: PowerLaw | None, out: Path) -> None:
    """Bits per byte over FLOPs: the runs, the law to ten times the largest, its 95% band."""
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot(1, 1, 1)
    flops = np.array([p.flops for p in points])
    if law is not None:
        x = np.geomspace(flops.min(), 10 * flops.max(), 200)
        band = law.band(x)
        if band is not None:
            axes.fill_between(x, *band, color=COLOURS["base"], alpha=0.15, lw=0, label="95%")
        text = f"{law.E:.3f} + {law.A:.3f} (C / {law.x0:.2e})$^{{-{law.alpha:.3f}}}$"
        axes.plot(x, law(x), color=COLOURS["base"], lw=1.4, label=text)
    axes.plot(flops, [p.val_bpb for p in points], "o", color=COLOURS["rl"], ms=5)
    for p in points:
        axes.annotate(
            p.tag, (p.flops, p.val_bpb), xytext=(5, 5), textcoords="offset points", fontsize=8
        )
    _label(axes, "training FLOPs", "validation bits per byte")
    axes.set_xscale("log")
    if law is not None:
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def draw_isoflop(points: list[Point], fits: Mapping[str, Any], out: Path) -> None:
    """Bits per byte over size with a parabola a budget, and the best sizes and tokens over FLOPs.

    `fits`: "optima" (list of Optimum), "params_exponent" and "tokens_exponent" if there are any."""
    optima: list[Optimum] = fits["optima"]
    figure = new_figure(10.4, 4.2)
    axes = figure.add_subplot(1, 2, 1)
    for i, budget in enumerate(sorted({p.target_flops or 0.0 for p in points})):
        colour = _CYCLE[i % len(_CYCLE)]
        of_budget = sorted(
            (p for p in points if p.target_flops == budget), key=lambda p: p.scaling_params
        )
        n = np.array([p.scaling_params for p in of_budget], dtype=float)
        axes.plot(n, [p.val_bpb for p in of_budget], "o", color=colour, label=f"{budget:.2g} FLOPs")
        for best in (b for b in optima if b.flops == budget):
            x = np.geomspace(n.min(), n.max(), 100)
            y = best.loss + best.curvature * (np.log(x) - np.log(best.params)) ** 2
            axes.plot(x, y, color=colour, lw=1.2)
            axes.plot([best.params], [best.loss], "*", color=colour, ms=11)
    axes.set_xscale("log")
    _label(axes, "matrix and head parameters", "validation bits per byte")
    axes.legend(fontsize=8, frameon=False)
    axes = figure.add_subplot(1, 2, 2)
    for name, colour in (("params", COLOURS["base"]), ("tokens", COLOURS["rl"])):
        law: Exponent | None = fits.get(f"{name}_exponent")
        label = f"{name} ~ C$^{{{law.exponent:.2f}}}$" if law else name
        flops = [b.flops for b in optima]
        axes.plot(flops, [getattr(b, name) for b in optima], "*", color=colour, ms=9, label=label)
        if law:
            axes.plot(flops, law(np.array(flops)), color=colour, lw=1.2)
    _label(axes, "training FLOPs", "at the best size")
    if optima:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8, frameon=False)
    save_figure(figure, out)


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    frame(axes, ("left", "bottom"))
