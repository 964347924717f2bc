"""
How a step of decoding on fixed memory is run: as it is written, compiled, or as a CUDA graph.

What it computes is fixed_memory.decode. On a CPU it is compiled ahead of time (step_program.py), on
a GPU by torch.compile, which a captured graph then repeats without either. Floor 1.75.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import is_
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError, print0, warn0
from nanochat.fixed_memory import Memory, decode
from nanochat.kv_cache import KVCache, int64
from nanochat.step_program import Programs

STEPS = ("plain", "compiled", "graph")


def _copied(function: Any) -> Any:
    """The same function with code of its own, to which torch.compile attaches its programs: those
    of one model must not be found for another, which the guards would not prevent."""
    code, defaults = function.__code__.replace(), function.__defaults__
    return FunctionType(code, function.__globals__, function.__name__, defaults)


def _of_inputs(guards: Sequence[Any]) -> list[bool]:
    """Which guards stay: those on the tensors that a step is given, and on their sizes."""
    tensors = torch.compiler.keep_tensor_guards_unsafe(guards)
    return [keep or guard.guard_type == "SHAPE_ENV" for keep, guard in zip(tensors, guards)]


def bucket_of(number: int) -> int:
    """The power of two that serves for so many rows, or positions."""
    return 1 << (number - 1).bit_length()


class Step:
    """Decodes one token for every row of a KVCache on fixed memory, compiled where that works."""

    def __init__(self, model: Any, compile: str = "auto") -> None:
        """`compile`: "ahead" (for a CPU), "traced" (by torch.compile) or "off"; "auto" is the one
        of the first two that the device asks for."""
        self.model = model
        if compile == "auto":
            compile = "ahead" if model.get_device().type == "cpu" else "traced"
        self.decode: Callable[..., Tensor] = decode
        if compile == "ahead":
            self.decode = Programs()
        elif compile == "traced":
            # Guards on weights and settings, which do not change here, take a twentieth of a small
            # model's time
            self.decode = torch.compile(_copied(decode), options={"guard_filter_fn": _of_inputs})
        self.traced = compile == "traced"
        # Numbers of rows with which it said what the plain one says, and the size of the rotary
        # table then: a larger one is another tensor, for which a program is made anew
        self.proven: set[tuple[int, int]] = set()
        self._memory = Memory([], None, torch.empty(0))
        self._held: list[Any] = []  # the cache's memory that it shows
        self._room = 0  # positions that there is memory for

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """(R, 1) ids -> (R, V) logits. The cache's lengths are its owner's to change."""
        R, end = idx.size(0), cache.end(1)
        if end > self.model.rotary.cos.size(0):
            self.model.rotary.fill(2 * end)
        layers, ids, places, _ = self.prepare(cache, R)
        # What no row has reached need not be read
        memory = Memory(layers, ids, places[:end], alone=R == 1)
        if self.traced and self._case(R) not in self.proven:
            torch._dynamo.maybe_mark_dynamic(memory.places, 0)
        return self.run(idx, int64(cache.lengths, idx.device), memory)

    def prepare(self, cache: KVCache, rows: int) -> Memory:
        """Memory for one more token of each row."""
        held = [*cache.layers, cache.ids]
        same = len(self._held) == len(held) and all(map(is_, held, self._held))
        if not same or cache.end(1) > self._room or self._memory.layers[0][0].size(0) != rows:
            cache.reserve(rows, cache.end(1))
            self._held, self._memory = [*cache.layers, cache.ids], self._shown(cache, rows)
        return self._memory

    def _shown(self, cache: KVCache, rows: int) -> Memory:
        layers = [(kv[0][:rows], kv[1][:rows]) for kv in cache.layers if kv is not None]
        size = layers[0][0].size(2)
        ids = None if cache.ids is None else cache.ids[:rows]
        self._room = size if ids is None else min(size, ids.size(1) - 1)
        if self.traced:  # one program for every size of the memory
            for tensor in (t for kv in layers for t in kv):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            if ids is not None:
                torch._dynamo.maybe_mark_dynamic(ids, 1)
        return Memory(layers, ids, torch.arange(size, device=cache.device))

    def _case(self, rows: int) -> tuple[int, int]:
        return rows, self.model.rotary.cos.size(0)

    def run(self, idx: Tensor, at: Tensor, memory: Memory) -> Tensor:
        if self.decode is not decode and self._case(idx.size(0)) not in self.proven:
            self._prove(idx, at, memory)
        return self.decode(self.model, idx, at, memory)

    def _prove(self, idx: Tensor, at: Tensor, memory: Memory) -> None:
        """Compares the first step of so many rows with the plain one, and goes on plainly if they
        differ."""
        plain = decode(self.model, idx, at, memory)
        try:
            found = self.decode(self.model, idx, at, memory)
            near = (found - plain).abs().max() <= 0.02 * plain.abs().max().clamp(min=1e-6)
            problem = "" if bool(near) else "it gives other logits than the plain one"
        except Exception as e:  # a missing compiler, or one that fails: of any kind
            lines = str(e).strip().splitlines()
            problem = f"{type(e).__name__}: {lines[0][:200] if lines else ''}"
        self.proven.add(self._case(idx.size(0)))
        if problem:
            self.decode, self.traced = decode, False
            warn0(f"the step of decoding is not compiled: {problem}")


class GraphStep(Step):
    """A Step captured as a CUDA graph, for batches of 1, 2, 4, ... rows that have 256, 512, 1,024,
    ... positions at most: launching its hundreds of kernels costs as much as launching one, and a
    short text does not pay for reading a long one's memory. The memory is captured too: when it has
    grown, graphs are made anew, so a cache that has `room` for the whole context from the start is
    best."""

    LEAST = 256  # positions

    def __init__(self, model: Any, compile: str = "traced") -> None:
        super().__init__(model, compile)
        # By rows and positions
        self.graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor, Tensor, Tensor]] = {}
        self._where: tuple[int, ...] = ()
        self._pool: Any = None  # what is between a step's kernels, of all graphs

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        R = idx.size(0)
        bucket = bucket_of(R)
        memory = self.prepare(cache, bucket)
        if memory.places.size(0) > self.model.rotary.cos.size(0):
            self.model.rotary.fill(memory.places.size(0))
        where = tuple(t.data_ptr() for kv in memory.layers for t in kv)
        where += () if memory.ids is None else (memory.ids.data_ptr(),)
        if where != self._where:
            self.graphs, self._where = {}, where
        seen = max(self.LEAST, bucket_of(cache.end(1)))
        key = (bucket, min(seen, memory.places.size(0)))
        if key not in self.graphs:
            if not self.graphs:
                said = f"decoding: capturing a graph for {bucket} rows, others as they are needed"
                print0(said, file=sys.stderr)
            self.graphs[key] = self.record(bucket, memory._replace(places=memory.places[: key[1]]))
        replay, static_idx, static_at, logits = self.graphs[key]
        # What is written into the rows of nobody, at their first place, is overwritten when
        # somebody takes them.
        static_at[:R].copy_(int64(cache.lengths), non_blocking=True)
        static_idx[:R].copy_(idx, non_blocking=True)
        static_at[R:] = 0
        replay()
        return logits[:R]

    def record(
        self, rows: int, memory: Memory
    ) -> tuple[Callable[[], None], Tensor, Tensor, Tensor]:
        """(what runs it again, its ids, its positions, its logits)."""
        device = memory.places.device
        # Trials at the last position that is looked at: what they write there is behind every
        # row's end, or where its new token will be
        last = memory.places.size(0) - 1
        if self.traced:
            torch._dynamo.maybe_mark_dynamic(memory.places, 0)
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
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Another thread may serve another GPU meanwhile, and allocate, and wait
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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
