"""
What a model has learned after so many tokens: bits per byte of the architectures, side by side.

    python -m bench.learning --data=../shared/data/fineweb_like
    python -m bench.learning --data=... --depths=4,6 --archs=gpt,turbo --seeds=3

Trains a tokenizer of 8,192 tokens on 40M characters, then each architecture at each depth and seed
by scripts.base_train with its defaults, on rows of 512 tokens, and measures validation bits per
byte over 262,144 tokens of the last shard, at a third, two thirds and the end. The conditions are
those of the figure for karpathy/nanochat in PEER: the same data, tokens, rows and evaluation. Runs
that are done are not run again. What was tried on the way to the defaults: bench/LEARNING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench import surroundings
from nanochat import flags
from nanochat.common import UserError, print0, read_jsonl, write_json

REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "bench" / "results" / "learning.json"
TOKENS = 2_457_600  # 300 steps of 8,192
EVAL_TOKENS = 262_144

# karpathy/nanochat, July 2026 (92d63d4), d4: bits per byte by tokens, 12.1 minutes on two cores.
PEER = {819_200: 2.476, 1_638_400: 2.131, TOKENS: 2.018}


@dataclass
class Args:
    """Train each architecture at each depth and seed, and compare."""

    data: Path
    """Folder of parquet shards with a `text` column; the last one is validation."""
    base_dir: Path = Path.home() / ".cache" / "nanochat-learning"
    """Where tokenizer, token cache and runs go, to be continued."""
    depths: str = "4"
    """Depths, separated by commas."""
    archs: str = "gpt,turbo"
    """Architectures, separated by commas."""
    seeds: int = 3
    """Runs of each."""
    tokens: int = TOKENS
    """Tokens of each run."""
    flags: str = ""
    """More flags for base_train, in one string."""
    out: Path = RESULT
    """Result file."""


def main(args: Args) -> None:
    if not list(args.data.glob("*.parquet")):
        raise UserError(f"--data={args.data} holds no parquet shards")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(args.base_dir)}
    ensure_tokenizer(env, args.base_dir, args.data)
    runs = []
    for depth in args.depths.split(","):
        for seed in range(args.seeds):
            for arch in args.archs.split(
                ","
            ):  # side by side in time, whatever else the machine does
                runs.append(one(args, env, arch, int(depth), seed))
                print0(
                    f"{arch} d{depth} seed {seed}: {runs[-1]['bpb']} in {runs[-1]['minutes']} min"
                )
    write_json(
        args.out,
        {**surroundings(), "peer": PEER, "runs": runs,
         "summary": summary(runs)},
    )  # fmt: skip
    print0(f"written to {args.out}")


def one(args: Args, env: dict[str, str], arch: str, depth: int, seed: int) -> dict[str, Any]:
    """One run: validation bits per byte by tokens, minutes in steps, tokens a second."""
    tag = f"{arch}-d{depth}-{args.tokens}-s{seed}"
    log = args.base_dir / "base_checkpoints" / tag / "log.jsonl"
    command = [
        f"--arch={arch}", f"--depth={depth}", f"--model_tag={tag}", f"--seed={seed}", "--resume",
        f"--data={args.data.resolve()}", "--max_seq_len=512", "--core_metric_every=-1",
        f"--target_tokens={args.tokens}", f"--eval_tokens={EVAL_TOKENS}", *args.flags.split(),
    ]  # fmt: skip
    if run_record(log) is None:
        run(env, "scripts.base_train", *command)
    return {
        "arch": arch, "depth": depth, "seed": seed,
        "flags": [flag for flag in command if not flag.startswith("--data=")],  # no paths of ours
        **(run_record(log) or {}),
    }  # fmt: skip


def ensure_tokenizer(env: dict[str, str], base_dir: Path, data: Path) -> None:
    """The tokenizer of all these runs: 8,192 tokens from 40M characters."""
    if not (base_dir / "tokenizer").exists():
        run(env, "scripts.tok_train", f"--data={data.resolve()}", "--vocab_size=8192",
            "--max_chars=40000000")  # fmt: skip


def run_record(log: Path) -> dict[str, Any] | None:
    """What a run's log says of it: validation bits per byte by tokens, minutes in steps, tokens a
    second. None if it has not ended."""
    rows = [row for _, row in read_jsonl(log)] if log.exists() else []
    end = next((row for row in rows if row["event"] == "end"), None)
    if end is None:
        return None
    tokens = next(row["tokens"] for row in reversed(rows) if row["event"] == "step")
    evals = [r for r in rows if r["event"] == "eval" and "val_bpb" in r and r["step"] > 0]
    return {
        "steps": end["step"],
        "bpb": {round(r["step"] * tokens / end["step"]): round(r["val_bpb"], 4) for r in evals},
        "final": evals[-1]["val_bpb"],
        "minutes": round(end["seconds"] / 60, 2),
        "tokens_per_second": round(tokens / end["seconds"]),
    }


def run(env: dict[str, str], module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=REPO, env=env, check=False)
    if done.returncode:
        raise UserError(f"{module} {' '.join(arguments)} ended with status {done.returncode}")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Final bits per byte and minutes by architecture and depth: mean and spread over seeds."""
    result = {}
    for name in sorted({(r["arch"], r["depth"]) for r in runs}):
        same = [r for r in runs if (r["arch"], r["depth"]) == name]
        finals = [r["final"] for r in same]
        result[f"{name[0]} d{name[1]}"] = {
            "bpb": round(mean(finals), 4),
            "bpb_stdev": round(stdev(finals), 4) if len(finals) > 1 else None,
            "minutes": round(mean(r["minutes"] for r in same), 2),
            "seeds": len(same),
        }
    return result


if __name__ == "__main__":
    flags.run(main, Args)
