"""What a program shows where there is a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys

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
