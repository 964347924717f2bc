"""
The optimizer on several ranks, in every mode: gloo processes on this machine against one rank.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nanochat.common import UserError
from nanochat.communication import Owned, PretendRanks, Ranks
from nanochat.distributed import local, shard_rows
from nanochat.matrices import CutMatrices
from nanochat.optim import MuonAdamW, ParamGroup, make_buckets, refuse_divergence
from tests.ranks_for_tests import as_ranks
from tests.test_optim import MATRICES, OTHERS, both_kinds, parameters, random, set_gradients

WORLDS = (2, 3, 5, 8)
MODES = ("none", "zero", "sharded")
STEPS, SAVED_AT = 5, 3
SHAPES = {**MATRICES, **{n: s for n, s in OTHERS.items() if s}}  # Shard(0) needs a dimension


# ---- who updates what


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_every_element_has_one_owner_and_all_have_as_many(size: int) -> None:
    params = parameters(MATRICES | OTHERS)
    elements: dict[str, list[int]] = {n: [0] * p.numel() for n, p in params.items()}
    for group in both_kinds(params).groups:
        for bucket in make_buckets(group, "zero", PretendRanks(0, size)):
            loads = [0] * size
            for name, p in bucket.params.items():
                shape = list(p.shape)
                for part in bucket.held(name, "exp_avg", shape):
                    loads[part.rank] += part.stop - part.start
                    for i in range(part.start, part.stop):
                        elements[name][i] += 1
            first, n = next(iter(bucket.params.values())).numel(), len(bucket.params)
            unit = first if group.kind == "muon" else 1
            if isinstance(bucket, CutMatrices):
                assert max(loads) == n * -(-first // size)
            elif size > 1:
                # Rounded up, as stretches must be of one length
                assert max(loads) == -(-sum(loads) // (size * unit)) * unit
    assert all(count == 1 for counts in elements.values() for count in counts)


def test_a_rank_with_fewer_large_matrices_gets_more_small_ones() -> None:
    params = {f"big{i}": nn.Parameter(torch.empty(8, 8)) for i in range(3)}
    params |= {f"small{i}": nn.Parameter(torch.empty(2, 2)) for i in range(3)}
    owned = []
    for rank in range(2):
        optimizer = MuonAdamW([ParamGroup("muon", params, 0.1)], ranks=PretendRanks(rank, 2))
        owned.append([name[:3] for _, bucket in optimizer.buckets for name in bucket.names])
    assert owned == [["big", "big", "sma"], ["big", "sma", "sma"]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [1, 4, 5, 9, 16])
def test_rows_are_shared_out_as_pytorch_does(rows: int, size: int) -> None:
    chunks = torch.arange(rows).chunk(size)
    mine = [list(range(*shard_rows(rows, rank, size))) for rank in range(size)]
    assert mine[: len(chunks)] == [chunk.tolist() for chunk in chunks]
    assert not any(mine[len(chunks) :])


# ---- in which order


class Watched(PretendRanks):
    """Ranks that note each transfer when it is begun, and when it is waited for."""

    def noting(self, name: str) -> Any:
        EVENTS.append(f"begin {name}")
        return SimpleNamespace(wait=lambda: EVENTS.append(f"wait {name}"))

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        return self.noting(f"all_reduce {tensor.numel()}")

    def reduce_scatter(self, mine: torch.Tensor, all_of_it: torch.Tensor) -> Any:
        return self.noting(f"reduce {mine.numel()}")

    def all_gather(self, all_of_it: torch.Tensor, mine: torch.Tensor) -> Any:
        return self.noting(f"gather {mine.numel()}")

    def all_to_all(self, received: Any, sent: Any, *sizes: Any) -> Any:
        return self.noting(f"exchange {sent.numel() + received.numel()}")


EVENTS: list[str] = []


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_an_update_waits_for_its_own_gradient_alone(
    clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All reductions are under way; each bucket is updated when its own is there, and on its way
    back while later ones are still coming. Clipping needs the norm of all of them first."""
    shapes = {"a": (8, 8), "b": (8, 8), "c": (4, 8), "d": (4, 8), "table": (50,)}
    params = parameters(shapes)
    groups = [
        ParamGroup("muon", {n: p for n, p in params.items() if p.ndim == 2}, 0.1),
        ParamGroup("adamw", {"table": params["table"]}, 0.1),
    ]
    optimizer = MuonAdamW(groups, "zero", Watched(0, 2))
    run = optimizer._run
    monkeypatch.setattr(
        optimizer, "_run", lambda f, *a: (EVENTS.append(f"update {f.__name__}"), run(f, *a))[1]
    )
    EVENTS.clear()
    optimizer.step(1.0, grad_clip=clip)
    reduced = ["reduce 64", "reduce 32", "reduce 25"]
    assert EVENTS[:3] == [f"begin {name}" for name in reduced]
    steps = [
        ["update muon_update", "begin gather 64"],
        ["update muon_update", "begin gather 32"],
        ["update adamw_update", "begin gather 25"],
    ]
    norm = ["begin all_reduce 1", "wait all_reduce 1"]
    came = [f"wait {name}" for name in reduced]
    back = [f"wait gather {size}" for size in (64, 32, 25)]
    if clip:
        assert EVENTS[3:] == [*came, *norm, *chain(*steps), *back]
    else:
        each = chain(*([there, *step] for there, step in zip(came, steps)))
        assert EVENTS[3:] == [*each, norm[0], *back, norm[1]]


def test_matrices_that_are_cut_meet_their_owners_meanwhile() -> None:
    """One of them on four ranks: its exchange is under way while what comes later is updated."""
    params = parameters({"a": (8, 8), "table": (50,)})
    groups = [ParamGroup("muon", {"a": params["a"]}, 0.1)]
    groups += [ParamGroup("adamw", {"table": params["table"]}, 0.1)]
    optimizer = MuonAdamW(groups, "zero", Watched(0, 4))
    assert isinstance(optimizer.buckets[0][1], CutMatrices)
    EVENTS.clear()
    optimizer.step(1.0)
    assert EVENTS == [
        "begin reduce 16", "begin reduce 13", "wait reduce 16", "begin exchange 80",
        "wait reduce 13", "begin gather 13", "begin all_reduce 1", "wait exchange 80",
        "begin exchange 80", "wait exchange 80", "begin gather 16", "wait gather 16",
        "wait gather 13", "wait all_reduce 1",
    ]  # fmt: skip


# ---- several ranks against one


def shares(size: int) -> list[float]:
    """How much of the gradient each rank holds: unequal shares, one of them negative."""
    some = [0.75, 0.5, -0.5, 0.125, 0.0625, -0.25, 0.5][: size - 1]
    return [*some, 1 - sum(some)]


def make(mode: str, size: int) -> tuple[dict[str, Any], MuonAdamW]:
    params: dict[str, Any] = parameters(SHAPES)
    if mode == "sharded":
        mesh = init_device_mesh("cpu", (size,))
        params = {
            n: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            for n, p in params.items()
        }
    optimizer = both_kinds(params)
    return params, MuonAdamW(optimizer.groups, mode)


def give(params: dict[str, Any], step: int, rank: int, size: int) -> None:
    """This rank's share of the gradients, or what FSDP leaves of their sum."""
    whole = {n: nn.Parameter(torch.empty(SHAPES[n])) for n in params}
    set_gradients(whole, step)
    if step == 2:  # nobody has a gradient for some, and one rank only for others
        for name in ("twin", "cube"):
            whole[name].grad = None
        for name in ("tall", "table"):
            whole[name].grad = random(*SHAPES[name], seed=9)
    for name, p in params.items():
        grad = whole[name].grad
        p.grad = None
        if grad is None:
            continue
        if isinstance(p, DTensor):
            mine = grad[slice(*shard_rows(len(grad), rank, size))]
            p.grad = DTensor.from_local(
                mine, p.device_mesh, [Shard(0)], shape=grad.shape, stride=grad.stride()
            )
        elif step == 2 and name in ("tall", "table"):
            p.grad = grad if rank == 0 else None
        else:
            p.grad = grad * shares(size)[rank]


def run(rank: int, size: int, mode: str) -> dict[str, Any]:
    """Five steps, clipped, and two that are refused. What a rank has in the end."""
    params, optimizer = make(mode, size)
    norms, result = [], {}
    for step in range(STEPS):
        if step == SAVED_AT:
            result["state"] = optimizer.state_dict()
            result["then"] = {n: whole(p) for n, p in params.items()}
        give(params, step, rank, size)
        norms.append(float(optimizer.step(1 - step / 10, momentum=0.9, grad_clip=3.0)))
        optimizer.zero_grad()
    result |= {"params": {n: whole(p) for n, p in params.items()}, "norms": norms}
    # One rank's gradient is broken: all must see it, and nothing may move anywhere
    state = {n: {k: t.clone() for k, t in held.items()} for n, held in optimizer.state.items()}
    before = {n: local(p.detach()).clone() for n, p in params.items()}
    result["refused"], result["unmoved"] = [], True
    for value in (float("nan"), float("inf")):
        give(params, 0, rank, size)
        if rank == size - 1 or mode == "sharded":
            grad = local(params["vector"].grad)
            grad[:1] = value  # some have no rows
        norm = float(optimizer.step(1.0, grad_clip=3.0))
        try:
            refuse_divergence(norm, STEPS)
        except UserError as e:
            result["refused"].append(str(e))
        result["unmoved"] &= all(
            torch.equal(local(p.detach()), before[n]) for n, p in params.items()
        )
        result["unmoved"] &= all(
            torch.equal(t, state[n][k])
            for n, held in optimizer.state.items()
            for k, t in held.items()
        )
    # Without clipping a bucket need not wait for the others: what is broken does not move
    give(params, 0, rank, size)
    if rank == size - 1 or mode == "sharded":
        local(params["tall"].grad)[:] = float("inf")
    result["refused"].append(float(optimizer.step(1.0)))
    result["unmoved"] &= torch.equal(local(params["tall"].detach()), before["tall"])
    result["finite"] = all(bool(local(p.detach()).isfinite().all()) for p in params.values())
    result["elements"] = sum(t.numel() for held in optimizer.state.values() for t in held.values())
    return result


def same_without_clipping(rank: int, size: int, mode: str) -> bool:
    """Updates that do not wait for the norm give the same bits as those that wait for one that
    clips nothing."""
    made = [make(mode, size) for _ in range(2)]
    for step in range(STEPS):
        norms = []
        for (params, optimizer), clip in zip(made, (0.0, 1e9)):
            give(params, step, rank, size)
            norms.append(optimizer.step(1.0, grad_clip=clip))
        if not torch.equal(*norms):
            return False
    (params, first), (others, second) = made
    return all(torch.equal(whole(p), whole(others[n])) for n, p in params.items()) and all(
        torch.equal(t, second.state[n][k])
        for n, held in first.state.items()
        for k, t in held.items()
    )


def whole(p: Any) -> torch.Tensor:
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def in_all_modes(rank: int, size: int, folder: Path) -> dict[str, Any]:
    result = {mode: run(rank, size, mode) for mode in MODES}
    for mode in MODES:
        result[mode]["as clipped"] = same_without_clipping(rank, size, mode)
    # Every mode goes on from what every mode has saved
    result["resumed"] = {}
    for writer in MODES:
        saved = torch.load(folder / "alone", weights_only=False)
        if size == 2:  # those that this very group has written
            held = [result[writer]["state"]]
            torch.distributed.broadcast_object_list(held)
            saved = {"state": held[0], "then": result[writer]["then"]}
        for reader in MODES:
            params, optimizer = make(reader, size)
            for name, p in params.items():
                low, high = (0, len(SHAPES[name]) and SHAPES[name][0])
                if isinstance(p, DTensor):
                    low, high = shard_rows(SHAPES[name][0], rank, size)
                with torch.no_grad():
                    local(p.detach()).copy_(saved["then"][name][low:high])
            optimizer.load_state_dict(saved["state"].__getitem__, SAVED_AT)
            for step in range(SAVED_AT, STEPS):
                give(params, step, rank, size)
                optimizer.step(1 - step / 10, momentum=0.9, grad_clip=3.0)
            result["resumed"][writer, reader] = {n: whole(p) for n, p in params.items()}
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(0, 1, "zero")


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, alone: dict[str, Any]
) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(alone, folder / "alone")
    return as_ranks(in_all_modes, WORLDS, folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("mode", MODES)
def test_several_ranks_do_what_one_does(ranks: Any, alone: Any, mode: str, size: int) -> None:
    """Parameters of any size, gradients in unequal shares, the norm and the clipping global."""
    assert max(alone["norms"]) > 3.0, "nothing is clipped"
    results = [result[mode] for result in ranks[size]]
    for result in results:
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for name, p in result["params"].items():
            assert torch.allclose(p, alone["params"][name], atol=4e-6), name
            assert torch.equal(p, results[0]["params"][name]), "ranks have drifted apart"
        assert ["nan" in str(said) for said in result["refused"]] == [True, False, False]
        assert result["refused"][-1] == float("inf")
        assert result["unmoved"] and result["finite"] and result["as clipped"]


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_state_comes_together_on_rank_0(ranks: Any, alone: Any, mode: str, size: int) -> None:
    states = [result[mode]["state"] for result in ranks[size]]
    assert not any(states[1:])
    assert set(states[0]) == set(alone["state"])
    for name, tensor in states[0].items():
        assert tensor.shape == alone["state"][name].shape, name
        assert torch.allclose(tensor, alone["state"][name], atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("reader", MODES)
@pytest.mark.parametrize("writer", MODES)
def test_any_mode_goes_on_from_any_other(
    ranks: Any, alone: Any, writer: str, reader: str, size: int
) -> None:
    for result in ranks[size]:
        for name, p in result["resumed"][writer, reader].items():
            assert torch.allclose(p, alone["params"][name], atol=8e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLDS)
def test_ranks_share_out_the_state(ranks: Any, alone: Any, size: int) -> None:
    held = {m: [result[m]["elements"] for result in ranks[size]] for m in MODES}
    assert set(held["none"]) == {alone["elements"]}
    for mode in ("zero", "sharded"):
        assert sum(held[mode]) == alone["elements"]
        assert max(held[mode]) < (0.75 if size == 2 else 0.6) * alone["elements"]


def test_one_rank_sends_nothing() -> None:
    optimizer = both_kinds(parameters(SHAPES))
    assert optimizer.ranks == Ranks() and not any(
        isinstance(bucket, Owned) for _, bucket in optimizer.buckets
    )
