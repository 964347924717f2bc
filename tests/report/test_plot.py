"""The report's picture: that it is drawn, of whatever there is, and what smoothing does."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nanochat.report.plot import new_figure, run_panels, save_panels, smoothed, svg, thinned
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


def test_panels_of_what_was_logged_and_of_nothing_else() -> None:
    run = run_of("base", [3.0, 2.0])
    assert [panel.title for panel in run_panels([run])] == ["base d4: loss, nats per token"]
    more = {"lr_mul": 1.0, "tokens_per_second": 9.0, "mfu": 0.5, "memory_gib": 1.5}
    run.steps = {s: {**row, **more, "seconds": 100.0 * s} for s, row in run.steps.items()}
    run.evals = {1: {"val_bpb": 1.0}}
    assert [panel.title for panel in run_panels([run])[1:]] == [
        "base d4: bits per byte", "learning rate, share of its peak", "tokens per second",
        "model FLOPs utilization, %", "memory, highest so far, GiB",
    ]  # fmt: skip


def test_stages_follow_each_other_in_time() -> None:
    runs = [run_of(stage, [3.0, 2.0, 1.0]) for stage in ("base", "mid")]
    for run in runs:
        run.steps = {s: {"mfu": 0.1 * s, "seconds": 60.0 * s} for s in (1, 2, 3)}
    (panel,) = [panel for panel in run_panels(runs) if "utilization" in panel.title]
    axes = new_figure(4, 3).add_subplot()
    panel.draw(axes)
    x = [line.get_xdata().tolist() for line in axes.lines]
    assert x == [[1, 2, 3], [4, 5, 6]] and "minutes" in axes.get_xlabel()
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([10, 20, 30])  # percent


def test_an_svg_has_the_pages_colours_and_its_own_ids() -> None:
    run = run_of("base", [3.0 / (i + 1) for i in range(5000)])
    run.evals = {s: {"val_loss": 1.0} for s in (1, 5000)}
    (panel,) = run_panels([run])
    text = svg(panel, "p7")
    assert text.startswith("<svg") and "var(--base)" in text and "var(--ink)" in text
    assert not re.search(r"#[0-9a-f]{6}\b", text)  # no colour that does not follow
    assert all(name.startswith("p7-") for name in re.findall(r'\bid="([^"]+)"', text))
    assert "<text" in text and "step" in text  # letters, to be read and searched
    assert text == svg(panel, "p7")
    assert len(text) < 150_000  # of ten thousand points


def test_a_long_curve_is_thinned_to_its_end() -> None:
    x, y = thinned(range(12345), [2.0 * i for i in range(12345)])
    assert len(x) <= 1001 and (x[0], x[-1]) == (0, 12344) and y == [2.0 * i for i in x]
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0]) and thinned([], []) == ([], [])
