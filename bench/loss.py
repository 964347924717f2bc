"""
The loss and its gradients, measured: how long, and how much memory beside what goes in.

    python -m bench.loss                                            # a small model's head
    python -m bench.loss --rows=32768 --width=768 --vocab_size=65536 --compiled   # a GPU's

    plain      all logits, then cross-entropy
    sum C      ours, nanochat/models/loss.py: C positions at a time, gradients in the forward pass
    rows C     ours, for a loss of each position: logits again in the backward pass
    torch      F.linear_cross_entropy in chunks of its own choice (PyTorch 2.13 and later; knows no
               softcap)

Every row of the table is a process of its own, so that its peak is its own; the fastest and the
median of --rounds are kept. On CUDA under autocast to bfloat16, on a CPU in float32. The result
goes to bench/results/loss.json; what it says is set in nanochat/models/loss.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import surroundings
from nanochat import flags
from nanochat.common import print0, write_json
from nanochat.distributed import pick_device_type
from nanochat.models.layers import lm_logits
from nanochat.models.loss import (
    chunk_rows,
    loss_kernel,
    losses_in_place,
    losses_of_rows,
    sum_of_losses,
)

OUT = Path(__file__).with_name("results") / "loss.json"


@dataclass
class Args(flags.DeviceFlags):
    """Measure ways to compute the loss."""

    rows: int = 8192
    """Positions in the micro-batch."""
    width: int = 256
    """Width of the model."""
    vocab_size: int = 8192
    """Tokens of the vocabulary."""
    softcap: float = 15.0
    """Cap of the logits; "torch" is measured without one, beside the others without one."""
    chunks: str = "64 128 256 512 1024 2048 4096"
    """Positions in a chunk, to be tried."""
    compiled: bool = False
    """Measure under torch.compile, as a GPU trains."""
    rounds: int = 7
    """Forward and backward passes measured, after two that are not."""
    out: str = str(OUT)
    """File for the result; empty: none."""


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, D), (V, D), (N,) -> ()


def plain(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    return F.cross_entropy(lm_logits(x, head, softcap), targets, ignore_index=-1, reduction="sum")


def of_torch(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    settings: dict[str, Any] = {"ignore_index": -1, "reduction": "sum", "options": options}
    return F.linear_cross_entropy(x, head.to(x.dtype), targets, **settings)


def function_of(way: str, chunk: int, softcap: float) -> Loss:
    if way == "plain":
        return partial(plain, softcap=softcap)
    if way == "torch":
        return of_torch
    if way == "sum":
        return partial(sum_of_losses, softcap=softcap, chunk=chunk)
    return lambda x, head, targets: losses_of_rows(x, head, targets, softcap, chunk).sum()


def ways(args: Args, device: str) -> list[tuple[str, int, float]]:
    """(way, chunk, softcap) of every row of the table; chunk 0: there is none."""
    default = chunk_rows(args.vocab_size, device, "sum")
    chunks = {int(c) for c in args.chunks.split()} | {default}
    tried = sorted(c for c in chunks if c < args.rows)
    table = [("plain", 0, args.softcap)]
    table += [(way, c, args.softcap) for way in ("sum", "rows") for c in tried]
    if args.softcap:
        table.append(("plain", 0, 0.0))
        table += [("sum", c, 0.0) for c in tried if c == default]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        table.append(("torch", 0, 0.0))
    return table


def measure(args: Args, device: str, way: str, chunk: int, softcap: float) -> dict[str, Any]:
    """Seconds and extra megabytes of one way, in a process that has done nothing else."""
    cuda = device == "cuda"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.rows, args.width, generator=generator)
    x = x.to(device, torch.bfloat16 if cuda else torch.float32).requires_grad_()
    head = (torch.randn(args.vocab_size, args.width, generator=generator) * args.width**-0.5).to(
        device
    )
    head.requires_grad_()
    targets = torch.randint(0, args.vocab_size, (args.rows,), generator=generator).to(device)
    function = function_of(way, chunk, softcap)
    if args.compiled and way not in ("sum", "rows"):
        function = torch.compile(function, dynamic=False)
    # As a compiled step has ours: by itself, with a kernel on a GPU (compiling.py)
    kernel = torch.compile(losses_in_place) if args.compiled else None

    def step() -> float:
        x.grad = head.grad = None
        wait()
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if kernel:
                stack.enter_context(loss_kernel(kernel))
            if cuda:
                stack.enter_context(torch.autocast("cuda", dtype=torch.bfloat16))
            loss = function(x, head, targets)
        (loss / args.rows).backward()
        wait()
        return time.perf_counter() - started

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def memory(peak: bool) -> float:
        if cuda:
            return (
                torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
            ) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    if args.compiled:
        step()  # a compiler's own memory is not the loss's
    x.grad = head.grad = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = memory(peak=False)
    step()
    step()
    seconds = [step() for _ in range(args.rounds)]
    return {
        "way": way,
        "chunk": chunk,
        "softcap": softcap,
        "fastest_ms": round(1e3 * min(seconds), 2),
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "extra_peak_mb": round(memory(peak=True) - before, 1),
    }


def main(args: Args) -> None:
    device = pick_device_type(args.device_type)
    default = chunk_rows(args.vocab_size, device, "sum")
    print0(f"{args.rows} rows, width {args.width}, vocabulary {args.vocab_size}, {device}")
    print0(f"{'way':<8}{'chunk':>7}{'cap':>6}{'fastest ms':>12}{'median ms':>12}{'peak MB':>10}")
    table = []
    for row in ways(args, device):
        # Spawned, not forked: CUDA does not survive a fork.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, args, device, *row).result()
        table.append(found)
        ours = (found["way"], found["chunk"], found["softcap"]) == ("sum", default, args.softcap)
        mark = "  <- the default" if ours else ""
        print0(
            f"{found['way']:<8}{found['chunk'] or '':>7}{found['softcap']:>6g}"
            f"{found['fastest_ms']:>12.2f}{found['median_ms']:>12.2f}"
            f"{found['extra_peak_mb']:>10.1f}{mark}"
        )
    if args.out:
        shape = {name: getattr(args, name) for name in ("rows", "width", "vocab_size", "compiled")}
        result = {
            **surroundings(),
            "device": device,
            "threads": torch.get_num_threads(),
            **shape,
            "rounds": args.rounds,
            "default_chunk": default,
            "table": table,
        }
        write_json(args.out, result)


if __name__ == "__main__":
    flags.run(main, Args)
