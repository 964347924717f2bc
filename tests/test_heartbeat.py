"""
Ranks of one machine that die, stop, fail or dawdle: the others end in time, and name them.

tests/test_nodes.py does the same across hosts.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TIMEOUT = 4.0  # seconds, the session's rank_timeout
BOUND = 60  # seconds until all that are able to have ended

# Rank 1 tells the test its process id and meets its fate in step 7; the others wait for it.
PROGRAM = """
    import os, pathlib, signal, sys, time
    from nanochat import distributed, flags
    from nanochat.token_cache import claim

    fate = sys.argv.pop()

    def main(args):
        with distributed.session("cpu", rank_timeout=TIMEOUT) as info:
            distributed.at_step(7)
            distributed.barrier()
            if info.rank == 1:
                time.sleep(1.5)  # a beat or two
                pathlib.Path(__file__).with_name("fate").touch()
                if fate == "fails":
                    raise ValueError("a row of 3 tokens")
                if fate == "leaves":
                    sys.exit(0)
                if fate in ("killed", "stopped", "lost"):
                    os.kill(os.getpid(), signal.SIGSTOP if fate == "stopped" else signal.SIGKILL)
                if fate == "dawdles":  # at a lock that nobody gives back
                    folder = pathlib.Path(__file__).with_name("shard")
                    with claim(folder, wait=True), claim(folder, wait=True):
                        pass
            if fate == "lost":  # by ranks that wait in what nothing breaks off, as NCCL's waits
                wait_for_ever()
            distributed.sum_over_ranks(1.0)

    def wait_for_ever():
        class Work:
            def wait(self): time.sleep(600)
        Work().wait()

    flags.run(main, flags.DeviceFlags, [])
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


def end_of_others(
    folder: Path, processes: list[subprocess.Popen[str]], fate: str, ranks: int = 2
) -> list[str]:
    """What each rank but 1 said on stderr, when they have ended, which must be with status 1 and in
    time."""
    program = folder / "program.py"
    text = textwrap.dedent(PROGRAM).replace("TIMEOUT", str(TIMEOUT))
    program.write_text(text, encoding="utf-8")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for rank in map(str, range(ranks)):
        env = {
            **os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [sys.executable, str(program), fate]
        processes.append(subprocess.Popen(words, env=env, stderr=subprocess.PIPE, encoding="utf-8"))
    others = [process for rank, process in enumerate(processes) if rank != 1]
    said = [process.communicate(timeout=240)[1] for process in others]
    took = time.time() - (folder / "fate").stat().st_mtime
    assert took < BOUND, f"{took:.0f} s\n{said}"
    assert [process.returncode for process in others] == [1] * len(others), said
    return said


def errors(said: str) -> list[str]:
    assert "Traceback" not in said, said
    return re.findall(r"^error.*", said, re.M)


@pytest.mark.parametrize("fate", ["killed", "stopped", "lost"])
def test_a_silent_rank_is_named(
    tmp_path: Path, processes: list[subprocess.Popen[str]], fate: str
) -> None:
    ranks = 3 if fate == "killed" else 2
    all_said = end_of_others(tmp_path, processes, fate, ranks)
    pid = processes[1].pid
    for said in all_said:
        (error,) = errors(said)
        name = f"rank 1 (host {socket.gethostname()}, pid {pid}, in step 7), last seen "
        assert name in error and "--resume" in error, said
    if fate == "stopped":
        processes[1].send_signal(signal.SIGCONT)


def test_a_rank_that_failed_is_quoted(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    (error,) = errors(end_of_others(tmp_path, processes, "fails")[0])
    assert "rank 1 (" in error and "in step 7): ValueError: a row of 3 tokens" in error
    assert "ValueError: a row of 3 tokens" in processes[1].communicate()[1]  # by itself, too


def test_a_rank_that_left_is_named(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    (error,) = errors(end_of_others(tmp_path, processes, "leaves")[0])
    assert re.search(r"rank 1 \(.* in step 7\) has ended, while others wait for it", error)


def test_a_rank_that_is_behind_is_named_with_its_place(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """It lives and beats, and is not where the others are."""
    (error,) = errors(end_of_others(tmp_path, processes, "dawdles")[0])
    assert "rank 1 (" in error and "did not come to where the others wait" in error
    assert re.search(
        rf"--rank_timeout={TIMEOUT:g} s: rank 1 is in claim \(token_cache.py:\d+\)", error
    )
