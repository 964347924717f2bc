"""Replies of every shape become programs; only those whose tests ran to the end pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.tasks.common import Rows, read_rows
from nanochat.tasks.humaneval import HumanEval, build_program, extract_code
from tests.tasks.data_for_tests import shared

PROMPT = 'from math import sqrt\n\ndef helper(x):\n    return x\n\ndef root(x):\n    """Root."""\n'
ROW = {
    "prompt": PROMPT,
    "test": "def check(candidate):\n    assert candidate(16) == 4\n",
    "entry_point": "root",
    "canonical_solution": "    return helper(sqrt(x))\n",
}


@pytest.fixture
def task() -> HumanEval:
    return HumanEval(Rows([("file", [ROW], None)]))


def test_extract_code() -> None:
    assert extract_code("Sure:\n```python\nx = 1\n```\nDone. ```y```") == "x = 1\n"
    assert extract_code("```\nx = 1\n```") == "x = 1\n"
    assert extract_code("```python\nx = 1\n") == "x = 1\n"  # cut off before the fence closed
    assert extract_code("x = 1") == "x = 1"


def test_build_program() -> None:
    assert build_program(PROMPT, "root", ROW["canonical_solution"]).startswith(PROMPT)
    whole = build_program(PROMPT, "root", "def root(x):\n    return helper(x)\n")
    assert whole.count("def root") == 1
    assert whole.index("def helper") < whole.index("def root")


@pytest.mark.parametrize(
    "reply",
    [
        "    return helper(sqrt(x))\n",
        "```python\ndef root(x):\n    return helper(sqrt(x))\n```",
        "def root(x):\n    return int(x ** 0.5)",
        f"Here it is.\n```python\n{PROMPT}    return sqrt(x)\n```\nIt takes the root.",
    ],
)
def test_right_replies(reply: str, task: HumanEval) -> None:
    assert task.evaluate(task[0], reply)


@pytest.mark.parametrize(
    "reply",
    [
        "    return x\n",
        "I do not know.",
        "",
        "```python\nimport os\ndef root(x):\n    os._exit(0)\n```",  # never reaches the assertion
        "```python\ndef root(x):\n    raise SystemExit(0)\n```",
        "```python\ndef root(x):\n    return 4\nraise SystemExit(0)\n```",
    ],
)
def test_wrong_replies(reply: str, task: HumanEval) -> None:
    assert not task.evaluate(task[0], reply)


def test_a_reply_that_looks_for_the_mark_of_success_fails(task: HumanEval) -> None:
    """Nothing that a program can read lets it claim that its tests were passed."""
    reply = """
import os, sys
def root(x):
    frame = sys._getframe()
    while frame:
        print(frame.f_locals, frame.f_globals, frame.f_code.co_consts)
        frame = frame.f_back
    sys.audit("nanochat.end")
    os._exit(0)
"""
    assert not task.evaluate(task[0], reply)


@pytest.mark.slow
def test_the_published_solutions_pass_and_wrong_ones_fail() -> None:
    """All 164: the reference is right; nothing at all and the next problem's body are wrong."""
    task = HumanEval(read_rows([shared("humaneval") / "HumanEval.jsonl"]))
    assert len(task) == 164
    replies = [task[i]["messages"][1]["content"] for i in range(len(task))]
    bodies = [reply.removeprefix(f"```python\n{task[i]['prompt']}").removesuffix("```")
              for i, reply in enumerate(replies)]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:

        def judge(given: list[str]) -> list[bool]:
            return list(pool.map(lambda i: task.evaluate(task[i], given[i]), range(len(task))))

        assert [i for i, right in enumerate(judge(replies)) if not right] == []
        wrong = [other if i % 2 else "    pass\n"
                 for i, other in enumerate([*bodies[1:], bodies[0]])]  # fmt: skip
        assert [i for i, right in enumerate(judge(wrong)) if right] == []
