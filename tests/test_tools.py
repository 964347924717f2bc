"""
The tools by themselves: what they say to a call. How replies use them is in test_engine_tools.py
and test_scheduler.py.
"""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from nanochat.execution import run_python
from nanochat.tools import ToolLimits, ToolUse, make_tool, python
from tests.tokenizers_for_tests import tiny_tokenizer


@pytest.fixture
def sandbox() -> None:
    try:
        run_python("pass")
    except UserError as e:
        pytest.skip(str(e))


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "code, said",
    [
        ("1,200 * 3", "3600"),  # the calculator's, commas and all
        ("x = 6\nx * 7", "42"),
        ("print('a')\nprint('b')", "a\nb"),
        ("'abc'.upper()", "ABC"),
        ("print(1)\n2", "1\n2"),
        ("None", ""),
        ("import math", ""),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("print('so far')\nundefined", "so far\nNameError: name 'undefined' is not defined"),
        ("open('/etc/passwd')", "PermissionError"),
    ],
)
def test_python_answers_as_at_a_prompt(code: str, said: str) -> None:
    assert python(code, seconds=60.0).startswith(said)
    if "Error" not in said:
        assert python(code, seconds=60.0) == said


@pytest.mark.usefixtures("sandbox")
def test_a_program_that_is_none_says_what_is_wrong_with_it() -> None:
    assert "SyntaxError" in python("for", seconds=60.0)


@pytest.mark.usefixtures("sandbox")
def test_a_program_that_takes_too_long_is_stopped() -> None:
    assert python("while True: pass", seconds=0.5) == "TimeoutError: stopped after 0.5 s"


def test_tools_by_name() -> None:
    limits = ToolLimits()
    assert make_tool("none", limits) is None
    calculator = make_tool("calculator", limits)
    assert calculator is not None and calculator.quick
    assert calculator.run("2+2") == "4" and calculator.run("import os") is None
    with pytest.raises(UserError, match=r"--tools=browser.*calculator, python, none"):
        make_tool("browser", limits)


@pytest.mark.usefixtures("sandbox")
def test_python_is_slow_and_runs_elsewhere() -> None:
    tool = make_tool("python", ToolLimits(seconds=60.0))
    assert tool is not None and not tool.quick and tool.run("sum(range(5))") == "10"


def test_the_state_machine_of_a_call() -> None:
    tokenizer = tiny_tokenizer()
    use = ToolUse(tokenizer, ToolLimits(calls=2, characters=4))
    code = tokenizer.encode("1+1")
    call = [use.start, *code, use.end]
    assert [use.feed(id) for id in [*code, use.end]] == [None] * (len(code) + 1), "no start"
    # a second start begins anew; two calls are answered, a third one is not
    for said in ("1+1", "1+1", None):
        assert [use.feed(id) for id in [use.start, *code, *call]][-1] == said
    assert use.answer(None) == []
    assert use.answer("") == tokenizer.tool_output_ids("")
    assert use.answer("12345") == tokenizer.tool_output_ids("1234... [cut]")
