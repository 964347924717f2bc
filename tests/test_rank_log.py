"""What several ranks say: one console, a file each, and the first failure before all else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import rank_log
from nanochat.common import UserError
from nanochat.rank_log import ERASE, RankLog, Tee
from tests.conftest import REPO

PROGRAM = """
    import os, signal, sys
    from dataclasses import dataclass

    import torch

    from nanochat import distributed, flags
    from nanochat.common import UserError, print0


    @dataclass
    class Args:
        how: str = ""


    def main(args):
        with distributed.session("cpu") as info:
            distributed.barrier()
            print0("only once")
            print(f"by print, {info.rank}", file=sys.stderr)
            os.system(f"echo by a child, {info.rank}")
            for step in range(3):
                distributed.all_reduce_sum(torch.ones(3))
                failing = step == 1 and (info.rank == 1 if args.how in ("raise", "kill") else True)
                if args.how == "raise" and failing:
                    raise ValueError("out of luck")
                if args.how == "kill" and failing:
                    os.kill(os.getpid(), signal.SIGKILL)
                if args.how == "refuse" and failing and info.rank == 2:
                    raise UserError("pairs.jsonl is missing here; give --data")
                if args.how == "all" and failing:
                    raise UserError("--depth=0 is too small")


    if __name__ == "__main__":
        flags.run(main, Args)
"""


@pytest.fixture
def base(own_base_dir: Path) -> Path:
    return own_base_dir


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Three ranks of PROGRAM under plain torchrun; what comes to the console, in its order."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    return subprocess.run(
        [*command, str(program), "--", *words],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=240,
        check=False,
    )  # fmt: skip


def files(base: Path) -> list[str]:
    """What the ranks of the one run there was have in their files."""
    (folder,) = (base / "rank_logs").iterdir()
    assert re.fullmatch(r"program-\w{8}", folder.name)
    return [(folder / f"rank_{rank}.log").read_text(encoding="utf-8") for rank in range(3)]


@pytest.mark.slow
def test_rank_0_speaks_and_every_rank_has_a_file(base: Path, tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("only once") == 1
    assert "by print, 0" in done.stdout and "by a child, 0" in done.stdout
    assert not re.search(r"by (print|a child), [12]", done.stdout)
    assert "what each of 3 ranks says: " in done.stdout
    for rank, text in enumerate(files(base)):
        assert text.startswith(f"--- rank {rank} of 3 on ")
        assert f"by print, {rank}" in text
        assert ("only once" in text) == (rank == 0)
        assert ("by a child, " in text) == (rank != 0), "a child of rank 0 has the console"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first", "then"),
    [
        ("raise", "error (rank 1): unexpected ValueError: out of luck (program.py:", "This is"),
        ("refuse", "error (rank 2): pairs.jsonl is missing here; give --data", ""),
        ("all", r"error \(rank [012]\): --depth=0 is too small", ""),
        ("kill", r"error.*?: rank 1 (ended without a word|\(host )", "SIGKILL"),
    ],
)
def test_the_first_failure_is_what_one_sees_first(
    how: str, first: str, then: str, base: Path, tmp_path: Path
) -> None:
    """Once, with the rank's name; not what the others say who lost their connection to it."""
    done = run(tmp_path, f"--how={how}")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    said = [line for line in lines if "error" in line.lower() or "Traceback" in line]
    pattern = first if how in ("all", "kill") else re.escape(first)
    if how == "kill" and not re.match(pattern, said[0]):
        # torchrun may be quicker to end the others than they are to notice: then it is what speaks
        assert re.search(r"failed \(exitcode: -9\) local_rank: 1 ", done.stdout), done.stdout
    else:
        assert re.match(pattern, said[0]), done.stdout
        assert len(re.findall(pattern, done.stdout)) == 1
    assert then in done.stdout
    before_torchrun = done.stdout.partition("torch/distributed/elastic")[0]
    assert "Traceback" not in before_torchrun
    assert ("out of luck" in before_torchrun) == (how == "raise")
    assert "closed by peer" not in done.stdout and "reset by peer" not in done.stdout
    texts = files(base)
    if how == "raise":
        assert done.stdout.count("out of luck") == 1
        assert 'raise ValueError("out of luck")' in texts[1], "the traceback is in the file"
        assert re.search(r"by peer", texts[0] + texts[2]), "the others' reasons are in their files"
        root = done.stdout.partition("Root Cause")[2]
        assert "rank      : 1 " in root and "rank_1.log" in root
    if how == "kill":
        root = done.stdout.partition("Root Cause")[2]
        assert "rank      : 1 " in root and "SIGKILL" in root
    if how == "refuse":
        assert "UserError: pairs.jsonl" in texts[2] and "in main" in texts[2]


@pytest.mark.slow
def test_a_flag_that_is_unknown_is_refused_once(base: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "--who=raise")
    assert done.returncode == 1
    assert len(re.findall(r"^error \(rank \d\): --who=raise is not a flag", done.stdout, re.M)) == 1


# ---- without processes


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RankLog]]:
    """Three ranks that torchrun has started, all in this process."""
    made = []
    for rank in range(3):
        folder = tmp_path / "attempt_0" / str(rank)
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        made.append(RankLog(tmp_path / "logs", rank, 3))
    for log in made:
        # Its output stays where it is: this process is not one rank
        monkeypatch.setattr(log, "_to_file", lambda: None)
        os.close(log.console)
        log.console = os.open(tmp_path / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    yield made
    for log in made:
        log.file.close()
        log.lock.close()
        os.close(log.console)


def console(tmp_path: Path) -> str:
    return (tmp_path / "console").read_text(encoding="utf-8")


def test_only_the_first_failure_is_said(tmp_path: Path, logs: list[RankLog]) -> None:
    assert not logs[0].another_failed()
    logs[2].report(UserError("give --data"))
    logs[2].report(UserError("again"))  # on its way through two handlers
    assert logs[0].another_failed()
    logs[0].report(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
    logs[1].report(UserError("give --data"))
    assert console(tmp_path) == "error (rank 2): give --data\n"
    told = [json.loads((tmp_path / "attempt_0" / str(r) / "error.json").read_text())["message"]
            for r in range(3)]  # fmt: skip
    times = [int(message["extraInfo"]["timestamp"]) for message in told]
    assert times[2] < min(times[:2]), "torchrun takes the earliest for the cause"
    assert "rank_2.log" in told[2]["message"]
    assert "closed by peer" in logs[0].path.read_text(encoding="utf-8")


def test_ranks_that_have_ended_are_known_by_their_locks(
    tmp_path: Path, logs: list[RankLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    monkeypatch.setattr(rank_log, "PATIENCE", 0.05)
    assert logs[0].gone() == []
    logs[2].report(ConnectionResetError("Connection reset by peer"))  # a download's
    assert console(tmp_path).startswith("error (rank 2): the network ")
    assert logs[2].claim is not None
    logs[2].claim.unlink()
    logs[1].lock.close()
    assert logs[0].gone() == [1] == logs[2].gone() and logs[0].another_failed()
    logs[0].report(RuntimeError("Read error: Connection reset by peer"))
    assert console(tmp_path).splitlines()[-1].startswith("error: rank 1 ended without a word")


def test_what_a_rank_on_another_machine_raised(
    tmp_path: Path, logs: list[RankLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said on its console; where the folder is shared it is said here, too."""
    pytest.importorskip("fcntl")
    monkeypatch.setattr(rank_log, "PATIENCE", 0.05)
    for log in logs[1:]:
        log.claim = tmp_path / "the other machine's"
    there = tmp_path / "its console"
    os.close(logs[2].console)
    logs[2].console = os.open(there, os.O_WRONLY | os.O_CREAT)
    logs[2].report(UserError("give --data"))
    logs[1].report(RuntimeError("Connection closed by peer"))
    assert there.read_text(encoding="utf-8") == "error (rank 2): give --data\n"
    for log in logs[1:]:
        log.lock.close()
    logs[0].report(RuntimeError("Connection closed by peer"))
    assert console(tmp_path).splitlines() == [
        "error: rank 2 failed: nanochat.common.UserError: give --data",
        f"It says more in {logs[2].path}",
    ]
    again = RankLog(logs[2].folder, 2, 3)
    assert again.last_words(2) == "", "what an earlier process of this rank raised"
    for handle in (again.file, again.lock):
        handle.close()
    os.close(again.console)


def test_a_connection_that_is_lost_for_no_known_reason(
    tmp_path: Path, logs: list[RankLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank on another machine, whose file is not here, or a dead link."""
    monkeypatch.setattr(rank_log, "PATIENCE", 0.05)
    logs[1].path.unlink()
    logs[0].report(RuntimeError("Connection closed by peer [10.0.0.1]:1"))
    said = console(tmp_path)
    assert said.startswith("error: rank 0 of 3 lost its connection to another rank: Connection ")
    assert "closed by peer" in said and said.endswith(f"It says more in {logs[0].path}\n")


def test_a_bug_is_one_sentence_and_with_debug_its_traceback(
    tmp_path: Path, logs: list[RankLog]
) -> None:
    logs[1].debug = True
    for log in logs[:2]:
        assert log.claim is not None
        log.claim.unlink(missing_ok=True)
        log.report(KeyError("what"))
    first, _, rest = console(tmp_path).partition("\n")
    assert first.startswith("error (rank 0): unexpected KeyError: 'what'. This is a bug")
    assert first.endswith(f"run again with --debug for the traceback; {logs[0].path} has it too")
    assert "error (rank 1): unexpected KeyError" in rest and "--debug" not in rest
    assert "KeyError: 'what'\nerror" in rest
    assert not list(tmp_path.rglob("*.traceback"))


def test_a_bar_is_for_the_terminal_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed above it is in the file, too, without colours."""
    with open(tmp_path / "rank_0.log", "w", encoding="utf-8") as file:
        both = Tee(sys.stdout, file)
        print("begin", file=both)
        both.write(f"\r{ERASE}step 1 ---")
        both.write(f"\r{ERASE}saved\nstep 2 ---")
        both.write(f"\r{ERASE}")
        print("\x1b[1mend\x1b[0m", file=both, flush=True)
        assert both.isatty() is False and both.encoding == sys.stdout.encoding
    assert "step 2 ---" in capsys.readouterr().out
    text = (tmp_path / "rank_0.log").read_text(encoding="utf-8")
    assert text == "begin\nsaved\nend\n"


def test_a_folder_that_cannot_be_written_is_said_and_borne(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base.parent.mkdir(exist_ok=True)
    base.write_text("a file in the place of the folder", encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_log, "_log", None)
    rank_log.start()
    assert "cannot be written" in capsys.readouterr().err
    assert not rank_log.report(UserError("x")) and not rank_log.another_failed()
