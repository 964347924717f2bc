"""
Every stage, stopped again and again where it hurts, is in the end the run that was left alone:
bitwise the same weights and optimizer state, the same log rows, the same numbers in checkpoints.

bench/kill_resume.py does the same at random, a hundred times.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.kill_resume import STAGES, Death, Processes, Stage, differences, prepare, torment
from nanochat.checkpoint import list_steps, stage_dir
from nanochat.common import read_jsonl
from nanochat.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A small world of its own, and a server that starts runs in it quickly."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        yield prepare(folder)


@pytest.fixture(autouse=True)
def base(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(processes.base_dir))
    return processes.base_dir


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT

# By stage: what befalls one run, one after the other; and the steps that are saved after each (None
# where the thread that saves may or may not have come that far).
FATES: dict[str, list[tuple[str, int, str, int, list[int] | None]]] = {
    "base": [
        ("rename of a save", 0, "before", KILL, []),  # written and sealed, but without its name
        ("step", 2, "before", TERM, [2, 3]),  # is finished and saved
        ("evaluation", 0, "before", TERM, [2, 3]),  # was due at step 3: broken off, nothing new
        ("writing of weights", 1, "after", KILL, [2, 3]),  # in the save of step 4
    ],
    "mid": [
        ("evaluation", 1, "during", KILL, None),
        ("manifest", 0, "before", INT, None),
        ("removal of an old save", 0, "before", KILL, None),
    ],
    "sft": [
        ("evaluation", 0, "before", INT, [0]),
        ("step", 1, "after", KILL, [0]),
        ("resuming", 0, "after", KILL, [0]),
        ("log", 5, "after", TERM, [0, 2]),
        ("answers", 0, "before", TERM, [0, 2]),  # to tasks, due at step 2: broken off
        ("answers", 0, "after", KILL, [0, 2]),
    ],
    "rl": [
        ("rollouts", 0, "during", KILL, []),
        ("rollouts", 1, "before", TERM, [1]),  # broken off; the step is not taken
        ("rename of a save", 1, "after", KILL, [1, 2, 4]),  # nobody removed the first
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_run_that_is_stopped_over_and_over_is_the_run_it_would_have_been(
    processes: Processes, stage: Stage
) -> None:
    run = (stage.script, *stage.argv)
    assert processes.run(*run, "--model_tag=whole") == 0
    for place, call, when, signum, steps in FATES[stage.name]:
        death = Death(place, stage.places[place], call, when, 0.0, signum)
        status = processes.run(*run, "--model_tag=stopped", "--resume", death=death)
        said = processes.output.read_text(encoding="utf-8")
        if signum == KILL:
            assert status == -KILL, said
        else:
            assert status == 0 and processes.was_stopped()
            assert "continue with --resume" in said
        if steps is not None:
            assert list_steps(stage.name, "stopped") == steps, (place, said)
    assert processes.run(*run, "--model_tag=stopped", "--resume") == 0
    assert differences(stage.name, "stopped", "whole") == []
    # And once it has ended, resuming it changes nothing.
    assert processes.run(*run, "--model_tag=stopped", "--resume") == 0
    assert "nothing is left to do" in processes.output.read_text(encoding="utf-8")
    assert differences(stage.name, "stopped", "whole") == []
    assert [p.name for p in (stage_dir(stage.name) / "stopped").glob(".*")] == []


@pytest.mark.slow
def test_random_kills(processes: Processes) -> None:
    """The short version of the benchmark, and a run that is not the same is noticed by it."""
    stage = STAGES[0]
    outcome = torment(stage, processes, 2, random.Random(5))
    assert outcome.kills.total() == 2 and outcome.runs > 0 and outcome.differences == []
    argv = [*stage.argv, "--model_tag=other", "--seed=1"]
    processes.run(stage.script, *argv)
    found = differences(stage.name, "other", "whole")
    assert any("another model.safetensors" in line for line in found)
    assert any(line.startswith("the log says") for line in found)


def test_the_runs_cross_the_border_of_an_epoch(base: Path) -> None:
    """8 steps of 4 rows of 65 tokens see all of the text, and then some of it again."""
    texts = [row["text"] for _, row in read_jsonl(base / "little.jsonl")]
    num_tokens = sum(map(len, get_tokenizer().encode(texts, prepend="<|bos|>")))
    assert 4 * 65 < num_tokens < 28 * 65
