"""
What a training step says of itself, without holding it up: its numbers, its time, its garbage.

A GPU works through a queue that the program fills ahead of it. Reading a number from it would wait
until the queue is empty, and then the GPU would wait for the program. So a number is copied to the
host behind the work that made it, and is read one step later, when there is more work in the queue.
The log has the same rows as if it had been read at once. Floor 3.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class HostCopy:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.copied: torch.cuda.Event | None = None
        if values.is_cuda:
            # Page-locked memory: the copy is queued like all else, and the event behind it.
            self.values = torch.empty_like(values, device="cpu", pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[float]:
        """The numbers; waits for what was queued before the copy, and for nothing after it."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


@dataclass
class StepRecord:
    """A step that has been taken, with what is to be said of it."""

    step: int  # its number, from 1
    lr_mul: float
    tokens: int  # over all ranks
    skipped: bool  # its gradient overflowed in float16
    numbers: HostCopy  # mean loss, norm of the gradient


class Meter:
    """Hands each step's numbers and seconds to `account(record, loss, norm, seconds)`, in order:
    at once, or, with `lag`, when the next step has been queued. `gaps`: what lies between two steps
    is waiting for data, and counts as time of the second."""

    def __init__(
        self,
        account: Callable[[StepRecord, float, float, float], None],
        lag: bool,
        gaps: bool = True,
    ) -> None:
        self.account, self.lag, self.gaps = account, int(lag), gaps
        self._pending: deque[StepRecord] = deque()
        self._boundary: float | None = None  # end of the last step; None: the clock stands still

    def begin(self) -> None:
        """A step begins."""
        if self._boundary is None:
            self._boundary = time.perf_counter()

    def end(self, record: StepRecord) -> None:
        """A step is taken, or queued."""
        self._pending.append(record)
        self._read(self.lag)
        if not self.gaps:
            self.pause()

    def flush(self) -> None:
        """Accounts for every step taken: waits for the device."""
        self._read(0)

    def pause(self) -> None:
        """Before an evaluation or a save: what comes until the next step is not the steps' time."""
        self.flush()
        self._boundary = None

    def _read(self, leave: int) -> None:
        while len(self._pending) > leave:
            record = self._pending.popleft()
            loss, norm = record.numbers.read()
            now = time.perf_counter()
            began = now if self._boundary is None else self._boundary
            self._boundary = now
            self.account(record, loss, norm, now - began)


class QuietCollector:
    """Python's garbage collector, kept from looking through everything in the middle of a step.

    torch makes many small objects and few cycles. A full collection goes through a million objects
    that will never be garbage, and takes up to half a second (karpathy/nanochat, dev/LOG.md). So:
    one collection after the first step, what is left then is set apart for good, and later ones
    come when there is an evaluation anyway, or every `EVERY` steps."""

    EVERY = 5000

    def __init__(self) -> None:
        self._started = self._quiet = False
        self._was_enabled = gc.isenabled()
        self._steps = 0

    def start(self) -> None:
        """From the next step on; until restore()."""
        self._started, self._was_enabled = True, gc.isenabled()

    def after_step(self) -> None:
        """To be called between two steps."""
        self._steps += 1
        if not self._started:
            return
        if not self._quiet:
            self._quiet = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self._steps >= self.EVERY:
            self.collect()

    def collect(self) -> None:
        """Collects what has come since, if steps have been taken."""
        if self._quiet and self._steps > 0:
            gc.collect()
            self._steps = 0

    def restore(self) -> None:
        """Everything as it was before start()."""
        if self._quiet:
            self._started = self._quiet = False
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()
