"""
Kills training and resumes it until it ends, and compares what came out with a run left alone.

    python -m bench.kill_resume                # 100 kills over the four stages; writes the result
    python -m bench.kill_resume --kills=12 --seed=3 --out=""

Every run is a process of its own and every kill a real SIGKILL: from outside at a random moment, or
from within right before, during or after a random call of something that matters (a step, an
evaluation, rollouts, each part of a save). Now and then it is SIGTERM or SIGINT instead, upon which
a run saves and ends. Then the same command is given again. When a run has got to its end, its
weights and optimizer state must be bitwise those of the run that nobody disturbed, its log must
have the same rows, and its checkpoints must hold the same numbers.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import surroundings
from nanochat import flags
from nanochat.checkpoint import FILES, LOG, list_steps, run_dir, step_dir
from nanochat.common import read_json, read_jsonl, seed_from, write_json
from nanochat.dataset import iter_texts, train_files
from nanochat.manifest import find_damage, read_manifest
from nanochat.primer.write import write_primer
from nanochat.tokenizer import Tokenizer

RESULT = Path(__file__).resolve().parent / "results" / "kill_resume.json"


@dataclass
class Args:
    """Kill and resume training, and compare it with training that was left alone."""

    kills: int = 100
    """Kills in all, shared out evenly over the stages."""
    seed: int = 42
    """Seed of the kills."""
    out: str = str(RESULT)
    """File for the result; empty: none."""


# -------------------------------------------------------------------------------------------------
# What is run: four stages, so small that a run takes a second, each over more than one epoch


@dataclass(frozen=True)
class Stage:
    """A training script and its flags; `places` are the functions to be killed in."""

    name: str
    script: str
    argv: tuple[str, ...]
    places: dict[str, str]  # name -> module:attribute


SAVE_PLACES = {
    "step": "nanochat.train:Trainer.step",
    "copy for a save": "nanochat.train:Trainer.save",
    "writing of weights": "nanochat.checkpoint:save_file",
    "manifest": "nanochat.checkpoint:seal",
    "rename of a save": "nanochat.checkpoint:_publish",
    "removal of an old save": "nanochat.checkpoint:_discard",
    "log": "nanochat.train:append_jsonl",
    "resuming": "nanochat.train:load_weights",
}
COMMON = ("--device_type=cpu", "--device_batch_size=2", "--save_every=2", "--keep_last=2")
CONVERSATIONS = (
    *COMMON, "--source_tag=start", "--mixture=primer-arithmetic@24", "--num_iterations=8",
    "--eval_every=3", "--val_mixture=primer-facts", "--eval_tokens=512", "--sample_prompts=Hello!",
    "--total_batch_size=256",
)  # fmt: skip
STAGES = (
    Stage(
        "base",
        "base_train",
        (
            *COMMON, "--depth=1", "--max_seq_len=64", "--total_batch_size=256",
            "--num_iterations=8", "--eval_every=3", "--eval_tokens=512", "--core_metric_every=-1",
            "--sample_prompts=The", "--data=little.jsonl", "--val_data=validation.jsonl",
        ),
        SAVE_PLACES | {"evaluation": "scripts.base_train:evaluate_bpb"},
    ),
    Stage(
        "mid", "mid_train", CONVERSATIONS,
        SAVE_PLACES | {"evaluation": "nanochat.finetune:evaluate_loss"},
    ),
    Stage(
        "sft",
        "chat_sft",
        (
            *CONVERSATIONS, "--init_lr_frac=0.5", "--sample_every=2", "--chat_eval_every=2",
            "--chat_eval_tasks=primer-choice", "--chat_eval_problems=2",
            "--chat_eval_max_new_tokens=4",
        ),
        SAVE_PLACES
        | {
            "evaluation": "nanochat.finetune:evaluate_loss",
            "answers": "nanochat.finetune:run_chat_eval",
        },
    ),
    Stage(
        "rl",
        "chat_rl",
        (
            *COMMON, "--source=mid", "--source_tag=start", "--task=problems.jsonl",
            "--examples_per_step=2", "--num_samples=4", "--max_new_tokens=12",
            "--num_iterations=6", "--eval_every=3", "--eval_examples=4", "--init_lr_frac=0.5",
        ),
        SAVE_PLACES
        | {
            "evaluation": "scripts.chat_rl:run_chat_eval",
            "rollouts": "scripts.chat_rl:sample_rollouts",
        },
    ),
)  # fmt: skip


def make_world(folder: Path) -> None:
    """Data and a tokenizer below `folder`, which NANOCHAT_BASE_DIR must name."""
    write_primer(folder, seed=1, scale=0.01)
    texts = list(iter_texts(train_files()))
    Tokenizer.train(texts, 500).save(folder / "tokenizer")
    files = {
        "little.jsonl": [{"text": text} for text in texts[:16]],
        "validation.jsonl": [{"text": text} for text in texts[16:40]],
        "problems.jsonl": [
            {"question": f"What is {k} + {k}?", "answer": f"#### {2 * k}"} for k in range(5)
        ],
    }
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(lines, encoding="utf-8")


# -------------------------------------------------------------------------------------------------
# Processes that die


@dataclass(frozen=True)
class Death:
    """When a run gets a signal: `delay` seconds after its start, or around a call of a function."""

    place: str = "any moment"
    target: str = ""  # module:attribute
    call: int = 0  # which call of it
    when: str = "during"  # before, during, after
    delay: float = 0.0  # after the start; for "during", after the call began
    signum: int = signal.SIGKILL


def draw_death(rng: random.Random, stage: Stage, seconds: float) -> Death:
    """One in six at any moment of a run of that many seconds, the others in a place of its own; of
    these, one in six may save first."""
    if rng.random() < 1 / 6:
        return Death(delay=rng.uniform(0, seconds))
    place = rng.choice(sorted(stage.places))
    when = rng.choice(["before", "during", "after"])
    signum = rng.choice([signal.SIGKILL] * 10 + [signal.SIGTERM, signal.SIGINT])
    # Few enough calls that most deaths come true: a resumed run has only the rest before it.
    call, delay = rng.randrange(4), rng.uniform(0, 0.03)
    return Death(place, stage.places[place], call, when, delay, signum)


def _lookup(target: str) -> tuple[Any, str]:
    """(object, name of its attribute) for "module:attribute" or "module:class.attribute"."""
    module, path = target.split(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _arm(death: Death) -> None:
    """Puts a wrapper around the function where this process is to get its signal."""

    def strike() -> None:
        os.kill(os.getpid(), death.signum)

    owner, name = _lookup(death.target)
    real: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == death.call
        if now and death.when == "before":
            strike()
        if now and death.when == "during":
            timer = threading.Timer(death.delay, strike)
            timer.daemon = True
            timer.start()
        result = real(*args, **kwargs)
        if now and death.when == "after":
            strike()
        return result

    setattr(owner, name, wrapped)


def _run(script: str, argv: list[str], base_dir: str, output: str, death: Death | None) -> None:
    """In a process of its own: the script's command line, its output in a file."""
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    os.chdir(base_dir)
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    # A model this small is never right: its replies are rewarded by their length.
    owner, name = _lookup("nanochat.tasks.common:Task.reward")
    setattr(owner, name, lambda task, conversation, reply: len(reply) % 4 / 3)
    if death is not None and death.target:
        _arm(death)
    module = importlib.import_module(f"scripts.{script}")
    flags.run(module.main, module.Args, argv)


class Processes:
    """Starts runs by forking a server that has imported everything: a tenth of a second each."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir
        self.output = base_dir / "output.txt"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"scripts.{stage.script}" for stage in STAGES])

    def run(self, script: str, *argv: str, death: Death | None = None) -> int:
        """The exit status of scripts.<script>; -9 if it was killed as planned."""
        process = self._context.Process(
            target=_run, args=(script, list(argv), str(self.base_dir), str(self.output), death)
        )
        process.start()
        if death is not None and not death.target:
            process.join(death.delay)
            process.kill()
        process.join(300)
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(
                f"scripts.{script} {' '.join(argv)} with {death} ended with status "
                f"{process.exitcode}: {self.output.read_text(encoding='utf-8')}"
            )
        return process.exitcode

    def was_stopped(self) -> bool:
        """Whether the last run ended by a signal, with all saved."""
        return "stopped by a signal at step" in self.output.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------
# Comparing


def differences(stage: str, tag: str, other: str) -> list[str]:
    """What differs between two runs of a stage that should be one and the same, in words."""
    found = []
    steps, other_steps = list_steps(stage, tag), list_steps(stage, other)
    # A signal upon which a run saves may make one of the last steps another.
    if (len(steps), steps[-1:]) != (len(other_steps), other_steps[-1:]):
        found.append(f"steps {steps}, not {other_steps}")
    for step in set(steps) & set(other_steps):
        one, two = step_dir(stage, tag, step), step_dir(stage, other, step)
        if damage := find_damage(one, FILES):
            found.append(f"step {step}: {damage}")
            continue
        hashes = [read_manifest(folder) or {} for folder in (one, two)]
        found += [
            f"step {step}: another {name}"
            for name in FILES
            if name.endswith(".safetensors") and hashes[0][name] != hashes[1][name]
        ]
        metas = [_lasting(read_json(folder / "meta.json")) for folder in (one, two)]
        found += [f"step {step}: {k} {metas[0][k]}" for k in metas[0] if metas[0][k] != metas[1][k]]
    logs = [[row for _, row in read_jsonl(run_dir(stage, t) / LOG)] for t in (tag, other)]
    # "start" and "shard" rows say what a process did, not what the run is.
    rows = [[_lasting(r) for r in log if r["event"] not in ("start", "shard")] for log in logs]
    for one_row, other_row in itertools.zip_longest(*rows):
        if one_row != other_row:
            found.append(f"the log says {one_row}, not {other_row}")
            break
    return found


def _lasting(row: dict[str, Any]) -> dict[str, Any]:
    """A log row or metadata without what no two runs have in common: times, and where it stood."""
    passing = ("time", "seconds", "tokens_per_second", "memory_gib", "args", "log_size", "loader")
    return {
        k: _lasting(v) if isinstance(v, dict) else v for k, v in row.items() if k not in passing
    }


@dataclass
class Outcome:
    """What became of a stage."""

    kills: Counter[str] = field(default_factory=Counter)  # by place
    stops: int = 0  # by a signal upon which it saved
    runs: int = 0  # that got to their end and were compared
    differences: list[str] = field(default_factory=list)


def torment(stage: Stage, processes: Processes, kills: int, rng: random.Random) -> Outcome:
    """Runs a stage once in peace, and then as often as it takes to be killed so many times."""
    outcome = Outcome()
    started = time.monotonic()
    processes.run(stage.script, *stage.argv, "--model_tag=whole", "--resume")
    seconds = time.monotonic() - started
    while outcome.kills.total() < kills:
        tag = f"killed{outcome.runs}"
        command = (stage.script, *stage.argv, f"--model_tag={tag}", "--resume")
        while outcome.kills.total() < kills:
            death = draw_death(rng, stage, seconds)
            if processes.run(*command, death=death) != 0:
                outcome.kills[death.place] += 1
            elif processes.was_stopped():
                outcome.stops += 1
            else:
                break  # at its end, before death came
        processes.run(*command)  # the rest; of a run that has ended, nothing
        outcome.runs += 1
        outcome.differences += differences(stage.name, tag, "whole")
    return outcome


def prepare(base_dir: Path) -> Processes:
    """A world below `base_dir`, which becomes NANOCHAT_BASE_DIR, with models to start from."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)
    make_world(base_dir)
    processes = Processes(base_dir)
    for stage in STAGES[:2]:
        argv = [flag for flag in stage.argv if not flag.startswith("--source_tag")]
        processes.run(stage.script, *argv, "--model_tag=start", "--num_iterations=3")
    return processes


def main(args: Args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order
    outcomes = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        processes = prepare(Path(folder))
        for number, stage in enumerate(STAGES):
            share = args.kills // len(STAGES) + (number < args.kills % len(STAGES))
            rng = random.Random(seed_from("kills", args.seed, stage.name))
            outcome = outcomes[stage.name] = torment(stage, processes, share, rng)
            places = ", ".join(f"{place} {n}" for place, n in sorted(outcome.kills.items()))
            print(f"{stage.name}: {outcome.kills.total()} kills ({places}),", end=" ")
            print(f"{outcome.stops} stops, {outcome.runs} runs,", end=" ")
            print(f"{len(outcome.differences)} differences", flush=True)
            for line in outcome.differences:
                print(f"  {line}")
    result = {
        **surroundings(),
        "seed": args.seed,
        "kills": sum(outcome.kills.total() for outcome in outcomes.values()),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "stages": {
            name: {
                "kills": dict(sorted(outcome.kills.items())),
                "stops by SIGTERM or SIGINT": outcome.stops,
                "runs compared": outcome.runs,
                "differences": outcome.differences,
            }
            for name, outcome in outcomes.items()
        },
    }
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    flags.run(main, Args)
