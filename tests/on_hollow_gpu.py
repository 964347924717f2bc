"""
What tests/test_hollow_gpu.py runs in a process of its own, where the hollow GPU is.

    python -m bench.hollow_gpu tests.on_hollow_gpu train|memory|autocast|decode|ranks|refuse

Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
from torch._dynamo.utils import counters

from bench.hollow_gpu import counts
from bench.memory import measured_peak
from nanochat import distributed
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo
from nanochat.flags import TrainFlags
from nanochat.kv_cache import KVCache
from nanochat.models import build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.plan import Planner, Setup
from nanochat.recompute import MODES
from nanochat.rows import Rows
from nanochat.sampling import Sampling
from nanochat.serving import make_ready
from nanochat.shard import build_for
from nanochat.static_step import GraphStep, Step
from nanochat.step import TrainStep
from nanochat.trial import confirm

GPU = torch.device("cuda", 0)


def train() -> dict[str, Any]:
    """A compiled step in float8 with windows and recomputed blocks: the trial, two steps."""
    config, _ = make_config("turbo", 2, 512, 256)
    model = build_model(config, GPU, seed=1)
    args = TrainFlags(compile="on", fp8=True)
    optimizer = make_optimizer(model, 0.1, 0.01, 0.01)
    step = TrainStep(args, DistInfo(0, 0, 1, GPU), model, optimizer, run_tokens=10**9)
    micro_batch = confirm((4, "block"), step, rows_per_step=8, length=256)
    graphs = counters["stats"]["unique_graphs"]
    idx = torch.zeros((micro_batch, 256), dtype=torch.int64, device=GPU)
    batches = [MicroBatch(idx, idx)] * 2
    rates = (1.0, 0.95, 1.0)
    step.take(1, batches, rates, False).numbers.read()
    before = counts()
    torch.cuda.set_sync_debug_mode("error")
    step.take(2, batches, rates, False)
    torch.cuda.set_sync_debug_mode("default")
    after = counts()
    return {
        "computing": str(step),
        "micro_batch": micro_batch,
        "breaks": sum(counters["graph_break"].values()),
        "compiled_again": counters["stats"]["unique_graphs"] - graphs,
        "kernels": after["kernels"] - before["kernels"],
    }


def memory() -> dict[str, Any]:
    """Estimates over peaks: plain and compiled, with most of it in logits and in activations."""
    found = {}
    for compiled, arch, vocab_size in ((False, "qwen2.5", 8192), (True, "gpt", 65_536)):
        config, _ = make_config(arch, 2, vocab_size, 2048)
        planner = Planner(config, Setup("cuda", bf16=True, compiled=compiled), rows=8)
        for mode in MODES[:1] if compiled else MODES:
            peak = measured_peak(config, 4, 2048, mode, device="cuda", bf16=True, compiled=compiled)
            found[f"{arch} {mode}"] = planner.memory(4, mode).total / peak
            torch.cuda.empty_cache()
    return found


@torch.inference_mode()
def autocast() -> dict[str, Any]:
    """Rows of different lengths decoded as in training, where autocast is on: what keys and values
    are held in."""
    found = {}
    for arch in ("gpt", "qwen2.5", "turbo"):
        config, _ = make_config(arch, 2, 512, 256)
        rows = Rows(build_model(config, GPU, seed=1), config.vocab_size)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            samplings = [Sampling(9)] * 2
            rows.join(rows.prefill([[1, 2, 3], [1] * 40]), samplings)
            rows.forward([[1], [2]])
        held = [t for kv in rows.cache.layers if kv is not None for t in kv]
        found[arch] = [sorted({str(t.dtype) for t in held}), rows.cache.lengths]
    return found


@torch.inference_mode()
def decode() -> dict[str, Any]:
    """Captured steps of int8 weights, of two lengths; the second needs no compilation."""
    config, _ = make_config("qwen2.5", 2, 512, 1024)
    model = make_ready(build_model(config, GPU, seed=1), torch.bfloat16, "int8")
    Step._prove = lambda self, *inputs: self.proven.add(self._case(1))  # type: ignore[method-assign]
    cache = KVCache(config.n_layer, 1, GPU, room=1024, most=1)
    step = GraphStep(model)
    idx, found = torch.zeros((1, 1), dtype=torch.int64, device=GPU), []
    model.hidden(idx, cache)
    for length in (100, 101, 300, 301):
        cache.set_lengths([length])
        before, programs = counts(), counters["stats"]["unique_graphs"]
        step(idx, cache)
        found.append({name: n - before[name] for name, n in counts().items()})
        found[-1]["programs"] = counters["stats"]["unique_graphs"] - programs
    return {"steps": found, "graphs": [list(key) for key in step.graphs], "layers": config.n_layer}


def ranks() -> dict[str, Any]:
    """Two steps of each way to share out, over NCCL, and a sum that is really one."""
    config, _ = make_config("gpt", 2, 512, 256)
    found: dict[str, Any] = {}
    with distributed.session("cuda", 1) as info:
        for shard in ("zero", "fsdp"):
            args = TrainFlags(compile="off", shard=shard)  # type: ignore[arg-type]
            model = build_for(args, config, info, "none", seed=1)
            optimizer = make_optimizer(model, 0.1, 0.01, 0.01, shard=shard)
            step = TrainStep(args, info, model, optimizer, run_tokens=1)
            idx = torch.zeros((2, 256), dtype=torch.int64, device=info.device)
            for number in (1, 2):
                step.take(number, [MicroBatch(idx, idx)], (1.0, 0.95, 1.0), False).numbers.read()
            found[shard] = sorted({p.device.type for p in model.parameters()})
        found["sum"] = distributed.sum_over_ranks(info.rank + 1, device=info.device)
        found["rank"] = info.rank
    return found


def refuse() -> dict[str, Any]:
    """What CUDA refuses is refused: more memory than there is, and to wait within a capture."""
    said = []
    try:
        torch.empty(10**15, device=GPU)
    except torch.OutOfMemoryError as e:
        said.append(str(e))
    values = torch.zeros(2, device=GPU)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            values.tolist()
    except RuntimeError as e:
        said.append(str(e))
    step = GraphStep(build_model(make_config("gpt", 2, 512, 256)[0], GPU, seed=1))
    waited: list[int] = []

    def elsewhere() -> torch.Tensor:  # as another worker does, for another GPU
        thread = threading.Thread(target=lambda: waited.append(len(values.tolist())))
        thread.start()
        thread.join()
        return values

    step.capture(elsewhere)
    return {"said": said, "waited": waited}


if __name__ == "__main__":
    parts = {
        "train": train, "memory": memory, "autocast": autocast, "decode": decode, "ranks": ranks,
        "refuse": refuse,
    }  # fmt: skip
    print(json.dumps(parts[sys.argv[1]]()))
