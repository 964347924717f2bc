"""
Several hosts: they train as one, one of them dies and the others go on, one is stuck and is named.

The hosts are network namespaces of this machine (see nodes_for_tests.py), the processes torchrun's,
the network between ranks gloo.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.checkpoint import LOG, list_steps, run_dir
from nanochat.common import read_jsonl
from nanochat.shards import pins_path
from tests.nodes_for_tests import Cluster, Run, cluster
from tests.tiny_world import BASE_FLAGS, new_world, run_stage

TIMEOUT = 8  # seconds, of --rank_timeout
BOUND = 90  # seconds in which a run must have ended then: silence, a census, teardown, a slow CPU
FOREVER = ["--num_iterations=100000", "--compile=off"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with new_world(tmp_path_factory) as folder:
        return folder


@pytest.fixture
def two(tmp_path: Path, base: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, 2) as hosts:
        yield hosts


@pytest.fixture
def three(tmp_path: Path, base: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, 3) as hosts:
        yield hosts


def losses(tag: str) -> dict[int, float]:
    rows = [row for _, row in read_jsonl(run_dir("base", tag) / LOG)]
    return {row["step"]: row["loss"] for row in rows if row["event"] == "step"}


def steps_taken(tag: str) -> int:
    return max(losses(tag), default=0) if (run_dir("base", tag) / LOG).exists() else 0


def errors(said: str) -> list[str]:
    return re.findall(r"^error.*", said, re.M)


@pytest.mark.slow
def test_two_hosts_train_as_one_process_does(two: Cluster, base: Path, tmp_path: Path) -> None:
    """Each with a token cache of its own, and all but rank 0's without the right to write to what
    they share."""
    b = two.hosts[1]
    cache = tmp_path / "cache"
    cache.mkdir()
    run_stage("base_train", *BASE_FLAGS, "--model_tag=alone", f"--token_cache_dir={tmp_path}/own")
    pins_path().unlink()  # so that the run has one to write
    b.private.append(cache)
    b.read_only.append(base)
    argv = [
        *BASE_FLAGS, "--model_tag=two", f"--token_cache_dir={cache}", "--save_every=3",
        "--device_batch_size=1",
    ]  # fmt: skip
    run = Run(two.hosts, "base_train", argv, tmp_path)
    assert run.wait() == [0, 0], run.everything()
    assert list_steps("base", "two") == [3, 6]
    assert pins_path().exists()
    assert losses("two") == pytest.approx(losses("alone"), rel=1e-3)
    assert [p.name for p in base.glob(".shared-*")] == []
    assert list(cache.glob("*/ids.bin")), "host a has prepared its own cache"
    # Rank 0 alone speaks, on its host.
    assert "saved" in run.said("a") and "saved" not in run.said("b")


@pytest.mark.slow
def test_two_hosts_with_a_folder_each_are_told(two: Cluster, base: Path, tmp_path: Path) -> None:
    b = two.hosts[1]
    b.private.append(base)
    run = Run(two.hosts, "base_train", BASE_FLAGS, tmp_path)
    assert 0 not in run.wait(), run.everything()
    for said in map(run.said, "ab"):
        (error,) = errors(said)
        assert f"b ({base}) does not see what a writes to {base}: NANOCHAT_BASE_DIR" in error
        assert "  File " not in said.split("error")[0]


@pytest.mark.slow
def test_hosts_vanish_and_the_others_go_on_while_they_can_meet(
    three: Cluster, base: Path, tmp_path: Path
) -> None:
    """By the recipe of docs/many_machines.md. First rank 0's host is lost: torchrun starts the two
    that are left again, by the same command, which resumes. Then the host is lost where the agents
    meet: the last one cannot go on, says why and ends."""
    argv = [
        *BASE_FLAGS, *FOREVER, "--model_tag=elastic", "--resume", "--save_every=20",
        "--eval_every=-1", "--keep_last=-1", f"--rank_timeout={TIMEOUT}", "--total_batch_size=768",
    ]  # fmt: skip
    a, b, _ = three.hosts
    run = Run(
        three.hosts, "base_train", argv, tmp_path, nodes="1:3",
        torchrun=["--max_restarts=9", "--rdzv_conf=last_call_timeout=5"], meet=b,
        variables={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    run.until(lambda: list_steps("base", "elastic") != [], "a first checkpoint")
    assert "100000 steps, 3 rank(s)" in run.said("a"), run.everything()
    a.vanish()
    last = list_steps("base", "elastic")[-1]
    run.until(lambda: "resumed" in run.said("b") + run.said("c"), "a start without host a")
    run.until(lambda: list_steps("base", "elastic")[-1] > last, "another checkpoint")
    said = run.said("b")
    assert "100000 steps, 2 rank(s)" in said, run.everything()
    resumed = re.search(r"resumed .* at step (\d+)", said)
    assert resumed and int(resumed[1]) == last, said
    named = [error for error in errors(said + run.said("c")) if "host a, pid " in error]
    assert named and "in step " in named[0], run.everything()
    begun = time.monotonic()
    b.vanish()
    taken = losses("elastic")
    assert sorted(taken) == list(range(1, len(taken) + 1)) and len(taken) > last
    run.until(lambda: "host b, pid " in "".join(errors(run.said("c"))), "the end of the last rank")
    took = time.monotonic() - begun
    assert took < BOUND, f"{took:.0f} s\n{run.everything()}"


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_named_in_time(two: Cluster, base: Path, tmp_path: Path) -> None:
    argv = [*BASE_FLAGS, *FOREVER, "--model_tag=stopped", f"--rank_timeout={TIMEOUT}"]
    run = Run(two.hosts, "base_train", argv, tmp_path)
    run.until(lambda: steps_taken("stopped") > 2, "some steps")
    begun, b = time.monotonic(), two.hosts[1]
    os.kill(b.pids("scripts.base_train")[-1], signal.SIGSTOP)  # the agent is older
    assert run.wait("a") != [0], run.everything()
    took = time.monotonic() - begun
    assert took < BOUND, f"{took:.0f} s\n{run.everything()}"
    (error,) = errors(run.said("a"))
    assert re.search(r"rank 1 \(host b, pid \d+, in step \d+\), last seen \d+ s ago", error)
    assert "with --resume" in error
    assert not re.search(r"^\[rank\d+\]: ", run.everything(), re.M)  # a traceback
