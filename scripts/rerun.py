"""
Repeats a run from its folder, or says how and what stands in the way.

    python -m scripts.rerun base/d4          # the command, and what is no longer as it was
    python -m scripts.rerun base/d4 --go     # repeats it, and compares the losses bit for bit

A run is named as stage/tag, or by its folder or log, which may have been moved. What it was made
of stands in the first line of its log (nanochat/record.py). The repetition is a run of its own,
with --tag; it refuses to start if flags, data, tokenizer or starting weights are not as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat import flags
from nanochat.checkpoint import LOG, run_dir
from nanochat.common import UserError, print0
from nanochat.launch import launch, shown
from nanochat.record import (
    changed_since,
    environment_of,
    find_log,
    first_start,
    repeat_command,
)
from nanochat.report.runs import Row, read_run
from nanochat.report.tables import table


@dataclass
class Args:
    """Repeat a run from its folder."""

    name: tyro.conf.Positional[str]
    """The run: stage/tag (base/d4), or a folder with a log.jsonl."""
    tag: str | None = None
    """Tag of the repetition; default: that of the run and -again."""
    go: bool = False
    """Repeat it now, and compare the losses; else only get ready for it and stop."""


def main(args: Args) -> None:
    log = find_log(args.name)
    start = first_start(log)
    stage, tag = start["stage"], args.tag or f"{log.parent.name}-again"
    command = repeat_command(log, tag)
    run = read_run(log, stage, log.parent.name)
    print0(f"{log}: {run.num_steps} of {start['num_steps']} steps\n")
    changed = changed_since(start)
    if changed:
        print0("\n".join(table(["no longer the same", "then", "now"], map(list, changed))))
        print0("\n".join(how_to_restore(log, start)))
    else:
        print0("Code, versions and machine are as they were.\n")
    print0(f"To repeat it:\n\n    {shown(command, start['environment'])}\n")
    if launch([*command, *([] if args.go else ["--dry_run"])], environment_of(start)) != 0:
        raise UserError(f"{args.name} cannot be repeated here, for the reason above")
    if args.go:
        print0(compare_losses(log, run_dir(stage, tag) / LOG, stage))
    else:
        print0("Flags, data, tokenizer and starting weights are as they were. Do it with --go.")


def how_to_restore(log: Path, start: Row) -> list[str]:
    """The commands that bring back the code of a run, as far as its log knows it."""
    revision = start["versions"].get("git", "").removesuffix("-dirty")
    if not revision:
        return []
    patch = start["code"].get("changes")
    lines = ["Its code:", "", f"    git checkout {revision}"]
    return [*lines, *([f"    git apply {log.parent / patch}"] if patch else []), ""]


def compare_losses(log: Path, other: Path, stage: str) -> str:
    """Whether two runs logged the same losses, bit for bit, as one line; UserError if not."""
    (steps, a), (_, b) = (
        read_run(path, stage, path.parent.name).series("steps", "loss") for path in (log, other)
    )
    n = min(len(a), len(b))
    if not n:
        raise UserError(f"nothing to compare: {log} has {len(a)} steps, {other} has {len(b)}")
    first = next((i for i in range(n) if a[i] != b[i]), None)
    if first is not None:
        raise UserError(
            f"not the same: the loss of step {steps[first]} was {a[first]!r}, now it is "
            f"{b[first]!r}. `python -m scripts.compare {log.parent} {other.parent}` shows how far "
            "they are apart; on a GPU both need --deterministic"
        )
    return f"The losses of {n} steps are the same, bit for bit."


if __name__ == "__main__":
    flags.run(main, Args)
