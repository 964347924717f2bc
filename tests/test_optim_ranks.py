"""
The optimizer on several ranks: gloo processes on this machine against one rank alone.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from nanochat.common import UserError
from nanochat.optim import MuonAdamW, refuse_divergence
from tests.test_optim import MATRICES, OTHERS, both_kinds, parameters, random, set_gradients


def owners(world_size: int, params: dict[str, nn.Parameter]) -> dict[str, int]:
    optimizer: Any = SimpleNamespace(world_size=world_size, named=params)
    return MuonAdamW._assign_owners(optimizer)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_owners_share_the_load_evenly(world_size: int) -> None:
    params = parameters(MATRICES | OTHERS)
    owner = owners(world_size, params)
    assert set(owner) == set(params) and set(owner.values()) <= set(range(world_size))
    assert owner == owners(world_size, dict(reversed(params.items()))), "the order must not matter"
    load = [sum(p.numel() for n, p in params.items() if owner[n] == r) for r in range(world_size)]
    assert max(load) - min(load) <= max(p.numel() for p in params.values())


SHARES = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.75, -0.25]}  # of the gradient on each rank
STEPS, SAVED_AT = 5, 3


def run(rank: int, world_size: int, on_save: Callable[[MuonAdamW], None]) -> dict[str, Any]:
    """Five steps, clipped; one rank lacks some gradients in step 2. What a rank has in the end."""
    params = parameters(MATRICES | OTHERS)
    optimizer = both_kinds(params)
    norms = []
    for step in range(STEPS):
        if step == SAVED_AT:
            on_save(optimizer)
        set_gradients(params, step, SHARES[world_size][rank])
        if step == 2:  # nobody has a gradient for some, and one rank only for others
            for name in ("twin", "cube"):
                params[name].grad = None
            for name in ("tall", "table"):
                if rank == 0:
                    params[name].grad = random(*params[name].shape, seed=9)
                else:
                    params[name].grad = None
        norms.append(float(optimizer.step(1 - step / 10, momentum=0.9, grad_clip=3.0)))
        optimizer.zero_grad()
    result: dict[str, Any] = {
        "params": {n: p.detach().clone() for n, p in params.items()},
        "norms": norms,
    }
    # One rank's gradient is broken: all must see it, and nothing may move anywhere
    state = {n: {k: t.clone() for k, t in held.items()} for n, held in optimizer.state.items()}
    result["refused"], result["unmoved"] = [], True
    for value in (float("nan"), float("inf")):
        set_gradients(params, 0)
        if rank == world_size - 1:
            params["vector"].grad[0] = value  # type: ignore[index]
        norm = float(optimizer.step(1.0))
        try:
            refuse_divergence(norm, STEPS)
        except UserError as e:
            result["refused"].append(str(e))
        result["unmoved"] &= all(torch.equal(p, result["params"][n]) for n, p in params.items())
        result["unmoved"] &= all(
            torch.equal(t, state[n][k])
            for n, held in optimizer.state.items()
            for k, t in held.items()
        )
    return result


def worker(rank: int, folder: str) -> None:
    """One of three processes, which run as three ranks and then, without the last, as two."""
    for world_size in (3, 2):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank,
            world_size=world_size, timeout=timedelta(seconds=60),
        )  # fmt: skip

        def save(optimizer: MuonAdamW, world_size: int = world_size, rank: int = rank) -> None:
            state = optimizer.state_dict()
            held = {n: p.detach().clone() for n, p in optimizer.named.items()}
            torch.save((state, held), f"{folder}/state{world_size}.{rank}")

        result = run(rank, world_size, save)
        dist.barrier()
        dist.destroy_process_group()
        torch.save(result, f"{folder}/result{world_size}.{rank}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every rank of the runs with 3 and with 2 ranks had."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    others = [context.Process(target=worker, args=(rank, str(folder))) for rank in (1, 2)]
    try:
        for process in others:
            process.start()
        worker(0, str(folder))  # this process is rank 0: starting one takes seconds
        for process in others:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in others:
            process.kill()
        if dist.is_initialized():  # after a failure
            dist.destroy_process_group()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_do_what_one_does(ranks: Path, world_size: int) -> None:
    """Parameters of any size, gradients in unequal shares, the norm and the clipping global."""
    alone = run(0, 1, lambda optimizer: None)
    assert max(alone["norms"]) > 3.0, "nothing is clipped"
    results = [torch.load(ranks / f"result{world_size}.{r}") for r in range(world_size)]
    for result in results:
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for name, p in result["params"].items():
            assert torch.allclose(p, alone["params"][name], atol=2e-6), name
            assert torch.equal(p, results[0]["params"][name]), "ranks have drifted apart"
        assert ["nan" in said for said in result["refused"]] == [True, False]
        assert result["unmoved"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_state_of_several_ranks_continues_on_one(ranks: Path, world_size: int) -> None:
    for rank in range(1, world_size):
        assert torch.load(ranks / f"state{world_size}.{rank}")[0] == {}, "rank 0 has all of it"
    state, held = torch.load(ranks / f"state{world_size}.0")
    params = {name: nn.Parameter(tensor) for name, tensor in held.items()}
    optimizer = both_kinds(params)
    assert set(state) == set(optimizer.state_dict()), "entries depend on the number of ranks"
    optimizer.load_state_dict(state.__getitem__, SAVED_AT)
    for step in range(SAVED_AT, STEPS):
        set_gradients(params, step)
        optimizer.step(1 - step / 10, momentum=0.9, grad_clip=3.0)
    wanted = torch.load(ranks / f"result{world_size}.0")["params"]
    for name, p in params.items():
        assert torch.allclose(p, wanted[name], atol=2e-6), name
