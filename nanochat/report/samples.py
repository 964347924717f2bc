"""
What the models said: the same questions, answered before and after every stage.

Two sources: the samples that a run logs while it trains, and the files of chat_eval, which hold
every question with its replies. Few and short ones are shown; how they are chosen does not depend
on who was right. All of it is quoted as code: a model may write anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.checkpoint import STAGE_FOLDERS
from nanochat.report.runs import Row, Run, read_rows
from nanochat.report.tables import literal, show, table

MAX_TASKS = 6  # a question of each of the first so many tasks
PROMPT = 300  # characters of a question; longer ones are passed over
REPLY = 240  # and of a reply; what is longer is broken off

_ASSISTANT = re.compile(r"<\|assistant_start\|>|<\|im_start\|>assistant\n")
_END = re.compile(r"<\|(?:assistant_end|im_end)\|>")
_CALL = re.compile(
    r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.S
)


def conversations(folder: Path, runs: list[Run], results: list[Row]) -> list[str]:
    """The section, of the runs' logs and of the files of chat_eval in the base directory of
    `folder`; empty if nobody was asked anything. `results`: the rows of chat_eval to be shown."""
    body: list[str] = []
    for prompt, answers in _by_prompt(runs).items():
        body += [f"**{literal(prompt)}**", "", *table(["", ""], answers)]
    tasks = list(_by_task(folder.parent, results))
    if tasks:
        body += [
            "Of each task the first short question that the stages do not agree about; these are "
            "examples, the measure is above:",
            "",
        ]
    for task, question, replies in tasks:
        expected = question.get("expected", question.get("gold"))
        right = f", where {_expected(expected)} is right" if expected else ""
        body += [f"**{literal(str(question['prompt']))}** ({show(task)}{right})", ""]
        body += table(["", "", ""], replies)
    if not body:
        return []
    about = (
        "What the model of each stage says to the same words; `[…]` is a call of its Python tool."
    )
    return ["## Before and after", "", about, "", *body]


# --------------------------------------------------------------------------------------------------
# samples of a run's log


def _by_prompt(runs: list[Run]) -> dict[str, list[list[Any]]]:
    """prompt -> [when, reply] of every run's first and last sample, in the order of the stages."""
    found: dict[str, list[list[Any]]] = {}
    for run in runs:
        for prompt, said in asked(run).items():
            rows = found.setdefault(prompt, [])
            steps = sorted(said)
            for step in dict.fromkeys((steps[0], steps[-1])):
                reply = literal(said[step], REPLY)
                when = f"before {run.stage}" if step == 0 else f"{run.stage}, step {step:,}"
                if run.end and step == run.num_steps:
                    when = f"after {run.stage}"
                # Before a stage is after the one before: said once if it is the same.
                if not (step == 0 and rows and rows[-1][1] == reply):
                    rows.append([when, reply])
    return found


def asked(run: Run) -> dict[str, dict[int, str]]:
    """prompt -> step -> what the model answered; empty if the log does not say what was asked."""
    prompts = str((run.start.get("args") or {}).get("sample_prompts") or "").split("|")
    found: dict[str, dict[int, str]] = {}
    for step, rows in run.samples.items():
        if len(rows) != len(prompts) or not all(prompts):
            return {}
        for prompt, row in zip(prompts, rows):
            found.setdefault(prompt, {})[step] = reply_in(str(row.get("text", "")), prompt)
    return found


def reply_in(text: str, prompt: str) -> str:
    """What the model added to its prompt, of a sample with special tokens: readable, and with "…"
    where a reply did not come to its end."""
    if _ASSISTANT.search(text):
        reply = _ASSISTANT.split(text)[-1]
        ended = bool(_END.search(reply))
        reply = _CALL.sub(lambda m: _called(m[1], m[2]), _END.split(reply)[0])
        return reply if ended else reply + " …"
    return text.partition(prompt)[2]


def _called(code: str, result: str | None) -> str:
    return f"[{code}] " if result is None else f"[{code} = {result}] "


# --------------------------------------------------------------------------------------------------
# chat_eval's files


def _by_task(base_dir: Path, results: list[Row]) -> Iterator[tuple[str, Row, list[list[Any]]]]:
    """(task, question, [stage, verdict, reply] rows) of the first tasks with files of replies."""
    files: dict[str, dict[str, Path]] = {}
    for row in results:
        path = (base_dir / str(row.get("items"))).resolve()
        # Metrics may come from elsewhere: they do not choose what is read on this machine.
        if row.get("items") and path.is_file() and path.is_relative_to(base_dir.resolve()):
            files.setdefault(str(row.get("task")), {})[str(row.get("source"))] = path
    for task, by_source in [*files.items()][:MAX_TASKS]:
        stages = [stage for stage in STAGE_FOLDERS if stage in by_source]
        items = [{i.get("index"): i for i in read_rows(by_source[s])} for s in stages]
        chosen = _choose(items)
        if chosen is not None:
            chosen_items = [of[chosen] for of in items]
            replies = [
                [stage, "right" if item.get("correct") else "wrong", literal(reply_of(item), REPLY)]
                for stage, item in zip(stages, chosen_items)
            ]
            yield task, chosen_items[0], replies


def _choose(items: list[dict[Any, Row]]) -> Any:
    """The index of the first short question that all sources answered and do not agree about; of
    the first short one where they always do; None if there is none."""
    first = None
    for index, item in items[0].items() if items else ():
        if len(str(item.get("prompt", ""))) > PROMPT or not all(index in of for of in items):
            continue
        first = index if first is None else first
        if len({bool(of[index].get("correct")) for of in items}) > 1:
            return index
    return first


def reply_of(item: Row) -> str:
    """The first reply of one of chat_eval's items as text; a letter, where letters are compared."""
    replies = item.get("replies") or [item]
    reply = replies[0].get("reply", "") if isinstance(replies[0], dict) else ""
    if isinstance(reply, str):
        return reply
    said = ""
    for part in reply:
        kind, text = part.get("type"), str(part.get("text", ""))
        if kind == "python":
            said += f"[{text}] "
        elif kind == "python_output":
            said = said.removesuffix("] ") + f" = {text}] "
        else:
            said += text
    return said


def _expected(value: Any) -> str:
    """The right answers, or the one there is."""
    answers = value if isinstance(value, list) else [value]
    return " or ".join(literal(str(answer), 80) for answer in answers[:4])
