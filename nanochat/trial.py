"""
Two real steps before training begins, which show that the memory suffices and leave no trace.

nanochat/plan.py estimates; on a GPU this has the last word. Floor 3.75.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nanochat.common import UserError, print0, warn0
from nanochat.dataloader import MicroBatch
from nanochat.distributed import local, sum_over_ranks
from nanochat.plan import candidates, gb, memory_advice, setup_of, usable_memory
from nanochat.recompute import Mode, recompute
from nanochat.step import TrainStep


def trial_step(step: TrainStep, batch: int, length: int, rows: int) -> int | None:
    """Peak bytes of training steps with real shapes, or None if some rank ran out of memory.

    Two steps: in the second the optimizer's state is there while the passes are made. Weights,
    that state, gradients and random generators are as before afterwards, to the bit, and the
    allocator's cache is empty. What is compiled here need not be again."""
    device = step.info.device
    cuda = device.type == "cuda"
    peak = 0
    with _as_before(step.model, step.optimizer, device):
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        fits = all(_one_step(step, batch, length, rows) for _ in range(2))
        if cuda:
            peak = torch.cuda.max_memory_allocated(device)
    return peak if fits else None


def _one_step(step: TrainStep, batch: int, length: int, rows: int) -> bool:
    """Whether all ranks had memory enough for it."""
    device = step.info.device
    try:
        idx = torch.randint(0, step.model.config.vocab_size, (batch, length), device=device)
        # The second micro-batch finds gradients there
        batches = [MicroBatch(idx, idx)] * min(2, max(1, rows // batch))
        step.passes(batches, torch.tensor(len(batches) * idx.numel(), device=device))
    except torch.OutOfMemoryError:
        if step.sharded:
            raise  # the others wait for this rank's share of the weights: torchrun ends them
        return _all_succeeded(False, device)
    # No rank may enter the optimizer, where ranks meet, while another cannot
    if not _all_succeeded(True, device):
        return False
    try:
        step.optimizer.step(0.0, grad_clip=step.args.grad_clip)
        step.optimizer.zero_grad()
    except torch.OutOfMemoryError:
        return _all_succeeded(False, device)
    return _all_succeeded(True, device)


def _all_succeeded(here: bool, device: torch.device) -> bool:
    return sum_over_ranks(not here, device=device)[0] == 0


@contextmanager
def _as_before(model: Any, optimizer: Any, device: torch.device) -> Iterator[None]:
    """Whatever happens inside leaves weights, optimizer and generators as they were."""
    cuda = device.type == "cuda"
    rng = torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state(device) if cuda else None
    weights = {name: local(t).to("cpu", copy=True) for name, t in model.state_dict().items()}
    state = {
        name: {entry: t.to("cpu", copy=True) for entry, t in entries.items()}
        for name, entries in optimizer.state.items()
    }
    num_steps = optimizer.num_steps
    try:
        yield
    finally:
        optimizer.zero_grad()
        optimizer.state.clear()
        optimizer.num_steps = num_steps
        gc.collect()  # an error's traceback holds the tensors of its frames
        with torch.no_grad():
            for name, t in model.state_dict().items():
                local(t).copy_(weights[name])
        for name, entries in state.items():
            optimizer.state[name] = {entry: t.to(device) for entry, t in entries.items()}
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng, device)
            torch.cuda.empty_cache()


def confirm(settled: tuple[int, Mode], step: TrainStep, rows_per_step: int, length: int) -> int:
    """The micro-batch after a trial on the GPU: that of settle(), or the next smaller that works.

    Has the model recompute what settle() said. A size that was typed is not made smaller. Off GPUs
    nothing is tried. All ranks must call it."""
    batch, mode = settled
    args, info, model = step.args, step.info, step.model
    recompute(model, mode)
    if info.device.type != "cuda":
        return batch
    rows = max(1, rows_per_step // info.world_size)
    for size in [d for d in range(batch, 0, -1) if rows % d == 0 or d == batch]:
        try:
            peak = trial_step(step, size, length, rows)
        except torch.OutOfMemoryError:
            break
        if peak is not None:
            print0(f"trial steps: at most {gb(peak)} GB in use")
            return size
        if args.device_batch_size != "auto":
            break
        warn0(f"trial steps of {size} row(s) ran out of memory; trying fewer")
    setup = candidates(args, setup_of(info, args, step.fixed_rows))[0]  # --shard is settled
    raise UserError(
        f"trial steps of --device_batch_size={size} ran out of memory\n"
        + memory_advice(model.config, setup, rows, size, length, mode, usable_memory(info))
    )
