"""
What it takes to repeat a run: written down as it starts, read back to repeat it.

The first row of a run's log holds its flags as typed and as resolved, the code (commit, hash, and
a patch beside the log if it had been changed), versions, machine, threads and environment, and the
identity that nanochat/start.py compares: shape, steps, seed, fingerprints of data, tokenizer and
starting weights. Floor 3.75.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from nanochat import flags
from nanochat.checkpoint import LOG, STAGE_FOLDERS, STAGE_SCRIPTS, run_dir, stage_dir
from nanochat.common import UserError, atomic_write, fingerprint, get_base_dir
from nanochat.launch import command
from nanochat.machine import code_changes, code_fingerprint, machine_info, versions

Row = dict[str, Any]
# What changes a sum's last bits, or how it is computed; nothing here names a user or a place.
ENVIRONMENT = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO",
    "TORCHINDUCTOR_MAX_AUTOTUNE", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def run_record(args: Any, folder: Path, world_size: int) -> Row:
    """Everything of the present process that a repetition needs besides flags and data; a patch of
    changed code goes to `folder`."""
    code = {"fingerprint": code_fingerprint()}
    if changes := code_changes():
        code["changes"] = f"code-{fingerprint(changes)[:8]}.diff"
        with atomic_write(folder / code["changes"], "w") as f:
            f.write(changes)
    return {
        "typed": flags.typed(args),
        "world_size": world_size,
        "nodes": max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
        "threads": torch.get_num_threads(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "code": code,
        "machine": machine_info(),
        "versions": versions(),
    }


# -------------------------------------------------------------------------------------------------
# Finding runs


def find_log(name: str) -> Path:
    """The log of a run that is named by its folder, its log, "base/d4", or "d4" if one stage alone
    has that tag. UserError, with the runs there are, if it is none of these."""
    path = Path(name).expanduser()
    for log in (path, path / LOG):
        if log.is_file():
            return log
    stage, _, tag = name.partition("/")
    places = (
        [(stage, tag)] if stage in STAGE_FOLDERS and tag else [(s, name) for s in STAGE_FOLDERS]
    )
    found = [place for place in places if (run_dir(*place) / LOG).is_file()]
    if len(found) == 1:
        return run_dir(*found[0]) / LOG
    if found:
        choice = " or ".join("/".join(place) for place in found)
        raise UserError(f"{name} names {len(found)} runs: say {choice}")
    there = [
        f"{s}/{log.parent.name}"
        for s in STAGE_FOLDERS
        for log in sorted(stage_dir(s).glob(f"*/{LOG}"))
    ]
    what = f"has no {LOG}" if path.is_dir() else "is neither a file nor a folder nor a run's name"
    raise UserError(
        f"{name} is no run: it {what}. Name a run's folder, its {LOG}, or one of the runs in "
        f"{get_base_dir()}: {', '.join(there) or 'none'}"
    )


def first_start(log: Path) -> Row:
    """The row a run began with. UserError if the file is no run's log, or says too little."""
    with open(log, encoding="utf-8", errors="replace") as f:
        try:
            row = json.loads(f.readline())
        except ValueError:
            row = None
    if (
        not isinstance(row, dict)
        or row.get("event") != "start"
        or row.get("stage") not in STAGE_SCRIPTS
    ):
        raise UserError(f"{log} is no run's log: its first line is no `start` of a training stage")
    return row


# -------------------------------------------------------------------------------------------------
# Repeating them


def repeat_command(log: Path, tag: str) -> list[str]:
    """The command that repeats a run under another tag and refuses to if anything differs.

    What the flags leave to what is there now (the newest checkpoint to start from) is named."""
    start = first_start(log)
    words = start.get("typed")
    if words is None:
        raise UserError(f"{log} does not say what was typed: the run was not started by a command")
    words = list(words)
    args = start["args"]
    began = re.fullmatch(r"\w+ (.+) step_(\d+) \(\w+\)", str(start.get("started_from") or ""))
    if began:
        words.append(f"--source_tag={began[1]}")
        words += [f"--step={int(began[2])}"] if "step" in args else []
    if isinstance(args.get("device_batch_size"), int):  # it may have been chosen by what was free
        words.append(f"--device_batch_size={args['device_batch_size']}")
    if args.get("resume_from_step", -1) >= 0:
        words.append("--resume_from_step=-1")
    words += [f"--model_tag={tag}", f"--repeats={log.parent if log.name == LOG else log}"]
    return command(STAGE_SCRIPTS[start["stage"]], words, start["world_size"], start["nodes"])


def environment_of(start: Row) -> dict[str, str]:
    """Our environment with the variables of ENVIRONMENT as they were when a run started."""
    rest = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    return {**rest, **start["environment"]}


def changed_since(start: Row) -> list[tuple[str, Any, Any]]:
    """(what, then, now) of code, versions and machine that are not as they were when a run
    started. Flags and data are compared by the run that repeats it (--repeats)."""
    now = {
        "code": {"fingerprint": code_fingerprint()},
        "versions": versions(),
        "machine": machine_info(),
    }
    found = []
    for part, value in now.items():
        before = start[part]
        for key in dict.fromkeys([*before, *value]):
            # The hash of the code says more than the name of its commit.
            if key not in ("git", "changes") and before.get(key) != value.get(key):
                found.append((f"{part}: {key}", before.get(key), value.get(key)))
    return found
