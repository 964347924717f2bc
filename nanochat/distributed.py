"""
Processes and devices: one rank or many, told apart by nothing but numbers.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without it a run is rank 0 of 1 and no process group
exists. The reductions below are identities then, so callers have one path. Floor 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from nanochat import errors, rank_log
from nanochat.common import UserError, get_base_dir
from nanochat.flags import RANK_TIMEOUT
from nanochat.heartbeat import Heartbeat, lost_contact
from nanochat.meeting import meet

# mallopt's names (malloc.h): sizes in bytes from which memory is given back to the kernel
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

_watch: list[Heartbeat] = []  # that of the session that is open, where it has several ranks


@dataclass(frozen=True)
class DistInfo:
    """This process's place: `rank` of `world_size`, computing on `device`."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def pick_device_type(device_type: str = "") -> str:
    """The wanted kind of device, or the best that is there."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not device_type:
        return next(name for name, there in available.items() if there)
    if device_type not in available:
        raise UserError(f"--device_type={device_type}: choose one of cuda, cpu, mps")
    if not available[device_type]:
        raise UserError(f"--device_type={device_type}: {_why_none(device_type)}")
    return device_type


def _why_none(device_type: str) -> str:
    """Why torch sees no such device: a driver that is old or missing, another build."""
    try:
        if device_type == "cuda":
            torch.cuda.init()
    except Exception as e:
        if known := errors.explain(e):
            return str(known)
    return (
        f"PyTorch {torch.__version__} sees no such device here; use --device_type=cpu, or install "
        "a driver and a PyTorch build that match"
    )


@contextmanager
def session(
    device_type: str = "",
    seed: int = 42,
    deterministic: bool = False,
    rank_timeout: float = RANK_TIMEOUT,
) -> Iterator[DistInfo]:
    """Joins the process group if torchrun made one, seeds torch, leaves the group at the end.

    `deterministic`: kernels that give the same bits every time (see repeatable). `rank_timeout`:
    seconds after which a rank that the others wait for is lost, which is a UserError that names it
    or, where nothing else breaks off the wait, the end of the process with that message."""
    if deterministic:
        with repeatable(), session(device_type, seed, rank_timeout=rank_timeout) as info:
            yield info
        return
    kind = pick_device_type(device_type)
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU of its own: this machine has "
                f"{torch.cuda.device_count()}; lower torchrun's --nproc_per_node to that"
            )
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 matmuls remain
    if kind == "cpu":
        keep_memory()
    torch.manual_seed(seed)
    info = DistInfo(rank, local_rank, world_size, device)
    with _group(info, rank_timeout) if world_size > 1 else contextlib.nullcontext():
        yield info


@contextmanager
def _group(info: DistInfo, timeout: float) -> Iterator[None]:
    """The process group, and a watch over its ranks, while the block runs."""
    gpu = info.device.type == "cuda"
    # NCCL's watchdog ends the process without naming a rank: it shall be second.
    patience = timedelta(seconds=timeout + 60 if gpu else timeout)
    device = info.device if gpu else None
    try:
        store, meeting = meet(info.rank, info.world_size, timeout)
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore(meeting, store),
            rank=info.rank,
            world_size=info.world_size,
            timeout=patience,
            device_id=device,
        )
        heartbeat = Heartbeat(info.rank, info.world_size, timeout, meeting)
        barrier()
        heartbeat.start()
    except RuntimeError as e:  # of which DistError is one
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(e).strip().splitlines()[0]
        raise UserError(
            f"rank {info.rank}, on {socket.gethostname()}, did not get together with the other "
            f"ranks of {info.world_size}, which meet at {where} ({why}). "
            "Do all hosts run the same command, and do they reach one another? On a CPU "
            "GLOO_SOCKET_IFNAME, on GPUs NCCL_SOCKET_IFNAME names the network interface"
        ) from e
    lost = False
    _watch.append(heartbeat)
    try:
        if info.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", info.world_size)):
            refuse_unshared(info)
        yield
    except Exception as e:
        lost = lost_contact(e)
        # What a rank of this node has said, or that it was killed, is known at once
        known = lost and rank_log.another_failed(rank_log.PATIENCE)
        if lost and not known and (explained := heartbeat.explain(e)) is not e:
            rank_log.report(explained)
            raise explained from e
        rank_log.report(e)  # before the others notice that this one has left
        if not known:
            heartbeat.stop(f"{type(e).__name__}: {e}")  # the others will ask why we are gone
        raise
    finally:
        _watch.clear()
        heartbeat.stop()
        if dist.is_initialized() and not (lost and gpu):  # NCCL would wait for the lost one
            dist.destroy_process_group()


def refuse_unshared(info: DistInfo) -> None:
    """UserError, on all ranks, if some host has another base directory than rank 0's.

    What rank 0 saves there the others must find when they resume."""
    base, name = get_base_dir(), ""
    if info.rank == 0:
        name = f".shared-{uuid.uuid4().hex}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            (base / name).touch()
        except OSError as e:
            raise UserError(f"NANOCHAT_BASE_DIR={base} cannot be written: {e}") from e
    writer, name = cast(tuple[str, str], broadcast_object((socket.gethostname(), name)))
    patience = time.monotonic() + 10  # seconds: a network file system may be behind
    while not (there := (base / name).exists()) and time.monotonic() < patience:
        time.sleep(0.05)
    blind: list[str] = [""] * info.world_size
    dist.all_gather_object(blind, "" if there else f"{socket.gethostname()} ({base})")
    if info.rank == 0:
        (base / name).unlink()
    if any(blind):
        raise UserError(
            f"{', '.join(sorted({*blind} - {''}))} does not see what {writer} writes to {base}: "
            "NANOCHAT_BASE_DIR must name a folder that all hosts share, at the same path"
        )


def at_step(number: int) -> None:
    """Tells the other ranks, should they wait for this one, how far it has come."""
    for heartbeat in _watch:
        heartbeat.at_step(number)


def keep_memory() -> None:
    """Tells the C library to keep memory that is freed, and torch to ask for it in huge pages.

    By default each large tensor of a training step is new pages from the kernel, which zeroes them,
    and gone again at its end: a part of the step's time that bench/train_speed.py measures. Must
    come before the process's first large tensor. The process then keeps its peak, as a GPU's
    allocator does. glibc only; elsewhere it does nothing."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # c10/core/impl/alloc_cpu.cpp
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


@contextmanager
def repeatable() -> Iterator[None]:
    """Within it the same operations give the same bits on the same GPUs, driver and versions.

    PyTorch takes kernels that add in a fixed order, in attention's and embedding's gradients for
    instance, and refuses what has none; cuBLAS gets a fixed workspace, which it reads when a
    process first uses it, so this must come before; compiled kernels are chosen without timing
    (https://docs.pytorch.org/docs/stable/notes/randomness.html). Costs speed. On a CPU the same
    number of threads gives the same bits without it."""
    # ":16:8" would be smaller and slower. Whoever has set it knows why.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from torch._inductor import config as inductor

    before = torch.are_deterministic_algorithms_enabled()
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    # Older versions of PyTorch lack the flag; there it is autotuning that must be off (the default)
    knobs = {"deterministic": True, "max_autotune": False, "coordinate_descent_tuning": False}
    try:
        with inductor.patch({k: v for k, v in knobs.items() if hasattr(inductor, k)}):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn


def is_distributed() -> bool:
    """True when several ranks run together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def _together() -> bool:
    """is_distributed(), where the ranks are about to meet: what shows that this one gets on."""
    for heartbeat in _watch:
        heartbeat.progress += 1
    return is_distributed()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums the tensor over all ranks, in place, and returns it."""
    if _together():
        dist.all_reduce(tensor)
    return tensor


def sum_over_ranks(*values: float, device: torch.device | str = "cpu") -> list[float]:
    """Sums plain numbers over the ranks, in float64 where the device has it."""
    if not _together():
        return [float(v) for v in values]
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return all_reduce_sum(torch.tensor(values, dtype=dtype, device=device)).tolist()


def max_over_ranks(value: float, device: torch.device | str = "cpu") -> float:
    """The largest of the ranks' numbers."""
    if not _together():
        return float(value)
    tensor = torch.tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, unless it is sharded (a DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks over which a tensor's rows are shared out; None if they are not."""
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else mesh.get_group(mesh.ndim - 1)


def shard_rows(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """(first, one past the last) of the rows that a rank of `size` holds, as PyTorch's Shard(0) and
    torch.chunk have it: all ranks as many, rounded up, until there are no more."""
    each = -(-num_rows // size)
    return min(rank * each, num_rows), min((rank + 1) * each, num_rows)


def local_rows(tensor: torch.Tensor) -> tuple[int, int]:
    """The rows of a tensor that this rank holds; all of them unless it is sharded."""
    group = shard_group(tensor)
    if group is None:
        return 0, len(tensor) if tensor.ndim else 1
    return shard_rows(len(tensor), group.rank(), group.size())


def barrier() -> None:
    """Waits for all ranks."""
    if _together():
        dist.barrier()


def broadcast_object(value: object) -> object:
    """Rank 0's value, on every rank (small Python objects only)."""
    if not _together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
