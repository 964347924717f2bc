"""Rewards by name, from a module of one's own, and what is not accepted as one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.rewards import checked, get_reward
from nanochat.tasks.common import Rows
from nanochat.tasks.gsm8k import GSM8K

TASK = GSM8K(Rows([("file", [{"question": "2+3?", "answer": "2+3=5\n#### 5"}], None)]))
PROBLEM = TASK[0]


def test_by_name() -> None:
    task, lenient = get_reward("task", TASK), get_reward("lenient", TASK)
    for reply, strict, anywhere in [
        ("#### 5", 1.0, 1.0), ("The answer is 5.", 0.0, 1.0), ("\\boxed{5}", 0.0, 1.0),
        ("#### 6 or 5", 0.0, 0.0), ("", 0.0, 0.0),
    ]:  # fmt: skip
        assert (task(PROBLEM, reply), lenient(PROBLEM, reply)) == (strict, anywhere), reply


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of rewards on the path."""
    (tmp_path / "some_rewards.py").write_text(
        "number = 5\n"
        "def short(problem, reply): return -len(reply)\n"
        "def one(reply): return 1\n"
        "def grumpy(problem, reply): return problem['expect']\n"
        "class Grader:\n"
        "    def __call__(self, problem, reply, strict=True): return 2\n"
        "grader = Grader()\n",
        encoding="utf-8",
    )
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    (tmp_path / "wrong_rewards.py").write_text("def short(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("some_rewards", None)


def test_of_a_module_on_the_path(own: Path) -> None:
    assert get_reward("some_rewards:short", TASK)(PROBLEM, "four") == -4
    assert get_reward("some_rewards:grader", TASK)(PROBLEM, "") == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("best", "none of task, lenient, and not of the form module:function"),
        ("some_rewards:", "not of the form"),
        (":short", "not of the form"),
        ("some_rewards:short()", "not of the form"),
        ("some rewards:short", "not of the form"),
        ("__import__('os'):system", "not of the form"),
        ("./some_rewards.py:short", "not of the form"),
        ("no_such_rewards:short", "no_such_rewards cannot be imported .*PYTHONPATH"),
        ("broken_rewards:short", "broken_rewards cannot be imported .*nothing_of_that_name"),
        ("wrong_rewards:short", r"SyntaxError: .*wrong_rewards\.py, line 1.* is imported"),
        ("some_rewards:long", "long does not exist in .*some_rewards.py"),
        ("some_rewards:number", "number is no function"),
        ("some_rewards:one", "must take a problem and a reply"),
    ],
)
def test_what_cannot_be_had_is_named(own: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_reward(name, TASK)


def test_a_mistake_in_a_function_of_the_users_is_theirs(own: Path) -> None:
    said = r"some_rewards:grumpy: KeyError: 'expect' \(some_rewards\.py:\d+; .*reply: 'five'"
    with pytest.raises(UserError, match=said):
        get_reward("some_rewards:grumpy", TASK)(PROBLEM, "five")


@pytest.mark.parametrize("value", [1, 0.5, -3, True, np.float32(0.5), np.float64(2), np.int64(3)])
def test_numbers_are_rewards(value: Any) -> None:
    assert checked(value, 0, PROBLEM, "") == float(value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), np.nan, None, "1", [1.0], 1j, {}]
)
def test_anything_else_is_an_error_that_names_problem_and_reply(value: Any) -> None:
    with pytest.raises(UserError, match=r"problem 7 is .*problem: '2\+3\?'; reply: 'It is 5'"):
        checked(value, 7, PROBLEM, "It is 5")
