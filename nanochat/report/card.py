"""
The report card's text: tables and sections made of metrics, as Markdown.

Rows whose shape is known (training runs, task results) get tables of their own; any other row is
shown as the names and values it has, so a stage may measure something new without a change here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat.checkpoint import STAGE_FOLDERS
from nanochat.common import UserError, atomic_write
from nanochat.machine import machine_info, versions
from nanochat.report.plot import plot_runs
from nanochat.report.runs import Row, Run, read_rows, read_runs

TITLES = {
    "base": "Pretraining (base)",
    "mid": "Midtraining (mid)",
    "sft": "Supervised finetuning (sft)",
    "rl": "Reinforcement learning (rl)",
    "dpo": "Preference optimization (dpo)",
}


# --------------------------------------------------------------------------------------------------
# numbers and tables


def show(value: Any) -> str:
    """A value for a table cell: 1,234,567 and 0.1234 and yes; text without what breaks a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|")


def duration(seconds: float | None) -> str:
    """75 -> "1m 15s"."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"


def table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    """A Markdown table, padded so that it also reads well as plain text; numbers to the right."""
    cells = [head, *([show(cell) for cell in row] for row in rows)]
    # A column of numbers has a digit in front everywhere, be it in "81.2 ± 1.0" or "3m 24s".
    numbers = [all(not c or c.lstrip("-+")[:1].isdigit() for c in col[1:]) for col in zip(*cells)]
    # One overlong cell (a mixture of tasks, say) must not stretch every line.
    widths = [min(60, max(3, *(len(row[i]) for row in cells))) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(*columns)) + " |"
        for columns in ((row, widths, numbers) for row in cells)
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-:"[n]) for w, n in zip(widths, numbers)) + "|"
    return [lines[0], rule, *lines[1:], ""]


def _pairs(row: Row, skip: tuple[str, ...] = ()) -> list[str]:
    """A two-column table of a row's plain values."""
    shown = [[k, v] for k, v in row.items() if k not in (*skip, "time") and _plain(v)]
    return table(["", "value"], shown) if shown else []


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and value != ""


# --------------------------------------------------------------------------------------------------
# sections


def summary(runs: list[Run]) -> list[str]:
    """One line a stage: how much was trained, how long it took, what came of it."""
    head = ["stage", "run", "parameters", "steps", "tokens", "time", "tokens/s", "result"]
    rows = []
    for run in runs:
        speeds = sorted(run.series("steps", "tokens_per_second")[1])
        rows.append(
            [
                run.stage,
                run.tag,
                run.start.get("num_params"),
                _progress(run),
                _tokens(run),
                duration(run.seconds) + ("" if run.end else " so far"),
                round(speeds[len(speeds) // 2]) if speeds else None,  # the median: first steps lag
                _result(run),
            ]
        )
    return table(head, rows)


def _tokens(run: Run) -> int | None:
    value = run.last("steps", "tokens")
    return None if value is None else int(value)


def _result(run: Run) -> str:
    """The one number of a stage, before and after: problems solved for RL, else loss."""
    for key in ("pass1", "val_bpb", "val_loss"):
        if change := _change(run, key):
            return f"{key} {change}"
    rewards = run.series("rl", "reward")[1]
    if rewards:
        part = max(1, len(rewards) // 10)  # a tenth of the run: one step is mostly noise
        return f"reward {_mean(rewards[:part]):.3f} -> {_mean(rewards[-part:]):.3f}"
    loss = run.last("steps", "loss")
    return "" if loss is None else f"loss {loss:.4f}"


def _change(run: Run, key: str) -> str:
    """A measurement's first and last value, with their standard errors: "0.31 ± 0.02 -> 0.4"."""
    steps, values = run.series("evals", key)
    if not values:
        return ""
    if min(values) == max(values) and values[0].is_integer():
        return show(int(values[0]))  # no measurement, but how it was made: the number of problems
    ends = dict.fromkeys((0, len(values) - 1))  # one value if there is one
    shown = []
    for i in ends:
        error = run.evals[steps[i]].get(f"{key}_stderr")
        shown.append(f"{values[i]:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return " -> ".join(shown)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def stage_section(run: Run) -> list[str]:
    """Settings and results of one run, with samples of what it said."""
    lines = [f"## {TITLES[run.stage]}: {run.tag}", ""]
    if not run.end:
        lines += ["This run has not ended: the numbers are those so far.", ""]
    results: Row = {"steps": _progress(run), "duration": duration(run.seconds)}
    losses = run.series("steps", "loss")[1]
    if losses and not run.rl:  # a policy-gradient loss says nothing
        results["training loss"] = f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    keys = dict.fromkeys(key for row in run.evals.values() for key in row)
    for key in keys:
        plain = not key.endswith("_stderr") and key not in ("event", "stage", "step", "time")
        if plain and (change := _change(run, key)):
            results[key] = change
    for kind, key in (
        ("rl", "reward"), ("rl", "completion_tokens"), ("rl", "ended"), ("steps", "mfu"),
    ):  # fmt: skip
        values = run.series(kind, key)[1]
        if values:
            results[f"{key}, last tenth"] = _mean(values[-max(1, len(values) // 10) :])
    lines += _pairs(results)
    place = f"`{STAGE_FOLDERS[run.stage]}/{run.tag}/`"
    lines += [f"In {place}; `python -m scripts.rerun {run.name}` repeats it.", ""]
    settings = {**(run.start.get("model") or {}), **(run.start.get("args") or {})}
    if settings:
        lines += ["<details><summary>Settings</summary>", "", *_pairs(settings), "</details>", ""]
    if run.samples:
        step = max(run.samples)
        lines += _samples(f"Samples at step {step:,}:", [r.get("text") for r in run.samples[step]])
    return lines


def _progress(run: Run) -> str:
    """ "200", or "120 of 200" where a run stopped before its end."""
    planned = run.start.get("num_steps")
    done = show(run.num_steps)
    return done if planned in (None, run.num_steps) else f"{done} of {show(planned)}"


def _samples(title: str, texts: list[Any]) -> list[str]:
    """What a model wrote, as indented code: it may hold special tokens and markup."""
    return [title, "", *("    " + " ".join(str(text).split()) for text in texts), ""]


def base_section(rows: list[Row], runs: list[Run], model_tag: str | None) -> list[str]:
    """Bits per byte, CORE and samples of base models, as scripts.base_eval measured them."""
    lines: list[str] = []
    for (source, tag), row in _newest(rows, runs, model_tag).items():
        lines += [f"## Base evaluation: {source} {tag}, step {show(row.get('step'))}", ""]
        lines += _pairs(row, skip=("source", "model_tag", "step"))
        tasks = row.get("core_tasks") or {}
        if tasks:
            body = [
                [label, t.get("n"), percent(t.get("results"), t.get("stderr")),
                 percent(t.get("centered"))]
                for label, t in tasks.items()
            ]  # fmt: skip
            lines += table(["CORE task", "n", "accuracy, %", "centred, %"], body)
        if row.get("samples"):
            lines += _samples("Samples:", row["samples"])
    return lines


def _newest(rows: list[Row], runs: list[Run], model_tag: str | None) -> dict[Any, Row]:
    """(source, tag) -> its rows as one, of the last step measured, for the runs reported on."""
    tags = {run.stage: run.tag for run in runs}
    newest: dict[Any, Row] = {}
    for row in rows:
        source, tag = row.get("source"), row.get("model_tag")
        if tag != (tags.get(str(source)) or model_tag or tag):
            continue
        old = newest.get((source, tag), {})
        newest[source, tag] = {**(old if old.get("step") == row.get("step") else {}), **row}
    return newest


def evaluation_section(rows: list[Row], runs: list[Run], model_tag: str | None) -> list[str]:
    """The tasks, one row each, with a column for every stage of which there are results."""
    steps = {key: row.get("step") for key, row in _newest(rows, runs, model_tag).items()}
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:  # in the order of time: the last result for a task wins
        key = (row.get("source"), row.get("model_tag"))
        if (
            row.get("task")
            and key[0] in STAGE_FOLDERS
            and key in steps
            and row.get("step") == steps[key]
        ):
            cells.setdefault(str(row["task"]), {})[str(key[0])] = row
    sources = [s for s in STAGE_FOLDERS if any(s in by_source for by_source in cells.values())]
    if not sources:
        return []
    body = []
    for task, by_source in cells.items():
        known = list(by_source.values())
        sizes = sorted({row["n"] for row in known if isinstance(row.get("n"), int)})
        body.append(
            [
                task,
                " / ".join(f"{n:,}" for n in sizes),
                percent(next((r["chance"] for r in known if r.get("chance")), None)),
                *(_accuracy(by_source.get(source)) for source in sources),
            ]
        )
    ended = [_share_ended(cells, source) for source in sources]
    if any(ended):
        body.append(["replies that end by themselves", "", "", *ended])
    lines = ["## Evaluation", "", "Accuracy in percent, with its standard error.", ""]
    return [*lines, *table(["task", "n", "chance", *sources], body)]


def percent(value: Any, stderr: Any = None) -> str:
    """0.8125, 0.0101 -> "81.2 ± 1.0"."""
    if not isinstance(value, (int, float)):
        return ""
    error = f" ± {100 * stderr:.1f}" if isinstance(stderr, (int, float)) else ""
    return f"{100 * value:.1f}{error}"


def _accuracy(row: Row | None) -> str:
    return percent(row.get("accuracy"), row.get("stderr")) if row else ""


def _share_ended(cells: dict[str, dict[str, Row]], source: str) -> str:
    """Share of a source's replies that ended by themselves, over all items of all tasks."""
    rows = [by_source[source] for by_source in cells.values() if source in by_source]
    rows = [r for r in rows if isinstance(r.get("ended"), (int, float)) and r.get("n")]
    total = sum(row["n"] for row in rows)
    return percent(sum(row["ended"] * row["n"] for row in rows) / total) if total else ""


def rows_section(title: str, rows: list[Row]) -> list[str]:
    """Rows of any shape: the last one of each kind, a kind being what its texts say."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        plain = {k: v for k, v in row.items() if _plain(v) and k != "time"}
        last[tuple(v for v in plain.values() if isinstance(v, str))] = plain
    if not last:
        return []
    if len(last) == 1:
        return [f"## {title}", "", *_pairs(next(iter(last.values())))]
    keys = list(dict.fromkeys(key for row in last.values() for key in row))
    keys.sort(key=lambda key: not any(isinstance(r.get(key), str) for r in last.values()))
    return [f"## {title}", "", *table(keys, ([r.get(k) for k in keys] for r in last.values()))]


def intro(runs: list[Run], others: list[str]) -> list[str]:
    """What was trained, on what machine, with which versions, for how long."""
    newest = runs[-1].start if runs else {}
    machine = newest.get("machine") or machine_info()
    gpus = machine.get("gpus") or []
    place = ", ".join(
        [
            *(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)),
            *([str(machine["cpu"])] if machine.get("cpu") else []),
            *([f"{machine['cores']} cores"] if machine.get("cores") else []),
            *([f"{machine['memory_gib']} GiB memory"] if machine.get("memory_gib") else []),
            *([str(machine["platform"])] if machine.get("platform") else []),
        ]
    )
    total = sum(run.seconds or 0.0 for run in runs)
    packages = ", ".join(f"{k} {v}" for k, v in (newest.get("versions") or versions()).items())
    lines = [f"- Machine: {place}", f"- Versions: {packages}"]
    if runs:
        lines.append(f"- Training time, all stages: {duration(total)}")
    if others:
        lines.append(f"- Runs not shown: {', '.join(others)} (choose with --model_tag)")
    if runs and others:
        two = f"{runs[-1].name} {others[-1]}"
        lines.append(f"- Two runs side by side: `python -m scripts.compare {two}`")
    return [*lines, ""]


def write_report(folder: Path, out: Path, model_tag: str | None = None) -> str:
    """Writes the report on the metrics in `folder`, which is report/ of a base directory, and on
    the runs of that directory to `out`, and loss.png beside it.

    Returns the summary table. UserError if there is nothing to report."""
    runs, others = read_runs(folder.parent, model_tag)
    chat, base = read_rows(folder / "chat_eval.jsonl"), read_rows(folder / "base_eval.jsonl")
    sections = [
        rows_section("Tokenizer", read_rows(folder / "tok_train.jsonl")[-1:]),
        rows_section("Tokenizer, compared", read_rows(folder / "tok_eval.jsonl")),
        *(stage_section(run) for run in runs),
        base_section(base, runs, model_tag),
        evaluation_section(chat, runs, model_tag),
    ]
    if not any(sections):
        which = f" of --model_tag={model_tag}" if model_tag else ""
        raise UserError(
            f"{folder} holds no metrics{which}; train something first, for example with "
            "`bash speedrun.sh`, or point NANOCHAT_BASE_DIR at the folder of a run"
        )
    lines = ["# nanochat report", "", *intro(runs, others)]
    overview = summary(runs) if runs else []
    lines += overview
    # Evaluation is what most readers look for: it comes first, then the stages as they happened.
    lines += sections[-1]
    if plot_runs(runs, out.with_name("loss.png")):
        lines += ["![loss curves](loss.png)", ""]
    lines += [line for section in sections[:-1] for line in section]
    with atomic_write(out, "w") as f:
        f.write("\n".join(lines).rstrip() + "\n")
    return "\n".join([*overview, *sections[-1][4:]]).rstrip()
