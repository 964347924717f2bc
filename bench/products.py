"""
The matrix products of decoding on a CPU: a few rows with all matrices of a model.

    python -m bench.products

F.linear in float32 ("linear") beside packed matrices (nanochat/cpu_kernels.py) of float32, bfloat16
and int8. The matrices are those of a GPT: each product reads its own from memory, as it does in a
step of decoding. The ways alternate, and the medians count. The result goes to
bench/results/products.json.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bench import surroundings
from nanochat import flags
from nanochat.common import UserError, print0, write_json
from nanochat.cpu_kernels import PackedLinear, problem
from nanochat.models import build_model, make_config

OUT = Path(__file__).with_name("results") / "products.json"
HELD = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass
class Args:
    """Time the products of a few rows with the matrices of small models."""

    depths: list[int] = field(default_factory=lambda: [4, 8])
    """Depths of the models."""
    rows: list[int] = field(default_factory=lambda: [1, 4, 16, 32, 64, 256, 768])
    """Rows that are multiplied at once; some hundred are a prompt's."""
    rounds: int = 11
    """Alternating rounds of which the median counts."""
    threads: int = 0
    """Threads; 0: one for each core."""
    out: Path = OUT
    """Result file."""


@torch.inference_mode()
def measure(depth: int, rows: list[int], rounds: int) -> list[dict[str, object]]:
    """For each number of rows the milliseconds of all products, by their way."""
    config, _ = make_config("gpt", depth, 8192, 1024)
    model = build_model(config, torch.device("cpu"), seed=1)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    ways: dict[str, list[nn.Module]] = {"linear": [*linears]}
    for name, dtype in HELD.items():
        ways[name] = [PackedLinear(linear.weight, None, dtype) for linear in linears]
    results: list[dict[str, object]] = []
    for count in rows:
        inputs = [torch.randn(count, linear.in_features) for linear in linears]
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, layers in ways.items():
                started = time.perf_counter()
                for layer, x in zip(layers, inputs):
                    layer(x)
                taken[way].append(time.perf_counter() - started)
        found = {way: 1e3 * statistics.median(t) for way, t in taken.items()}
        print0(f"d{depth}, {count} rows: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
        results.append({"depth": depth, "rows": count, "milliseconds": found})
    return results


def main(args: Args) -> None:
    load = os.getloadavg()[0]
    if problem():
        raise UserError(f"nothing to measure: {problem()}")
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    results = [row for depth in args.depths for row in measure(depth, args.rows, args.rounds)]
    about = {"threads": torch.get_num_threads(), "products": results}
    write_json(args.out, {**about, **surroundings(load)})
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
