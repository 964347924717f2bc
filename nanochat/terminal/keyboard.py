"""
What the user types: one message at a time, of one line or many; and what comes through a pipe.

On a terminal prompt_toolkit reads, with a history in a file, search (Ctrl-R), and pasted text in
one piece. Where there is none, or a dumb one, lines are read as they come. In both, a message goes
on after a line that ends in a backslash, and until three quotes close it if it began with three
(BLOCK). Floor 4.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat.common import UserError

BLOCK = '"""'
WAIT = 2.0  # seconds of an empty pipe after which we say that we wait for it


def is_open(text: str) -> bool:
    """Whether a message goes on in the next line."""
    if text.startswith(BLOCK):
        return len(text.rstrip()) < 2 * len(BLOCK) or not text.rstrip().endswith(BLOCK)
    return text.endswith("\\")


def unwrap(text: str) -> str:
    """The text of a message without the marks of a block, and without white space around it."""
    text = text.strip()
    if text.startswith(BLOCK):
        text = text.removeprefix(BLOCK).removesuffix(BLOCK)
    return text.strip()


def piped() -> str:
    """All of the standard input, where that is a pipe or a file; else "", at once.

    UserError if it is not UTF-8."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file at all
        return ""
    if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)):
        return ""  # a terminal, /dev/null
    hint = "waiting for the end of the standard input (give it < /dev/null if there is none)"
    waiting = threading.Timer(WAIT, lambda: print(hint, file=sys.stderr, flush=True))
    waiting.daemon = True
    waiting.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise UserError(f"the standard input is not UTF-8 text: {e}") from e
    finally:
        waiting.cancel()


def make_reader(history: Path, words: Iterable[str] = ()) -> Callable[[], str]:
    """A function that reads one message, \"\" if there is none yet. It raises EOFError at the end
    of the input (Ctrl-D), KeyboardInterrupt at Ctrl-C on an empty line.

    `history`: the file of what was typed. `words`: commands that Tab completes."""
    is_dumb = os.environ.get("TERM", "") in ("dumb", "unknown", "") and os.name != "nt"
    if not sys.stdin.isatty() or not sys.stdout.isatty() or is_dumb:
        return read_lines
    session = _session(history, list(words))

    def read() -> str:
        print()
        # What was no UTF-8 comes as lone surrogates, which nothing behind us can write
        return session.prompt().encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    return read


def read_lines() -> str:
    """A message from a terminal that can do nothing but lines."""
    text = input("\nYou: ")
    try:
        while is_open(text):
            # In a block a backslash is a backslash
            text = (text if text.startswith(BLOCK) else text[:-1]) + "\n" + input("...  ")
    except EOFError:
        pass  # what there is of it
    except KeyboardInterrupt:
        print()
        return ""
    return text


def private_file(path: Path) -> Path | None:
    """The file, which nobody but its owner can read; None if it cannot be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)  # it may be older than this rule
    except OSError:
        return None
    return path


def _session(history: Path, words: list[str]) -> Any:
    """prompt_toolkit's line editor with our keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.shortcuts import CompleteStyle

    file = private_file(history)  # a folder that cannot be written to: a history of this session
    return PromptSession(
        [("bold", "You: ")],
        multiline=True,  # Enter sends by our own rule
        prompt_continuation="     ",
        key_bindings=_keys(),
        history=FileHistory(str(file)) if file else InMemoryHistory(),
        completer=_completer(words),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_suspend=True,
    )


def _completer(words: list[str]) -> Any:
    """Completes a command, and the file behind one."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
            typed = document.text_before_cursor
            command, space, rest = typed.partition(" ")
            if not space:
                found = [word for word in words if typed and word.startswith(typed)]
                yield from (Completion(word, start_position=-len(typed)) for word in found)
            elif command in ("/save", "/load"):
                yield from paths.get_completions(Document(rest), event)

    return Commands()


def _keys() -> Any:
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if not is_open(buffer.text):
            buffer.validate_and_handle()
            return
        if not buffer.text.startswith(BLOCK) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()  # the backslash has done its work
        buffer.insert_text("\n")

    @keys.add("escape", "enter", filter=~is_searching)
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=~is_searching)
    @keys.add(Keys.SIGINT)
    def stop(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
