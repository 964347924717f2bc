"""
Your own rows, without code: a folder or file whose rows are recognised by their columns.

    messages                    conversations; with `expected` they can be evaluated
    question, choices, answer   multiple choice; answer is an index from 0 or a letter; with
                                "restate": true the reply is the whole line of the choice
    question, answer            word problems in GSM8K's form: the answer ends in "#### NUMBER"
    prompt, test, entry_point   functions to write in HumanEval's form
    word (and letter)           spelling (and counting letters)

get_task("my-data", "train") reads $NANOCHAT_BASE_DIR/task_data/my-data/train.{jsonl,parquet};
get_task("some/folder", "test") the folder's test split; get_task("some/file.jsonl") all of the
file. load_own("some/place"), for the flag --data, takes a file, a folder or a glob and holds some
of it out. Every row is checked when a task is made: a bad one does not end a run hours later.

`expected` is a string, or a list of them: a reply is right if one of them is in it as a whole word
or number, in any case. With `expected_exact` true the stripped reply must equal one of them;
`expected_exact` may also be that string itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import dataset
from nanochat.common import UserError, get_base_dir
from nanochat.conversation import Conversation
from nanochat.tasks.choice import MultipleChoice, RestatedChoice
from nanochat.tasks.common import (
    REGISTRY,
    ChosenRows,
    Row,
    Rows,
    RowTask,
    Task,
    read_rows,
    split_files,
)
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.spellingbee import SimpleSpelling, SpellingBee

# -----------------------------------------------------------------------------
# Conversations with expected answers

# A sign belongs to the number unless a number or word is right before it, as in 27-15
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w|,\d{3}(?!\d))"
)


def _canonical(number: str) -> str:
    """A number in one spelling: "+1,200.50" -> "1200.5", ".5" -> "0.5"."""
    text = re.sub(r"^-?(?=\.)", r"\g<0>0", number.replace(",", "").lstrip("+"))
    return text.rstrip("0").rstrip(".") if "." in text else text


def mentions(reply: str, expected: str) -> bool:
    """Whether `expected` is in `reply` as a whole number or as whole words, in any case.

    "4" is in "It is 4." but neither in "14" nor in "4.5" nor in "-4"; "art" is not in "party"."""
    wanted = expected.strip()
    if _NUMBER.fullmatch(wanted):
        return _canonical(wanted) in {_canonical(n) for n in _NUMBER.findall(reply)}
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", reply, re.IGNORECASE) is not None


class Custom(RowTask):
    """Rows of {"messages"}, and to evaluate them "expected" or "expected_exact"."""

    def convert(self, row: Row, where: str) -> Conversation:
        exact = row.get("expected_exact")
        expected = exact if isinstance(exact, str) else row.get("expected")
        # Arrow gives every row every column: a row without an expectation has None
        conversation: Conversation = {"messages": row.get("messages")}
        if expected is None:
            return conversation
        wanted = [expected] if isinstance(expected, str) else expected
        if (
            not isinstance(wanted, list)
            or not wanted
            or not all(isinstance(w, str) and w.strip() for w in wanted)
        ):
            raise UserError(
                f'{where}: "expected" must be a string or a list of strings, none of them empty, '
                f"found {expected!r:.80}"
            )
        return {**conversation, "expected": wanted, "exact": bool(exact)}

    def evaluate(self, conversation: Conversation, reply: str) -> bool:
        wanted = conversation.get("expected")
        if wanted is None:
            raise UserError(
                f'{self.name} cannot be evaluated: its rows have no "expected" key with what a '
                "right reply contains"
            )
        if conversation["exact"]:
            return reply.strip() in [w.strip() for w in wanted]
        return any(mentions(reply, w) for w in wanted)


# -----------------------------------------------------------------------------
# Recognising and loading


def task_class(row: Row) -> type[RowTask] | None:
    """The kind of task that a row's columns stand for; None if there is none."""
    has = {key for key, value in row.items() if value is not None}
    if "messages" in has:
        return Custom
    if {"question", "choices", "answer"} <= has:
        return RestatedChoice if row.get("restate") is True else MultipleChoice
    if {"question", "answer"} <= has and "####" in str(row["answer"]):
        return GSM8K
    if {"prompt", "test", "entry_point"} <= has:
        return HumanEval
    if "word" in has:
        return SpellingBee if "letter" in has else SimpleSpelling
    return None


def make_task(rows: Rows, name: str, **slicing: Any) -> RowTask:
    """The task for these rows, every one of them checked. Raises UserError with file and row."""
    first = task_class(rows[0])
    if first is None:
        found = ", ".join(rows[0]) or "nothing"
        if {"question", "answer"} <= rows[0].keys():
            found += f" (the answer is {rows[0]['answer']!r:.60})"
        raise UserError(
            f"{rows.where(0)}: cannot tell what kind of row this is, it has the columns {found}. "
            "Known are: messages | question, choices, answer | question, answer (ending in "
            "#### NUMBER) | prompt, test, entry_point | word"
        )
    task = first(rows, **slicing)
    task.name = name
    for i in range(len(rows)):
        kind = task_class(rows[i])
        if kind is not first and not (kind is None and first is not Custom):
            found = kind.__name__ if kind else f"columns {', '.join(rows[i]) or 'nothing'}"
            raise UserError(f"{rows.where(i)}: expected a {first.__name__} row, found {found}")
        task.conversation(i)
    return task


def find_files(name: str, split: str) -> list[Path]:
    """The files of an own task: `name` is a path, or a folder in task_data/."""
    base = get_base_dir() / "task_data"
    places = [Path(name), base / name]
    for place in places:
        if place.is_file():
            return [place]
        if not place.is_dir():
            continue
        files = split_files(place, split)
        if files:
            return files
        there = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
        raise UserError(f"{place} has no {split}.jsonl or {split}.parquet; there is: {there}")
    hint = ""
    if re.search("[,; ]", name):
        hint = "; several are joined by |"
    elif re.search("[@*]", name):
        hint = "; rows and epochs are whole numbers, as in smoltalk@5000*2"
    raise UserError(
        f"no task {name!r}: known are {', '.join(REGISTRY)}, and there is neither a file or folder "
        f"{places[0]} nor {places[1]}{hint}"
    )


def load(name: str, split: str, **slicing: Any) -> Task:
    """The task made of the rows at a path, or in task_data/<name>/."""
    return make_task(read_rows(find_files(name, split)), name, **slicing)


# -----------------------------------------------------------------------------
# --data: a file, a folder or a glob, and what of it is held out


@dataclass(frozen=True)
class OwnData:
    """Own rows to train on, and those held out; `validation` says in words which these are."""

    train: RowTask
    val: RowTask | None  # None: there are too few to hold one out
    validation: str


def load_own(data: str, val_data: str | None = None, answers: bool = False) -> OwnData:
    """The rows of a file, folder or glob, split as texts are (see dataset.split_files): a file of
    its own is held out, pinned by name; of a lone file, some rows, by a hash of what they ask.

    With `answers`, every row must have a right answer to evaluate replies by."""
    files = dataset.split_files(data, val_data, dataset.ROW_SUFFIXES)
    rows = read_rows(files.train)
    train = _kept(rows, files.keep_train)
    held_out = _kept(rows if files.train == [files.val] else read_rows([files.val]), files.keep_val)
    if not len(train):
        raise UserError(f"--data={data} has too few rows to train on: add some, or use --val_data")
    tasks = [make_task(some, data) for some in (train, held_out) if len(some)]
    for task in tasks if answers else []:
        for i in range(len(task)):
            if isinstance(task, Custom) and "expected" not in task[i]:
                raise UserError(
                    f'{task.rows.where(i)}: there is no "expected" with what a right reply contains'
                )
    return OwnData(tasks[0], tasks[1] if len(tasks) == 2 else None, files.validation)


def _kept(rows: Rows, keep: dataset.Keep) -> Rows:
    if keep == "all":
        return rows
    wanted = keep == "val"
    return ChosenRows(rows, [i for i in range(len(rows)) if _is_val(rows[i]) == wanted])


def _is_val(row: Row) -> bool:
    """Decided by what is asked (of a conversation, by all of it): other columns change nothing, and
    no question is on both sides."""
    asked = next((row[k] for k in ("messages", "question", "prompt", "word") if row.get(k)), None)
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return dataset.is_val_document(text)
