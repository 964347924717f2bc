"""
The matrix products of decoding on a CPU, laid out and turned round as serving.py does it.

    python -m bench.products

The product of a few rows with a weight, in float32: F.linear with the weight by rows, as a
checkpoint has it ("rows"); by columns ("columns"); and with the matrix on the left and the result
turned round ("left"). Each shape has as many matrices as a model has layers, so that caches hold
what they would hold in a model; the ways alternate, and the medians count. LARGE_BYTES of
nanochat/serving.py and LEFT_ROWS of nanochat/models/layers.py follow from it. Among a model's other
work caches hold less, so one row pays less for columns, and 16 gain more, than here. The result
goes to bench/results/products.json.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import surroundings
from nanochat import flags
from nanochat.common import print0, write_json
from nanochat.models.layers import large_product

OUT = Path(__file__).with_name("results") / "products.json"


@dataclass
class Args:
    """Time the products of a few rows with the matrices of small models."""

    shapes: list[str] = field(
        default_factory=lambda: [
            "192x768",
            "256x1024",
            "512x2048",
            "2048x512",
            "256x8192",
            "512x8192",
        ]
    )
    """Inputs and outputs of each matrix."""
    rows: list[int] = field(default_factory=lambda: [1, 16, 32])
    """Rows that are multiplied at once."""
    layers: int = 8
    """Matrices of each shape."""
    rounds: int = 41
    """Alternating rounds of which the median counts."""
    threads: int = 0
    """Threads; 0: one for each core."""
    out: Path = OUT
    """Result file."""


@torch.inference_mode()
def measure(args: Args, n_in: int, n_out: int, rows: int) -> dict[str, float]:
    """Microseconds of one product, by its way."""
    x = torch.randn(rows, n_in)
    by_rows = [torch.randn(n_out, n_in) for _ in range(args.layers)]
    by_columns = [weight.t().contiguous().t() for weight in by_rows]
    ways = {
        "rows": (F.linear, by_rows),
        "columns": (F.linear, by_columns),
        "left": (large_product, by_rows),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, (product, weights) in ways.items():
            started = time.perf_counter()
            for weight in weights:
                product(x, weight)
            taken[way].append(time.perf_counter() - started)
    return {way: 1e6 * statistics.median(t) / args.layers for way, t in taken.items()}


def main(args: Args) -> None:
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    results = []
    for shape in args.shapes:
        n_in, n_out = map(int, shape.split("x"))
        for rows in args.rows:
            found = measure(args, n_in, n_out, rows)
            results.append({"in": n_in, "out": n_out, "rows": rows, "microseconds": found})
            print0(f"{shape}, {rows} rows: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()))
    about = {"layers": args.layers, "threads": torch.get_num_threads()}
    write_json(args.out, {**about, "products": results, **surroundings(load)})
    print0(f"wrote {args.out}")


if __name__ == "__main__":
    flags.run(main, Args)
