"""
BPE encoding: rustbpe.Encoder against tiktoken, on the same text, for the same ids.

    python -m bench.bpe_encoding --data=texts/

A vocabulary is trained on the text first. Every run is a process of its own, bound to one core or
to two, and the runs take turns; medians count, and the ids of all runs must be the same. The result
goes to bench/results/bpe_encoding.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.dataset import find_files, iter_texts
from nanochat.machine import machine_info, versions
from nanochat.tokenizer import Tokenizer, without_surrogates

OUT = Path(__file__).with_name("results") / "bpe_encoding.json"
RUNNERS = ("rustbpe, list of str", "rustbpe, arrow array", "tiktoken")


@dataclass
class Args:
    """Time the encoding of text, ours against tiktoken."""

    data: str | None = None
    """A file, folder or glob of text; default: $NANOCHAT_BASE_DIR/base_data/."""
    max_chars: int = 100_000_000
    """Characters of text to encode."""
    vocab_size: int = 65_536
    """Tokens of the vocabulary, which is trained on the same text."""
    threads: int = 2
    """Cores of the runs that use several."""
    repeats: int = 5
    """Runs of each; the median counts."""
    run: str = ""
    """Of a run itself: one of the runners, the folder with its input, and the cores to use."""


def encode(runner: str, folder: Path, threads: int) -> None:
    """One run: reads text and vocabulary, starts the clock, encodes, prints a line of JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import rustbpe
    from nanochat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(folder)
    column = pq.read_table(folder / "text.parquet")["text"].combine_chunks()
    vocabulary = tokenizer.vocabulary
    if runner == "tiktoken":
        texts, encoding = column.to_pylist(), tokenizer._encoding
        start = time.perf_counter()
        if threads == 1:  # its own pool of one thread would only cost
            rows = [encoding.encode_ordinary(text) for text in texts]
        else:
            rows = encoding.encode_ordinary_batch(texts, num_threads=threads)
        seconds = time.perf_counter() - start
        ids = np.fromiter((id for row in rows for id in row), np.uint16)
    else:
        encoder = rustbpe.Encoder(vocabulary.ranks, vocabulary.pattern)
        texts = column.to_pylist() if runner == "rustbpe, list of str" else column
        start = time.perf_counter()
        ids, _ = encoder.encode_batch(texts)
        seconds = time.perf_counter() - start
    digest = hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest()
    print(json.dumps({"seconds": seconds, "tokens": len(ids), "ids_sha256": digest}))


def main(args: Args) -> None:
    if args.run:
        runner, folder, threads = args.run.split("|")
        return encode(runner, Path(folder), int(threads))
    if args.vocab_size > 65_536:
        raise UserError(f"--vocab_size={args.vocab_size}: at most 65536 here")
    runs: dict[str, list[dict[str, Any]]] = {}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, texts, chars = Path(name), [], 0
        for text in map(without_surrogates, iter_texts(find_files(args.data))):
            texts.append(text[: args.max_chars - chars])
            chars += len(texts[-1])
            if chars >= args.max_chars:
                break
        mb = sum(len(text.encode()) for text in texts) / 1e6
        print0(f"{len(texts):,} documents, {mb:.1f} MB")
        Tokenizer.train(texts, args.vocab_size).save(folder)
        pq.write_table(
            pa.table({"text": pa.array(texts, pa.large_string())}), folder / "text.parquet"
        )
        for repeat in range(args.repeats):
            for threads in dict.fromkeys((1, args.threads)):
                for runner in RUNNERS:
                    label = f"{runner}, {threads} thread{'s' * (threads > 1)}"
                    command = [sys.executable, "-m", "bench.bpe_encoding",
                               f"--run={runner}|{folder}|{threads}"]  # fmt: skip
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    run = json.loads(done.stdout)
                    runs.setdefault(label, []).append(run)
                    print0(f"  {repeat} {label:35} {mb / run['seconds']:8.1f} MB/s")
    if len({run["ids_sha256"] for of_one in runs.values() for run in of_one}) != 1:
        raise UserError("the ids differ")
    speed = {
        label: round(mb / statistics.median(run["seconds"] for run in of_one), 1)
        for label, of_one in runs.items()
    }
    judge = speed["tiktoken, 1 thread"]
    result = {
        "corpus": {"documents": len(texts), "chars": chars, "mb": round(mb, 2)},
        "vocab_size": args.vocab_size,
        "tokens": runs["tiktoken, 1 thread"][0]["tokens"],
        "load_before": round(load_before, 2),
        "same_ids": True,  # or we would not be here
        "mb_per_s": speed,
        "times_one_tiktoken_thread": {k: round(v / judge, 1) for k, v in speed.items()},
        "runs": runs,
        "machine": machine_info(),
        "versions": versions(),
    }
    write_json(OUT, result)
    for label, value in speed.items():
        print0(f"{label:35} {value:8.1f} MB/s, {value / judge:5.1f} x tiktoken, 1 thread")


if __name__ == "__main__":
    flags.run(main, Args)
