"""One measured encoding, in a process of its own: the worker of bench/bpe_encoding.py.

Imports nothing of this repository, so that it runs under the Python of any environment. Reads text
and vocabulary first, then starts the clock, encodes, and prints one line of JSON. Where a package
has caches, a second call on the same text is timed too.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

# Each takes the Arrow column and the spec, and returns what is timed, with a function that makes
# flat ids of what it gives. What it gives at all costs is part of the comparison: tiktoken makes a
# Python list for each text, rustbpe NumPy arrays, gigatoken an Awkward array.


def rustbpe_encoder(column, spec: dict) -> tuple[Callable, Callable]:
    import rustbpe

    encoder = rustbpe.Encoder(read_ranks(spec["ranks"]), spec["pattern"])
    texts = column.to_pylist() if spec["texts"] == "str" else column
    return lambda: encoder.encode_batch(texts), lambda batch: batch[0]


def tiktoken_encoder(column, spec: dict) -> tuple[Callable, Callable]:
    import tiktoken

    encoding = tiktoken.Encoding(
        "bench",
        pat_str=spec["pattern"],
        mergeable_ranks=read_ranks(spec["ranks"]),
        special_tokens={},
    )
    texts, threads = column.to_pylist(), spec["threads"]

    def encode() -> list[list[int]]:
        if threads == 1:  # its own pool of one thread would only cost
            return [encoding.encode_ordinary(text) for text in texts]
        return encoding.encode_ordinary_batch(texts, num_threads=threads)

    return encode, lambda rows: np.fromiter((id for row in rows for id in row), np.uint32)


def gigatoken_encoder(column, spec: dict) -> tuple[Callable, Callable]:
    import awkward as ak
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_tiktoken(spec["ranks"], spec["pattern_name"])
    texts = column.to_pylist() if spec["texts"] == "str" else ak.from_arrow(column)
    parallel = spec["threads"] > 1
    encode = lambda: tokenizer.encode_batch(texts, parallel=parallel)  # noqa: E731
    return encode, lambda batch: ak.to_numpy(ak.flatten(batch))


ENCODERS = {
    "rustbpe": rustbpe_encoder,
    "tiktoken": tiktoken_encoder,
    "gigatoken": gigatoken_encoder,
}


def read_ranks(path: str) -> dict[bytes, int]:
    """The ranks of a .tiktoken file: a token in base64 and its rank on each line."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}


def main(spec: dict) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    column = pq.read_table(spec["folder"] + "/texts.parquet")["text"].combine_chunks()
    encode, flat = ENCODERS[spec["package"]](column, spec)
    result: dict = {"version": importlib.metadata.version(spec["package"])}
    digests = set()
    # tiktoken has no caches: a second call would only take its time.
    for field in ("seconds", "again_seconds")[: 1 if spec["package"] == "tiktoken" else 2]:
        start = time.perf_counter()
        batch = encode()
        result[field] = round(time.perf_counter() - start, 4)
        ids = flat(batch)
        digests.add(hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest())
        result["tokens"] = len(ids)
        del batch, ids
    (result["ids_sha256"],) = digests
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
