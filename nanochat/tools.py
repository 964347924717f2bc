"""
Tools that a model may use while it replies: a calculator, and Python in the sandbox.

A call stands between the tokens of a call; its result is what the model reads next. `ToolUse` is
the state machine that follows one reply: it says when a call is complete, and what is to be forced
after it. It runs nothing itself, so that a program which takes seconds holds up its own reply only:

    code = use.feed(token)                  # None, or the text of a call that has just ended
    if code is not None:
        forced = use.answer(calculator(code))      # the tokens of the result

Floor 2.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.execution import calculate, run_python

TOOLS = ("calculator", "python", "none")


@dataclass(frozen=True)
class ToolLimits:
    """What one reply's calls may take."""

    seconds: float = 5.0
    """Time of one program."""
    characters: int = 2000
    """Of one result; the rest is cut."""
    calls: int = 32
    """In a reply; further ones are not answered."""


def calculator(code: str) -> str | None:
    """The value of an expression; None, which forces nothing, if it is not understood."""
    return calculate(code)


def python(code: str, seconds: float = 5.0) -> str:
    """What a program prints, and the value of its last line if that is an expression, as at a
    prompt. Arithmetic is the calculator's: its results look as those that models are trained with.

    A failure is told by the last line of its traceback. UserError where there is no sandbox."""
    value = calculate(code)
    if value is not None:
        return value
    result = run_python(_shown(code), timeout=seconds)
    if result.timed_out:
        return f"{result.stdout}TimeoutError: stopped after {seconds:g} s"
    if result.success:
        return result.stdout.removesuffix("\n")
    reason = result.stderr.rstrip().rpartition("\n")[2] or "the program failed"
    return result.stdout + reason


def _shown(code: str) -> str:
    """The program, made to print its last expression. What is no program is left as it is: its
    SyntaxError is the answer."""
    try:
        tree = ast.parse(code)
        if not tree.body or not isinstance(tree.body[-1], ast.Expr):
            return code
        # As at the prompt, None is not shown; strings are, without quotes, as the calculator's are
        shown = ast.parse("if (value := 0) is not None: print(value)").body[0]
        assert isinstance(shown, ast.If) and isinstance(shown.test, ast.Compare)
        assert isinstance(shown.test.left, ast.NamedExpr)
        shown.test.left.value = tree.body[-1].value
        tree.body[-1] = shown
        return ast.unparse(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return code


@dataclass(frozen=True)
class Tool:
    """How the calls of a reply are answered."""

    run: Callable[[str], str | None]
    quick: bool
    """Whether it answers at once; else it is run in a thread, while other rows go on."""


def make_tool(name: str, limits: ToolLimits) -> Tool | None:
    """The tool of that name; None for "none". UserError if it is not known, or cannot run here."""
    if name == "none":
        return None
    if name == "calculator":
        return Tool(calculator, quick=True)
    if name == "python":
        run_python("pass")  # says now, not in the middle of a reply, that there is no sandbox
        return Tool(lambda code: python(code, limits.seconds), quick=False)
    raise UserError(f"--tools={name} is not known; choose one of {', '.join(TOOLS)}")


class ToolUse:
    """Follows the tokens of one reply.

    Between the start and the end of a call its text is collected; then its result, written as the
    tokenizer's chat format writes tool output, is what the row must say next. (In ChatML that is
    the end of the turn, the user's answer, and the opening of the next turn.)"""

    def __init__(self, tokenizer: Any, limits: ToolLimits | None = None) -> None:
        self.tokenizer = tokenizer
        self.limits = limits or ToolLimits()
        self.start, self.end = tokenizer.tool_call_ids
        self.calls = 0
        self.collecting: list[int] | None = None

    def feed(self, token: int) -> str | None:
        """Takes the reply's next token; returns the code of a call that it completes."""
        if token == self.start:
            self.collecting = []
        elif token == self.end and self.collecting is not None:
            written, self.collecting = self.tokenizer.decode(self.collecting), None
            self.calls += 1
            if self.calls <= self.limits.calls:
                return self.tokenizer.read_tool_call(written)
        elif self.collecting is not None:
            self.collecting.append(token)
        return None

    def answer(self, result: str | None) -> list[int]:
        """The tokens to force after a call with that result: none if it was not understood."""
        if result is None:
            return []
        if len(result) > self.limits.characters:
            result = result[: self.limits.characters] + "... [cut]"
        return self.tokenizer.tool_output_ids(result)
