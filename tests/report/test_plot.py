"""The report's picture: that it is drawn, of whatever there is, and what smoothing does."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nanochat.report.plot import run_panels, save_panels, smoothed
from nanochat.report.runs import Run


def run_of(stage: str, values: list[float]) -> Run:
    run = Run(stage, "d4")
    rows = {i + 1: {"loss": v, "reward": v} for i, v in enumerate(values)}
    run.steps = rows
    if stage == "rl":
        run.rl = rows
    return run


def test_nothing_to_draw_makes_no_file(tmp_path: Path) -> None:
    assert not save_panels(run_panels([Run("base", "d4")]), tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values",
    [[2.0], [2.0] * 100, [math.nan] * 100, [math.nan, *[1.0 / (i + 1) for i in range(99)]]],
)
def test_odd_curves_are_drawn(tmp_path: Path, values: list[float]) -> None:
    run = run_of("base", values)
    run.evals = {1: {"val_bpb": values[-1]}}
    assert save_panels(run_panels([run]), tmp_path / "loss.png")


def test_every_stage_gets_a_panel(tmp_path: Path) -> None:
    def size(*stages: str) -> tuple[int, int]:
        runs = [run_of(stage, [3.0, 2.0, 1.0]) for stage in stages]
        save_panels(run_panels(runs), tmp_path / "loss.png")
        picture = matplotlib.image.imread(tmp_path / "loss.png")
        assert picture[..., :3].std() > 0.01  # not blank
        return picture.shape[1], picture.shape[0]

    width, height = size("base")
    assert size("base", "rl") == (2 * width, height)
    assert size("base", "mid", "sft", "rl") == (2 * width, 2 * height)


def test_smoothing_keeps_the_trend_and_drops_the_noise() -> None:
    rng = np.random.default_rng(0)
    trend = np.linspace(5, 3, 300)
    smooth = np.array(smoothed((trend + rng.normal(0, 0.3, 300)).tolist()))
    assert np.abs(smooth - trend)[20:-20].max() < 0.25
    assert np.abs(np.diff(smooth)).mean() < 0.05
    few = [3.0, 1.0, 2.0]
    assert smoothed(few) is few


def test_smoothing_skips_what_is_not_finite() -> None:
    values = [1.0] * 50
    values[10] = math.nan
    values[20] = math.inf
    assert smoothed(values) == pytest.approx([1.0] * 50)
