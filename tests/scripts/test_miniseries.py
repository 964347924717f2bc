"""A series of runs and its law: trained once, not again, and what cannot be fitted is said."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nanochat import flags
from nanochat.checkpoint import LOG, run_dir, step_dir
from nanochat.common import UserError, read_json, read_jsonl
from nanochat.report.series import Point, draw_isoflop
from scripts import miniseries
from tests.tiny_world import BASE_FLAGS, make_world, run_stage

FLAGS = [flag for flag in BASE_FLAGS if not flag.startswith(("--depth", "--num_iterations"))]


def in_process(words: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """In place of launch: the same run without a new Python."""
    _, _, module, *argv = words
    run_stage(module.removeprefix("scripts."), *argv)
    return 0


def series(*argv: str) -> None:
    miniseries.main(flags.parse(miniseries.Args, [*argv, *FLAGS]))


@pytest.fixture
def world(own_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_world(own_base_dir)
    monkeypatch.setattr(miniseries, "launch", in_process)
    return own_base_dir


def test_two_depths_are_trained_fitted_and_drawn_and_not_trained_again(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--depths=2,1", "--target_param_data_ratio=0.004", "--series=s"]
    series(*argv)
    result = read_json(world / "report" / "s.json")
    points = result["points"]
    assert [p["tag"] for p in points] == ["s-d1", "s-d2"]
    for point in points:
        rows = [row for _, row in read_jsonl(run_dir("base", point["tag"]) / LOG)]
        start, end = rows[0], rows[-1]
        assert point["tokens"] == 256 * start["num_steps"]
        assert point["flops"] == point["tokens"] * start["flops_per_token"]
        assert point["val_bpb"] == end["final"]["val_bpb"]
        assert point["num_params"] == sum(start["params"].values()) > point["scaling_params"]
        horizon = 0.004 * point["num_params"]
        assert abs(point["tokens"] - horizon) <= 256  # the ratio went to base_train
    assert (world / "report" / "s.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    if points[1]["val_bpb"] < points[0]["val_bpb"]:
        assert result["law"]["E"] == 0.0 and "two sizes only" in said
    else:
        assert "the loss does not fall" in result["problems"][0]

    last = step_dir("base", "s-d2", points[1]["tokens"] // 256) / "model.safetensors"
    written = last.stat().st_mtime_ns
    series(*argv)
    assert "this run has ended already" in capsys.readouterr().out
    assert last.stat().st_mtime_ns == written
    assert read_json(world / "report" / "s.json")["points"] == points
    with pytest.raises(UserError, match="its --seed was 42, now it is 7"):
        series(*argv, "--seed=7")


def test_a_grid_of_flops_is_exact_to_a_step(world: Path) -> None:
    """--target_flops, end to end: what was spent is within one step of what was asked for."""
    series("--depths=1,2", "--target_flops=1e9,2.5e9", "--series=iso")
    result = read_json(world / "report" / "iso.json")
    assert [p["tag"] for p in result["points"]] == [
        "iso-d1-1e09", "iso-d2-1e09", "iso-d1-2.5e09", "iso-d2-2.5e09"
    ]  # fmt: skip
    for point in result["points"]:
        start = next(row for _, row in read_jsonl(run_dir("base", point["tag"]) / LOG))
        one_step = 256 * start["flops_per_token"]
        assert abs(point["flops"] - point["target_flops"]) <= one_step / 2
        assert point["flops"] == start["num_steps"] * one_step
    assert result["optima"] == [] and "3 or more depths, not 2" in result["problems"][0]
    assert (world / "report" / "iso.png").exists()


def test_the_fits_of_a_grid_and_their_picture(tmp_path: Path) -> None:
    """Made points whose best size grows as C^0.5, and so do the tokens."""
    budgets = [1e15, 1e16, 1e17]
    points = []
    for c in budgets:
        best = 1e6 * (c / 1e15) ** 0.5
        for factor in (0.3, 0.8, 2.0):
            n = round(best * factor)
            loss = 1.5 * (c / 1e15) ** -0.05 + 0.02 * math.log(n / best) ** 2
            points.append(Point(f"{c}-{n}", 2 * n, n, round(c / (6 * n)), c, loss, None, c))
    result = miniseries.fit_isoflop(points, budgets)
    assert result["params_exponent"].exponent == pytest.approx(0.5, abs=1e-4)
    assert result["tokens_exponent"].exponent == pytest.approx(0.5, abs=1e-2)
    assert result["problems"] == []
    draw_isoflop(points, result, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
    text = json.dumps(miniseries.plain(result))
    assert "family" not in text and "params_exponent" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--depths=4,x"], "numbers joined by commas"),
        (["--depths=0,4"], "0 is not above 0"),
        (["--depth=4"], r"--depth=4: a series sets --depth by itself; use --depths"),
        (["--num-iterations", "5"], "--target_flops or"),
        (["--no-resume"], "by itself"),
    ],
)
def test_flags_that_do_not_fit_a_series(argv: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        miniseries.main(flags.parse(miniseries.Args, argv))


def test_a_run_that_failed_or_was_stopped_ends_the_series(
    own_base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []

    def fails(words: Sequence[str]) -> int:
        commands.append(shlex.join(words))
        return 2

    monkeypatch.setattr(miniseries, "launch", fails)
    argv = ["--depths=2,4", "--nproc_per_node=2", "--matrix_lr=0.01"]
    with pytest.raises(UserError, match="miniseries-d2 failed with status 2"):
        miniseries.main(flags.parse(miniseries.Args, argv))
    assert commands == [
        "torchrun --standalone --nproc_per_node=2 -m scripts.base_train -- --matrix_lr=0.01 "
        "--depth=2 --model_tag=miniseries-d2 --resume --target_param_data_ratio=20.0"
    ]
    monkeypatch.setattr(miniseries, "launch", lambda words: 0)
    log = run_dir("base", "miniseries-d2") / LOG
    log.parent.mkdir(parents=True)
    log.write_text('{"event": "start", "stage": "base", "step": 0}\n', encoding="utf-8")
    with pytest.raises(UserError, match="was stopped; the same command goes on"):
        miniseries.main(flags.parse(miniseries.Args, argv))
