"""
What is shown of a reply: its text as it grows, tool calls, what it took. Floor 4.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

from nanochat.reply import Event
from nanochat.terminal.chat import Answer

DIM, PLAIN = "\033[2m", "\033[0m"
CUT = "[cut: --max_new_tokens or the context was reached]"


def safe(text: str) -> str:
    """Text without the characters that would command the terminal, which a model can write too."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class Screen:
    """Prints to the standard output: a terminal gets notes dimmed, and numbers after a reply."""

    def __init__(self, tool: str = "calculator") -> None:
        """`tool`: the name that calls are shown under."""
        self.tool = tool
        self.is_terminal = sys.stdout.isatty()
        plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
        self.color = self.is_terminal and not plain
        self._in_call = False  # a call is shown, its result is not

    def note(self, text: str, end: str = "\n") -> None:
        """Prints what is not the model's text."""
        text = safe(text)
        print(f"{DIM}{text}{PLAIN}" if self.color and text else text, end=end, flush=True)

    def show(self, events: Iterable[Event]) -> None:
        """Prints one reply while it is made."""
        self._in_call = False
        for event in events:
            self._show(*event)
        print(flush=True)

    def _show(self, kind: str, text: str) -> None:
        if kind == "tool":
            self._close_call()
            # A program stands on lines of its own
            self.note(f"[{self.tool}:" + (f"\n{text}\n" if "\n" in text else f" {text}"), end="")
            self._in_call = True
        elif kind == "tool_output":
            self.note(f"{' ' * self._in_call}= {text}] ", end="")
            self._in_call = False
        elif kind == "text":
            self._close_call()
            print(safe(text), end="", flush=True)
        else:
            self._close_call()
            if text == "length":
                self.note(f" {CUT}", end="")

    def _close_call(self) -> None:
        """A call that the tool said nothing to."""
        if self._in_call:
            self.note("] ", end="")
        self._in_call = False

    def speed(self, answer: Answer | None) -> None:
        """What a reply took, on a terminal."""
        if answer is None or not self.is_terminal or not answer.tokens:
            return
        rate = f", {answer.tokens_per_second:.1f} a second" if answer.tokens_per_second else ""
        tokens = f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"
        self.note(f"({tokens}{rate}, the first after {answer.first_token_seconds:.2f} s)")
