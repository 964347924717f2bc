"""
One of bench/scale.py's ranks: steps of a small model on gloo, with their time and traffic.

    python -m bench.scale_worker --ranks=2 --shard=zero

starts the ranks by torchrun, in a network namespace of their own where that is allowed, and prints
one line of JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from nanochat import distributed, flags
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo, local
from nanochat.flags import TrainFlags
from nanochat.models import Config, build_model, make_config
from nanochat.optim import make_optimizer
from nanochat.shard import build_sharded, init_sharded
from nanochat.step import TrainStep

ROWS, LENGTH, VOCAB, DEPTH = 2, 128, 4096, 4  # of one rank's step
STEPS, WARM = 6, 2
SHARDS = ("none", "zero", "fsdp")
NAMESPACE = "NANOCHAT_BENCH_NAMESPACE"  # set in the ranks' environment where they have their own


@dataclass
class Args:
    """Measure steps of so many ranks."""

    ranks: int = 2
    """Ranks, on this machine."""
    shard: Literal["none", "zero", "fsdp"] = "zero"
    """How they share out the training state."""


def model_config() -> Config:
    return make_config("gpt", DEPTH, VOCAB, LENGTH)[0]


def measure(ranks: int, shard: str) -> dict[str, Any]:
    """Starts the ranks and returns what rank 0 found."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={ranks}",
        "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "-m", "bench.scale_worker",
        f"--ranks={ranks}", f"--shard={shard}",
    ]  # fmt: skip
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    if own_network():
        command = ["unshare", "-Urn", sys.executable, "-m", "bench.scale_worker", "--", *command]
        env[NAMESPACE] = "1"
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{ranks} ranks, --shard={shard}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def own_network() -> bool:
    """Whether this machine lets a user have a network namespace."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    test = ["unshare", "-Urn", "ip", "link", "set", "lo", "up"]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


def loopback_bytes() -> int | None:
    """Bytes that the loopback device has carried; None where others use it too."""
    if NAMESPACE not in os.environ:
        return None
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return None


def work(args: Args) -> None:
    """A rank's part."""
    with distributed.session("cpu") as info:
        torch.set_num_threads(1)
        step, batches = ready(args.shard, info)
        seconds, before = [], None
        for number in range(1, STEPS + WARM + 1):
            if number == WARM + 1:
                distributed.barrier()
                before = loopback_bytes()
            began = time.perf_counter()
            step.take(number, batches, (1.0, 0.9, 1.0), False).numbers.read()
            seconds.append(time.perf_counter() - began)
        distributed.barrier()
        after = loopback_bytes()
        optimizer = step.optimizer
        held = [t for entries in optimizer.state.values() for t in entries.values()]
        found = {
            "seconds": round(statistics.median(seconds[WARM:]), 4),
            "loopback_bytes": after and before and round((after - before) / STEPS),
            "bytes_per_second": bandwidth(info),
            "weights_held": sum(local(p.detach()).nbytes for p in step.model.parameters())
            + sum(b.nbytes for b in step.model.buffers()),
            "optimizer_held": max_of(sum(t.nbytes for t in held)),
        }
        if info.rank == 0:
            print(json.dumps(found), flush=True)


def ready(shard: str, info: DistInfo) -> tuple[TrainStep, list[MicroBatch]]:
    """The step and what it trains on."""
    config = model_config()
    if shard == "fsdp":
        model = build_sharded(config, info, info.world_size)
        init_sharded(model, 1)
    else:
        model = build_model(config, seed=1)
    optimizer = make_optimizer(model, 0.1, 0.01, 0.01, shard=shard)
    step = TrainStep(TrainFlags(compile="off"), info, model, optimizer)
    step.equal_batches = True
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1))
    return step, [MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())]


def bandwidth(info: DistInfo) -> int | None:
    """Bytes/s that a rank sends while all gather 16 MB; None of one."""
    if info.world_size == 1:
        return None
    mine = torch.zeros(4_000_000 // info.world_size)
    whole = torch.empty(mine.numel() * info.world_size)
    found = []
    for _ in range(7):
        began = time.perf_counter()
        dist.all_gather_into_tensor(whole, mine)
        found.append(time.perf_counter() - began)
    return round((whole.nbytes - mine.nbytes) / statistics.median(found))


def max_of(value: int) -> int:
    return int(distributed.max_over_ranks(float(value)))


def main() -> None:
    if "--" in sys.argv:  # in a new namespace, whose loopback is down
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        command = sys.argv[sys.argv.index("--") + 1 :]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    flags.run(work, Args)


if __name__ == "__main__":
    main()
