"""
Multi-scale evaluation: whether a trained turbo predicts better with longer windows, or longer rows.

    python -m bench.learning_scales --data=../shared/data/fineweb_like --tags trial-base-s0
    python -m bench.render                          # puts the table into bench/LEARNING.md

Models that bench.learning_trials trained are evaluated as they are and with other windows in their
layers with short ones, on rows as long as in training and twice as long. Each line is over the
first so many tokens of the last shard; those of one row length are over the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import surroundings
from bench.learning_trials import EVAL_TOKENS, REPO, ROW
from nanochat import flags
from nanochat.checkpoint import load_model
from nanochat.common import UserError, print0, write_json
from nanochat.dataloader import RowReader, eval_batches
from nanochat.dataset import split_files
from nanochat.evals.bpb import evaluate_bpb
from nanochat.text_source import TextSource

WINDOWS = {"as trained": 1.0, "half": 0.5, "twice": 2.0, "the whole row": float("inf")}


@dataclass
class Args:
    """Evaluate trained models at other scales."""

    data: Path
    """Folder of parquet shards with a `text` column; the last one is validation."""
    base_dir: Path = Path.home() / ".cache" / "nanochat-learning"
    """Where bench.learning_trials put its runs."""
    tags: list[str] = field(default_factory=lambda: [f"trial-base-s{seed}" for seed in range(3)])
    """The models."""
    out: Path = REPO / "bench" / "results" / "learning_scales.json"
    """Result file."""


@contextmanager
def windows_times(model: Any, factor: float) -> Iterator[None]:
    """The model with its short windows that many times as long; infinity: the whole row."""
    short = [block.attn for block in model.h if block.attn.window is not None]
    trained = [attn.window for attn in short]
    for attn, window in zip(short, trained):
        attn.window = None if factor == float("inf") else round(window * factor)
    try:
        yield
    finally:
        for attn, window in zip(short, trained):
            attn.window = window


def main(args: Args) -> None:
    if not list(args.data.glob("*.parquet")):
        raise UserError(f"--data={args.data} holds no parquet shards")
    os.environ["NANOCHAT_BASE_DIR"] = str(args.base_dir)
    files, device = split_files(str(args.data.resolve())), torch.device("cpu")
    rows = []
    for tag in args.tags:
        model, tokenizer, meta = load_model("base", device, tag)
        source = TextSource([files.val], tokenizer, files.keep_val)
        for length in (ROW, 2 * ROW):
            reader = RowReader(source, length + 1, 0, tokenizer.get_bos_token_id())
            for name, factor in WINDOWS.items():
                batches = eval_batches(reader, EVAL_TOKENS, 8, 0, 1, device)
                with windows_times(model, factor):
                    found = evaluate_bpb(model, batches, tokenizer.token_bytes)
                rows.append(
                    {"tag": tag, "step": meta["step"], "row": length, "windows": name,
                     "bpb": found.bpb, "stderr": found.stderr}
                )  # fmt: skip
                print0(f"{tag} rows of {length}, windows {name}: {found.bpb:.4f}")
    write_json(args.out, {**surroundings(), "tokens": EVAL_TOKENS, "rows": rows})
    print0(f"written to {args.out}")


def table(result: dict[str, Any]) -> str:
    """The passage of bench/LEARNING.md: a line for each scale, a column for each model."""
    tags = list(dict.fromkeys(row["tag"] for row in result["rows"]))
    scales = dict.fromkeys((row["row"], row["windows"]) for row in result["rows"])
    lines = [
        f"| evaluated on rows of | short windows | {' | '.join(tags)} |",
        "|---|---|" + "---|" * len(tags),
    ]
    for length, windows in scales:
        own = {r["tag"]: r for r in result["rows"] if (r["row"], r["windows"]) == (length, windows)}
        cells = [f"{own[tag]['bpb']:.4f}" if tag in own else "" for tag in tags]
        lines.append(f"| {length:,} | {windows} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.run(main, Args)
