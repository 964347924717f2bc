"""
Training runs as processes of their own: their command lines, and waiting for them.

A command is written as one would type it: `python -m scripts.base_train --depth=4`, or torchrun's
words before it where a run has several ranks. Floor 0.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # where `scripts` and `nanochat` lie


def command(
    script: str,
    words: Sequence[str],
    world_size: int = 1,
    nodes: int = 1,
    meet: str = "FIRST_NODE:29400",
) -> list[str]:
    """The words that run scripts.<script> with these flags on so many ranks.

    On several nodes it is to be typed on each of them, or given to srun; `meet` is where their
    torchruns meet: a port of the first node. ValueError if the ranks are not as many on each."""
    if world_size == 1:
        return ["python", "-m", f"scripts.{script}", *words]
    if world_size % nodes:
        raise ValueError(f"{world_size} ranks on {nodes} nodes: not as many on each")
    where = ["--standalone"]
    if nodes > 1:
        where = [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={meet}"]
    ranks = f"--nproc_per_node={world_size // nodes}"
    return ["torchrun", *where, ranks, "-m", f"scripts.{script}", "--", *words]


def launch(words: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs such a command with this Python, in our environment or the one given; returns its exit
    status (minus the signal's number if a signal ended it).

    Ctrl-C reaches the run by itself and SIGTERM is passed on: it saves and ends, and we wait for
    that. Call it in the main thread."""
    programs = {"python": ["-u"], "torchrun": ["-m", "torch.distributed.run"]}
    own = [sys.executable, *programs[words[0]], *words[1:]]
    env = dict(os.environ if environment is None else environment)
    env["PYTHONPATH"] = _with_root(env.get("PYTHONPATH", ""))
    with subprocess.Popen(own, env=env) as process:
        handlers = {
            # Not SIG_IGN, which the run would inherit, had it been set a moment earlier.
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        }
        try:
            return process.wait()
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)


def shown(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """The command for a shell, with variables set for it alone."""
    variables = [f"{k}={shlex.quote(v)}" for k, v in (environment or {}).items()]
    return " ".join([*variables, shlex.join(words)])


def _with_root(path: str) -> str:
    """PYTHONPATH such that the run has our code, wherever it is started."""
    return os.pathsep.join([str(ROOT), *filter(None, [path])])
