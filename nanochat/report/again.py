"""
The report's last section: the commands that lead to a run, from its data on, and its versions.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.checkpoint import LOG, STAGE_FOLDERS, STAGE_SCRIPTS
from nanochat.common import read_json
from nanochat.launch import command
from nanochat.machine import versions
from nanochat.report.runs import Row, Run, read_run
from nanochat.report.tables import pairs
from nanochat.shards import DEFAULT_REPO

WIDTH = 88  # characters of a command's line
TAG_FLAGS = ("-g", "--model_tag", "--model-tag")
STARTED_FROM = re.compile(r"(\w+) (.+) step_(\d+) \(\w+\)")  # as a checkpoint is named

Lines = list[str]
Words = list[str]


def reproduction(
    base_dir: Path, runs: list[Run], trained: list[Row], tested: list[Row], rest: list[str]
) -> Lines:
    """Versions and revision, and the commands. `trained`: rows of tok_train, `tested`: those of
    chat_eval and base_eval, `rest`: names of runs that are not reported on."""
    newest = runs[-1].start if runs else {}
    known = newest.get("versions") or versions()
    lines = ["## How to reproduce it", ""]
    code = newest.get("code") or {}
    lines += pairs({**known, "code": code.get("fingerprint") or ""})
    revision = str(known.get("git") or "").removesuffix("-dirty")
    commands = [["git", "checkout", revision]] if revision else []
    if code.get("changes"):
        folder = f"{STAGE_FOLDERS[runs[-1].stage]}/{runs[-1].tag}"
        commands.append(["git", "apply", f"{folder}/{code['changes']}"])
    commands += all_commands(base_dir, runs, trained, tested)
    # As code, line by line: a prompt among the flags may hold anything.
    lines += [f"    {line}" for words in commands for line in folded(words).splitlines()] + [""]
    if runs:
        lines += [
            f"`python -m scripts.rerun {runs[-1].name}` says what is no longer as it was; with "
            "`--go` it repeats the run and compares the losses.",
            "",
        ]
    if rest:
        lines += [f"Runs not shown here: {', '.join(rest)} (`--model_tag` chooses).", ""]
        alike = [(r.name, other) for r in runs for other in rest if other.startswith(r.stage + "/")]
        for a, b in alike[:1]:
            lines += [f"Two runs side by side: `python -m scripts.compare {a} {b}`.", ""]
    return lines


def all_commands(
    base_dir: Path, runs: list[Run], trained: list[Row], tested: list[Row]
) -> Iterator[Words]:
    """From the data to the last evaluation, as far as the files say what was done. A run comes
    after the one that it started from, whether that is reported on or not."""
    line = _chain(base_dir, runs)
    yield from _data(base_dir, line)
    for row in trained[-1:]:
        names = [key for key in ("max_chars", "vocab_size", "doc_cap") if key in row]
        typed = row.get("typed")
        yield command("tok_train", typed or [f"--{key}={row[key]}" for key in names])
    for run in line:
        yield from _run(base_dir, run)
        about = (run.stage, run.tag)
        rows = [row for row in tested if (row.get("source"), row.get("model_tag")) == about]
        yield from _evaluations("base_eval", run, [row for row in rows if "task" not in row])
        yield from _evaluations("chat_eval", run, [row for row in rows if "task" in row])


def _evaluations(script: str, run: Run, rows: list[Row]) -> Iterator[Words]:
    """What was typed for each row, and the tag of the run: the newest of then may not be it now."""
    for words in dict.fromkeys(tuple(row["typed"]) for row in rows if row.get("typed") is not None):
        named = any(word.startswith(TAG_FLAGS) for word in words)
        yield command(script, [*words, *([] if named else ["-g", run.tag])])
    rest = [row for row in rows if row.get("typed") is None]  # by a program of the user's own
    tasks = dict.fromkeys(str(row["task"]) for row in rest if row.get("task"))
    tasks.pop("ChatCORE", None)  # the mean of the others
    if rest:
        which = ["-a", "|".join(tasks)] if tasks else []
        yield command(script, ["-i", run.stage, "-g", run.tag, *which])


def _chain(base_dir: Path, runs: list[Run]) -> list[Run]:
    """The runs, each with those before it that it started from, back to the first."""
    found: dict[str, Run] = {}
    reported = {run.name: run for run in runs}

    def add(run: Run, below: frozenset[str]) -> None:
        began = STARTED_FROM.fullmatch(str(run.start.get("started_from") or ""))
        if began and began[1] in STAGE_FOLDERS:
            stage, tag = began[1], began[2]
            name = f"{stage}/{tag}"
            if name not in below:  # a tag used anew may stand for its own beginning
                log = base_dir / STAGE_FOLDERS[stage] / tag / LOG
                add(reported.get(name) or read_run(log, stage, tag), below | {name})
        found.setdefault(run.name, run)

    for run in runs:
        add(run, frozenset([run.name]))
    return list(found.values())


def _data(base_dir: Path, runs: list[Run]) -> Iterator[Words]:
    """What wrote the text that is there: the primer, or a download. Own text needs no command."""
    primer, pins = base_dir / "primer.json", base_dir / "validation_files.json"
    if primer.exists():
        made = read_json(primer)
        flags = [f"--{key}={made[key]:g}" for key in ("seed", "scale") if made.get(key, 1) != 1]
        yield ["python", "-m", "nanochat.primer", *flags]
        return
    read = [
        run for run in runs if run.stage == "base" and not (run.start.get("args") or {}).get("data")
    ]
    claimed = read_json(pins).get("base_data", {}) if pins.exists() else {}
    if read and claimed.get("repo"):
        shards = len(list((base_dir / "base_data").glob("shard_*.parquet")))
        words = ["python", "-m", "nanochat.dataset", "-n", str(max(0, shards - 1))]  # - validation
        other = claimed["repo"] != DEFAULT_REPO
        yield [*words, *([f"--repo={claimed['repo']}"] if other else [])]


def _run(base_dir: Path, run: Run) -> Iterator[Words]:
    """What was typed for a run, or the import that stands in its place."""
    typed, nodes, ranks = run.start.get("typed"), run.start.get("nodes") or 1, ranks_of(run)
    if isinstance(typed, list):
        words = [str(word) for word in typed]
        yield command(STAGE_SCRIPTS[run.stage], words, ranks, 1 if ranks % nodes else nodes)
    if run.start:
        return
    for path in sorted((base_dir / STAGE_FOLDERS[run.stage] / run.tag).glob("step_*/meta.json"))[
        -1:
    ]:
        where: Any = (read_json(path).get("imported") or {}).get("from")
        if where:
            tag, stage = f"--model_tag={run.tag}", f"--stage={run.stage}"
            yield command("hf_import", [f"--from={where}", tag, stage])


def ranks_of(run: Run) -> int:
    """Processes that a run was made by."""
    size = run.start.get("world_size")
    return size if isinstance(size, int) else 1


def folded(words: Words) -> str:
    """A command for a shell, on lines of at most about WIDTH characters."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
