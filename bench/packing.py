"""
Ways to pack documents into rows, measured: what they crop and cut, and what a model learns.

    python -m bench.packing --data=../shared/data/fineweb_like

    crop    best fit; a document is cut where none fits, and the rest of it is dropped (karpathy's)
    return  best fit as in crop, but the rest of a cut document waits with the others
    exact   ours, nanochat/packing.py: long documents have rows of their own, ends fill rows exactly

Every way trains the same model for the same number of tokens, once on plenty of text (no row is
seen twice) and once on little (so that dropping means repeating). Documents of more than
--max_doc_tokens are left out, so that rows of 256 tokens crop as much of these as rows of 2,048 do
of web text (karpathy/nanochat: 34.6% of FineWeb-Edu). All are judged on the same two
sets of rows, which no way of packing made: every token of the validation documents, each row a
stretch of one document after bos ("all"); and the first rows of the documents alone ("heads"). The
result goes to bench/results/packing.json.
"""

from __future__ import annotations

import bisect
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import surroundings
from nanochat import flags
from nanochat.common import print0, seed_from, write_json
from nanochat.dataset import iter_texts, split_files
from nanochat.evals.bpb import evaluate_bpb
from nanochat.models import build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.packing import PACK_BUFFER, Documents, Piece, Plan, pack, show_rows
from nanochat.schedule import lr_multiplier, muon_momentum
from nanochat.tokenizer import Tokenizer

OUT = Path(__file__).with_name("results") / "packing.json"
Way = Callable[[np.ndarray, np.ndarray, int], Plan]


@dataclass
class Args:
    """Measure ways to pack documents."""

    data: str | None = None
    """Folder of text; default: base_data/."""
    depth: int = 2
    """Layers of the model."""
    seq_len: int = 256
    """Tokens in a row."""
    rows_per_step: int = 8
    """Rows in an optimizer step."""
    num_steps: int = 200
    """Optimizer steps of a run."""
    seeds: int = 2
    """Runs of each."""
    vocab_size: int = 2048
    """Tokens of the vocabulary, which is trained on the same text."""
    max_doc_tokens: int = 512
    """Longer documents are left out of training and validation."""
    little: float = 0.25
    """Tokens of the documents in the runs on little text, as a share of those trained on."""
    eval_rows: int = 300
    """Rows of each validation set."""


def best_fit(lengths: np.ndarray, order: np.ndarray, row_len: int, keep_rest: bool) -> Plan:
    """The way of karpathy/nanochat: the longest that fits goes next; where none does, the shortest
    is cut, in an empty row the longest."""
    pieces: list[Piece] = []
    starts = [0]
    buffer: list[tuple[int, int, int]] = []  # (length, document, first), sorted
    upcoming = iter(order.tolist())
    while True:
        room = row_len
        while room > 0:
            while len(buffer) < PACK_BUFFER and (doc := next(upcoming, None)) is not None:
                bisect.insort(buffer, (int(lengths[doc]), doc, 0))
            if not buffer:
                break
            fit = bisect.bisect_right(buffer, (room, 1 << 62, 0)) - 1
            at = fit if fit >= 0 else 0 if room < row_len else len(buffer) - 1
            length, doc, first = buffer.pop(at)
            shown = min(length, room)
            pieces.append((doc, first, shown))
            room -= shown
            if shown < length and keep_rest:
                bisect.insort(buffer, (length - shown + 1, doc, first + shown - 1))
        if room > 0:  # the data ended inside this row
            del pieces[starts[-1] :]
            break
        starts.append(len(pieces))
    array = np.asarray(pieces, dtype=np.int64)
    cropped = (lengths[order] - 1).sum() - (array[:, 2] - 1).sum()
    return Plan(array, np.asarray(starts), int(cropped))


WAYS: dict[str, Way] = {
    "crop": lambda lengths, order, row_len: best_fit(lengths, order, row_len, keep_rest=False),
    "return": lambda lengths, order, row_len: best_fit(lengths, order, row_len, keep_rest=True),
    "exact": lambda lengths, order, row_len: pack(lengths, order, row_len, cut=True),
}


def tokenized(tokenizer: Tokenizer, files: list[Path]) -> Documents:
    return Documents(*tokenizer.encode_batch(list(iter_texts(files)), prepend="<|bos|>"))


def short_ones(documents: Documents, longest: int) -> Documents:
    """The documents of at most so many tokens."""
    kept = documents.lengths <= longest
    ids = documents.ids[np.repeat(kept, documents.lengths)]
    return Documents(ids, np.concatenate([[0], np.cumsum(documents.lengths[kept])]))


def shares(documents: Documents, way: Way, row_len: int) -> dict[str, float]:
    """What a way of packing does to one shard."""
    lengths = documents.lengths
    order = np.random.default_rng(0).permutation(len(lengths))
    started = time.perf_counter()
    plan = way(lengths, order, row_len)
    seconds = time.perf_counter() - started
    summary = plan.summary(row_len)
    return {
        "rows": len(plan),
        "cropped": round(summary["cropped"], 4),
        "without their document's beginning": round(summary["continued"], 4),
        "pieces": len(plan.pieces),
        "plan_seconds": round(seconds, 3),
    }


def endless_rows(documents: Documents, way: Way, row_len: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of tokens, epoch after epoch, each packed and mixed anew."""
    bos = int(documents.ids[0])
    for epoch in itertools.count():
        rng = np.random.default_rng(seed_from(seed, epoch))
        plan = way(documents.lengths, rng.permutation(len(documents.lengths)), row_len)
        for row in rng.permutation(len(plan)):
            yield show_rows(documents, plan, np.array([row]), row_len, bos)[0][0]


def validation_sets(documents: Documents, row_len: int, n: int) -> dict[str, Any]:
    """ "all" and "heads" as (idx, targets) batches: stretches of one document, padded."""
    full, rest = np.divmod(documents.lengths - 1, row_len - 1)
    parts = [
        (doc, k * (row_len - 1), row_len if k < full[doc] else int(rest[doc]) + 1)
        for doc in range(len(full))
        for k in range(full[doc] + (rest[doc] > 0))
    ]
    rng = np.random.default_rng(0)
    sets = {}
    for name, of in (("all", parts), ("heads", [p for p in parts if p[1] == 0])):
        chosen = np.asarray(of)[rng.permutation(len(of))[:n]]
        chosen = chosen[np.argsort(chosen[:, 2])]
        plan = Plan(chosen, np.arange(len(chosen) + 1), 0)
        bos = int(documents.ids[0])
        everything = Documents(documents.ids, documents.offsets, np.ones_like(documents.ids))
        batches = []
        for at in range(0, len(chosen), 16):
            rows = np.arange(at, min(at + 16, len(chosen)))
            tokens, trained = show_rows(everything, plan, rows, row_len, bos)
            assert trained is not None
            targets = np.where(trained[:, 1:], tokens[:, 1:], -1)
            batches.append((torch.from_numpy(tokens[:, :-1]), torch.from_numpy(targets)))
        sets[name] = batches
    return sets


def train(
    args: Args,
    tokenizer: Tokenizer,
    documents: Documents,
    way: Way,
    seed: int,
    sets: dict[str, Any],
) -> dict[str, float]:
    """One run; bits per byte on both validation sets."""
    config, _ = make_config("gpt", args.depth, tokenizer.get_vocab_size(), args.seq_len)
    model = build_model(config, seed=seed)
    optimizer = make_optimizer(model, 0.02, 0.002, 0.008)  # for some 2,048 tokens a step
    rows = endless_rows(documents, way, args.seq_len + 1, seed)
    for step in range(args.num_steps):
        tokens = torch.from_numpy(np.stack(list(itertools.islice(rows, args.rows_per_step))))
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), reduction="sum")
        (loss / (args.rows_per_step * args.seq_len)).backward()
        optimizer.step(lr_multiplier(step, args.num_steps, 20, 0.4), muon_momentum(step), 1.0)
        optimizer.zero_grad()
    return {
        name: round(evaluate_bpb(model, batches, tokenizer.token_bytes).bpb, 5)
        for name, batches in sets.items()
    }


def main(args: Args) -> None:
    files = split_files(args.data)
    row_len = args.seq_len + 1
    tokenizer = Tokenizer.train(itertools.islice(iter_texts(files.train), 12_000), args.vocab_size)
    all_text = tokenized(tokenizer, files.train)
    plenty = short_ones(all_text, args.max_doc_tokens)
    val = short_ones(tokenized(tokenizer, [files.val]), args.max_doc_tokens)
    wanted = args.little * args.num_steps * args.rows_per_step * args.seq_len
    few = int(np.searchsorted(plenty.offsets, wanted))
    little = Documents(plenty.ids[: plenty.offsets[few]], plenty.offsets[: few + 1])
    sets = validation_sets(val, row_len, args.eval_rows)
    result: dict[str, Any] = {
        "args": vars(args) | {"data": "fineweb_like" if args.data else "base_data"},
        "documents": {"plenty": len(plenty.lengths), "little": len(little.lengths)},
        "tokens": {"plenty": len(plenty.ids), "little": len(little.ids)},
        "packing": {
            f"{which}, rows of {length}": {
                name: shares(documents, way, length) for name, way in WAYS.items()
            }
            for which, documents, length in (
                ("all documents", all_text, 2049),
                ("all documents", all_text, 257),
                ("short documents", plenty, row_len),
            )
        },
        **surroundings(),
        "load_before": round(os.getloadavg()[0], 2),
        "runs": [],
    }
    for seed, (text, documents) in itertools.product(
        range(args.seeds), (("plenty", plenty), ("little", little))
    ):
        for name, way in WAYS.items():
            started = time.time()
            bpb = train(args, tokenizer, documents, way, seed, sets)
            run = {"text": text, "way": name, "seed": seed, "bpb": bpb}
            result["runs"].append({**run, "seconds": round(time.time() - started, 1)})
            print0(result["runs"][-1])
            result["mean_bpb"] = means(result["runs"])
            write_json(OUT, result)
    for text, of_text in result["mean_bpb"].items():
        for name, bpb in of_text.items():
            print0(f"{text:8} {name:8} {bpb}")


def means(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean bits per byte over the seeds: [text][way][validation set]."""
    table: dict[str, Any] = {}
    for run in runs:
        of_way = table.setdefault(run["text"], {}).setdefault(run["way"], {})
        for name, value in run["bpb"].items():
            of_way.setdefault(name, []).append(value)
    return {
        text: {
            way: {name: round(statistics.mean(values), 4) for name, values in sets.items()}
            for way, sets in of_text.items()
        }
        for text, of_text in table.items()
    }


if __name__ == "__main__":
    flags.run(main, Args)
