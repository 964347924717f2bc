"""What is typed, and what comes through a pipe (keys: tests/scripts/test_chat_cli.py)."""

from __future__ import annotations

import builtins
import os
import stat
import sys
from pathlib import Path

import pytest

from nanochat.terminal import keyboard
from nanochat.terminal.keyboard import is_open, make_reader, piped, private_file, unwrap


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        ("", False),
        ("one line", False),
        ("a\\", True),
        ("a\\\nb", False),
        ('"""', True),
        ('""""', True),
        ('"""a', True),
        ('"""a\n""" ', False),
        ('""""""', False),
        ('"""C:\\', True),
        ('say """', False),
    ],
)
def test_a_message_goes_on_after_a_backslash_and_in_a_block(text: str, goes_on: bool) -> None:
    assert is_open(text) == goes_on


def test_the_marks_of_a_block_are_no_text() -> None:
    assert unwrap('"""\n a "quoted" word \n"""') == 'a "quoted" word'
    assert unwrap(' say """this""" ') == 'say """this"""'


def test_lines_are_read_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["a\\", "b", '"""c', "d"])

    def read_line(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read_line)
    read = make_reader(Path("nowhere"))
    assert [read(), read()] == ["a\nb", '"""c\nd']  # the end of the input ends a block
    with pytest.raises(EOFError):
        read()


def test_the_history_is_private_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "base" / "chat_history"
    assert private_file(path) == path and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert private_file(path / "below" / "a_file") is None


def test_a_pipe_that_stays_empty_is_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    monkeypatch.setattr(keyboard, "WAIT", 0.05)
    real = keyboard.threading.Timer  # type: ignore[attr-defined]

    def timer(seconds: float, say: object) -> object:
        def say_and_close() -> None:
            say()  # type: ignore[operator]
            os.write(write, b"late")
            os.close(write)

        return real(seconds, say_and_close)

    monkeypatch.setattr(keyboard.threading, "Timer", timer)  # type: ignore[attr-defined]
    with open(read, encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert piped() == "late"
    assert "waiting for the end of the standard input" in capfd.readouterr().err


def test_no_standard_input_at_all_is_no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert piped() == ""
