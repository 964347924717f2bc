"""Threads: results, errors, and a prompt end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanochat.common import UserError
from nanochat.threads import in_thread
from tests.conftest import REPO


def test_whoever_asks_gets_the_result_or_the_error() -> None:
    def halve(n: int) -> int:
        if n % 2:
            raise UserError(f"{n} is odd")
        return n // 2

    assert in_thread(halve, 4).result() == 2
    with pytest.raises(UserError, match="5 is odd"):
        in_thread(halve, 5).result()


PROGRAM = """
import sys, time
from nanochat.threads import end_if_over, in_thread
def work():
    for i in range(600):
        end_if_over()
        time.sleep(0.1)
in_thread(work)
time.sleep(0.2)
sys.exit(3)
"""


def test_the_end_of_the_program_ends_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=REPO, timeout=30, check=False)
    assert done.returncode == 3
