"""Ranks and devices: one process is the general case with one rank, two agree on everything."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nanochat import distributed
from nanochat.common import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_has_no_group_and_everything_is_an_identity() -> None:
    with distributed.session("cpu", seed=7) as info:
        assert (info.rank, info.local_rank, info.world_size) == (0, 0, 1)
        assert info.device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        assert not distributed.is_distributed()
        assert distributed.rank_and_world() == (0, 1)
        tensor = torch.tensor([1.0, 2.0])
        assert distributed.all_reduce_sum(tensor) is tensor
        assert tensor.tolist() == [1.0, 2.0]
        assert distributed.sum_over_ranks(1, 2.5) == [1.0, 2.5]
        assert distributed.broadcast_object({"a": 1}) == {"a": 1}
        distributed.barrier()


def test_session_seeds_torch() -> None:
    drawn = []
    for seed in (7, 7, 8):
        with distributed.session("cpu", seed):
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_device_is_the_best_or_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.pick_device_type("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert distributed.pick_device_type() == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.pick_device_type() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.pick_device_type() == "cuda"


def test_a_device_that_is_not_there_is_an_error_with_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device_type=cuda"):
        distributed.pick_device_type("cuda")
    with pytest.raises(UserError, match="--device_type=tpu: choose one of"):
        distributed.pick_device_type("tpu")


def test_more_ranks_than_gpus_is_an_error_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="--nproc_per_node"), distributed.session("cuda"):
        pass


PROGRAM = """
    import torch
    from nanochat import distributed
    from nanochat.common import print0

    with distributed.session("cpu", seed=3) as info:
        assert distributed.is_distributed()
        assert distributed.rank_and_world() == (info.rank, 2)
        # float32 would lose the 1: the sum must be made in float64
        big, ones = distributed.sum_over_ranks(2.0**30 * info.rank, 1)
        assert (big, ones) == (2.0**30, 2.0), (big, ones)
        (odd,) = distributed.sum_over_ranks(2.0**30 if info.rank else 1.0)
        assert odd == 2.0**30 + 1, odd
        tensor = torch.full((3,), float(info.rank + 1))
        assert distributed.all_reduce_sum(tensor).tolist() == [3.0] * 3
        assert distributed.broadcast_object([info.rank]) == [0]
        same = torch.rand(4)
        assert torch.equal(distributed.all_reduce_sum(same.clone()), 2 * same)  # equal seeds
        distributed.barrier()
        print0("only once")
        if info.rank == 1:
            raise SystemExit(5)  # a rank that dies must not hang in leaving, nor the other one
    assert not torch.distributed.is_initialized()
"""


def test_two_ranks_agree_and_leave_the_group(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        env = {
            **os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(program)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, encoding="utf-8"))
    output = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 5]
    # Gloo of torch 2.9 says on standard output that it is connected
    said = [re.sub(r"^\[Gloo\].*\n", "", text, flags=re.M) for text in output]
    assert said == ["only once\n", ""]
