"""
The estimate of a step's memory against what the device measures.

    python -m bench.memory                  # on a GPU: d12 and the like, in a few minutes
    python -m bench.memory --device_type=cpu
    python -m bench.hollow_gpu bench.memory --depth=8    # as on a GPU, where there is none

On a GPU steps run as in training, in bfloat16 and compiled, and the allocator tells the peak;
on a CPU in float32, at sizes that a laptop has, and the profiler sees every allocation.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import hollow_gpu, surroundings
from nanochat import distributed, flags
from nanochat.common import write_json
from nanochat.compiling import CompiledStep
from nanochat.flags import TrainFlags
from nanochat.models import build_model, make_config
from nanochat.models.attention import choose_for
from nanochat.optim import make_optimizer
from nanochat.plan import MODES, Planner, setup_of
from nanochat.recompute import Mode, recompute

RESULT = Path(__file__).resolve().parent / "results" / "memory.json"


@dataclass
class Args(flags.DeviceFlags):
    """Compare estimates with measured peaks."""

    depth: int = -1
    """Size of the models; -1: 12 on a GPU, 4 elsewhere."""
    eager: bool = False
    """Compile nothing, on a GPU too."""
    out: str = str(RESULT)
    """File for the result; empty: none."""


def measured_peak(
    config: Any,
    batch: int,
    length: int,
    mode: Mode = "none",
    *,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    micro_batches: int = 2,
) -> int:
    """Peak bytes of tensors in the second step of a run, in which the optimizer's state is there.

    On a CPU the profiler hears of every allocation, those inside of PyTorch's kernels too."""
    model = build_model(config, device, seed=1)
    recompute(model, mode)
    optimizer = make_optimizer(model, 0.1, 0.01, 0.01)
    if device == "cuda":
        choose_for(model, torch.device(device), torch.bfloat16 if bf16 else torch.float32)
    if compiled:
        optimizer.fuse()
    step_model = CompiledStep(model) if compiled else model
    idx = torch.randint(0, config.vocab_size, (batch, length), device=device)

    def step() -> None:
        for _ in range(micro_batches):
            with torch.autocast(device, dtype=torch.bfloat16) if bf16 else nullcontext():
                loss = step_model(idx, idx, reduction="sum")
            loss.backward()
            del loss
        optimizer.step(1.0, grad_clip=1.0)
        optimizer.zero_grad()

    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    held = [*model.parameters(), *model.buffers()]
    held += [t for entries in optimizer.state.values() for t in entries.values()]
    total = peak = sum(t.untyped_storage().nbytes() for t in held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def compare(args: Args, info: distributed.DistInfo) -> list[dict[str, Any]]:
    cuda = info.device.type == "cuda"
    depth = args.depth if args.depth > 0 else (12 if cuda else 4)
    vocab_size, length, batches = (65_536, 2048, (2, 8)) if cuda else (8192, 256, (1, 4))
    setup = setup_of(info, step_flags(args, info))
    rows = []
    for arch in ("gpt", "qwen2.5", "turbo"):
        config, _ = make_config(arch, depth, vocab_size, length)
        for batch in batches:
            for mode in MODES:
                estimate = Planner(config, setup, 2 * batch).memory(batch, mode)
                measured = measured_peak(
                    config, batch, length, mode,
                    device=info.device.type, bf16=setup.bf16, compiled=setup.compiled,
                )  # fmt: skip
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                rows.append(
                    {
                        "arch": arch, "depth": depth, "batch": batch, "length": length,
                        "activation_checkpointing": mode,
                        "estimate_gb": round(estimate.total / 1e9, 4),
                        "measured_gb": round(measured / 1e9, 4),
                        "ratio": round(estimate.total / measured, 3),
                        "micro_batch": estimate.micro_batch,
                        "optimizer_step": estimate.optimizer_step,
                    }
                )  # fmt: skip
                print({k: v for k, v in rows[-1].items() if not isinstance(v, dict)}, flush=True)
    return rows


def step_flags(args: Args, info: distributed.DistInfo) -> TrainFlags:
    return TrainFlags(compile="off" if args.eager or info.device.type != "cuda" else "on")


def main(args: Args) -> None:
    with distributed.session(args.device_type) as info:
        rows = compare(args, info)
        setup = setup_of(info, step_flags(args, info))
    ratios = [row["ratio"] for row in rows]
    print(f"estimate / measured: {min(ratios)} to {max(ratios)}")
    if args.out:
        where = surroundings()
        if hollow_gpu.is_inside():
            where["machine"]["gpus"] = []
        result = {
            **where,
            "device": setup.device_type,
            "kernels_left_out": hollow_gpu.is_inside(),
            "bf16": setup.bf16,
            "compiled": setup.compiled,
            "worst": max(ratios, key=lambda r: abs(r - 1)),
            "rows": rows,
        }
        write_json(args.out, result)


if __name__ == "__main__":
    flags.run(main, Args)
