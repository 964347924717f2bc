"""
CORE, timed against a loop that takes one item at a time, on the same model and items.

    python -m bench.core_speed --bundle=../shared/data/eval_bundle
    python -m bench.core_speed --bundle=../shared/data/eval_bundle --depth=20 --max_per_task=200

The loop does what karpathy/nanochat's core_eval does: an item's options make one padded batch, the
whole of it goes through the model and its head, and the item is finished before the next one
begins. Ours is nanochat/evals/core.py: many items in batches of like length, the tokens that an
item's options share run once, and only scored positions through the head. Both tokenize in the
time that is taken. The model is random, for speed does not depend on what it knows; but a few
predictions may differ where two options come out alike, and their share is told. Without a
tokenizer in the base directory one of 8,192 tokens is trained on the bundle. The result goes to
bench/results/core_speed.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import surroundings
from nanochat import distributed, flags
from nanochat.common import UserError, get_base_dir, print0, write_json
from nanochat.evals.core import (
    CoreTask,
    Item,
    evaluated_rows,
    fewshot_indices,
    find_spans,
    predict_task,
    read_bundle,
    read_items,
    render_prompts,
)
from nanochat.evals.scoring import crop
from nanochat.models import build_model, make_config
from nanochat.precision import autocast
from nanochat.tokenizer import Tokenizer, get_tokenizer

OUT = Path(__file__).with_name("results") / "core_speed.json"
Rows = tuple[CoreTask, list[Item], list[int]]  # a task, its items, those that are evaluated


@dataclass
class Args(flags.PrecisionFlags):
    """Time CORE against one item at a time."""

    bundle: str | None = None
    """Folder of the CORE bundle; default: eval_bundle/ in the base directory."""
    depth: int = 4
    """Size of the random model."""
    max_seq_len: int = 2048
    """Its context."""
    max_per_task: int = 16
    """Items of each task."""
    out: str = str(OUT)
    """File for the result; empty: none."""


@torch.inference_mode()
def predict_alone(task: CoreTask, items: Sequence[Item], i: int, model: Any, tok: Any) -> int:
    """One item's prediction, the plain way."""
    shots = [items[j] for j in fewshot_indices(task.label, i, len(items), task.num_fewshot)]
    prompts = render_prompts(task, items[i], shots)
    rows = tok.encode(prompts, prepend=tok.get_bos_token_id())
    probes = [crop(p, model.config.sequence_len) for p in find_spans(task.kind, rows)]
    idx = torch.zeros(len(probes), max(len(p.ids) for p in probes), dtype=torch.int64)
    for row, probe in zip(idx, probes):
        row[: len(probe.ids)] = torch.tensor(probe.ids)
    idx = idx.to(model.get_device())
    logits = model(idx)  # (options, T, V)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none"
    ).view(len(probes), -1)  # (options, T - 1)
    spans = [slice(p.start - 1, len(p.ids) - 1) for p in probes]
    if task.kind == "language_modeling":
        likeliest = logits[0, spans[0]].argmax(-1)
        return int(torch.equal(likeliest, idx[0, 1:][spans[0]]))
    means = [float(losses[row, span].mean()) for row, span in enumerate(spans)]
    return means.index(min(means))


def timed(action: Callable[[], list[int]], device: torch.device) -> tuple[list[int], float]:
    """What it returned, and the seconds it took. Every prediction has come back from the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    return action(), time.perf_counter() - started


def compare(tasks: Sequence[Rows], model: Any, tokenizer: Any, device: torch.device) -> dict:
    """Seconds of both ways by task and in all, with the share of equal predictions."""
    by_task: dict[str, Any] = {}
    total = {"items": 0, "loop_seconds": 0.0, "ours_seconds": 0.0, "equal": 0}
    for task, items, rows in tasks:

        def loop(task: Any = task, items: Any = items, rows: Any = rows) -> list[int]:
            return [predict_alone(task, items, i, model, tokenizer) for i in rows]

        def ours(task: Any = task, items: Any = items, rows: Any = rows) -> list[int]:
            return predict_task(task, items, rows, model, tokenizer)

        loop_predictions, loop_s = timed(loop, device)
        our_predictions, our_s = timed(ours, device)
        equal = sum(a == b for a, b in zip(loop_predictions, our_predictions, strict=True))
        row = {"items": len(rows), "loop_seconds": loop_s, "ours_seconds": our_s, "equal": equal}
        for key, value in row.items():
            total[key] += value
        by_task[task.label] = {**row, "times": loop_s / our_s}
        print0(f"{task.label:<34} loop {loop_s:7.2f} s  ours {our_s:7.2f} s  "
               f"{loop_s / our_s:5.2f} times  equal {equal}/{len(rows)}")  # fmt: skip
    total["times"] = total["loop_seconds"] / total["ours_seconds"]
    return {"total": total, "tasks": by_task}


def tokenizer_for(tasks: Sequence[Rows]) -> Tokenizer:
    """The base directory's, or a small one that knows the bundle's words."""
    if (get_base_dir() / "tokenizer" / "tokenizer.json").exists():
        return get_tokenizer()
    texts = [str(item) for _, items, _ in tasks for item in items[:500]]
    return Tokenizer.train(texts, 8192)


def main(args: Args) -> None:
    if args.max_per_task < 1:
        raise UserError(f"--max_per_task={args.max_per_task} must be at least 1")
    bundle = Path(args.bundle) if args.bundle else get_base_dir() / "eval_bundle"
    tasks = []
    for task in read_bundle(bundle):
        items = read_items(task)
        tasks.append((task, items, evaluated_rows(task.label, len(items), args.max_per_task)))
    with distributed.session(args.device_type) as info:
        tokenizer = tokenizer_for(tasks)
        config, name = make_config("gpt", args.depth, tokenizer.get_vocab_size(), args.max_seq_len)
        model = build_model(config, info.device, seed=1).eval()
        # Fresh models predict all tokens alike; a random head tells options apart
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0.0, 0.02)
        with autocast(info.device, args.dtype):
            compare([(t, i, r[:1]) for t, i, r in tasks[:2]], model, tokenizer, info.device)
            print0("warm; from here on it counts")
            result = compare(tasks, model, tokenizer, info.device)
    total = result["total"]
    print0(f"{name}: {total['items']} items, loop {total['loop_seconds']:.1f} s, "
           f"ours {total['ours_seconds']:.1f} s: {total['times']:.2f} times")  # fmt: skip
    if args.out:
        about = {"model": name, "vocab_size": config.vocab_size, "args": vars(args)}
        write_json(args.out, {**surroundings(), **about, **result})
        print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
