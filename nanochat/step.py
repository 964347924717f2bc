"""
The training step: passes over the micro-batches, one gradient, one move of the weights.

How it computes is decided once, before the first: in which format (precision.py), in 8 bits or not
(fp8.py), compiled or not (compiling.py). On a GPU a step is queued and not waited for (meter.py).
Floor 3.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError, warn0
from nanochat.compiling import CompiledStep, choose_compile
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo, all_reduce_sum, max_over_ranks
from nanochat.flags import TrainFlags
from nanochat.fp8 import Fp8, check_fp8
from nanochat.machine import peak_flops
from nanochat.meter import HostCopy, StepRecord
from nanochat.models.attention import choose_for
from nanochat.optim import MuonAdamW
from nanochat.precision import LossScaler, choose_precision
from nanochat.shard import sharded_modules


class TrainStep:
    """Takes the steps of one run. `run_tokens`: those of the whole run on this rank; None where
    rows differ in length (RL, DPO)."""

    def __init__(
        self,
        args: TrainFlags,
        info: DistInfo,
        model: Any,
        optimizer: MuonAdamW,
        run_tokens: int | None = None,
    ) -> None:
        self.args, self.info, self.model, self.optimizer = args, info, model, optimizer
        self.stop_agreed = False  # some rank was stopping when the last step began
        self.precision = choose_precision(args.dtype, info.device)
        self.scaler = LossScaler(self.precision.dtype == torch.float16)
        self.fp8: Fp8 | None = None
        if args.fp8:
            check_fp8(info.device)
            self.fp8 = Fp8(model)
        self.fixed_rows = run_tokens is not None
        choose_for(model, info.device, self.precision.dtype)  # probing cannot be part of a graph
        self.sharded = sharded_modules(model)
        flops = (run_tokens or 0) * model.flops_per_token()
        self.compiled = choose_compile(args.compile, info.device, flops, self.fixed_rows)
        if self.compiled.on:
            optimizer.fuse()
        if self.fp8 and not self.compiled.on:
            warn0("--fp8 without compilation (--compile=on) is slower than bfloat16")
        # Evaluation and sampling use the plain module: other shapes would compile again.
        self.forward = model
        if self.compiled.on:
            self.forward = CompiledStep(model, self.fixed_rows, by_block=bool(self.sharded))
        self.equal_batches = self.fixed_rows  # all ranks have as many
        self.peak_flops: float | None = None
        if info.device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(info.device))

    def __str__(self) -> str:
        eights = f", {len(self.fp8.names)} linears in float8" if self.fp8 else ""
        return f"{self.precision.name} ({self.precision.why}){eights}, {self.compiled}"

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the GPUs' bfloat16 peak that the model's FLOPs use, whatever the format they are
        computed in; None where the peak is unknown."""
        if self.peak_flops is None:
            return None
        peak = self.peak_flops * self.info.world_size
        return self.model.flops_per_token() * tokens_per_second / peak

    def take(
        self,
        number: int,
        batches: list[MicroBatch],
        rates: tuple[float, float, float],
        stopping: bool,
    ) -> StepRecord:
        """Step `number` over this rank's micro-batches, which may be none. All ranks must call it.

        The loss is the sum over trained tokens divided by their number in the whole step, on all
        ranks: how the batch is cut into micro-batches does not matter. A batch of another kind
        (DPO's pairs) counts what it says. A step without a trained token changes nothing.
        `rates`: the learning rate's multiplier, Muon's momentum and the weight decay's multiplier.
        `stopping`: this rank would like to stop; stop_agreed says so to all."""
        lr_mul, momentum, decay_mul = rates
        # What the host must know of the whole step is summed over the ranks first, and read when
        # the passes are queued: by then it is there, and the device does not run dry.
        trained = torch.zeros((), dtype=torch.int64, device=self.info.device)
        for batch in batches:
            trained += batch.count()
        tokens = sum(batch.idx.numel() for batch in batches)
        sums = [trained, torch.full_like(trained, tokens), torch.full_like(trained, stopping)]
        whole = all_reduce_sum(torch.stack(sums))
        known = HostCopy(whole)
        count = whole[0].clamp(min=1)

        loss = all_reduce_sum(self.passes(batches, count)) / count
        num_trained, num_tokens, num_stopping = known.read()
        self.stop_agreed = num_stopping > 0
        finite = self.scaler.unscale(self.optimizer.named.values())
        norm: float | Tensor = 0.0
        if num_trained > 0 and finite:
            norm = self.optimizer.step(lr_mul, momentum, self.args.grad_clip, decay_mul)
        self.optimizer.zero_grad()
        norm = norm.to(loss) if isinstance(norm, Tensor) else torch.full_like(loss, norm)
        numbers = HostCopy(torch.stack([loss, norm]))
        return StepRecord(number, lr_mul, int(num_tokens), not finite, numbers)

    def passes(self, batches: list[MicroBatch], count: Tensor) -> Tensor:
        """Forward and backward passes; returns the summed loss. Gradients are of that divided by
        `count`. If the first compiled passes fail, plain ones take their place."""
        compiled = self.forward
        if not isinstance(compiled, CompiledStep) or compiled.proven or not batches:
            return self._run_passes(batches, count)
        try:
            loss = self._run_passes(batches, count)
        except Exception as e:  # a compiler's, of any kind; an error of our own comes up again
            if self.args.compile == "on" or is_out_of_memory(e):
                raise
            warn0(compiled.give_up(e))
            self.optimizer.zero_grad()
            loss = self._run_passes(batches, count)
        compiled.proven = True
        return loss

    def _run_passes(self, batches: list[MicroBatch], count: Tensor) -> Tensor:
        loss_sum = torch.zeros((), device=self.info.device)
        most = len(batches)  # on any rank
        if self.sharded and not self.equal_batches:
            most = int(max_over_ranks(most, self.info.device))
        with self.fp8.on() if self.fp8 else nullcontext():
            for number in range(most):
                if self.sharded:  # copies of the weights need no gradient before it is whole
                    self.model.set_requires_all_reduce(number == most - 1)
                with self.precision.autocast():
                    if number < len(batches):
                        loss = batches[number].loss(self.forward)
                    else:
                        loss = self._nothing()
                self.scaler.scaled(loss / count).backward()
                loss_sum += loss.detach()
        return loss_sum

    def _nothing(self) -> Tensor:
        """A loss of 0, of a rank that has run out of batches where others have not: the weights of
        a sharded model come together for all of them at once, or for none."""
        idx = torch.zeros((1, 1), dtype=torch.int64, device=self.info.device)
        return 0.0 * self.model(idx, idx, reduction="sum")


# -------------------------------------------------------------------------------------------------
# Memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory ran out. Only CUDA's error has a type of its own;
    MPS and the CPU's allocator raise a RuntimeError that says it."""
    said = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def out_of_memory(
    error: BaseException, number: int, batches: list[MicroBatch], saved: int | None
) -> UserError:
    """What to tell the user when memory runs out in step `number`: what was tried, what to set,
    and from which saved step the run can go on."""
    # RL's differ in size
    rows, length = max((batch.idx for batch in batches), key=torch.Tensor.numel).shape
    go_on = "No checkpoint has been saved yet: start again"
    if saved is not None:
        go_on = f"The checkpoint of step {saved} is intact: continue with --resume"
    return UserError(
        f"out of memory in step {number}, with micro-batches of {rows} rows of {length} tokens "
        f"({str(error).strip().splitlines()[0]}). {memory_advice(rows)}. {go_on}"
    )


def memory_advice(rows: int) -> str:
    """What to set when micro-batches of that many rows do not fit."""
    if rows > 1:
        return (
            f"Set --device_batch_size={rows // 2}, or --activation_checkpointing: the results stay "
            "the same"
        )
    return (
        "Set --activation_checkpointing, --shard=fsdp on several GPUs, or a smaller --max_seq_len "
        "or --depth"
    )
