"""
BPE encoding: rustbpe.Encoder against tiktoken and gigatoken, on the same text, for the same ids.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install gigatoken==0.10.0 pyarrow
    python -m bench.bpe_encoding --data=texts/ --peers_python=/tmp/peers/bin/python

A vocabulary is trained on the text for each of two patterns first: ours, and cl100k's, since
gigatoken does not know ours. Every run is a process of its own, bound to one core or to two, and
the runs take turns; medians count. The ids of all runs with one vocabulary must be the same, or it
ends in an error. A second call on the same text tells what caches that live between batches give.
The result goes to bench/results/bpe_encoding.json, and from there into rustbpe/README.md by
bench/bpe_table.py.
"""

from __future__ import annotations

import base64
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rustbpe
from bench import surroundings
from bench.bpe_common import (
    RESULTS,
    Run,
    describe,
    measure,
    median_of,
    python_of,
    read_texts,
    write_texts,
)
from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.vocabulary import SPLIT_PATTERN

OUT = RESULTS / "bpe_encoding.json"
# cl100k's as tiktoken has it.
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
PATTERNS = {"ours": SPLIT_PATTERN, "cl100k": CL100K_PATTERN}


@dataclass
class Args:
    """Time the encoding of text, ours against its peers."""

    data: str | None = None
    """A file, folder or glob of text; default: $NANOCHAT_BASE_DIR/base_data/."""
    about: str = "text"
    """What the text is, for the record."""
    peers_python: str | None = None
    """Python of an environment with gigatoken and pyarrow; without it that is left out."""
    max_chars: int = 100_000_000
    """Characters of text to encode."""
    vocab_size: int = 65_536
    """Tokens of the vocabularies, which are trained on the same text."""
    threads: int = 2
    """Cores of the runs that use several."""
    repeats: int = 3
    """Runs of each; the median counts."""
    out: str = str(OUT)
    """Where the result goes."""


def runs_of(threads: int) -> list[Run]:
    """Everything that is measured, in the order of a round."""
    runs = []
    for n in dict.fromkeys((1, threads)):
        runs += [
            Run("tiktoken", "str", n),
            Run("rustbpe", "str", n),
            Run("rustbpe", "array", n),
            Run("rustbpe", "str", n, "cl100k"),
            Run("gigatoken", "str", n, "cl100k"),
            Run("rustbpe", "array", n, "cl100k"),
            Run("gigatoken", "array", n, "cl100k"),
        ]
    return [*runs, Run("tiktoken", "str", 1, "cl100k", once=True)]


def train(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Writes a .tiktoken file of each vocabulary: a token in base64 and its rank on each line."""
    for name, pattern in PATTERNS.items():
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(texts, vocab_size, pattern=pattern)
        ranks: dict[bytes, int] = {}
        for token, _ in tokenizer.get_mergeable_ranks():
            ranks.setdefault(bytes(token), len(ranks))  # two merges may spell the same bytes
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
        (folder / f"{name}.tiktoken").write_text("".join(lines), encoding="ascii")


def measure_all(args: Args, folder: Path, mb: float) -> dict[Run, list[dict[str, Any]]]:
    """All runs, taking turns."""
    found: dict[Run, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for run in runs_of(args.threads):
            python = python_of(run, None, args.peers_python)
            if python is None or (run.once and repeat > 0):
                continue
            result = measure(
                "bpe_encoding_worker.py", python, run,
                folder=str(folder), ranks=str(folder / f"{run.pattern}.tiktoken"),
                pattern=PATTERNS[run.pattern], pattern_name=run.pattern,
            )  # fmt: skip
            found.setdefault(run, []).append(result)
            again = (
                f", again {mb / result['again_seconds']:.1f}" if "again_seconds" in result else ""
            )
            print0(f"  {repeat} {run.label:48} {mb / result['seconds']:8.1f} MB/s{again}")
    return found


def check(found: dict[Run, list[dict[str, Any]]]) -> None:
    """That all runs with one vocabulary gave the same ids."""
    for pattern in PATTERNS:
        of_one = {run.label: {r["ids_sha256"] for r in of} for run, of in found.items()
                  if run.pattern == pattern}  # fmt: skip
        if len(set().union(*of_one.values())) != 1:
            hashes = "\n".join(f"  {label}: {sorted(h)}" for label, h in of_one.items())
            raise UserError(f"with the {pattern} pattern the ids differ:\n{hashes}")


def main(args: Args) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats={args.repeats}: at least 1")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = read_texts(args.data, args.max_chars)
        corpus = describe(texts, args.about)
        mb = corpus["mb"]
        print0(f"{corpus['documents']:,} documents, {mb} MB")
        write_texts(texts, folder)
        train(texts, args.vocab_size, folder)
        found = measure_all(args, folder, mb)
    check(found)
    judge = median_of(found[Run("tiktoken", "str", 1)], "seconds")
    assert judge is not None
    rows = []
    for run, of_one in found.items():
        seconds, again = median_of(of_one, "seconds"), median_of(of_one, "again_seconds")
        assert seconds is not None
        rows.append(
            {
                "label": run.label,
                **{key: getattr(run, key) for key in ("package", "texts", "pattern", "threads")},
                "version": of_one[0]["version"],
                "mb_per_s": round(mb / seconds, 1),
                "again_mb_per_s": again and round(mb / again, 1),
                "times_one_tiktoken_thread": round(judge / seconds, 1),
                "again_times_one_tiktoken_thread": again and round(judge / again, 1),
                "runs": of_one,
            }
        )
        print0(f"{run.label:50} {rows[-1]['mb_per_s']:7.1f} MB/s, {judge / seconds:.1f} x tiktoken")
    result = {
        "corpus": corpus,
        "vocab_size": args.vocab_size,
        "threads": args.threads,
        "same_ids": True,  # by vocabulary, or we would not be here
        "encoders": rows,
        **surroundings(load_before),
    }
    write_json(args.out, result)
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
