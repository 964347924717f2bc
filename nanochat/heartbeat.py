"""
Which rank is missing: every rank says that it lives, and each watches the next.

A collective that waits for a rank which died, was stopped or lost its network ends in an error
about a socket (gloo) or ends the process (NCCL's watchdog), and neither names the rank. So every
rank keeps a line in the store in which the ranks met (torchrun's TCPStore): a count that goes up
while the process lives, its host, its step, and what its main thread is at. Two threads see to it:
one talks to the store and may be held up by a dead network, the other judges and is not. Nobody
compares the clocks of two hosts: a rank is silent when its count stands still. Floor 0.9.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from nanochat import rank_log
from nanochat.common import UserError
from nanochat.meeting import connect

OURS = str(Path(__file__).resolve().parent.parent)  # where `scripts` and `nanochat` lie
# Beats in a row that a rank may miss (a busy host, a lost packet) before it counts as silent
MISSED = 3
LOST_ONE_ANOTHER = "all ranks are alive"


@dataclass
class Beat:
    """What a rank says of itself."""

    host: str
    pid: int
    near: bool  # whether the store is on this host
    count: int = 0  # of beats
    step: int = 0  # that it is in
    where: str = ""  # the line of our code that its main thread is at
    waiting: bool = False  # there, for other ranks or for its GPU
    time: float = 0.0  # by its own clock, to be shown and not compared
    state: str = ""  # "" while it runs, "ended", or the error that ended it


class Heartbeat:
    """Says that this rank lives, and ends the process when another one does not.

    `timeout` (seconds): after which a rank that is silent, or that the others wait for, is lost.
    `run`: the name of their meeting."""

    def __init__(self, rank: int, world_size: int, timeout: float, run: str) -> None:
        self.rank, self.world_size, self.timeout, self.run = rank, world_size, timeout, run
        self.interval = min(5.0, timeout / 4)  # seconds between two beats
        # gloo's collectives raise after `timeout` where they were called; this is for all else.
        self.limit = timeout + MISSED * self.interval
        host = os.environ["MASTER_ADDR"]
        self.place = f"{host}:{os.environ['MASTER_PORT']}"
        # Not that of the process group, which may be held by a call that waits
        self.store = connect(timeout)
        self.own = Beat(socket.gethostname(), os.getpid(), _is_local(host))
        self.progress = 0  # goes up with whatever shows that the main thread gets on
        self.seen: dict[int, tuple[Beat, float]] = {}  # by rank: last beat, when its count changed
        self.verdict = ""  # what was found, by us or by another rank
        self._answered = time.monotonic()  # when the store last did
        self._published = False
        self._census = False  # whether to read the beats of all ranks
        self._warned: set[int] = set()
        self._over, self._wake, self._speaking = threading.Event(), threading.Event(), _Once()
        self._threads: list[threading.Thread] = []
        self._put()

    def start(self) -> None:
        """Begins to beat and to watch, when all ranks have made theirs."""
        self._census = True  # who is beside the store cannot be asked once that is gone
        self._look()
        self._census = False
        self.seen = {rank: self.seen[rank] for rank in self._beside()}  # others we do not watch
        for loop in (self._beat, self._judge):
            thread = threading.Thread(target=loop, name=f"heartbeat {loop.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def at_step(self, number: int) -> None:
        """The main thread begins a step."""
        self.own.step = number
        self.progress += 1

    def stop(self, state: str = "ended") -> None:
        """The last beat: this rank leaves, and says whether in order. Again does nothing."""
        if self._over.is_set():
            return
        self.own.state = state
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            # A thread in C++ as Python ends would take the process down, so we wait for it; but not
            # for one that a dead network holds.
            if thread is not threading.current_thread():
                thread.join(self.interval)

    # ---------------------------------------------------------------------------------------------
    # The thread that talks to the store

    def _key(self, rank: int) -> str:
        return f"nanochat/{self.run}/{rank}"

    def _beat(self) -> None:
        while True:
            self._wake.wait(self.interval)
            self._wake.clear()
            try:
                self._put()
                if self._over.is_set():
                    return
                self._look()
            except (dist.DistError, RuntimeError):  # no answer: the other thread sees the silence
                if self._over.wait(self.interval):
                    return

    def _put(self) -> None:
        self.own.count += 1
        self.own.time = time.time()
        self.own.where, self.own.waiting = _position()
        self.store.set(self._key(self.rank), json.dumps(asdict(self.own)))

    def _beside(self) -> list[int]:
        """One rank on the store's host, once we have heard of it."""
        return [rank for rank, (beat, _) in self.seen.items() if beat.near][:1]

    def _look(self) -> None:
        """Reads the next rank's beat, past those that have ended, and that of one beside the store;
        in a census all of them."""
        others = [(self.rank + k) % self.world_size for k in range(1, self.world_size)]
        if not self._census:
            running = (r for r in others if r not in self.seen or not self.seen[r][0].state)
            others = sorted({*[*running][:1], *self._beside()})
        now = time.monotonic()
        texts = self.store.multi_get([*map(self._key, others)]) if others else []
        for rank, text in zip(others, texts):
            beat = Beat(**json.loads(text))
            if rank not in self.seen or self.seen[rank][0].count != beat.count:
                self.seen[rank] = (beat, now)
        key = f"nanochat/{self.run}/verdict"
        if not self.verdict and self.store.check([key]):
            self.verdict = self.store.get(key).decode()
            self._published = True
        elif self.verdict and not self._published:
            self.store.set(key, self.verdict)
            self._published = True
        self._answered = time.monotonic()

    # ---------------------------------------------------------------------------------------------
    # The thread that judges

    def _judge(self) -> None:
        at, since = None, time.monotonic()
        while not self._over.wait(self.interval / 2):
            now = time.monotonic()
            where, waiting = _position()
            if not waiting or at != (self.progress, where):
                at, since = (self.progress, where), now
            silent = [r for r in self.seen if self._silence(r) > MISSED * self.interval]
            self._warn(silent)
            held_up = now - since > self.limit  # NCCL's waits do not end by themselves
            lost = any(self._silence(r) > self.limit for r in silent)
            if self.verdict or held_up or lost or now - self._answered > self.limit:
                self._end(self.diagnose())
                return

    def _silence(self, rank: int) -> float:
        """Seconds since a rank's count went up; 0 of one that has ended, or while the store does
        not answer, which says nothing of the ranks."""
        beat, changed = self.seen[rank]
        return 0.0 if beat.state else max(0.0, self._answered - changed)

    def _warn(self, silent: Sequence[int]) -> None:
        """Says so at once, once: NCCL may end the process before a rank counts as lost."""
        for rank in sorted(set(silent) - self._warned):
            self._warned.add(rank)
            _print(f"warning: {self._names([rank])} has not been heard of for a while")

    def _end(self, message: str) -> None:
        """The main thread is in a wait that nothing breaks off, so the process ends here."""
        if self._speaking.first():
            if not rank_log.report(UserError(message)):
                who = "error" if self.rank == 0 else f"error (rank {self.rank})"
                _print(f"{who}: {message}")
            os._exit(1)

    # ---------------------------------------------------------------------------------------------
    # What is wrong

    def explain(self, error: Exception) -> Exception:
        """For the error that the main thread met in a collective, one that names the rank; the
        error itself if no rank is missing."""
        # gloo: "[/path/pair.cc:561] Connection closed by peer [10.77.0.2]:49340. This is ..."
        said = re.sub(r"^(.*: )?\[/[^]]*\] ", "", str(error).strip().splitlines()[0])
        message = self.diagnose(said.split(". ")[0])
        if not self._speaking.first():
            threading.Event().wait()  # the other thread is about to end the process
        return error if message.startswith(LOST_ONE_ANOTHER) else UserError(message)

    def diagnose(self, error: str = "") -> str:
        """Hears all ranks for a few beats, and says in a sentence which one is missing."""
        self._census = True
        self._wake.set()
        until = time.monotonic() + (MISSED + 0.5) * self.interval
        while time.monotonic() < until and not self.verdict:
            if any(beat.state not in ("", "ended") for beat, _ in self.seen.values()):
                break  # it has said itself what was wrong
            time.sleep(self.interval / 20)
        if not self.verdict:
            self.verdict = self._sentence(error)
        self._wake.set()  # the others shall say the same
        until = time.monotonic() + min(1.0, self.interval)
        while time.monotonic() < until and not self._published:
            time.sleep(self.interval / 20)
        return self.verdict

    def _sentence(self, error: str) -> str:
        late = (MISSED - 0.5) * self.interval
        failed = [r for r, (beat, _) in self.seen.items() if beat.state not in ("", "ended")]
        silent = [r for r in self.seen if self._silence(r) > late]
        ended = [r for r, (beat, _) in self.seen.items() if beat.state == "ended"]
        running = [r for r, (beat, _) in self.seen.items() if not beat.state]
        ahead = [r for r in running if not self.seen[r][0].waiting]
        unanswered = time.monotonic() - self._answered
        go_on = (
            "Checkpoints are intact: run the same command with --resume, on the hosts that are left"
        )
        if unanswered > late:
            there = [r for r, (beat, _) in self.seen.items() if beat.near]
            what = (
                f"no answer for {unanswered:.0f} s from {self.place}, where the ranks meet: the "
                f"host of {self._names(there) or 'rank 0'}, or the network to it, is gone"
            )
        elif failed:
            what = f"{self._names(failed)}: {self.seen[failed[0]][0].state}"
        elif silent:
            ago = max(time.time() - self.seen[r][0].time for r in silent)
            what = (
                f"{self._names(silent)}, last seen {max(ago, late):.0f} s ago: the process was "
                "killed or stopped, or its host or the network to it is gone"
            )
        elif ended:
            what = f"{self._names(ended)} has ended, while others wait for it"
        elif ahead:
            where = ", ".join(f"rank {r} is in {self.seen[r][0].where or '?'}" for r in ahead)
            what = (
                f"{self._names(ahead)} did not come to where the others wait within "
                f"--rank_timeout={self.timeout:g} s: {where}"
            )
        else:
            what = f"{LOST_ONE_ANOTHER} but cannot go on, in step {self.own.step}"
        return f"{what}{f' ({error})' if error and not failed else ''}. {go_on}"

    def _names(self, ranks: Sequence[int]) -> str:
        """ "rank 3 (host b, pid 77, in step 120)", by host where there are several."""
        hosts: dict[tuple[str, int], list[int]] = {}
        for rank in sorted(ranks):
            beat = self.seen[rank][0]
            hosts.setdefault((beat.host, beat.step), []).append(rank)
        return " and ".join(
            f"rank{'s' if len(of) > 1 else ''} {', '.join(map(str, of))} (host {host}, "
            f"pid {', '.join(str(self.seen[r][0].pid) for r in of)}, in step {step})"
            for (host, step), of in hosts.items()
        )


class _Once:
    """Who comes first may speak; nobody else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def first(self) -> bool:
        return self._lock.acquire(blocking=False)


def lost_contact(error: Exception) -> bool:
    """Whether an error came out of a wait for other ranks. gloo's have no type of their own, and
    many words."""
    if isinstance(error, dist.DistError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return isinstance(error, RuntimeError) and trace is not None and _place(trace.tb_frame)[1]


def _position() -> tuple[str, bool]:
    """The line of our code that the main thread is at, and whether it waits there."""
    return _place(sys._current_frames().get(threading.main_thread().ident or 0))


def _place(frame: FrameType | None) -> tuple[str, bool]:
    waiting = False
    while frame is not None:
        path, line = frame.f_code.co_filename, frame.f_lineno
        if path.startswith(OURS) and "site-packages" not in path[len(OURS) :]:
            name = os.path.basename(path)
            # A wait in C++ has no frame of its own: the line that called it says so.
            called = linecache.getline(path, line)
            waiting |= name == "distributed.py" or ".wait(" in called or ".synchronize(" in called
            return f"{frame.f_code.co_name} ({name}:{line})", waiting
        waiting |= "/torch/distributed/" in path or "/torch/cuda/" in path
        frame = frame.f_back
    return "", waiting


def _is_local(host: str) -> bool:
    """Whether an address is one of this machine's own."""
    try:
        with socket.create_server((host, 0)):
            return True
    except OSError:
        return False


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
