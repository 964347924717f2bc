"""
karpathy/nanochat's model and optimizer on the rows that ours trains on: bench/learning.py's worker.

Imports a checkout of that project, whose package has the name of ours: so this file imports nothing
of ours. Its argument is a JSON object: `peer` (the checkout), `rows` (an .npz of train_x, train_y,
val_x, val_y and token_bytes), `depth`, `steps`, `tokens_per_step`, `evals` (the steps after which
to measure) and `seed`. It prints one: bits per byte by tokens, minutes in steps, tokens a second.

The rates and schedules are those of its scripts/base_train.py at 0e4b3fa, summer 2026: rates by the
root of the batch in units of 2^19 tokens, weight decay by that root over the tokens that a model of
the size wants (in units of d12's), a warmup of 40 steps, a warmdown over 65% to 5%, Muon's momentum
from 0.85 to 0.97 over 400 steps and to 0.90 in the warmdown, weight decay along a half cosine.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from typing import Any

import numpy as np
import torch

VAL_ROWS = 16  # at a time


def build(gpt: Any, depth: int, seq_len: int, vocab_size: int) -> Any:
    """Its model at a depth, without memory: heads of 64, its windows."""
    with torch.device("meta"):
        return gpt.GPT(
            gpt.GPTConfig(
                sequence_len=seq_len, vocab_size=vocab_size, n_layer=depth, n_head=depth,
                n_kv_head=depth, n_embd=64 * depth, window_pattern="SSSL",
            )
        )  # fmt: skip


def scaling_params(model: Any) -> int:
    """The parameters that its rules count."""
    counts = model.num_scaling_params()
    matrices = counts.get("active_transformer_matrices", counts.get("transformer_matrices"))
    return matrices + counts["lm_head"]


def schedules(step: int, steps: int) -> tuple[float, float, float]:
    """(of the rates, Muon's momentum, of the weight decay)."""
    warmdown = round(0.65 * steps)
    left = min(1.0, (steps - step) / warmdown)  # 1 until the warmdown begins
    rate = (step + 1) / 40 if step < 40 else left + (1 - left) * 0.05
    rising = min(1.0, step / 400)
    momentum = 0.85 + 0.12 * rising if left == 1 or step < 400 else 0.90 + 0.07 * left
    return rate, momentum, 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def bits_per_byte(model: Any, x: torch.Tensor, y: torch.Tensor, sizes: torch.Tensor) -> float:
    """Of its logits over all rows; tokens of no bytes do not count."""
    nats, num_bytes = 0.0, 0
    for a, b in zip(x.split(VAL_ROWS), y.split(VAL_ROWS)):
        losses = torch.nn.functional.cross_entropy(
            model(a.long()).float().flatten(0, 1), b.long().flatten(), reduction="none"
        )
        of = sizes[b.long().flatten()]
        nats += float((losses * (of > 0)).sum(dtype=torch.float64))
        num_bytes += int(of.sum())
    return nats / num_bytes / math.log(2)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, spec["peer"])
    gpt = importlib.import_module("nanochat.gpt")
    if not str(gpt.__file__).startswith(spec["peer"]):
        raise SystemExit(f"--peer={spec['peer']} has no nanochat/gpt.py")
    with np.load(spec["rows"]) as file:
        held = {name: torch.from_numpy(file[name].astype(np.int32)) for name in file.files}
    torch.manual_seed(spec["seed"])
    seq_len, vocab_size = held["train_x"].size(1), len(held["token_bytes"])
    model = build(gpt, spec["depth"], seq_len, vocab_size)
    model.to_empty(device="cpu")
    model.init_weights()
    scale = (spec["tokens_per_step"] / 2**19) ** 0.5
    reference = scaling_params(build(gpt, 12, seq_len, vocab_size))
    decay = 0.28 * scale * reference / scaling_params(model)
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * scale, embedding_lr=0.3 * scale, scalar_lr=0.5 * scale,
        matrix_lr=0.02 * scale, weight_decay=decay,
    )  # fmt: skip
    forward = torch.compile(model, dynamic=False)
    rows, found, seconds = spec["tokens_per_step"] // seq_len, {}, 0.0
    for step in range(spec["steps"]):
        started = time.perf_counter()
        at = slice(step * rows, (step + 1) * rows)
        forward(held["train_x"][at].long(), held["train_y"][at].long()).backward()
        rate, momentum, wd = schedules(step, spec["steps"])
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay * wd
        optimizer.step()
        model.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - started
        if step + 1 in spec["evals"]:
            bpb = bits_per_byte(model, held["val_x"], held["val_y"], held["token_bytes"])
            found[(step + 1) * spec["tokens_per_step"]] = round(bpb, 4)
            print(f"step {step + 1}: {bpb:.4f} bits per byte", file=sys.stderr, flush=True)
    return {
        "steps": spec["steps"],
        "bpb": found,
        "final": bpb,
        "minutes": round(seconds / 60, 2),
        "tokens_per_second": round(spec["steps"] * spec["tokens_per_step"] / seconds),
    }


if __name__ == "__main__":
    print(json.dumps(train(json.loads(sys.argv[1]))))
