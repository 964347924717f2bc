"""
Metrics files, read back: what one training run left behind, and which runs there are.

A run writes <stage>_checkpoints/<tag>/log.jsonl, one event a line:

    {"event": "start", "step", "args", "model", "num_params", "num_steps", "machine", "versions",
     "flops_per_token", "identity", "typed", "code", ...}    what nanochat/record.py describes
    {"event": "step", "step", "loss", "lr_mul", "tokens_per_second", "mfu", "seconds", "tokens",
     "memory_gib"}                 the most this process (its GPU) has held so far
    {"event": "eval", "step", "val_bpb" or "val_loss" or "pass1", "pass1_stderr", ...}
    {"event": "rl", "step", "reward", "completion_tokens", "ended"}
    {"event": "sample", "step", "text"}
    {"event": "end", "step", "seconds", "final": {...}}

`step` is the number of optimizer steps taken, `seconds` and `tokens` count from the beginning of
the run, `time` (in every row) is in seconds since 1970. A reader here never fails on what is
missing or half written: a run that is still going is reported as far as it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.checkpoint import LOG, STAGE_FOLDERS
from nanochat.common import warn0

Row = dict[str, Any]


@dataclass
class Run:
    """What one training run left behind; each dict goes from step to the last row of that step."""

    stage: str
    tag: str
    start: Row = field(default_factory=dict)
    steps: dict[int, Row] = field(default_factory=dict)
    evals: dict[int, Row] = field(default_factory=dict)
    rl: dict[int, Row] = field(default_factory=dict)
    samples: dict[int, list[Row]] = field(default_factory=dict)
    end: Row | None = None
    wall: float = 0.0  # seconds from the first row to the last, without those between two starts

    def series(self, kind: str, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one measurement: series("steps", "loss"), series("rl", "reward")."""
        rows = sorted(getattr(self, kind).items())
        pairs = [(s, float(r[key])) for s, r in rows if isinstance(r.get(key), (int, float))]
        return [s for s, _ in pairs], [v for _, v in pairs]

    @property
    def name(self) -> str:
        """What commands call it: base/d4."""
        return f"{self.stage}/{self.tag}"

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken so far."""
        return max(self.steps, default=0)

    @property
    def seconds(self) -> float | None:
        """Duration of the run so far, None if it is not known."""
        if self.end and isinstance(self.end.get("seconds"), (int, float)):
            return float(self.end["seconds"])
        return self.last("steps", "seconds")

    def last(self, kind: str, key: str) -> float | None:
        """The newest value of a measurement, None if there is none."""
        values = self.series(kind, key)[1]
        return values[-1] if values else None


def read_rows(path: Path) -> list[Row]:
    """The JSON objects of a file. A line cut short by a crash is skipped with a warning."""
    if not path.exists():
        return []
    rows = []
    # Not splitlines(), which cuts at U+2028 and U+0085 too: a model may write those
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            warn0(f"{path}:{number}: no JSON, skipped")
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_run(path: Path, stage: str, tag: str) -> Run:
    """One run from its events. A resumed run appends to its file and repeats the steps after its
    checkpoint: its "start" erases what the file said of them."""
    run = Run(stage, tag)
    before: float | None = None
    resumed_at: int | None = None
    for row in read_rows(path):
        now = _time(row)
        if row.get("event") != "start" and before and now > before:
            run.wall += now - before
        before = now or before
        event, step = row.get("event"), row.get("step", 0)
        if not isinstance(step, int):
            continue
        kept: dict[str, dict[int, Row]] = {"step": run.steps, "eval": run.evals, "rl": run.rl}
        if event == "start":
            run.start, run.end = row, None
            for rows in kept.values():
                for old in [s for s in rows if s > step]:
                    del rows[old]
            run.samples = {s: texts for s, texts in run.samples.items() if s <= step}
            resumed_at = step
        elif event == "end":
            run.end = row
        elif event == "sample":
            if step == resumed_at:  # made again, as its checkpoint was saved before them
                run.samples.pop(step, None)
                resumed_at = None
            run.samples.setdefault(step, []).append(row)
        elif event in kept:
            # Several evaluations may be recorded at one step, each with its own names.
            kept[event][step] = {**kept[event].get(step, {}), **row}
    return run


def read_runs(base_dir: Path, model_tag: str | None = None) -> tuple[list[Run], list[str]]:
    """The newest run of every stage (or the one with `model_tag`) in a base directory, and the
    names of the others."""
    chosen: dict[str, Run] = {}
    others = []
    logs = [
        (stage, path)
        for stage, folder in STAGE_FOLDERS.items()
        for path in sorted((base_dir / folder).glob(f"*/{LOG}"))
    ]
    for stage, path in logs:
        run = read_run(path, stage, path.parent.name)
        rival = chosen.get(run.stage)
        if (model_tag and run.tag != model_tag) or (
            rival and _time(rival.start) > _time(run.start)
        ):
            others.append(run.name)
            continue
        if rival:
            others.append(rival.name)
        chosen[run.stage] = run
    return [chosen[stage] for stage in STAGE_FOLDERS if stage in chosen], others


def _time(row: Row) -> float:
    """When a row was written, in seconds since 1970; 0 if it does not say."""
    value = row.get("time")
    return float(value) if isinstance(value, (int, float)) else 0.0
