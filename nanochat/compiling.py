"""
Whether to compile the training step: where it works, by trial, and where it pays.

torch.compile fuses what stands between the matrix products. It takes a while at the start, needs a
compiler (Triton on a GPU, C++ on a CPU), and static shapes: rows of one length. A run that cannot
have it runs without and says why. Evaluation and sampling always use the plain module, whose shapes
vary.

A sharded model (shard.py) is compiled block by block: between them weights come and go, which the
compiler would have to leave out of its graph anyway. Floor 1.25.
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.models.loss import loss_kernel, losses_in_place
from nanochat.recompute import blocks_of

# What decides on a CPU. Compiling a small GPT took about a minute there, and made its forward and
# backward passes 1.2 times as fast (3.3k and 4.0k tokens/s of 37 MFLOP, on 2 cores): a run earns
# it back after 60 / (1 - 3.3 / 4.0) seconds of plain computing.
CPU_COMPILE_SECONDS = 60.0
CPU_SHARE_SAVED = 1 - 3.3 / 4.0
CPU_FLOPS_PER_CORE = 3.3e3 * 37e6 / 2  # what the plain step computes in a second


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and why (not)."""

    on: bool
    why: str

    def __str__(self) -> str:
        return f"{'compiled' if self.on else 'eager'} ({self.why})"


def choose_compile(
    wanted: str, device: torch.device, run_flops: float, static_shapes: bool = True
) -> Choice:
    """What --compile=`wanted` (auto, on, off) means for a run of that many FLOPs on one rank.

    The same for a run and its resumption, as compiled and plain losses differ in the last digits.
    UserError if compilation was asked for and does not work."""
    if wanted == "off":
        return Choice(False, "as --compile says")
    if wanted == "auto":
        if not static_shapes:
            return Choice(False, "rows differ in length")
        if device.type == "cpu":
            seconds, needed = cpu_seconds(run_flops), CPU_COMPILE_SECONDS / CPU_SHARE_SAVED
            if seconds < needed:
                return Choice(
                    False, f"about {seconds:.0f} s of computing; compilation pays from {needed:.0f}"
                )
        elif device.type != "cuda":
            return Choice(False, f"not tried on {device.type}; --compile=on tries it")
    problem = probe_compile(device)
    if problem and wanted == "on":
        raise UserError(f"--compile=on: {problem}; use --compile=auto or --compile=off")
    if problem:
        return Choice(False, problem)
    return Choice(True, "a trial gave the plain result")


def cpu_seconds(flops: float) -> float:
    """About how long this machine's CPU computes on that many training FLOPs, not compiled."""
    return flops / (CPU_FLOPS_PER_CORE * torch.get_num_threads())


def _trial(x: Tensor, w: Tensor) -> Tensor:
    return F.relu(x @ w).square().sum()


def probe_compile(device: torch.device) -> str | None:
    """Compiles a small function, runs it forward and backward and compares with the plain one.
    What is wrong with it in a sentence, or None."""
    if device.type == "cpu" and not _cpp_compiler():
        return "no C++ compiler found (g++, clang++ or $CXX)"
    w = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64).requires_grad_()
    x = torch.linspace(1, -1, 32 * 64, device=device).view(32, 64)
    try:
        compiled = torch.compile(_trial, dynamic=False)
        results = []
        for function in (compiled, _trial):
            value = function(x, w)
            (grad,) = torch.autograd.grad(value, w)
            results.append((value.detach(), grad))
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    except AssertionError as e:
        return f"a compiled trial gives another result than the plain one ({_first_line(e)})"
    except Exception as e:  # a missing Triton, a compiler that fails: of any kind
        return f"compilation fails here ({_first_line(e)})"
    return None


def _first_line(error: BaseException) -> str:
    """What an error says, in brief: those of compilers go over pages."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def _cpp_compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)


class CompiledStep:
    """A model whose parts are compiled at its first call. If that fails, plain from then on.

    The trial above is small; a whole model may still meet an operation or a compiler's limit that
    it did not.

    The trunk is compiled as one, or, `by_block`, each block's own arithmetic (FSDP's hooks stand
    around a module's call, not in its forward). The loss is not part of it: its loop over chunks
    would be unrolled, which takes the compiler longer than all else, and its chunks would wait for
    each other in memory. On a GPU what is pointwise in a chunk is one kernel of its own. Within a
    call only: evaluations use the plain parts."""

    def __init__(self, model: Any, static_shapes: bool = True, by_block: bool = False) -> None:
        self.model, self.proven = model, False
        # Rows of varying length would compile anew for each; dynamic shapes at the second one do.
        dynamic = False if static_shapes else None
        parts = [(b, "forward") for b in blocks_of(model)] if by_block else [(model, "hidden")]
        self.parts = [
            (part, name, torch.compile(getattr(part, name), dynamic=dynamic))
            for part, name in parts
        ]
        self.kernel: Any = torch.compile(losses_in_place)  # the last chunk may be shorter

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        for part, name, compiled in self.parts:
            setattr(part, name, compiled)
        try:
            with loss_kernel(self.kernel) if self.kernel else nullcontext():
                return self.model(*args, **kwargs)
        finally:
            for part, name, _ in self.parts:
                delattr(part, name)

    def give_up(self, error: Exception) -> str:
        """Goes on without compilation; says why."""
        self.parts, self.kernel, self.proven = [], None, True
        return f"compiling the model fails, going on without ({_first_line(error)})"
