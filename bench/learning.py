"""
What a model has learned after so many tokens: bits per byte of the architectures, side by side.

    python -m bench.learning --data=../shared/data/fineweb_like
    python -m bench.learning --data=... --depths=4,6 --archs=gpt,turbo --seeds=3
    python -m bench.learning --data=... --peer=/path/to/karpathy/nanochat   # that beside it

Trains a tokenizer of 8,192 tokens on 40M characters, then each architecture at each depth and seed
by scripts.base_train with its defaults, on rows of 512 tokens, and measures validation bits per
byte over 262,144 tokens of the last shard, at a third, two thirds and the end. The conditions are
those of the figure for karpathy/nanochat in PEER: the same data, tokens, rows and evaluation. With
--peer its model and optimizer train on our rows, too (learning_peer.py). Runs that are done are not
run again. What was tried on the way to the defaults: bench/LEARNING.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from bench import surroundings
from bench.train_speed import peer_checkout
from nanochat import flags
from nanochat.common import UserError, print0, read_json, read_jsonl, write_json
from nanochat.dataloader import RowReader
from nanochat.dataset import split_files
from nanochat.text_source import TextSource
from nanochat.tokenizer import get_tokenizer

REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "bench" / "results" / "learning.json"
TOKENS = 2_457_600  # 300 steps of 8,192
EVAL_TOKENS = 262_144
ROW = 512  # tokens
PEER_BATCH = 8192  # tokens a step

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
    peer: Path | None = None
    """A checkout of karpathy/nanochat, to be run once at each depth."""
    flags: str = ""
    """More flags for base_train, in one string."""
    out: Path = RESULT
    """Result file."""


def main(args: Args) -> None:
    if not list(args.data.glob("*.parquet")):
        raise UserError(f"--data={args.data} holds no parquet shards")
    os.environ["NANOCHAT_BASE_DIR"] = str(args.base_dir)
    env = dict(os.environ)
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
    peer_runs = [one_of_peer(args, int(depth)) for depth in args.depths.split(",") if args.peer]
    write_json(
        args.out,
        {**surroundings(), "peer": PEER, "runs": runs, "peer_runs": peer_runs,
         "summary": summary(runs)},
    )  # fmt: skip
    print0(f"written to {args.out}")


def one(args: Args, env: dict[str, str], arch: str, depth: int, seed: int) -> dict[str, Any]:
    """One run: validation bits per byte by tokens, minutes in steps, tokens a second."""
    more = re.sub(r"\W+", "-", args.flags).strip("-")  # a run with other flags is another run
    tag = f"{arch}-d{depth}-{args.tokens}-s{seed}" + (f"-{more}" if more else "")
    log = args.base_dir / "base_checkpoints" / tag / "log.jsonl"
    command = [
        f"--arch={arch}", f"--depth={depth}", f"--model_tag={tag}", f"--seed={seed}", "--resume",
        f"--data={args.data.resolve()}", f"--max_seq_len={ROW}", "--core_metric_every=-1",
        f"--target_tokens={args.tokens}", f"--eval_tokens={EVAL_TOKENS}", *args.flags.split(),
    ]  # fmt: skip
    if run_record(log) is None:
        run(env, "scripts.base_train", *command)
    return {
        "arch": arch, "depth": depth, "seed": seed,
        "flags": [flag for flag in command if not flag.startswith("--data=")],  # no paths of ours
        **(run_record(log) or {}),
    }  # fmt: skip


def one_of_peer(args: Args, depth: int) -> dict[str, Any]:
    """The same of karpathy/nanochat's model, on the rows that ours trained on."""
    result = args.base_dir / f"peer-d{depth}-{args.tokens}.json"
    if not result.exists():
        steps = args.tokens // PEER_BATCH
        spec = {
            "peer": str(peer_checkout(args.peer)), "rows": str(write_rows(args)), "depth": depth,
            "steps": steps, "evals": [steps // 3, 2 * steps // 3, steps], "seed": 0,
            "tokens_per_step": PEER_BATCH,
        }  # fmt: skip
        worker = [sys.executable, str(REPO / "bench" / "learning_peer.py"), json.dumps(spec)]
        done = subprocess.run(worker, stdout=subprocess.PIPE, check=False, text=True)
        if done.returncode:
            raise UserError(f"{worker[1]} ended with status {done.returncode}")
        write_json(result, {"depth": depth, **json.loads(done.stdout.splitlines()[-1])})
    found = read_json(result)
    print0(f"karpathy/nanochat d{depth}: {found['bpb']} in {found['minutes']} min")
    return found


def write_rows(args: Args) -> Path:
    """The rows that scripts.base_train takes and measures, in one file."""
    path = args.base_dir / f"rows-{args.tokens}.npz"
    if not path.exists():
        tokenizer, files = get_tokenizer(), split_files(str(args.data.resolve()))
        bos = tokenizer.get_bos_token_id()
        rows = {}
        for name, of, tokens in (
            ("train", files.train, args.tokens), ("val", [files.val], EVAL_TOKENS)
        ):  # fmt: skip
            keep = files.keep_train if name == "train" else files.keep_val
            reader = RowReader(TextSource(of, tokenizer, keep), ROW + 1, 0, bos)
            x, y = reader.read(0, tokens // ROW)
            rows |= {f"{name}_x": x.astype(np.uint16), f"{name}_y": y.astype(np.uint16)}
        np.savez(path, **rows, token_bytes=tokenizer.token_bytes)
    return path


def ensure_tokenizer(env: dict[str, str], base_dir: Path, data: Path) -> None:
    """The tokenizer of all these runs: 8,192 tokens from 40M characters."""
    if not (base_dir / "tokenizer").exists():
        run(env, "scripts.tok_train", f"--data={data.resolve()}", "--vocab_size=8192",
            "--max_chars=40000000")  # fmt: skip


def run_record(log: Path) -> dict[str, Any] | None:
    """What a run's log says of it: validation bits per byte by tokens, minutes in steps, tokens a
    second, by which code and threads: a result file keeps runs of other days. None if it has not
    ended."""
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
        "git": rows[0]["versions"].get("git"),
        "threads": rows[0]["threads"],
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


def table(results: list[dict[str, Any]]) -> str:
    """The passage of bench/LEARNING.md: ours beside karpathy/nanochat's, at equal tokens."""
    lines = [
        "| | tokens | turbo, its defaults | karpathy/nanochat, our rows | its figure, July 2026 |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        for run in result["runs"]:
            depth, last = run["depth"], max(map(int, run["bpb"]))
            for tokens, bpb in run["bpb"].items():
                theirs = [r["bpb"].get(tokens) for r in result["peer_runs"] if r["depth"] == depth]
                figure = result["peer"].get(tokens) if depth == 4 and last == TOKENS else None
                if any(theirs) or figure:
                    of = "the end" if int(tokens) == last else f"of {last / 1e6:.2f} M"
                    cells = [f"{n:.3f}" if n else "" for n in (bpb, *(theirs or [None]), figure)]
                    lines.append(
                        f"| d{depth} | {int(tokens) / 1e6:.2f} M, {of} | {' | '.join(cells)} |"
                    )
    return "\n".join(lines)


if __name__ == "__main__":
    flags.run(main, Args)
