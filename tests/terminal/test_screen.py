"""What a reply looks like."""

from __future__ import annotations

import sys

import pytest

from nanochat.reply import Event
from nanochat.terminal.chat import Answer
from nanochat.terminal.screen import CUT, Screen

CALL: list[Event] = [("text", "It is "), ("tool", "27+15"), ("tool_output", "42")]
ANSWER = Answer("x", [], 11, 2.5, 0.5, 5.0, "stop", 0)


@pytest.mark.parametrize(
    ("events", "shown"),
    [
        ([*CALL, ("text", "42."), ("end", "stop")], "It is [calculator: 27+15 = 42] 42.\n"),
        ([("tool", "1/0"), ("text", "Hm."), ("end", "stop")], "[calculator: 1/0] Hm.\n"),
        ([("tool", "1/0"), ("tool", "2"), ("end", "stop")], "[calculator: 1/0] [calculator: 2] \n"),
        ([("tool", "a = 1\na"), ("tool_output", "1")], "[calculator:\na = 1\na\n = 1] \n"),
        ([("text", "The"), ("end", "length")], f"The {CUT}\n"),
    ],
)
def test_a_reply_is_shown_with_its_calls(
    events: list[Event], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Screen().show(events)
    assert capsys.readouterr().out == shown


def test_a_call_is_shown_before_its_result_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> object:
        yield ("tool", "while True: pass")
        assert capsys.readouterr().out == "[python: while True: pass"
        yield ("tool_output", "TimeoutError")

    Screen("python").show(slow())  # type: ignore[arg-type]
    assert capsys.readouterr().out == " = TimeoutError] \n"


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.show([("text", "a\x1b[2Jb\tc\nd\r\x9b"), ("tool", "\x1b]0;"), ("tool_output", "\x07")])
    screen.note("(\x1b)")
    bad = "\ufffd"
    wanted = f"a{bad}[2Jb\tc\nd{bad}{bad}[calculator: {bad}]0; = {bad}] \n({bad})\n"
    assert capsys.readouterr().out == wanted


def test_numbers_and_dimness_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Screen().speed(ANSWER)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Screen().speed(ANSWER)
    numbers = "(11 tokens, 5.0 a second, the first after 0.50 s)"
    assert capsys.readouterr().out == f"\x1b[2m{numbers}\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    Screen().speed(ANSWER)
    assert capsys.readouterr().out == f"{numbers}\n"
