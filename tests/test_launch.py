"""Command lines of runs, and what becomes of signals while one is waited for."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from nanochat.launch import ROOT, command, launch, shown


def test_commands_for_one_rank_one_node_and_several() -> None:
    assert shown(command("base_train", ["--depth=4", "--data=my texts"])) == (
        "python -m scripts.base_train --depth=4 '--data=my texts'"
    )
    assert shown(command("chat_rl", ["--seed=1"], 8), {"OMP_NUM_THREADS": "1"}) == (
        "OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --seed=1"
    )
    assert shown(command("mid_train", [], 16, nodes=2, meet="a:29400")) == (
        "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=a:29400 --nproc_per_node=8 "
        "-m scripts.mid_train --"
    )
    with pytest.raises(ValueError, match="16 ranks on 3 nodes"):
        command("mid_train", [], 16, nodes=3)


def test_the_status_and_the_environment_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"import os, pathlib; pathlib.Path({str(out)!r}).write_text(os.environ['X'])"
    assert launch(["python", "-c", program], {"X": "1"}) == 0
    assert out.read_text(encoding="utf-8") == "1"
    assert launch(["python", "-c", "import sys, nanochat.launch; sys.exit(3)"], {}) == 3
    assert (ROOT / "nanochat" / "launch.py").exists()


def test_a_signal_is_the_runs_to_answer(tmp_path: Path) -> None:
    """Ctrl-C, which a terminal sends to both, does not end the one that waits; SIGTERM to us gets
    to the run, which ends in its own way."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ready = tmp_path / "ready"
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(120)"
    )

    def send() -> None:
        while not ready.exists():
            time_to_wait.wait(0.02)
        for signum in (signal.SIGINT, signal.SIGTERM):  # from outside they come to this thread
            signal.pthread_kill(main, signum)

    time_to_wait, main = threading.Event(), threading.get_ident()
    thread = threading.Thread(target=send)
    thread.start()
    assert launch(["python", "-c", program]) == 5
    thread.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
