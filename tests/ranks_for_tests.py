"""Several gloo ranks on this machine: processes that tests share, as starting them takes long."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300  # until a rank that waits for another gives up


def as_ranks(
    function: Callable[[int, int, Path], Any], world_sizes: tuple[int, ...], folder: Path
) -> dict[int, list[Any]]:
    """What function(rank, world size, folder) gives on every rank, by world size. One set of
    processes takes part in all of them, largest first. The first error of a rank ends them all."""
    own = Path(mkdtemp(dir=folder))
    # The server imports torch once, and its children begin with it
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", function.__module__])
    processes = [
        context.Process(target=_take_part, args=(function, rank, world_sizes, folder, own))
        for rank in range(max(world_sizes))
    ]
    try:
        for process in processes:
            process.start()
        left = {process.sentinel: process for process in processes}
        while left:
            for sentinel in wait(list(left)):
                process = left.pop(sentinel)  # type: ignore[call-overload]
                process.join()
                said = "\n".join(path.read_text() for path in sorted(own.glob("error.*")))
                assert process.exitcode == 0, said
    finally:
        for process in processes:
            process.kill()
    return {
        size: [torch.load(own / f"{size}.{rank}", weights_only=False) for rank in range(size)]
        for size in world_sizes
    }


def _take_part(
    function: Any, rank: int, world_sizes: tuple[int, ...], folder: Path, own: Path
) -> None:
    torch.set_num_threads(1)
    try:
        for size in sorted(world_sizes, reverse=True):
            if rank >= size:
                continue
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(size), NANOCHAT_BASE_DIR=str(folder),
            )  # fmt: skip
            dist.init_process_group(
                "gloo", init_method=f"file://{own}/store{size}", rank=rank,
                world_size=size, timeout=timedelta(seconds=SECONDS),
            )  # fmt: skip
            result = function(rank, size, folder)
            dist.barrier()
            dist.destroy_process_group()
            torch.save(result, own / f"{size}.{rank}")
    except BaseException:
        (own / f"error.{rank}").write_text(traceback.format_exc())
        raise
