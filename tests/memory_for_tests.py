"""
What a step really takes in memory, by the allocator's own account. Tests and bench share it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nanochat.models import build_model
from nanochat.optim import make_optimizer
from nanochat.recompute import Mode, recompute


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
    step_model = torch.compile(model, dynamic=False) if compiled else model
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
