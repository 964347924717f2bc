"""
What the two BPE benchmarks share: the text, a worker in a process of its own, and the peers.

Every run is a fresh process bound to some cores, so that no run warms caches for the next. The
workers (bench/bpe_*_worker.py) import nothing of this repository and so run under any Python.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError
from nanochat.dataset import find_files, iter_texts
from nanochat.tokenizer import without_surrogates

RESULTS = Path(__file__).with_name("results")
DOCUMENTS = 8192  # of a row group of the Parquet file, and so of an Arrow array


@dataclass(frozen=True)
class Run:
    """One thing to measure: which package, on which form of the text, on how many cores."""

    package: str
    texts: str
    """"str" (a list of them) or "array" (Arrow's, or gigatoken's own kind)."""
    threads: int
    pattern: str = "ours"
    """Which split pattern: "ours", "cl100k", or "own": the package's own default."""
    once: bool = False
    """Run in the first round only: too slow to be repeated."""

    @property
    def label(self) -> str:
        """How the result files name it."""
        plural = "s" * (self.threads > 1)
        return (
            f"{self.package}, {self.texts}, {self.pattern} pattern, {self.threads} thread{plural}"
        )


def read_texts(data: str | None, max_chars: int) -> list[str]:
    """The documents of `data` up to `max_chars` characters, the last one cut."""
    texts, left = [], max_chars
    for text in map(without_surrogates, iter_texts(find_files(data))):
        texts.append(text[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def describe(texts: list[str], about: str) -> dict[str, Any]:
    """How much text it is (MB of UTF-8), and what."""
    size = sum(len(text.encode("utf-8")) for text in texts)
    repeated = size - sum(len(text.encode("utf-8")) for text in set(texts))
    return {
        "about": about,
        "documents": len(texts),
        "chars": sum(map(len, texts)),
        "mb": round(size / 1e6, 2),
        "repeated_mb": round(repeated / 1e6, 2),  # in documents that are there twice
    }


def write_texts(texts: list[str], folder: Path) -> None:
    """Writes the documents for the workers: texts.jsonl (one JSON string a line), texts.parquet."""
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    pq.write_table(table, folder / "texts.parquet", row_group_size=DOCUMENTS)


def python_of(run: Run, peer_python: str | None, peers_python: str | None) -> str | None:
    """The Python for a run; None where the peer's is not given."""
    if run.package in ("rustbpe", "tiktoken"):
        return sys.executable
    return peer_python if run.package == "rustbpe 0.1.0" else peers_python


def measure(worker: str, python: str, run: Run, **spec: Any) -> dict[str, Any]:
    """One run of a worker, whose last line of output is its result as JSON."""
    fields = {"package": run.package.split()[0], "texts": run.texts, "threads": run.threads}
    script = str(Path(__file__).with_name(worker))
    command = [python, script, json.dumps({**fields, **spec})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    except FileNotFoundError as e:
        raise UserError(f"the Python {python} does not exist; see --help for the peers'") from e
    except subprocess.CalledProcessError as e:
        raise UserError(f"{run.label} under {python} failed:\n{e.stderr.strip()[-2000:]}") from e
    return json.loads(done.stdout.splitlines()[-1])


def median_of(runs: list[dict[str, Any]], field: str) -> float | None:
    """The median of a field over runs; None where a run does not have it."""
    values = [run.get(field) for run in runs]
    return None if None in values else statistics.median(values)  # type: ignore[type-var]
