"""
The step of decoding as a program of its own: exported, compiled ahead of time, run without Python.

    programs = Programs()
    logits = programs(model, idx, at, memory)      # as fixed_memory.decode, on a CPU

torch.compile looks its program up at every call and hands it every weight: around a small model
that takes half as long as the model. A program of AOTInductor has the weights already (they stay
where they are, nothing is copied) and is given what changes. Making one takes some twenty seconds,
so it is kept in ~/.cache and found again by what it computes. Floor 1.6.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat import cpu_kernels
from nanochat.common import print0
from nanochat.fixed_memory import Memory, decode
from nanochat.models import layers as layer_functions

RANGES = ((1, 1), (2, 2**16))  # rows that share a program: a single one has no mask
CONSTANTS = 64  # numbers in a tensor that may become part of a program; torch 2.15 takes up to 8


class Decode(nn.Module):
    """fixed_memory.decode as the module that torch.export wants."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Weights that serving.py has joined are no children of the model; an exported program names
        # only those that are
        joined = [vars(m)["joined"] for m in model.modules() if "joined" in vars(m)]
        self.joined = nn.ModuleList(joined)

    def forward(
        self,
        idx: Tensor,
        at: Tensor,
        layers: list[tuple[Tensor, Tensor]],
        ids: Tensor | None,
        places: Tensor,
    ) -> Tensor:
        memory = Memory(layers, ids, places, alone=idx.size(0) == 1)
        own = cpu_kernels.attends(layers[0][0].size(-1))
        one_query = cpu_kernels.one_query if own else layer_functions.one_query
        return decode(self.model, idx, at, memory, one_query)


class Programs:
    """The programs of one model, made as they are needed: one for each range of rows."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], Callable[[list[Tensor]], list[Tensor]]] = {}
        self._held: list[Any] = []  # what programs point to must live as long as they
        self._table = 0  # positions in the rotary table that they have
        self._layers: Any = None
        self._tensors: list[Tensor] = []  # of the layers

    def __call__(self, model: Any, idx: Tensor, at: Tensor, memory: Memory) -> Tensor:
        """(B, 1) ids, (B,) positions, memory of B rows -> (B, V) float32 logits."""
        table = model.rotary.cos
        if table.size(0) != self._table:  # it has grown: another tensor
            self._runs, self._held, self._table = {}, [], table.size(0)
        rows = next(r for r in RANGES if r[0] <= idx.size(0) <= r[1])
        if rows not in self._runs:
            self._runs[rows] = self._load(model, rows, memory)
        if memory.layers is not self._layers:
            self._layers = memory.layers
            self._tensors = [tensor for kv in memory.layers for tensor in kv]
        ids = [] if memory.ids is None else [memory.ids]
        (logits,) = self._runs[rows]([idx, at, *self._tensors, *ids, memory.places])
        return logits

    def _load(
        self, model: Any, rows: tuple[int, int], memory: Memory
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        with torch.inference_mode(False), torch.no_grad():
            run, held = _program(_export(model, rows, memory), rows)
        self._held.append(held)
        return run


def _program(
    exported: Any, rows: tuple[int, int]
) -> tuple[Callable[[list[Tensor]], list[Tensor]], Any]:
    """(what runs it on the tensors of its arguments, what must live as long)."""
    weights = {**exported.state_dict, **exported.constants}
    settings: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": cpu_kernels.shims(),
    }
    if rows[1] > 1:
        # What one thread alone has written the others read slowly, so all take part in every loop
        settings["cpp.min_chunk_size"] = 16
    path = cpu_kernels.folder() / f"{_name(exported, weights, settings)}.pt2"
    if not path.is_file():
        said = f"decoding: compiling the step for {_said(rows)}; it is kept for the next start"
        print0(said, file=sys.stderr)
        _compile(exported, path, settings)
    program = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    wanted = {name: weights[name] for name in program.get_constant_fqns()}
    program.load_constants(wanted, check_full_update=True, user_managed=True)
    return program.loader.boxed_run, (program, wanted)


def _said(rows: tuple[int, int]) -> str:
    return "one row" if rows[1] == 1 else f"{rows[0]} rows and more"


def _export(model: Any, rows: tuple[int, int], memory: Memory) -> Any:
    """The torch.export.ExportedProgram for these numbers of rows, and for any memory like this."""
    dim = torch.export.Dim
    table = model.rotary.cos.size(0)
    B, held, width, seen = min(rows[0] + 1, rows[1]), 24, 28, min(20, table)  # any would do
    row = {} if rows[0] == rows[1] else {0: dim("rows", min=rows[0], max=rows[1])}
    most = dim("held", min=2, max=2**24)

    def like(tensor: Tensor, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=tensor.dtype)

    number = torch.zeros(B, dtype=torch.int64)
    layers = [tuple(like(t, B, t.size(1), held, t.size(3)) for t in kv) for kv in memory.layers]
    ids = None if memory.ids is None else like(memory.ids, B, width)
    example = (number[:, None], number, layers, ids, torch.arange(seen))
    dynamic = (
        row,
        row,
        [({**row, 2: most}, {**row, 2: most}) for _ in layers],
        None if ids is None else {**row, 1: dim("width", min=2, max=2**24)},
        {0: dim("seen", min=2, max=table)},
    )
    return torch.export.export(Decode(model), example, dynamic_shapes=dynamic, strict=False)


def _name(exported: Any, weights: dict[str, Tensor], settings: dict[str, Any]) -> str:
    """A name for what is computed, on which kind of weights, by which torch."""
    said: list[Any] = [torch.__version__, torch.backends.cpu.get_cpu_capability(), settings]
    said += [torch.get_num_threads(), exported.graph_module.code, exported.range_constraints]
    for name, t in weights.items():
        # Of a few numbers the compiler makes constants
        values = t.tolist() if t.numel() <= CONSTANTS else None
        said.append((name, t.dtype, tuple(t.shape), t.stride(), values))
    return hashlib.sha256("\n".join(map(str, said)).encode()).hexdigest()[:32]


def _compile(exported: Any, path: Path, settings: dict[str, Any]) -> None:
    """Makes the program; all of it or nothing under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=f"{folder}/step.pt2", inductor_configs=settings
        )
        os.replace(made, path)
