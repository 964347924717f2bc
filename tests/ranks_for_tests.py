"""Several gloo ranks on this machine: processes that tests share, as starting them takes long."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist

SECONDS = int(
    os.environ.get("RANKS_SECONDS", "180")
)  # until a rank that waits for another gives up


def as_ranks(
    function: Callable[[int, int, Path], Any], world_sizes: tuple[int, ...], folder: Path
) -> dict[int, list[Any]]:
    """What function(rank, world size, folder) gives on every rank, by world size. One set of
    processes, this one among them as rank 0, takes part in all of them, largest first."""
    stores = Path(mkdtemp(dir=folder))
    # The server imports torch once, and its children begin with it
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", function.__module__])
    others = [
        context.Process(target=_take_part, args=(function, rank, world_sizes, folder, stores))
        for rank in range(1, max(world_sizes))
    ]
    try:
        for process in others:
            process.start()
        try:
            _take_part(function, 0, world_sizes, folder, stores)
        except Exception as e:
            raise AssertionError(_said(folder)) from e
        for process in others:
            process.join(SECONDS)
            assert process.exitcode == 0, _said(folder)
    finally:
        for process in others:
            process.kill()
        if dist.is_initialized():  # after a failure
            dist.destroy_process_group()
    return {
        size: [torch.load(folder / f"{size}.{rank}", weights_only=False) for rank in range(size)]
        for size in world_sizes
    }


def _take_part(
    function: Any, rank: int, world_sizes: tuple[int, ...], folder: Path, stores: Path
) -> None:
    torch.set_num_threads(1)
    try:
        for size in sorted(world_sizes, reverse=True):
            if rank >= size:
                continue
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(size),
            )  # fmt: skip
            dist.init_process_group(
                "gloo", init_method=f"file://{stores}/{size}", rank=rank,
                world_size=size, timeout=timedelta(seconds=SECONDS),
            )  # fmt: skip
            result = function(rank, size, folder)
            dist.barrier()
            dist.destroy_process_group()
            torch.save(result, folder / f"{size}.{rank}")
    except BaseException:
        (folder / f"error.{rank}").write_text(traceback.format_exc())
        raise
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def _said(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("error.*")))
