"""
The report's sections: what each stage did, what it was tested on, what the tokenizer holds.

Rows whose shape is known (training runs, task results) get tables of their own; any other row is
shown as the names and values it has, so a stage may measure something new without a change here.
"""

from __future__ import annotations

from typing import Any

from nanochat.checkpoint import STAGE_FOLDERS
from nanochat.report.runs import Row, Run
from nanochat.report.samples import asked
from nanochat.report.tables import duration, pairs, percent, show, table

TITLES = {
    "base": "Pretraining (base)",
    "mid": "Midtraining (mid)",
    "sft": "Supervised finetuning (sft)",
    "rl": "Reinforcement learning (rl)",
    "dpo": "Preference optimization (dpo)",
}


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
    lines = [f"### {TITLES[run.stage]}: {run.tag}", ""]
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
    lines += pairs(results) + _data(run)
    place = f"`{STAGE_FOLDERS[run.stage]}/{run.tag}/`"
    lines += [f"In {place}; `python -m scripts.rerun {run.name}` repeats it.", ""]
    settings = {**(run.start.get("model") or {}), **(run.start.get("args") or {})}
    if settings:
        lines += ["<details><summary>Settings</summary>", "", *pairs(settings), "</details>", ""]
    if run.samples and not asked(run):  # else they are shown side by side with the other stages'
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
    for (source, tag), row in newest_rows(rows, runs, model_tag).items():
        lines += [f"## Base evaluation: {source} {tag}, step {show(row.get('step'))}", ""]
        lines += pairs(row, skip=("source", "model_tag", "step"))
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


def newest_rows(rows: list[Row], runs: list[Run], model_tag: str | None) -> dict[Any, Row]:
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


def current(rows: list[Row], runs: list[Run], model_tag: str | None) -> list[Row]:
    """The rows of task results about the checkpoints reported on, in the order of time."""
    steps = {key: row.get("step") for key, row in newest_rows(rows, runs, model_tag).items()}
    return [
        row
        for row in rows
        if row.get("task")
        and row.get("source") in STAGE_FOLDERS
        and (key := (row["source"], row.get("model_tag"))) in steps
        and row.get("step") == steps[key]
    ]


def core_rows(rows: list[Row], runs: list[Run], model_tag: str | None) -> list[Row]:
    """CORE as rows of task results, to stand in one table with them: accuracies are centred."""
    return [
        {**row, "task": "CORE (centred)", "accuracy": row["core_metric"],
         "stderr": row.get("core_stderr"), "n": _core_size(row)}
        for row in newest_rows(rows, runs, model_tag).values()
        if isinstance(row.get("core_metric"), (int, float))
    ]  # fmt: skip


def _core_size(row: Row) -> int | None:
    """Questions of all CORE tasks."""
    sizes = [task.get("n") for task in (row.get("core_tasks") or {}).values()]
    return sum(n for n in sizes if isinstance(n, int)) or None


def evaluation_section(rows: list[Row], runs: list[Run], model_tag: str | None) -> list[str]:
    """The tasks, one row each, with a column for every stage of which there are results."""
    cells: dict[str, dict[str, Row]] = {}
    for row in current(rows, runs, model_tag):  # the last result for a task wins
        cells.setdefault(str(row["task"]), {})[str(row["source"])] = row
    sources = [s for s in STAGE_FOLDERS if any(s in by_source for by_source in cells.values())]
    if not sources:
        return []
    body = []
    for task, by_source in cells.items():
        known = list(by_source.values())
        sizes = sorted({row["n"] for row in known if isinstance(row.get("n"), int)})
        chance = next((r["chance"] for r in known if r.get("chance") is not None), None)
        body.append(
            [
                task,
                " / ".join(f"{n:,}" for n in sizes),
                percent(chance),
                *(_accuracy(by_source.get(source)) for source in sources),
            ]
        )
    ended = [_share_ended(cells, source) for source in sources]
    if any(ended):
        body.append(["replies that end by themselves", "", "", *ended])
    lines = ["## Evaluation", "", "Accuracy in percent, with its standard error.", ""]
    return [*lines, *table(["task", "n", "chance", *sources], body)]


def _accuracy(row: Row | None) -> str:
    return percent(row.get("accuracy"), row.get("stderr")) if row else ""


def _share_ended(cells: dict[str, dict[str, Row]], source: str) -> str:
    """Share of a source's replies that ended by themselves, over all items of all tasks."""
    rows = [by_source[source] for by_source in cells.values() if source in by_source]
    rows = [r for r in rows if isinstance(r.get("ended"), (int, float)) and r.get("n")]
    total = sum(row["n"] for row in rows)
    return percent(sum(row["ended"] * row["n"] for row in rows) / total) if total else ""


def _data(run: Run) -> list[str]:
    """What a run learned from: its data, and the shares of a mixture's tasks."""
    start, args = run.start, run.start.get("args") or {}
    lines = pairs(
        {
            "data": args.get("data") or ("base_data/" if run.stage == "base" else None),
            "task": args.get("task") if run.stage == "rl" else None,
            "mixture": start.get("mixture"),
            "validation": start.get("validation"),
            "started from": start.get("started_from"),
        }
    )
    shares = [row for row in start.get("shares") or [] if isinstance(row, dict)]
    if not shares:
        return lines
    total = sum(row.get("tokens") or 0 for row in shares) or 1
    body = [
        [*(row.get(key) for key in ("name", "rows", "epochs", "tokens")),
         percent((row.get("trained") or 0) / (row.get("tokens") or 1)),
         percent((row.get("tokens") or 0) / total)]
        for row in shares
    ]  # fmt: skip
    head = ["task", "conversations", "epochs", "tokens", "of them trained on, %", "share, %"]
    return lines + table(head, body)


def tokenizer_section(trained: list[Row], measured: list[Row]) -> list[str]:
    """How much text a token holds, a line for each text and a column for each tokenizer; then how
    fast they are; then how ours was made."""
    cells: dict[str, dict[str, Row]] = {}
    for row in measured:  # the last measurement wins
        cells.setdefault(str(row.get("text")), {})[str(row.get("tokenizer"))] = row
    lines: list[str] = []
    if cells:
        names = list(dict.fromkeys(name for by_name in cells.values() for name in by_name))
        body = [
            [
                text,
                next(iter(by_name.values())).get("bytes"),
                *(_decimals(by_name.get(name), "bytes_per_token") for name in names),
                _decimals(by_name.get(names[0]), "chars_per_token"),
            ]
            for text, by_name in cells.items()
        ]
        head = ["text", "bytes", *names, f"characters, {names[0]}"]
        lines += ["Bytes of text that a token holds: the more, the fewer steps for a text.", ""]
        lines += table(head, body)
        speeds = [
            [name, row.get("vocab"), percent(row.get("used_share")), row.get("mb_per_second"),
             row.get("batch_mb_per_second")]
            for name, row in cells.get("validation", {}).items()
        ]  # fmt: skip
        if speeds:
            head = ["tokenizer", "vocabulary", "of it used, %", "MB/s", "MB/s in batches"]
            lines += table(head, speeds)
    if trained:
        lines += ["<details><summary>How it was trained</summary>", "", *pairs(trained[-1])]
        lines += ["</details>", ""]
    return ["## Tokenizer", "", *lines] if lines else []


def _decimals(row: Row | None, key: str) -> str:
    value = row.get(key) if row else None
    return f"{value:.2f}" if isinstance(value, (int, float)) else ""
