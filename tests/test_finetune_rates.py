"""bench/finetune_rates.py: every run parses and varies what it says, only differences beyond their
error are believed, and a run once done is not run again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import finetune_rates as bench
from nanochat import flags
from nanochat.common import UserError
from nanochat.conversation import reply_text
from nanochat.dpo import read_pair
from nanochat.tasks.common import get_task
from nanochat.tokenizer import get_tokenizer
from tests.tiny_world import BASE_FLAGS, MID_FLAGS, new_world, run_stage


def test_every_run_parses_and_the_defaults_are_those_of_the_stages() -> None:
    for trial in bench.TRIALS:
        script = bench.SCRIPTS[trial.stage]
        args = flags.parse(script.Args, [*bench.command(trial, 0), "--model_tag=tag"])
        if trial.is_default and trial.group != bench.IDENTITY:
            assert (args.init_lr_frac, args.lora_lr) == (
                script.Args.init_lr_frac,
                script.Args.lora_lr,
            )
    for group in {trial.group for trial in bench.TRIALS}:
        assert sum(t.is_default for t in bench.TRIALS if t.group == group) == 1


def run_of(seed: int, loss: float, solved: float = 0.5) -> dict[str, Any]:
    shares = dict.fromkeys([*bench.TASKS, bench.NAME.lower()], solved)
    return {"seed": seed, bench.VAL_LOSS: loss, **shares}


def trial_of(group: str, shown: str, *runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "group": group, "stage": "sft", "shown": shown, "is_default": shown == "default",
        "flags": [], "runs": list(runs),
    }  # fmt: skip


def test_a_difference_is_believed_beyond_twice_its_error() -> None:
    trials = [
        trial_of("SFT", "default", run_of(0, 1.0), run_of(1, 2.0)),
        trial_of("SFT", "low", run_of(0, 0.9), run_of(1, 1.92)),
        trial_of("SFT", "tie", run_of(0, 0.96), run_of(1, 2.02)),
        trial_of("SFT", "once", run_of(0, 9.0)),
    ]
    found = bench.against_default(trials, bench.VAL_LOSS)
    assert found[0] is None
    low, tie, once = found[1:]
    assert low and tie and once
    # Differences -0.1, -0.08 and -0.04, 0.02: their spread is of both settings together
    assert low == pytest.approx((-0.09, ((0.02**2 / 2 + 0.06**2 / 2) / 2 / 2) ** 0.5))
    assert once[1] == pytest.approx(low[1] * 2**0.5)
    said = [bench.verdict(d, bench.VAL_LOSS).rpartition(" ")[2] for d in found]
    assert said == ["", "better", "tie", "worse"]
    assert bench.verdict((0.1, 0.01), bench.GOAL) == "+10.0% ± 1.0%: better"
    assert bench.verdict((0.1, float("nan")), bench.GOAL) == "+10.0%: one seed"


def test_the_tables_show_every_run_that_is_done() -> None:
    result = {
        "mid_steps": 7,
        "before": run_of(0, 3.0, 0.25),
        "trials": [
            trial_of("SFT", "default", run_of(0, 1.0), run_of(1, 2.0)),
            trial_of("SFT", "low", run_of(0, 0.9)),
            trial_of("SFT, LoRA", "without its default", run_of(0, 0.9)),
            trial_of(bench.IDENTITY, "default", run_of(0, 1.0, 0.75)),
            trial_of(bench.IDENTITY, "not yet"),
        ],
    }
    rates, identity = bench.rates_table(result), bench.identity_table(result)
    assert "after 7 steps" in rates and "| before SFT | | 3.000 | 25.0% | 25.0% |  | |" in rates
    assert "| **default** | 2 | 1.500 | 50.0% | 50.0% |  |  |" in rates
    assert "without" not in rates and "not yet" not in identity
    assert "| default | 75.0% | 75.0% | 75.0% | 75.0% | 1.000 |" in identity


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with new_world(tmp_path_factory) as folder:
        run_stage("base_train", *BASE_FLAGS)
        run_stage("mid_train", *MID_FLAGS)
        yield folder


@pytest.mark.slow
def test_runs_that_are_done_are_not_run_again(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.WORDS, "sft", [*bench.WORDS["sft"], "--num_iterations=2"])
    monkeypatch.setattr(bench, "TASKS", dict.fromkeys(bench.TASKS, 2))
    monkeypatch.setattr(bench, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(bench, "PAIR_PROBLEMS", 4)
    args = bench.Args(base_dir=base, only="SFT", seeds=1, out=base / "result.json")
    bench.main(args)
    assert capsys.readouterr().out.count("starting from") == 3
    result = json.loads(args.out.read_text())
    assert [len(t["runs"]) for t in result["trials"] if t["group"] == "SFT"] == [1, 1, 1]
    assert str(base) not in args.out.read_text()
    bench.main(args)
    assert "starting from" not in capsys.readouterr().out


def test_a_pair_is_the_best_and_the_worst_reply_with_their_tool_calls(base: Path) -> None:
    tokenizer, problem = get_tokenizer(), get_task(bench.GOAL, "train")[0]
    solved, mask = tokenizer.render_conversation(problem)
    mask = tokenizer.trained_mask(solved, mask)  # the engine's says that the end was chosen, too
    start = tokenizer.render_for_completion(problem)
    wrong = [*start, *tokenizer.encode("None."), tokenizer.encode_special("<|assistant_end|>")]
    found: Any = SimpleNamespace(
        sequences=[wrong, [], [], solved], masks=[[1] * len(wrong), [], [], mask],
        rewards=np.array([[0.0, 0.5, 0.5, 1.0]]),
    )  # fmt: skip
    chosen, rejected = read_pair(bench.pair(tokenizer, problem, found, 0), "here")
    assert reply_text(rejected["messages"][-1]["content"]) == "None."
    assert tokenizer.render_conversation(chosen)[0] == solved
    assert any(part["type"] == "python" for part in chosen["messages"][-1]["content"])


def test_what_cannot_be_is_said(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--only=DPO \| nothing: nothing: choose among SFT"):
        bench.main(bench.Args(base_dir=base, only="DPO | nothing", out=tmp_path / "result.json"))
    with pytest.raises(UserError, match="holds no midtrained model; `NANOCHAT_BASE_DIR="):
        bench.main(bench.Args(base_dir=tmp_path, out=tmp_path / "result.json"))
