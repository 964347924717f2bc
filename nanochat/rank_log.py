"""
What several ranks say: rank 0 on the console, every rank in a file of its own, the first failure
before everything else.

    $NANOCHAT_BASE_DIR/rank_logs/<script>-<run id>/rank_<N>.log

When one rank fails, the others lose their connection to it and fail too, and torchrun adds a page.
Only the rank that failed first speaks, before the others can know of it. Floor 0.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from nanochat import errors
from nanochat.common import get_base_dir, print0, warn0

try:
    import fcntl
except ImportError:  # Windows: then a killed rank is not named
    fcntl = None  # type: ignore[assignment]

HEADER = "--- rank "  # begins what a process writes in its rank's file
FAILED = "--- failed ---"  # in a file, before what a rank raised
ERASE = "\x1b[2K"  # on a terminal, before what takes the place of a line
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
# What gloo, NCCL and the store say when the process at the other end has ended
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|ncclRemoteError|remote process exited|"
    r"connection was likely closed|ncclSystemError",
    re.IGNORECASE,
)
# A process that is killed closes its connections one after the other; its lock may go last.
PATIENCE = 2.0  # seconds


class Tee:
    """A stream of rank 0: the console's, copied to its file."""

    def __init__(self, console: Any, file: TextIO) -> None:
        self.console, self.file = console, file

    def write(self, text: str) -> int:
        """Writes to both: to the file without codes, and without a bar that is redrawn in its place
        (what ends no line there)."""
        plain = CODES.sub("", text)
        if ERASE in text:
            plain = plain[: plain.rfind("\n") + 1]
        self.file.write(plain)
        return int(self.console.write(text))

    def flush(self) -> None:
        """Flushes both."""
        self.file.flush()
        self.console.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


class RankLog:
    """This rank's file, and what it can find out about the others."""

    def __init__(self, folder: Path, rank: int, world_size: int, debug: bool = False) -> None:
        self.folder, self.rank, self.world_size, self.debug = folder, rank, world_size, debug
        self.path = self.path_of(rank)
        folder.mkdir(parents=True, exist_ok=True)
        # Both stay open until the process ends, however it ends
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        # A handle of its own: programs that we start inherit the file, and would hold the lock
        self.lock = open(self.path, encoding="utf-8")  # noqa: SIM115
        if fcntl is not None:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # torchrun's folder of this node's ranks, a new one each time that it starts them
        errors = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self.error_file = Path(errors) if errors else None
        self.claim = Path(errors).parent.parent / "first_failure" if errors else None
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # ranks of a node
        self.neighbours = set(range(rank // here * here, rank // here * here + here))
        self.said = False
        self.console = os.dup(2)  # rank 0's messages end here, other ranks' only if they fail
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(
            f"{HEADER}{rank} of {world_size} on {socket.gethostname()}, process {os.getpid()}, "
            f"{when}: {' '.join(sys.argv)}\n"
        )

    def path_of(self, rank: int) -> Path:
        """The file of any rank."""
        return self.folder / f"rank_{rank}.log"

    def take_over(self) -> None:
        """From now on what this process writes is in its file; rank 0's on the console too."""
        if self.rank == 0:
            sys.stdout, sys.stderr = Tee(sys.stdout, self.file), Tee(sys.stderr, self.file)
        else:
            self._to_file()

    def _to_file(self) -> None:
        """The whole process's output, that of its libraries and children too, is in the file."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)
        for stream in (sys.__stdout__, sys.__stderr__):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

    def gone(self) -> list[int]:
        """Other ranks whose processes have ended; those on other machines too, where the folder is
        shared."""
        found = []
        for rank in range(self.world_size) if fcntl is not None else ():
            path = self.path_of(rank)
            if rank == self.rank or not path.exists():
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                continue  # held: it is alive. Or the file system has no locks
            found.append(rank)
        return found

    def another_failed(self, patience: float = 0.0) -> bool:
        """Whether another rank that this torchrun started has said that it failed, or has ended, or
        does so within `patience` seconds."""
        if self.claim is None:
            return False
        until = time.monotonic() + patience
        while not (self.claim.exists() or not self.neighbours.isdisjoint(self.gone())):
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        return True

    def _is_first(self) -> bool:
        """Whether no other rank of this node has failed before. True once at most."""
        if self.claim is None:
            return True  # not under torchrun: nobody collects what failed, so each rank speaks
        try:
            self.claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def report(self, error: BaseException) -> None:
        """Puts the error in the file, and on the console if no rank has failed before. Once."""
        if self.said:
            return
        self.said = True
        text = "".join(traceback.format_exception(error))
        self.file.write(f"{FAILED}\n{text}")
        # Collectives raise RuntimeErrors; a download's are of other kinds
        lost = isinstance(error, RuntimeError) and LOST.search(str(error)) is not None
        dead = self._wait_for_reason() if lost else []
        if not self._is_first():
            self._tell_torchrun("another rank had failed", 1)
            return self._to_file()
        if dead:
            text = self._words_of(dead)
        elif lost:
            shown = text if self.debug else ""
            text = (
                f"{shown}error: rank {self.rank} of {self.world_size} lost its connection to "
                f"another rank: {str(error).strip().splitlines()[0]}. It says more in {self.path}\n"
            )
        else:
            text = errors.words(error, self.debug, self.rank, str(self.path)) + "\n"
        os.write(self.console, ((f"\r{ERASE}" if os.isatty(self.console) else "") + text).encode())
        if dead:
            self._tell_torchrun(f"lost its connection to {ranks(dead)}", 1)
        else:
            self._tell_torchrun(f"{type(error).__name__}: said above, and in {self.path}", 0)
        self._to_file()  # what its libraries say while it ends

    def _wait_for_reason(self) -> list[int]:
        """The ranks that have ended without a word, if no rank has spoken."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.claim is not None and self.claim.exists():
                return []
            if dead := self.gone():
                return dead
            time.sleep(0.02)
        return []

    def _words_of(self, dead: list[int]) -> str:
        """What there is to say of ranks that have ended: one on another machine may have raised
        something, and said so there."""
        words = {rank: self.last_words(rank) for rank in dead}
        first = [rank for rank in dead if not LOST.search(words[rank])] or dead
        where = f"{self.path_of(first[0])}\n"
        if words[first[0]]:
            return f"error: rank {first[0]} failed: {words[first[0]]}\nIt says more in {where}"
        return (
            f"error: {ranks(first)} ended without a word: killed, perhaps for want of memory (the "
            f"signal's name follows below). What it said before: {where}"
        )

    def last_words(self, rank: int) -> str:
        """The last line of what a rank raised; "" if it ended without."""
        said = self.path_of(rank).read_text(encoding="utf-8", errors="replace")
        said = said.rpartition(f"\n{FAILED}\n")[2] if f"\n{FAILED}\n" in said else ""
        lines = said.strip().splitlines()
        again = any(line.startswith(HEADER) for line in lines)  # started again after that
        return lines[-1] if lines and not again else ""

    def _tell_torchrun(self, message: str, later: int) -> None:
        """The line that torchrun's page shows for this rank; what comes `later` (in seconds, the
        unit of its clock) is not the root cause."""
        if self.error_file is not None:
            known = {"py_callstack": message, "timestamp": str(int(time.time()) + later)}
            said = {"message": {"message": message, "extraInfo": known}}
            self.error_file.write_text(json.dumps(said), encoding="utf-8")


def ranks(numbers: list[int]) -> str:
    """ "rank 1" or "ranks 1, 2" """
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


# -------------------------------------------------------------------------------------------------
# This process's

_log: RankLog | None = None


def start(debug: bool = False) -> bool:
    """Opens this rank's file, if there are several ranks, and sends its output there. Whether it
    did. `debug`: a rank that fails shows its traceback."""
    global _log  # noqa: PLW0603  # the process's own output
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or _log is not None:
        return _log is not None
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")[:8]  # --standalone makes a long one
    name = "-".join(filter(None, [Path(sys.argv[0]).stem, re.sub(r"[^\w.-]", "_", run_id)]))
    folder = get_base_dir() / "rank_logs" / name
    try:
        _log = RankLog(folder, int(os.environ.get("RANK", "0")), world_size, debug)
    except OSError as e:
        warn0(f"ranks have no files of their own: {folder} cannot be written: {e}")
        return False
    _log.take_over()
    print0(f"what each of {world_size} ranks says: {folder}/rank_*.log")
    return True


def report(error: BaseException) -> bool:
    """Says that this rank failed, if none has failed before; to be called before connections to
    the others are closed. False where ranks have no files: the caller must speak."""
    if _log is not None:
        _log.report(error)
    return _log is not None


def another_failed(patience: float = 0.0) -> bool:
    """Whether another rank of this node is known to have failed, within so many seconds."""
    return _log is not None and _log.another_failed(patience)
