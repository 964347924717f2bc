"""
In which number format to compute: chosen by trying it out, once, with the reason said.

Weights, optimizer and loss are always float32; what is chosen is the format of the matrix products
(autocast). bfloat16 has float32's range and needs nothing else. float16, for GPUs before 2020, has
not: small gradients vanish in it, so the loss is scaled up before the backward pass and the
gradients down after it (Micikevicius et al. 2018, arXiv 1710.03740). Floor 1.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.distributed import all_reduce_sum, local

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TENSOR_CORES = (7, 0)  # CUDA capability from which float16 products are faster than float32 ones


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Precision:
    """The format of matrix products on a device, and why it is that one."""

    device: torch.device
    dtype: torch.dtype
    why: str

    @property
    def name(self) -> str:
        """float32, bfloat16 or float16."""
        return _name(self.dtype)

    def autocast(self) -> Any:
        """A context in which matrix products are computed in this format."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


@functools.lru_cache(maxsize=8)
def choose_precision(wanted: str, device: torch.device) -> Precision:
    """What --dtype=`wanted` (auto, float32, bfloat16, float16) means on the device.

    UserError if a format that was asked for cannot be computed in here."""
    if wanted == "auto":
        return _best(device)
    dtype = DTYPES[wanted]
    if dtype != torch.float32:
        problem = _fails_elsewhere(dtype) if device.type == "cpu" else _fails_here(dtype, device)
        if problem:
            raise UserError(f"--dtype={wanted}: {problem}; use --dtype=auto or --dtype=float32")
    return Precision(device, dtype, "as --dtype says")


def autocast(device: torch.device, dtype: str = "auto") -> Any:
    """The context of choose_precision, for evaluations."""
    return choose_precision(dtype, device).autocast()


def _best(device: torch.device) -> Precision:
    if device.type != "cuda":
        return Precision(device, torch.float32, f"the safe choice on {device.type}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = torch.bfloat16, "native here"
    else:
        major, minor = torch.cuda.get_device_capability(device)
        why = f"capability {major}.{minor} has no bfloat16"
        dtype = torch.float16 if (major, minor) >= TENSOR_CORES else torch.float32
    problem = _fails_here(dtype, device)
    if problem:
        return Precision(device, torch.float32, f"in {_name(dtype)} {problem}")
    return Precision(device, dtype, why)


# -------------------------------------------------------------------------------------------------
# Trying it out


def _fails_here(dtype: torch.dtype, device: torch.device) -> str | None:
    """Runs a linear layer, forward and backward. What is wrong with it, or None."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=generator).to(device) for n in (512, 1024))
    w.requires_grad_()
    exact = F.linear(x, w.detach())
    try:
        with torch.autocast(device.type, dtype=dtype):
            product = F.linear(x, w)
        product.float().sum().backward()
        difference = float((product.detach().float() - exact).norm() / exact.norm())
    except RuntimeError as e:
        return f"a small matrix product fails here ({str(e).splitlines()[0]})"
    # bfloat16 has 8 bits of mantissa: factors and results are off by up to 2^-9 of themselves
    if product.dtype != dtype or not difference < 0.02:
        return f"a small matrix product differs by {difference:.1%} from float32's"
    return None


TRY = """
import torch
from nanochat.precision import _fails_here
print(_fails_here(torch.{}, torch.device("cpu")) or "works")
"""


def _fails_elsewhere(dtype: torch.dtype) -> str | None:
    """The same in a process of its own: on some CPUs it ends with an illegal instruction."""
    command = [sys.executable, "-c", TRY.format(_name(dtype))]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=300,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as e:
        return f"it could not be tried ({e})"
    if done.returncode == 0:
        said = done.stdout.strip().splitlines()[-1:]
        return None if said == ["works"] else " ".join(said)
    if done.returncode < 0:
        try:
            name = signal.Signals(-done.returncode).name
        except ValueError:
            name = f"signal {-done.returncode}"
        return (
            f"a small matrix product in it ended a process of its own with {name}. If that is "
            "SIGILL, oneDNN takes this CPU for a newer one than it is: the environment variable "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 may help"
        )
    last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    return f"trying a small matrix product in it failed ({last})"


# -------------------------------------------------------------------------------------------------
# float16


class LossScaler:
    """A factor on the loss that keeps float16 gradients above zero and below infinity.

    It is halved when a gradient overflows, and that step is left out; it is doubled after
    `GROWTH_STEPS` steps without. All ranks leave out the same steps. torch.amp.GradScaler does the
    same for torch.optim optimizers, which keep their gradients to themselves; ours sums them over
    the ranks within its step, so an overflow must be known to all before that, and GradScaler's
    count of overflows is private."""

    GROWTH_STEPS = 2000  # as in torch.amp.GradScaler
    LARGEST = 2.0**24

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 2.0**16  # powers of two change no digits
        self.good_steps = 0  # since the scale was last changed

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self.scale if self.enabled else loss

    def unscale(self, params: Iterable[Tensor]) -> bool:
        """Brings the gradients back to their size. Whether they are finite on all ranks, which
        must all call it; if not, the step is to be left out.

        UserError when they overflow at any scale."""
        if not self.enabled:
            return True
        params = list(params)
        grads = [local(p.grad) for p in params if p.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        overflow = torch.zeros((), device=params[0].device)
        if grads:
            largest = torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))
            overflow += (~largest.isfinite()).float()
        # Reading it waits for the device. The GPUs that need float16 are slow enough not to care.
        finite = float(all_reduce_sum(overflow)) == 0
        if finite and grads:
            torch._foreach_mul_(grads, 1 / self.scale)
        self._adapt(finite)
        return finite

    def _adapt(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
            if self.scale < 2.0**-10:  # far below 1: it is not float16 that is too small
                raise UserError(
                    "--dtype=float16: gradients are infinite at any scale of the loss; the run has "
                    "diverged. Lower --matrix_lr, --embedding_lr and --unembedding_lr, or use "
                    "--dtype=float32"
                )
        elif self.good_steps >= self.GROWTH_STEPS:
            self.scale, self.good_steps = min(2 * self.scale, self.LARGEST), 0

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"scale": self.scale, "good_steps": self.good_steps} if self.enabled else {}

    def load_state(self, state: dict[str, float]) -> None:
        """Takes what state() gave; nothing, if that run had no scaler."""
        if self.enabled and state:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
