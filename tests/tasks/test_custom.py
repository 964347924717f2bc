"""Own rows: recognised by their columns, checked at once, errors with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nanochat.common import UserError
from nanochat.tasks.choice import MultipleChoice, RestatedChoice
from nanochat.tasks.common import Task, get_task
from nanochat.tasks.custom import Custom, load_own, mentions
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
        ("It is .5", "0.5", True),
        ("-0.50", "-.5", True),
        (".5", "5", False),
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


# ---- --data


def asked(task: Task | None) -> list[str]:
    """The first message of every row."""
    assert task is not None
    return [c["messages"][0]["content"] for c in task]


def conversations(start: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(start, start + count):
        question = {"role": "user", "content": f"{i}+1?"}
        answer = {"role": "assistant", "content": str(i + 1)}
        rows.append({"messages": [question, answer], "expected": str(i + 1)})
    return rows


def test_own_data_of_several_files_holds_one_out(base_dir: Path) -> None:
    folder = base_dir / "own"
    write_jsonl(folder / "a.jsonl", conversations(0, 3))
    write_parquet(folder / "b.parquet", conversations(10, 2))
    (folder / "README.txt").write_text("not a row", encoding="utf-8")
    packed = folder / "z.jsonl.zst"
    with pa.output_stream(str(packed)) as f:
        for row in conversations(20, 2):
            f.write((json.dumps(row) + "\n").encode())
    own = load_own(str(folder))
    assert asked(own.train) == ["0+1?", "1+1?", "2+1?", "10+1?", "11+1?"]
    assert asked(own.val) == ["20+1?", "21+1?"]
    assert (own.validation, own.train.name) == ("z.jsonl.zst", str(folder))
    assert len(load_own(str(folder / "[ab].*")).train) == 3  # a glob
    named = load_own(str(folder / "a.jsonl"), val_data=str(packed))
    assert (len(named.train), asked(named.val)) == (3, ["20+1?", "21+1?"])


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_of_a_lone_file_some_rows_are_held_out_for_good(write: Any, base_dir: Path) -> None:
    rows = conversations(0, 400)
    suffix = "jsonl" if write is write_jsonl else "parquet"
    path = write(base_dir / f"own.{suffix}", rows)
    own = load_own(str(path))
    train, val = asked(own.train), asked(own.val)
    assert sorted(train + val) == sorted(row["messages"][0]["content"] for row in rows)
    assert 1 <= len(val) <= 20
    assert own.validation == f"own.{suffix}: 1 document in 50, by its hash"
    # In another order, with another column, with more rows: the same ones are held out
    more = [{**row, "source": "me"} for row in [*conversations(400, 50), *reversed(rows)]]
    write(path, more)
    again = asked(load_own(str(path)).val)
    assert set(val) <= set(again) and not set(again) & set(train)
    assert own.train.rows.where(0).startswith(str(path))  # rows still know where they stand


def test_few_rows_leave_nothing_to_hold_out(base_dir: Path) -> None:
    path = write_jsonl(base_dir / "own.jsonl", conversations(3, 3))
    assert load_own(str(path)).val is None


def test_own_data_errors_name_file_and_row(base_dir: Path) -> None:
    path = write_jsonl(base_dir / "own.jsonl", [*conversations(0, 40), {"question": "why?"}])
    with pytest.raises(UserError, match=f"{path}:41: expected a Custom row, found columns quest"):
        load_own(str(path))
    with pytest.raises(UserError, match=r"own\.jsonl:1: .* question, answer \(the answer is '4'\)"):
        load_own(str(write_jsonl(path, [{"question": "2+2?", "answer": "4"}])))
    with pytest.raises(UserError, match=r"own\.jsonl:2: there is no \"expected\""):
        load_own(str(write_jsonl(path, [*conversations(0, 1), CHAT])), answers=True)
    text = base_dir / "own.txt"
    text.write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match=r"own\.txt: conversations and problems are read from"):
        load_own(str(text))
    with pytest.raises(UserError, match=r"no parquet or jsonl files in .*elsewhere: --data takes"):
        load_own(str(base_dir / "elsewhere"))
