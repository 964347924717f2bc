"""
Work in a thread that neither holds up the end of the program nor is torn off in the middle.

A pool's threads are waited for at the exit, however long they take; daemon threads are cut off,
inside of compiled code too. These are waited for, and may look whether it is over. Floor 0.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Calls a function in a thread of its own; whoever asks for the result gets what it raised."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work).start()
    return future


def end_if_over() -> None:
    """Ends the thread that calls it if the main thread has ended. For long work, now and then."""
    if not threading.main_thread().is_alive():
        sys.exit()
