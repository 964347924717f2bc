"""Writes the primer: everything generated in memory, then one atomic file after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write, fingerprint, read_json, seed_from, write_json
from nanochat.conversation import check_conversation, reply_text
from nanochat.primer.bundle import bundle_rows, core_yaml, meta_csv
from nanochat.primer.chat import chat_conversation, fact_conversation, self_conversation
from nanochat.primer.choice import choice, letters_conversation, letters_document
from nanochat.primer.split import held_out_word
from nanochat.primer.sums import arithmetic_conversation, word_problem
from nanochat.primer.text import document
from nanochat.primer.words import (
    all_words,
    made_up_word,
    spelling_conversation,
    training_words,
)

VERSION = 2  # raise it when the same seed gives other bytes
MANIFEST = "primer.json"
ROW_GROUP = 1024  # documents, as in the real pretraining shards
SHARDS = 4  # of training; one more is validation

Row = dict[str, Any]
# name: (maker of one row, training rows, test rows) at scale 1
TASKS: dict[str, tuple[Callable[[Random, bool], Row], int, int]] = {
    "primer-chat": (chat_conversation, 10_000, 400),
    "primer-facts": (fact_conversation, 12_000, 500),
    "primer-arithmetic": (arithmetic_conversation, 8_000, 400),
    "primer-choice": (choice, 16_000, 500),
    "primer-letters": (letters_conversation, 16_000, 400),
    "primer-math": (word_problem, 8_000, 500),
    "primer-self": (self_conversation, 5_000, 400),
}
SPELLING_ROWS = (12_000, 400)
DOCUMENTS = (24_000, 600)
LISTS = (16_000, 300)  # short documents for the first lesson, in a folder of their own
LISTS_DIR = "primer_lists"
BUNDLE_ROWS = 300


def generate(seed: int, scale: float) -> dict[str, bytes]:
    """Every file of the primer: path under the base directory -> its bytes."""
    train, val = _documents(seed, "documents", document, DOCUMENTS, scale)
    lists = _documents(seed, "lists", letters_document, LISTS, scale)
    tasks: dict[str, dict[str, list[Row]]] = {}
    for name, (maker, n_train, n_test) in TASKS.items():
        tasks[name] = {
            "train": _rows(seed, name, maker, False, _scaled(n_train, scale)),
            "test": _rows(seed, name, maker, True, _scaled(n_test, scale)),
        }
    words = _unseen_words([*train, *lists[0]], tasks)
    tasks["primer-spelling"] = _spelling(seed, words, scale)
    rng = _rng(seed, "bundle")
    bundle = bundle_rows(rng, words, _scaled(BUNDLE_ROWS, scale))

    files: dict[str, bytes] = {}
    for i, shard in enumerate([*(train[i::SHARDS] for i in range(SHARDS)), val]):
        files[f"base_data/shard_{i:05d}.parquet"] = _parquet(shard)
    for i, shard in enumerate(lists):
        files[f"{LISTS_DIR}/shard_{i:05d}.parquet"] = _parquet(shard)
    for name, splits in tasks.items():
        for split, rows in splits.items():
            files[f"task_data/{name}/{split}.jsonl"] = _jsonl(rows)
    files["eval_bundle/core.yaml"] = core_yaml().encode()
    files["eval_bundle/eval_meta_data.csv"] = meta_csv(bundle).encode()
    for label, rows in bundle.items():
        files[f"eval_bundle/eval_data/primer/{label}.jsonl"] = _jsonl(rows)
    return files


def write_primer(base_dir: Path, seed: int = 1, scale: float = 1.0) -> dict[str, Any]:
    """Writes the primer under `base_dir` and returns a summary: seed, and bytes of every file.

    The same seed and scale give the same bytes; running it again changes nothing. `scale`
    multiplies all counts (tests use a small one). Raises UserError rather than touch data it did
    not write."""
    if scale <= 0:
        raise UserError(f"--scale={scale} must be above 0")
    base_dir = Path(base_dir)
    old = _written_before(base_dir)
    files = generate(seed, scale)
    # The manifest goes first and names old and new files: should this be interrupted, the next run
    # still knows which files are the primer's own.
    _write_manifest(base_dir, seed, scale, sorted(old | files.keys()), files)
    for path, data in files.items():
        with atomic_write(base_dir / path) as f:
            f.write(data)
    for path in sorted(old - files.keys()):  # left over from a larger scale
        (base_dir / path).unlink(missing_ok=True)
    return _write_manifest(base_dir, seed, scale, sorted(files), files)


def _write_manifest(
    base_dir: Path, seed: int, scale: float, paths: list[str], files: dict[str, bytes]
) -> dict[str, Any]:
    summary = {
        "version": VERSION,
        "seed": seed,
        "scale": scale,
        "fingerprint": fingerprint(*(part for p in sorted(files) for part in (p, files[p]))),
        "files": {path: len(files.get(path, b"")) for path in paths},
    }
    write_json(base_dir / MANIFEST, summary)
    return summary


def _written_before(base_dir: Path) -> set[str]:
    """The files an earlier run wrote here. Somebody else's data in our places is a UserError."""
    manifest = base_dir / MANIFEST
    old = set(read_json(manifest)["files"]) if manifest.exists() else set()
    folders = ("base_data", LISTS_DIR)
    shards = [p for folder in folders for p in base_dir.glob(f"{folder}/*.parquet")]
    for path in [*shards, base_dir / "eval_bundle" / "core.yaml"]:
        if path.exists() and path.relative_to(base_dir).as_posix() not in old:
            raise UserError(
                f"{path} was not written by the primer, which would overwrite or mix with it. Give "
                "the primer a place of its own: --out=DIR, or another NANOCHAT_BASE_DIR"
            )
    return old


def _scaled(count: int, scale: float) -> int:
    return max(SHARDS, round(count * scale))


def _rng(seed: int, *purpose: str) -> Random:
    """One independent stream a purpose: a change in one file leaves the others as they are."""
    return Random(seed_from("primer", seed, *purpose))


def _documents(
    seed: int, name: str, maker: Callable[[Random], str], counts: tuple[int, int], scale: float
) -> tuple[list[str], list[str]]:
    """(training, validation): so many different documents each, in random order of kinds."""
    found: list[dict[str, None]] = []
    for split, count in zip(("train", "val"), counts):
        rng = _rng(seed, name, split)
        made: dict[str, None] = {}
        while len(made) < _scaled(count, scale):
            made[maker(rng)] = None
        found.append(made)
    train, val = found
    # A validation document that training holds too would measure memory
    return list(train), [d for d in val if d not in train]


def _rows(
    seed: int, name: str, maker: Callable[[Random, bool], Row], test: bool, count: int
) -> list[Row]:
    """Up to `count` rows that all ask something different.

    Where the world has fewer different questions than that (the model itself, in tests), fewer."""
    rng = _rng(seed, name, "test" if test else "train")
    found: dict[str, Row] = {}
    for _ in range(count * 5):
        row = maker(rng, test)
        found.setdefault(user_text(row), row)
        if len(found) == count:
            break
    return list(found.values())


def user_text(row: Row) -> str:
    """What is asked in a row of any of our formats, as one string: the row's identity."""
    if "messages" in row:
        check_conversation(row, "primer")
        return "\n".join(reply_text(m["content"]) for m in row["messages"][::2])
    return "\n".join([row["question"], *row.get("choices", [])])


def _unseen_words(documents: list[str], tasks: dict[str, dict[str, list[Row]]]) -> list[str]:
    """The held-out words that no training text contains, whether spelled or merely used."""
    seen: set[str] = set()
    rows = (json.dumps(row) for splits in tasks.values() for row in splits["train"])
    for text in (*documents, *rows):
        seen.update(re.findall(r"[a-z]+", text.lower()))
    return [w for w in all_words() if held_out_word(w) and w not in seen]


def _spelling(seed: int, unseen: list[str], scale: float) -> dict[str, list[Row]]:
    """Training: training words and made-up ones, in many prompts. Tests: each unseen word once."""
    rng = _rng(seed, "primer-spelling")
    n_train, n_test = (_scaled(n, scale) for n in SPELLING_ROWS)

    def pick() -> str:
        return made_up_word(rng) if rng.random() < 0.2 else rng.choice(training_words())

    test = rng.sample(unseen, min(n_test, len(unseen)))
    return {
        "train": [spelling_conversation(rng, pick()) for _ in range(n_train)],
        "test": [spelling_conversation(rng, w) for w in test],
    }


def _jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(documents: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": pa.array(documents, pa.string())})
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    return sink.getvalue().to_pybytes()


def sample_documents(seed: int, count: int) -> Iterator[str]:
    """A few documents to look at, without writing anything (`--show`)."""
    rng = _rng(seed, "documents", "train")
    for _ in range(count):
        yield document(rng)
