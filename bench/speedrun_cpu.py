"""
The CPU speedrun as a user runs it: how long it takes and how well the model does afterwards.

    python -m bench.speedrun_cpu             # runs it in a fresh folder
    python -m bench.render                   # puts the result into README.md

The result holds the seconds of every stage, the accuracy of every task after every stage, word
problems before and after RL, and what chat_cli answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import flags
from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import read_jsonl, write_json

REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "bench" / "results" / "speedrun_cpu.json"
STAGES = ("base", "mid", "sft", "rl")
QUESTION = "What is 27 + 15?"


@dataclass
class Args:
    """Measure the CPU speedrun."""

    base_dir: str = ""
    """Collect from this finished run instead of running."""


def run(base_dir: Path) -> float:
    """speedrun.sh without a GPU; returns its wall seconds, set-up included."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "CUDA_VISIBLE_DEVICES": ""}
    started = time.time()
    subprocess.run(["bash", "speedrun.sh"], cwd=REPO, env=env, check=True)
    return time.time() - started


def collect(base_dir: Path, wall_seconds: float | None) -> dict[str, Any]:
    """Reads the run's metrics files and asks chat_cli one question."""
    report = base_dir / "report"
    seconds, pass1, about = {}, [], {}
    for stage in STAGES:
        seconds[stage] = 0.0  # with evaluations and saves; pretraining has two parts
        for path in (base_dir / STAGE_FOLDERS[stage]).glob(f"*/{LOG}"):
            rows = [row for _, row in read_jsonl(path)]
            about = {key: rows[0][key] for key in ("machine", "versions")}
            about["date"] = time.strftime("%Y-%m-%d", time.gmtime(rows[0]["time"]))
            seconds[stage] += rows[-1]["time"] - rows[0]["time"]
            pass1 += [row["pass1"] for row in rows if "pass1" in row]
    evals: dict[str, Any] = {}
    for _, row in read_jsonl(report / "chat_eval.jsonl"):
        keys = ("accuracy", "n", "stderr", "chance", "ended")
        evals.setdefault(row["task"], {})[row["source"]] = {k: row.get(k) for k in keys}
    command = [sys.executable, "-m", "scripts.chat_cli", "-p", QUESTION]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    answer = subprocess.run(
        command, cwd=REPO, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        encoding="utf-8", check=True,
    ).stdout  # fmt: skip
    return {
        **about,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "training_minutes": round(sum(seconds.values()) / 60, 2),
        "wall_seconds": wall_seconds and round(wall_seconds, 1),
        "tasks": evals,
        "word_problems_pass1": {"before_rl": pass1[0], "after_rl": pass1[-1]},
        "question": QUESTION,
        "answer": answer.strip(),
    }


def table(result: dict[str, Any]) -> str:
    """The README's passage: minutes, machine, and accuracy by task and stage."""
    machine = result["machine"]
    cores = "one core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    minutes = ", ".join(f"{k} {v / 60:.1f}" for k, v in result["seconds"].items())
    lines = [
        f"{result['training_minutes']:.1f} minutes of training on {cores} of "
        f"{machine.get('cpu', 'a CPU')} ({minutes}), on items that were never trained on:",
        "",
        "| task | after mid | after SFT | after RL | chance | items |",
        "|---|---|---|---|---|---|",
    ]
    for task, by_source in result["tasks"].items():
        cells = [
            f"{100 * by_source[s]['accuracy']:.1f}%" if s in by_source else "" for s in STAGES[1:]
        ]
        row = next(iter(by_source.values()))
        lines.append(f"| {task} | {' | '.join(cells)} | {100 * row['chance']:.0f}% | {row['n']} |")
    ended = min(
        row["ended"]
        for by_source in result["tasks"].values()
        for source, row in by_source.items()
        if row.get("ended") is not None and source == "rl"
    )
    lines += [
        "",
        f"Replies that end by themselves, in the worst task: {100 * ended:.1f}%. Asked "
        f'"{result["question"]}", it says:',
        "",
        "```",
        *result["answer"].splitlines(),
        "```",
    ]
    return "\n".join(lines)


def main(args: Args) -> None:
    if args.base_dir:
        result = collect(Path(args.base_dir), None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = collect(Path(folder), run(Path(folder)))
    write_json(RESULT, result)


if __name__ == "__main__":
    flags.run(main, Args)
