"""
The pipeline on real data: records every command and what it gave.

    python -m bench.real_data --data=../shared/data

--data is a folder with fineweb_like/ (parquet shards, the last is validation), gsm8k/, humaneval/,
mmlu_arc/, smoltalk_like/ and eval_bundle/. A 65,536-token tokenizer and a d4 model are trained on
it, 200 steps; then every kind of task is trained on and evaluated for a few items, to show that the
files are read as they are.
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

from bench import surroundings
from nanochat import flags
from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import UserError, print0, read_jsonl, write_json

REPO = Path(__file__).resolve().parent.parent
RESULT = REPO / "bench" / "results" / "real_data.json"

LINKS = {  # in the base directory: in --data
    "base_data": "fineweb_like",
    "eval_bundle": "eval_bundle",
    "task_data/gsm8k": "gsm8k",
    "task_data/humaneval": "humaneval",
    "task_data/mmlu": "mmlu_arc/mmlu",
    "task_data/arc": "mmlu_arc/arc",
    "task_data/smoltalk": "smoltalk_like",
}

COMMANDS = [
    "scripts.tok_train --vocab_size=65536",
    "scripts.tok_eval",
    "scripts.base_train --depth=4 --max_seq_len=256 --device_batch_size=4 "
    "--total_batch_size=1024 --num_iterations=200 --eval_every=50 --eval_tokens=32768 "
    "--core_metric_every=-1",
    "scripts.base_train --arch=qwen2.5 --depth=4 --max_seq_len=256 --device_batch_size=4 "
    "--total_batch_size=1024 --num_iterations=20 --eval_every=20 --eval_tokens=32768 "
    "--core_metric_every=-1 --model_tag=q4",
    "scripts.base_eval --model_tag=d4 --max_per_task=4 --split_tokens=8192",
    "scripts.mid_train --source_tag=d4 --num_iterations=10 --device_batch_size=4 "
    "--mixture=smoltalk@400|gsm8k@100|arc-easy@100|spelling@100|spellingbee@100 "
    "--val_mixture=smoltalk@50|gsm8k@50",
    "scripts.chat_eval -i mid -x 4 -m 32 "
    "-a arc-easy|arc-challenge|mmlu|gsm8k|humaneval|spellingbee",
]


@dataclass
class Args:
    """Run the pipeline on real data."""

    data: str = "../shared/data"
    """Folder with the data; see the module's text for its layout."""


def run(command: str, base_dir: Path) -> dict[str, Any]:
    """Runs one command; returns it with its seconds and the last lines it printed."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir)}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=REPO, env=env, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    print0(done.stdout)
    lines = done.stdout.replace(str(base_dir), "$NANOCHAT_BASE_DIR").splitlines()
    seconds = round(time.time() - started, 1)
    return {"command": f"python -m {command}", "seconds": seconds, "printed": lines[-30:]}


def main(args: Args) -> None:
    data = Path(args.data).resolve()
    missing = [name for name in LINKS.values() if not (data / name).exists()]
    if missing:
        raise UserError(f"--data={args.data} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        base_dir = Path(folder)
        (base_dir / "task_data").mkdir()
        for link, target in LINKS.items():
            (base_dir / link).symlink_to(data / target)
        runs = [run(command, base_dir) for command in COMMANDS]
        rows = [row for _, row in read_jsonl(base_dir / STAGE_FOLDERS["base"] / "d4" / LOG)]
        bpb = {row["step"]: round(row["val_bpb"], 4) for row in rows if "val_bpb" in row}
    print0(f"validation bits per byte by step: {bpb}")
    result = {**surroundings(), "val_bpb": bpb, "runs": runs}
    write_json(RESULT, result)


if __name__ == "__main__":
    flags.run(main, Args)
