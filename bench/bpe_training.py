"""
BPE training: our crate against its peers, on the same text.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install rustbpe==0.1.0
    python -m venv /tmp/peers && /tmp/peers/bin/pip install ffbpe==0.1.10 tokenizers==0.23.3
    python -m bench.bpe_training --data=texts/ --max_chars=350_000_000 \\
        --peer_python=/tmp/peer/bin/python --peers_python=/tmp/peers/bin/python

Every run is a process of its own and the trainers take turns, so that all see the same weather;
the median counts. rustbpe 0.1.0 must learn the same merges, and ours must encode as tiktoken does,
or it ends in an error. ffbpe is run with its own pattern (GPT-2's), for which it has a scanner, and
once with ours, which goes through its regex engine; Hugging Face's tokenizers takes ours and breaks
ties in another way. The result goes to bench/results/bpe_training.json (of 350 MB) and
bpe_training_50mb.json (--out), and from there into rustbpe/README.md by bench/bpe_table.py.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

OUT = RESULTS / "bpe_training.json"
PATTERNS = {"ours": SPLIT_PATTERN, "own": ""}


@dataclass
class Args:
    """Time the training of a tokenizer, ours against its peers."""

    data: str | None = None
    """A file, folder or glob of text; default: $NANOCHAT_BASE_DIR/base_data/."""
    about: str = "text"
    """What the text is, for the record."""
    peer_python: str | None = None
    """Python of an environment with PyPI's rustbpe 0.1.0; without it that is left out."""
    peers_python: str | None = None
    """Python of an environment with ffbpe and tokenizers; without it they are left out."""
    max_chars: int = 50_000_000
    """Characters of text to train on."""
    vocab_size: int = 65_536
    """Tokens to learn, the 256 bytes included."""
    threads: int = 2
    """Cores of the runs that use several."""
    repeats: int = 3
    """Runs of each; the median counts."""
    check_docs: int = 2000
    """Documents whose ids are compared with tiktoken's."""
    out: str = str(OUT)
    """Where the result goes."""


def runs_of(threads: int) -> list[Run]:
    """Everything that is measured, in the order of a round."""
    return [
        Run("rustbpe", "str", threads),
        Run("rustbpe 0.1.0", "str", threads),
        Run("ffbpe", "str", threads, "own"),
        Run("rustbpe", "array", threads),
        Run("rustbpe", "str", 1),
        Run("ffbpe", "str", threads, once=True),
        Run("tokenizers", "str", threads, once=True),
    ]


def measure_all(args: Args, folder: Path) -> dict[Run, list[dict[str, Any]]]:
    """All runs, taking turns; those that are too slow in the first round only."""
    found: dict[Run, list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for run in dict.fromkeys(runs_of(args.threads)):
            python = python_of(run, args.peer_python, args.peers_python)
            if python is None or (run.once and repeat > 0):
                continue
            # The comparison with tiktoken comes after the clock has stopped; once is enough.
            first_of_ours = run.package == "rustbpe" and run.texts == "str" and run not in found
            result = measure(
                "bpe_training_worker.py", python, run,
                folder=str(folder), vocab_size=args.vocab_size, pattern=PATTERNS[run.pattern],
                check_docs=args.check_docs if first_of_ours else 0,
            )  # fmt: skip
            found.setdefault(run, []).append(result)
            seconds, cpu = result["seconds"], result["cpu_seconds"]
            memory = f"+{result['added_rss_mib']} MiB"
            print0(f"  {repeat} {run.label:48} {seconds:7.2f} s, {cpu:.2f} of CPU, {memory}")
    return found


def check(found: dict[Run, list[dict[str, Any]]]) -> None:
    """That ours and 0.1.0 learned the same, and that ours encodes as tiktoken does."""
    exact = [of_one for run, of_one in found.items() if run.package.startswith("rustbpe")]
    if len({result["merges_sha256"] for of_one in exact for result in of_one}) != 1:
        raise UserError("ours and rustbpe 0.1.0 learned different merges")
    for run, of_one in found.items():
        version = of_one[0]["version"]
        if run.package == "rustbpe 0.1.0" and version != "0.1.0":
            raise UserError(f"--peer_python has rustbpe {version}, not 0.1.0")
        for result in of_one:
            if wrong := result.get("tiktoken_mismatches", 0):
                docs = result["tiktoken_docs"]
                raise UserError(f"{wrong} of {docs} documents differ from tiktoken's ids")


def main(args: Args) -> None:
    if args.repeats < 1:
        raise UserError(f"--repeats={args.repeats}: at least 1")
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        texts = read_texts(args.data, args.max_chars)
        corpus = describe(texts, args.about)
        write_texts(texts, Path(folder))
        del texts  # or forked workers would start from a large process
        print0(f"{corpus['documents']:,} documents, {corpus['mb']} MB")
        found = measure_all(args, Path(folder))
    check(found)
    judge = Run("rustbpe", "str", args.threads)
    ours, merges = median_of(found[judge], "seconds"), found[judge][0]["merges_sha256"]
    assert ours is not None
    rows = []
    for run, of_one in found.items():
        seconds = median_of(of_one, "seconds")
        assert seconds is not None
        rows.append(
            {
                "label": run.label,
                **{key: getattr(run, key) for key in ("package", "texts", "pattern", "threads")},
                "version": of_one[0]["version"],
                "seconds": seconds,
                "mb_per_s": round(corpus["mb"] / seconds, 2),
                "cpu_seconds": median_of(of_one, "cpu_seconds"),
                # None where the system does not tell (see the worker).
                "added_rss_mib": median_of(of_one, "added_rss_mib"),
                "times_ours": round(seconds / ours, 2),  # how much longer than ours, several cores
                "same_merges": of_one[0].get("merges_sha256") == merges,
                "runs": of_one,
            }
        )
        print0(f"{run.label:50} {rows[-1]['mb_per_s']:7.1f} MB/s, {seconds / ours:.2f} x our time")
    result = {
        "corpus": corpus,
        "vocab_size": args.vocab_size,
        "threads": args.threads,
        "trainers": rows,
        **surroundings(load_before),
    }
    write_json(args.out, result)
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
