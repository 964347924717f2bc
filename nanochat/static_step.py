"""
A step of decoding on fixed memory: what can be compiled, and captured as a CUDA graph.

`decode` is one token for every row, as a function of tensors alone: the ids, where they stand, and
the memory of a KVCache, which it writes to. No number of it is on the host, so that one graph
serves every position. It costs what the rows' memory has room for, not what they hold: of positions
behind a row's end keys are read, and hidden by the mask. Floor 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.common import UserError, print0, warn0
from nanochat.kv_cache import KVCache

STEPS = ("plain", "compiled", "graph")


class Memory(NamedTuple):
    """The memory of a KVCache's first B rows."""

    layers: list[tuple[Tensor, Tensor]]  # (B, K, S or more, E) keys and values
    ids: Tensor | None  # (B, 1 + S or more)
    places: Tensor  # (S,): 0, 1, 2...: the positions that are looked at
    alone: bool = False  # one row, and `places` ends where it ends


class StaticCache:
    """Fixed memory for one more token of each row. What layers.KVCacheLike says, for T = 1."""

    def __init__(self, memory: Memory, at: Tensor) -> None:
        """`at`: (B,), where the new tokens stand."""
        (self.layers, self.ids, self.places, self.alone), self.at = memory, at
        self.rows = torch.arange(at.size(0), device=at.device)
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, T: int) -> Tensor:
        return self.at[:, None]  # (B, 1)

    def end(self, T: int) -> int:
        return self.places.size(0)

    def mask(self, T: int, window: int | None = None) -> Tensor | None:
        if self.alone and window is None:
            return None  # all that is looked at is its own
        if window not in self._masks:
            visible = self.places <= self.at[:, None]  # (B, S)
            if window is not None:
                visible = visible & (self.places > self.at[:, None] - window)
            self._masks[window] = visible[:, None, None]  # (B, 1, 1, S)
        return self._masks[window]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layers[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys[:, :, : self.end(1)], values[:, :, : self.end(1)]

    def previous(self, idx: Tensor) -> Tensor:
        assert self.ids is not None
        self.ids[self.rows, self.at + 1] = idx[:, 0]
        return self.ids[self.rows, self.at][:, None]

    def advance(self, T: int) -> None:
        """Its owner counts."""


def decode(model: Any, idx: Tensor, at: Tensor, memory: Memory) -> Tensor:
    """(B, 1) ids, (B,) positions, memory of B rows -> (B, V) float32 logits."""
    x = model.hidden(idx, StaticCache(memory, at))  # (B, 1, D)
    return model.logits(x[:, -1])


def _copied(function: Any) -> Any:
    """The same function with code of its own, to which torch.compile attaches its programs: those
    of one model must not be found for another, which the guards would not prevent."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards stay: those on the tensors that a step is given, and on their sizes."""
    tensors = torch.compiler.keep_tensor_guards_unsafe(guards)
    return [keep or guard.guard_type == "SHAPE_ENV" for keep, guard in zip(tensors, guards)]


def bucket_of(rows: int) -> int:
    """The batch size that serves so many rows: a power of two."""
    return 1 << (rows - 1).bit_length()


class Step:
    """Decodes one token for every row of a KVCache on fixed memory, compiled where that works."""

    def __init__(self, model: Any, compile: bool = True) -> None:
        self.model = model
        self.decode: Callable[..., Tensor] = decode
        if compile:
            # Guards on weights and settings, which do not change here, and calls from Python would
            # each be a twentieth of a small model's time
            options: dict[str, Any] = {"guard_filter_fn": _of_inputs}
            if model.get_device().type == "cpu":
                options["cpp_wrapper"] = True
            self.decode = torch.compile(_copied(decode), options=options)
        self.proven = not compile
        self._memory = Memory([], None, torch.empty(0))
        self._held: list[Any] = []  # the cache's memory that it shows
        self._sizes: set[int] = set()  # numbers of rows that there may be programs for

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """(R, 1) ids -> (R, V) logits. The cache's lengths are its owner's to change."""
        memory = self.prepare(cache, idx.size(0))
        # What no row has reached need not be read
        memory = memory._replace(places=memory.places[: cache.end(1)], alone=idx.size(0) == 1)
        if self.decode is not decode and idx.size(0) not in self._sizes:
            self._sizes.add(idx.size(0))  # not at every step: it costs a tenth of a small model's
            torch._dynamo.maybe_mark_dynamic(memory.places, 0)
        return self.run(idx, torch.tensor(cache.lengths, device=idx.device), memory)

    def prepare(self, cache: KVCache, rows: int) -> Memory:
        """Memory for one more token of each row, and angles for every position of it."""
        cache.reserve(rows, cache.end(1))
        held = [*cache.layers, cache.ids]
        same = len(self._held) == len(held) and all(a is b for a, b in zip(held, self._held))
        if not same or self._memory.layers[0][0].size(0) != rows:
            self._held, self._memory = held, self._shown(cache, rows)
        return self._memory

    def _shown(self, cache: KVCache, rows: int) -> Memory:
        layers = [(kv[0][:rows], kv[1][:rows]) for kv in cache.layers if kv is not None]
        size, rotary = layers[0][0].size(2), self.model.rotary
        if size > rotary.cos.size(0):
            rotary.fill(size)
        ids = None if cache.ids is None else cache.ids[:rows]
        if self.decode is not decode:  # one program for every size of the memory
            for tensor in (t for kv in layers for t in kv):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            if ids is not None:
                torch._dynamo.maybe_mark_dynamic(ids, 1)
        return Memory(layers, ids, torch.arange(size, device=cache.device))

    def run(self, idx: Tensor, at: Tensor, memory: Memory) -> Tensor:
        if not self.proven:
            self._prove(idx, at, memory)
        return self.decode(self.model, idx, at, memory)

    def _prove(self, idx: Tensor, at: Tensor, memory: Memory) -> None:
        """Compares the first step with the plain one, and goes on plainly if they differ."""
        self.proven = True
        plain = decode(self.model, idx, at, memory)
        try:
            found = self.run(idx, at, memory)
            near = (found - plain).abs().max() <= 0.02 * plain.abs().max().clamp(min=1e-6)
            problem = "" if bool(near) else "it gives other logits than the plain one"
        except Exception as e:  # a missing compiler, or one that fails: of any kind
            lines = str(e).strip().splitlines()
            problem = f"{type(e).__name__}: {lines[0][:200] if lines else ''}"
        if problem:
            self.decode = decode
            warn0(f"the step of decoding is not compiled: {problem}")


class GraphStep(Step):
    """A Step captured as a CUDA graph, for batches of 1, 2, 4, ... rows: launching its hundreds of
    kernels costs as much as launching one. The memory is captured too: when it has grown, graphs
    are made anew, so a cache that has `room` for the whole context from the start is best."""

    def __init__(self, model: Any, compile: bool = True) -> None:
        super().__init__(model, compile)
        self.graphs: dict[int, tuple[Callable[[], None], Tensor, Tensor, Tensor]] = {}
        self._where: tuple[int, ...] = ()

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        R = idx.size(0)
        bucket = bucket_of(R)
        memory = self.prepare(cache, bucket)
        where = tuple(t.data_ptr() for kv in memory.layers for t in kv)
        where += () if memory.ids is None else (memory.ids.data_ptr(),)
        if where != self._where:
            self.graphs, self._where = {}, where
        if bucket not in self.graphs:
            if not self.graphs:
                print0(f"decoding: capturing a graph for {bucket} rows, others as they are needed")
            self.graphs[bucket] = self.record(bucket, memory)
        replay, static_idx, static_at, logits = self.graphs[bucket]
        # What is written into the rows of nobody, at their first place, is overwritten when
        # somebody takes them.
        static_at[:R].copy_(torch.tensor(cache.lengths), non_blocking=True)
        static_idx[:R].copy_(idx, non_blocking=True)
        static_at[R:] = 0
        replay()
        return logits[:R]

    def record(
        self, rows: int, memory: Memory
    ) -> tuple[Callable[[], None], Tensor, Tensor, Tensor]:
        """(what runs it again, its ids, its positions, its logits)."""
        device = memory.places.device
        # Trials at the last position, which no row has reached: what they write there is behind
        # every row's end
        last = memory.places.size(0) - 1
        idx = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        at = torch.full((rows,), last, device=device)
        replay, logits = self.capture(lambda: self.run(idx, at, memory))
        return replay, idx, at, logits

    def capture(self, action: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what repeats the action, the tensor that its result is always in)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, chooses kernels, takes memory
                action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = action()
        return graph.replay, logits


def make_step(name: str, model: Any) -> Step | None:
    """The step of that name; None: the model as it is. UserError if it is not to be had."""
    if name == "plain":
        return None
    if name == "compiled":
        return Step(model)
    if name == "graph":
        if model.get_device().type != "cuda":
            raise UserError(
                f"--step=graph needs CUDA, the device is {model.get_device().type}; use "
                "--step=compiled or --step=plain"
            )
        return GraphStep(model)
    raise UserError(f"--step={name} is not known; choose one of {', '.join(STEPS)}")
