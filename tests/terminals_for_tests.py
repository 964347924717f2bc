"""What a program shows where there is a terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPO


def on_a_terminal(program: str, *argv: str, columns: int = 100, **env: str) -> str:
    """Runs Python code on a pseudo-terminal, where it has to end well; returns what was
    shown, colours left out."""
    pty = pytest.importorskip("pty")
    main, terminal = pty.openpty()
    size = {"TERM": "xterm", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=REPO, env={**os.environ, **size, **env},
        stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait(timeout=120) == 0, shown.decode(errors="replace")
    return re.sub(r"\x1b\[[\d;]*m", "", shown.decode())


class Terminal:
    """A program on a pseudo-terminal that is talked to as a person does: what it shows is waited
    for, then keys are typed. On leaving, the program is ended if it has not."""

    def __init__(self, program: str, *argv: str, **env: str) -> None:
        """`program`: Python code, as for `python -c`."""
        pty = pytest.importorskip("pty")
        self._main, terminal = pty.openpty()
        settings = {"TERM": "xterm", "COLUMNS": "200", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            # The child makes the terminal its own, so that Ctrl-C reaches it
            [sys.executable, "-c", _OWN_TERMINAL + program, *argv], cwd=REPO,
            env={**os.environ, **settings, **env},
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""  # all of it, colours and cursor movements left out
        self._raw = b""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)

    def type(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def wait_for(self, text: str, seconds: float = 120.0) -> str:
        """Waits until `text` is shown; returns what was shown since the last wait, up to it."""
        end = time.monotonic() + seconds
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < end, f"{text!r} is not in {self.shown[self._seen :]!r}"
            assert self._read(1.0), f"the program ended without {text!r}: {self.shown!r}"
        at = self.shown.index(text, self._seen) + len(text)
        since, self._seen = self.shown[self._seen : at], at
        return since

    def interrupt(self) -> None:
        """Types Ctrl-C once the program waits for a line: between its prompt and its wait, Python's
        input() would see the signal with the next line only."""
        syscall = Path(f"/proc/{self.process.pid}/syscall")  # "0 0x0 ...": a read of file 0
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                if syscall.read_text().startswith("0 0x0 "):
                    break
            except OSError:  # not Linux, or not ours to see: all ten seconds then
                pass
            time.sleep(0.05)
        self.type("\x03")

    def ended(self, seconds: float = 120.0) -> int:
        """Waits until the program has ended; returns its exit status."""
        end = time.monotonic() + seconds
        while self._read(1.0):
            assert time.monotonic() < end, f"still running: {self.shown[-500:]!r}"
        return self.process.wait(timeout=seconds)

    def _read(self, seconds: float) -> bool:
        """Takes in what is shown within some time; False once the program has closed it."""
        if not select.select([self._main], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self._main, 65536)
        except OSError:
            return False
        self._raw += piece
        text = self._raw.decode(errors="ignore")  # half a character comes whole next time
        self.shown = re.sub(r"\x1b(\[[\d;?]*[A-Za-z]|[=>])", "", text).replace("\r", "")
        return bool(piece)


_OWN_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
"""
