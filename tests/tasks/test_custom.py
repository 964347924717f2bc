"""Own rows: recognised by their columns, checked at once, errors with file and row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.tasks.choice import MultipleChoice, RestatedChoice
from nanochat.tasks.common import get_task
from nanochat.tasks.custom import Custom, mentions
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.spellingbee import SimpleSpelling, SpellingBee
from tests.tasks.data_for_tests import write_jsonl, write_parquet

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
ROWS: dict[type, dict[str, Any]] = {
    Custom: {**CHAT, "source": "me"},
    MultipleChoice: {"question": "q", "choices": ["a", "b"], "answer": 0, "subject": "s"},
    RestatedChoice: {"question": "q", "choices": ["a", "b"], "answer": 0, "restate": True},
    GSM8K: {"question": "q", "answer": "#### 4"},
    HumanEval: {"prompt": "def f():\n", "test": "def check(c): pass", "entry_point": "f"},
    SimpleSpelling: {"word": "apple"},
    SpellingBee: {"word": "apple", "letter": "p"},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_kinds_by_columns(kind: type, write: Any, base_dir: Path) -> None:
    suffix = "jsonl" if write is write_jsonl else "parquet"
    path = write(base_dir / f"task_data/mine/train.{suffix}", [ROWS[kind]] * 2)
    task = get_task("mine", "train")
    assert type(task) is kind
    assert len(list(task)) == 2
    assert task.name == "mine"
    assert len(get_task(str(path), "any", start=1)) == 1  # a file by its path
    assert len(get_task(str(path.parent), "train")) == 2  # a folder by its path


def test_arrow_fills_absent_columns_with_none(base_dir: Path) -> None:
    rows = [{**CHAT, "expected": "4", "word": None}, CHAT]
    write_parquet(base_dir / "task_data/mine/test.parquet", rows)
    task = get_task("mine", "test")
    assert type(task) is Custom
    assert task.evaluate(task[0], "4")
    with pytest.raises(UserError, match="mine cannot be evaluated"):
        task.evaluate(task[1], "4")


@pytest.mark.parametrize(
    ("reply", "expected", "found"),
    [
        ("The answer is 4.", "4", True),
        ("It is four, 4", "4", True),
        ("14", "4", False),
        ("4.5", "4", False),
        ("4.0", "4", True),
        ("-4", "4", False),
        ("-4", "-4", True),
        ("10-4 is 6", "4", True),
        ("1,200 in all", "1200", True),
        ("1200", "1,200", True),
        ("41,200", "1200", False),
        ("x4", "4", False),
        ("The capital is Paris!", "paris", True),
        ("party", "art", False),
        ("state of the art.", "the art", True),
        ("C++ is", "C++", True),
        ("", "4", False),
    ],
)
def test_mentions(reply: str, expected: str, found: bool) -> None:
    assert mentions(reply, expected) is found


@pytest.mark.parametrize(
    ("keys", "right", "wrong"),
    [
        ({"expected": "4"}, "It is 4.", "It is 5."),
        ({"expected": ["four", "4"]}, "Four!", "Five!"),
        ({"expected": "4", "expected_exact": True}, " 4\n", "It is 4."),
        ({"expected_exact": "4"}, "4", "4."),
        ({"expected": "4", "expected_exact": False}, "It is 4.", "5"),
    ],
)
def test_evaluate(keys: dict[str, Any], right: str, wrong: str, base_dir: Path) -> None:
    write_jsonl(base_dir / "task_data/mine/test.jsonl", [{**CHAT, **keys}])
    task = get_task("mine", "test")
    assert task.eval_type == "generative"
    assert task.evaluate(task[0], right)
    assert not task.evaluate(task[0], wrong)
    assert task.reward(task[0], right) == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": [{"role": "assistant", "content": "4"}]},
        {"question": "q", "answer": "#### 4"},
        {"text": "something else"},
        {},
        {**CHAT, "expected": []},
        {**CHAT, "expected": ""},
        {**CHAT, "expected": 4},
        "not an object",
    ],
)
def test_every_row_is_checked_at_once(bad: Any, base_dir: Path) -> None:
    path = write_jsonl(base_dir / "task_data/mine/train.jsonl", [CHAT, CHAT, bad, CHAT])
    with pytest.raises(UserError, match=f"{path}:3"):
        get_task("mine", "train")


def test_unknown_rows_names_and_splits(base_dir: Path) -> None:
    write_jsonl(base_dir / "task_data/mine/train.jsonl", [{"text": "x", "id": 1}])
    with pytest.raises(UserError, match=r"train.jsonl:1: cannot tell .* columns text, id"):
        get_task("mine", "train")
    with pytest.raises(
        UserError, match=r"has no test.jsonl or test.parquet; there is: train.jsonl"
    ):
        get_task("mine", "test")
    with pytest.raises(UserError, match=r"no task 'yours': known are smoltalk, .*task_data/yours"):
        get_task("yours", "train")
