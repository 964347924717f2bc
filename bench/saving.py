"""
How long a save holds up training, how much memory it takes, how long a checkpoint takes to load.

    python -m bench.saving [--depth=12]

Saves a model with its optimizer state as training does, and compares the time that save() takes
with that of a bare copy of the same tensors, and with the time until the files are whole.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import surroundings
from nanochat import distributed, flags
from nanochat.checkpoint import FILES, load_weights, step_dir
from nanochat.common import write_json
from nanochat.manifest import find_damage
from nanochat.models import build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.step import TrainStep
from nanochat.train import Trainer

RESULT = Path(__file__).resolve().parent / "results" / "saving.json"
ROUNDS = 4


@dataclass
class Args(flags.TrainFlags):
    """Measure how long saving and loading take."""

    depth: int = 12
    """Size of the model, with 65,536 tokens."""
    out: str = str(RESULT)
    """File for the result; empty: none."""


def seconds_of(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def peak_memory() -> float:
    """Of this process since its start, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(args: Args, info: distributed.DistInfo) -> dict[str, Any]:
    config, tag = make_config("gpt", args.depth, 65_536, 1024)
    model = build_model(config, info.device, seed=1)
    optimizer = make_optimizer(model, 0.2, 0.004, 0.02)
    like = dict(model.named_parameters())
    optimizer.load_state_dict(lambda name: torch.rand_like(like[name.rsplit("/", 1)[0]]), 1)
    meta = {"tokenizer": None, "tokenizer_fingerprint": "", "data": {}}
    trainer = Trainer("base", tag, TrainStep(args, info, model, optimizer), ROUNDS, meta)
    tensors = [*like.values(), *(t for state in optimizer.state.values() for t in state.values())]
    before = peak_memory()
    blocked, whole, copy = [], [], []
    for step in range(1, ROUNDS + 1):  # in turns: whatever else the machine does is fair to both
        trainer.state.step = step
        started = time.perf_counter()
        blocked.append(seconds_of(trainer.save))
        trainer._wait_for_save()
        whole.append(time.perf_counter() - started)
        extra = peak_memory() - before
        copy.append(seconds_of(lambda: [t.detach().to("cpu", copy=True) for t in tensors]))
    folder = step_dir("base", tag, ROUNDS)
    return {
        **surroundings(),
        "device": info.device.type,
        "parameters": sum(p.numel() for p in like.values()),
        "checkpoint_gb": round(sum((folder / name).stat().st_size for name in FILES) / 1e9, 2),
        "rounds": ROUNDS,  # the fastest of these:
        "save_blocks_seconds": round(min(blocked), 2),
        "bare_copy_seconds": round(min(copy), 2),
        "save_whole_seconds": round(min(whole), 2),
        "extra_peak_memory_gb": round(extra, 2),
        "verify_seconds": round(seconds_of(lambda: find_damage(folder, FILES)), 2),
        "load_weights_seconds": round(seconds_of(lambda: load_weights(folder, model)), 2),
    }


def main(args: Args) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        distributed.session(args.device_type, args.seed) as info,
    ):
        os.environ["NANOCHAT_BASE_DIR"] = folder
        result = measure(args, info)
    for name, value in result.items():
        print(f"{name}: {value}")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    flags.run(main, Args)
