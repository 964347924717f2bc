"""Bytes on paper against bytes that real ranks send; FLOPs against PyTorch's count; formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanochat.cluster import LINK_HOP, LINK_SHARE, NETWORK_HOP, START, Cluster, find_gpu
from nanochat.communication import PretendRanks
from nanochat.dataloader import MicroBatch
from nanochat.distributed import DistInfo
from nanochat.flags import TrainFlags
from nanochat.models import build_model, make_config
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.precision import Precision
from nanochat.shard import build_sharded, init_sharded, shard_size
from nanochat.step import TrainStep
from nanochat.traffic import (
    FLOAT32,
    HALF,
    StepTime,
    Transfer,
    Work,
    muon_flops,
    step_time,
    transfers,
)
from nanochat.updates import orthogonalize
from tests.models_for_tests import TINY, tiny_model

H100 = find_gpu("h100")
HSDP = 2  # ranks that share out a copy
ROW = 17  # a row of 16 tokens and its last target
C10D = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
}  # fmt: skip


class Listener(TorchDispatchMode):
    """Counts the collectives that PyTorch is asked for, and the bytes of the whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            op = C10D[func.__name__.split(".")[0]]
            tensors = [t for t in (args[0] if isinstance(args[0], list) else args[:2])
                       if isinstance(t, Tensor)]  # fmt: skip
            self.calls[op] += 1
            # What a rank gives is its part of an exchange; else the larger one is whole
            given = tensors[1].nbytes if op == "all_to_all" else max(t.nbytes for t in tensors)
            self.sizes[op] += given
        return func(*args, **(kwargs or {}))


def worker(rank: int, folder: str) -> None:
    """One of three processes, which run as three ranks and then, without the last, as two."""
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank >= ranks:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        heard = {
            f"{arch} {shard}": listen(arch, shard, rank, ranks)
            for arch in TINY
            for shard in ("none", "zero", "fsdp")
        }
        dist.barrier()
        dist.destroy_process_group()
        torch.save(heard, f"{folder}/heard{ranks}.{rank}")


def listen(
    arch: str, shard: str, rank: int, ranks: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, int], dict[str, int]]:
    """(calls, bytes) by collective of the second step of a run with two micro-batches."""
    info = DistInfo(rank, rank, ranks, torch.device("cpu"))
    if shard in ("fsdp", "hsdp"):
        size = shard_size(shard, ranks, HSDP)
        model = build_sharded(TINY[arch], info, size, dtype=dtype)
        init_sharded(model, 0)
    else:
        model = tiny_model(arch)
    optimizer = make_optimizer(model, 0.1, 0.1, 0.1, shard=shard)
    args = TrainFlags(compile="off")
    step = TrainStep(args, info, model, optimizer)
    step.equal_batches = True  # as in pretraining
    step.precision = Precision(info.device, dtype, "for this test")
    for number in (1, 2):
        ids = torch.randint(0, TINY[arch].vocab_size, (2, 1, ROW))
        batches = [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in ids]
        listener = Listener()
        with listener:
            step.take(number, batches, (1.0, 0.9, 1.0), False)
    return dict(listener.calls), dict(listener.sizes)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every rank of the runs with 3 and with 2 ranks sent."""
    folder = tmp_path_factory.mktemp("heard")
    context = torch.multiprocessing.get_context("spawn")
    others = [context.Process(target=worker, args=(rank, str(folder))) for rank in (1, 2)]
    threads = torch.get_num_threads()
    try:
        for process in others:
            process.start()
        worker(0, str(folder))
        for process in others:
            process.join(120)
            assert process.exitcode == 0
    finally:
        torch.set_num_threads(threads)
        for process in others:
            process.kill()
        if dist.is_initialized():  # after a failure
            dist.destroy_process_group()
    return folder


def predicted(
    arch: str, shard: str, cluster: Cluster, gathered: int = FLOAT32
) -> tuple[Counter[str], Counter[str]]:
    work = Work.of(TINY[arch], cluster.gpus * 32, 2, gathered)
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for transfer in transfers(work, shard, cluster):
        calls[transfer.op] += transfer.calls
        sizes[transfer.op] += transfer.size
    return calls, sizes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("shard", ["none", "zero", "fsdp"])
@pytest.mark.parametrize("arch", TINY)
def test_predicted_bytes_are_those_that_ranks_send(
    heard: Path, ranks: int, shard: str, arch: str
) -> None:
    calls, sizes = predicted(arch, shard, Cluster(H100, per_node=ranks))
    assert sum(sizes.values()) > 1000
    exchanged = 0
    for rank in range(ranks):
        heard_calls, heard_sizes = torch.load(heard / f"heard{ranks}.{rank}")[f"{arch} {shard}"]
        assert heard_calls == calls
        exchanged += heard_sizes.pop("all_to_all", 0)
        assert heard_sizes == {op: size for op, size in sizes.items() if op != "all_to_all"}
    assert exchanged == sizes["all_to_all"]


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize(
    ("shard", "dtype", "entry"),
    [("zero", torch.float32, FLOAT32), ("fsdp", torch.float32, FLOAT32),
     ("hsdp", torch.float32, FLOAT32), ("fsdp", torch.bfloat16, HALF)],
)  # fmt: skip
def test_predicted_bytes_of_more_ranks_than_a_test_can_start(
    arch: str, shard: str, dtype: torch.dtype, entry: int
) -> None:
    """Rank 1 of 8 in two copies or four nodes; what it asks for is heard, and goes nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    try:
        # oneDNN's products in bfloat16 are an illegal instruction on some CPUs
        with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
            heard_calls, heard_sizes = listen(arch, shard, 1, 8, dtype)
    finally:
        dist.destroy_process_group()
    cluster = Cluster(H100, per_node=HSDP, nodes=8 // HSDP)
    calls, sizes = predicted(arch, shard, cluster, entry)
    assert heard_calls == calls
    heard_sizes.pop("all_to_all", 0)  # a rank's part of it differs
    sizes.pop("all_to_all", 0)
    assert heard_sizes == sizes


class Counting(PretendRanks):
    """Ranks that count what they are asked for; sizes of whole tensors, in bytes."""

    def count(self, op: str, size: int) -> Any:
        SIZES[op] += size
        return SimpleNamespace(wait=lambda: None)

    def all_reduce(self, tensor: Tensor) -> Any:
        return self.count("all_reduce", tensor.nbytes)

    def reduce_scatter(self, mine: Tensor, all_of_it: Tensor) -> Any:
        assert mine.nbytes * self.size == all_of_it.nbytes
        return self.count("reduce_scatter", all_of_it.nbytes)

    def all_gather(self, all_of_it: Tensor, mine: Tensor) -> Any:
        assert mine.nbytes * self.size == all_of_it.nbytes
        return self.count("all_gather", all_of_it.nbytes)

    def all_to_all(self, received: Tensor, sent: Tensor, *sizes: Any) -> Any:
        return self.count("all_to_all", sent.nbytes)


SIZES: Counter[str] = Counter()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 64, 512])
def test_zero_pads_little_at_any_number_of_ranks(ranks: int) -> None:
    """A d20, whose matrices are 80 of one shape and 20 each of two others: what the first, a middle
    and the last rank send, against what there is to send."""
    config = make_config("gpt", 20, 65_536, 2048)[0]
    model = build_model(config, "meta")
    groups = make_optimizer(model, 0.1, 0.1, 0.1).groups
    numbers = sum(p.numel() for p in model.parameters())
    work = Work.of(config, 1024, 1)
    expected: Counter[str] = Counter()
    for t in transfers(work, "zero", Cluster(H100, min(ranks, 8), -(-ranks // 8))):
        expected[t.op] += t.size
    exchanged = 0
    for rank in {0, ranks // 2, ranks - 1} if ranks > 3 else range(ranks):
        SIZES.clear()
        optimizer = MuonAdamW(groups, "zero", Counting(rank, ranks))
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step(1.0)
        if ranks == 1:
            assert not SIZES and not expected
            return
        for op in ("reduce_scatter", "all_gather"):
            assert SIZES[op] == expected[op]
            assert FLOAT32 * numbers <= SIZES[op] < 1.26 * FLOAT32 * numbers, op
        assert SIZES["all_reduce"] == FLOAT32  # the norm
        exchanged = max(exchanged, SIZES["all_to_all"])
    # Its parts of all that are cut; and back, whole, what it owns: here at most one of a shape
    largest = sum(FLOAT32 * one.shapes[0].numel() for one in work.together if one.is_cut(ranks))
    assert (exchanged > 0) == (largest > 0) == (ranks > 8)
    assert exchanged <= expected["all_to_all"] / 2 / ranks + largest


# ---- formulas


def test_one_rank_sends_nothing() -> None:
    work = Work.of(TINY["gpt"], 32, 1)
    for shard in ("none", "zero", "fsdp"):
        assert not list(transfers(work, shard, Cluster(H100, per_node=1)))


@pytest.mark.parametrize(
    ("op", "ranks", "sent"),
    [("all_gather", 4, 75), ("reduce_scatter", 4, 75), ("all_reduce", 4, 150),
     ("all_to_all", 4, 18.75), ("all_gather", 1, 0), ("all_reduce", 1, 0)],
)  # fmt: skip
def test_bytes_sent_by_hand(op: Any, ranks: int, sent: float) -> None:
    assert Transfer("x", op, 1, 100, ranks, "reduce").sent() == sent


def test_seconds_by_hand() -> None:
    """A ring within a node goes over NVLink; one that leaves it shares all ways out of the node; an
    exchange, and a ring of one rank of each node, have one each."""
    cluster = Cluster(H100, per_node=8, nodes=2, network=50e9)
    inside = Transfer("x", "all_gather", 3, 8_000_000, 8, "reduce")
    assert inside.seconds(cluster) == pytest.approx(
        3 * (START + 7 * LINK_HOP) + 7_000_000 / (450e9 * LINK_SHARE)
    )
    outside = Transfer("x", "all_reduce", 1, 16_000_000, 16, "reduce")
    assert outside.seconds(cluster) == pytest.approx(
        2 * (START + 14 * LINK_HOP + NETWORK_HOP) + 30_000_000 / (8 * 50e9 * LINK_SHARE)
    )
    across = Transfer("x", "all_reduce", 1, 16_000_000, 2, "backward", across=True)
    assert across.seconds(cluster) == pytest.approx(
        2 * (START + 14 * LINK_HOP + NETWORK_HOP) + 16_000_000 / (50e9 * LINK_SHARE)
    )
    exchange = Transfer("x", "all_to_all", 1, 256_000_000, 16, "update")
    assert exchange.seconds(cluster) == pytest.approx(
        START + 14 * LINK_HOP + NETWORK_HOP + 15_000_000 / (50e9 * LINK_SHARE)
    )


def test_bytes_that_leave_a_node() -> None:
    """As docs/many_machines.md has them: P parameters, K nodes."""
    nodes, config = 4, make_config("qwen2.5-7b", 0, 151_665, 2048)[0]
    cluster = Cluster(H100, 8, nodes)
    params = sum(p.numel() for p in build_model(config, "meta").parameters())
    for micro in (1, 3):
        work = Work.of(config, 1024, micro)
        gone = {
            shard: sum(
                t.leaves_node(cluster)
                for t in transfers(work, shard, cluster)
                if t.op != "all_to_all"
            )
            / params
            for shard in ("zero", "fsdp", "hsdp")
        }
        assert gone["zero"] == pytest.approx(8, rel=0.1)
        assert gone["fsdp"] == pytest.approx(8 * micro, rel=0.1)
        assert gone["hsdp"] == pytest.approx(8 * (nodes - 1) / nodes, rel=0.01)
    inside = Transfer("x", "all_gather", 1, 800, 8, "reduce")
    assert inside.leaves_node(cluster) == 0
    # 8 ranks that each send 100 bytes, of which three quarters are for the other three nodes
    exchange = Transfer("x", "all_to_all", 1, 3200, 32, "update")
    assert exchange.leaves_node(cluster) == 8 * 100 * 3 / 4


@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32)])
def test_muons_flops_are_those_that_pytorch_counts(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(*shape, device="meta"))
    assert counter.get_total_flops() == muon_flops(torch.Size(shape))


def test_what_the_busiest_rank_updates_is_what_it_owns() -> None:
    for arch, config in TINY.items():
        model = build_model(config, "meta")
        groups = make_optimizer(model, 0.1, 0.1, 0.1).groups
        together = Work.of(config, 1024, 1).together
        for ranks in (1, 2, 3, 8, 64):
            buckets = [
                MuonAdamW(groups, "zero", PretendRanks(r, ranks)).buckets for r in range(ranks)
            ]
            for number, one in enumerate(together):
                owned = [sum(w.numel() for w in of[number][1].weights) for of in buckets]
                assert one.most(ranks) == max(owned), (arch, ranks, one)


def test_more_ranks_make_the_update_no_shorter_than_one_matrix() -> None:
    work = Work.of(TINY["gpt"], 1024, 1)
    times = [
        step_time(work, "zero", Cluster(H100, per_node=ranks), 0.5).update
        for ranks in (1, 2, 8, 64, 512)
    ]
    assert times == sorted(times, reverse=True) and times[0] > 2 * times[2]
    flops = sum(muon_flops(one.shapes[0]) for one in work.together if one.kind == "muon")
    assert 1 < times[-1] / (flops / (H100.peak * 0.5)) < 1.5


def test_without_clipping_updates_hide_behind_what_is_still_to_come() -> None:
    """Where the network takes the time, buckets come one after the other, each is updated
    meanwhile, and only the last update is left; and the way back need not wait for the first."""
    work = Work.of(make_config("gpt", 20, 65_536, 2048)[0], 2**19, 1)
    cluster = Cluster(H100, 4, 2, network=1e9)
    clipped = step_time(work, "zero", cluster, 0.5)
    free = step_time(replace(work, clipped=False), "zero", cluster, 0.5)
    assert (free.passes, free.update) == (clipped.passes, clipped.update)
    first, *_, last = (one.update_seconds(8, False, cluster, 0.5) for one in work.together)
    assert free.reduce + free.update == pytest.approx(clipped.reduce + last)
    assert clipped.total - free.total == pytest.approx(first) and first > 0


def test_a_step_on_one_gpu_is_its_passes_and_its_update() -> None:
    work = Work.of(TINY["gpt"], 1_000_000, 1)
    found = step_time(work, "none", Cluster(H100, per_node=1), 0.4)
    assert found.passes == pytest.approx(1e6 * work.flops_per_token / (989e12 * 0.4))
    assert found.total == pytest.approx(found.passes + found.update)
    assert found.reduce == found.spread == 0


def test_the_parts_of_a_step_are_all_of_it() -> None:
    assert StepTime(1.0, 2.0, 4.0, 8.0, 16.0).total == 31.0
