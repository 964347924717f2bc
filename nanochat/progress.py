"""
How far a long task is, in one style wherever people wait.

    with Progress(len(files), "tokenizing", "files") as bar:
        for file in files:
            ...
            bar.advance()

    for name in track(names, "reading weights", "tensors"):
        ...

On a terminal it is a bar with the speed and the time left; elsewhere a line about every ten seconds
and one at the end. What takes less than ten seconds leaves no line. It goes to stderr, for what a
command prints on stdout may be data. Only rank 0 speaks. Floor 0.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, TextIO, TypeVar

import rich.progress
from rich import filesize
from rich.console import Console
from rich.table import Column
from rich.text import Text

from nanochat.common import is_rank0

T = TypeVar("T")

LINE_SECONDS = 10.0  # between two lines where there is no terminal
REFRESHES = 4  # a second, on a terminal


class Eta:
    """How fast it goes: the mean speed over the last fifth of the work, and over the later half of
    what is done as long as that is less.

    A slow start (a connection, compilation) brings little work, so that measured in work it is soon
    behind; and a change of speed is forgotten a fifth of the work later."""

    def __init__(self, total: float | None, start: float, now: float) -> None:
        self.total, self.start, self.done = total, start, start
        self._seen: deque[tuple[float, float]] = deque([(now, start)])  # (seconds, work done)
        self._spacing = 0.0  # of work: what comes closer than that is one entry

    def add(self, amount: float, now: float) -> None:
        """Some work is done; below 0, it has to be done again."""
        self.done += amount
        if amount < 0:  # as if it had never been counted: there is no backward speed
            self._seen = deque((t, done + amount) for t, done in self._seen)
            self.start += amount
            return
        if len(self._seen) > 1 and self.done - self._seen[-2][1] <= self._spacing:
            self._seen.pop()
        self._seen.append((now, self.done))
        window = (self.done - self.start) / 2
        if self.total is not None:
            window = min(window, (self.total - self.start) / 5)
        while len(self._seen) > 2 and self._seen[1][1] <= self.done - window:
            self._seen.popleft()
        self._spacing = window / 500  # memory stays bounded, whatever the steps

    def speed(self) -> float | None:
        """Work a second; None before there is any."""
        (t0, before), (t1, after) = self._seen[0], self._seen[-1]
        return (after - before) / (t1 - t0) if after > before and t1 > t0 else None

    def left(self) -> float | None:
        """Seconds that the rest takes; None where that cannot be said."""
        speed = self.speed()
        if self.total is None or speed is None:
            return None
        return max(0.0, self.total - self.done) / speed


class Progress:
    """The progress of one task, from `with` on. Any thread may advance it.

    what, unit: what is being done, to how many of what ("B": bytes, which get their own units).
    total: None where nobody knows; then it says how long it has been at work.
    start: what was done before.
    stdout: for a command whose output this is.
    ticking: a thread redraws it; without, it is redrawn as it advances."""

    def __init__(
        self,
        total: float | None,
        what: str,
        unit: str = "",
        *,
        start: float = 0,
        stdout: bool = False,
        ticking: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.stdout, self.clock = what, unit, stdout, clock
        self.eta = Eta(total, start, clock())
        self._text: str | None = None  # said in place of our own words
        self._how = "silent"
        self._lock = threading.RLock()
        self._ticking = ticking
        self._began = self._told = clock()
        self._display: Any = None

    # ---------------------------------------------------------------------------------------------
    # Its life

    def __enter__(self) -> Progress:
        self._began = self._told = self.clock()
        self.eta = Eta(self.eta.total, self.eta.done, self._began)
        # Of threads, the main one: what others do in the background is no news
        if is_rank0() and threading.current_thread() is threading.main_thread():
            console = Console(stderr=not self.stdout)
            self._how = "lines"
            if self._stream().isatty() and not console.is_dumb_terminal:
                self._how = "live"
                self._begin_display(console)
        return self

    def _begin_display(self, console: Console) -> None:
        # What is printed meanwhile appears above the bar; what a pipe gets is left alone
        all_here = sys.stdout.isatty() and sys.stderr.isatty()
        self._display = rich.progress.Progress(
            _Words(lambda: "" if self._text else self.what, Column(no_wrap=True)),
            rich.progress.BarColumn(None, table_column=Column(ratio=1, min_width=5, max_width=40)),
            _Words(lambda: self._text or self.state(), Column(no_wrap=True)),
            console=console, transient=True, expand=True,
            auto_refresh=self._ticking, refresh_per_second=REFRESHES,
            redirect_stdout=all_here, redirect_stderr=all_here,
        )  # fmt: skip
        self._display.add_task("", total=self.eta.total, completed=self.eta.done)
        if _shown:  # two would write over each other
            _shown[-1].stop()
        _shown.append(self._display)
        _start(self._display)

    def __exit__(self, error: object, *_: object) -> None:
        if self._how == "live":
            self._display.stop()
            _shown.remove(self._display)
            if _shown:
                _start(_shown[-1])
        over = self.clock() - self._began
        if error is None and self._text is None and over >= LINE_SECONDS:
            done = f"{self.count()} in " if self.eta.done else ""
            self.note(f"{self.what}: {done}{duration(over)}")
        self._how = "silent"

    # ---------------------------------------------------------------------------------------------
    # What happens

    def advance(self, amount: float = 1, show: bool = True) -> None:
        """Some of the work is done; below 0, it has to be done again. show=False: show() follows,
        with a text of one's own."""
        with self._lock:
            self.eta.add(amount, self.clock())
            if show:
                self.show()

    def resize(self, total: float) -> None:
        """It turns out to be more, or less."""
        with self._lock:
            self.eta.total = total

    def restart(self, total: float | None, what: str, unit: str = "", start: float = 0) -> None:
        """The next part of the same task, at a speed of its own."""
        with self._lock:
            self.what, self.unit = what, unit
            self.eta = Eta(total, start, self.clock())

    def show(self, text: str | None = None, now: bool = False, last: bool = False) -> None:
        """Shows how it stands, or `text` in place of that: when it is time, or `now`. A text of
        one's own stays behind as a line if it is the `last`."""
        with self._lock:
            self._text = text
            if last and text is not None:
                return self.note(text)
            since = self.clock() - self._told
            if self._how == "live":
                task = self._display.tasks[0]
                task.completed, task.total = self.eta.done, self.eta.total
                if now or (not self._ticking and since >= 1 / REFRESHES):
                    self._told = self.clock()
                    self._display.refresh()
            elif now or since >= LINE_SECONDS:
                self._told = self.clock()
                self.note(text or f"{self.what}: {self.state()}")

    def note(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._how == "live" and self._display in _shown:
            self._display.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._how != "silent":
            print(text, file=self._stream(), flush=True)

    def _stream(self) -> TextIO:
        return sys.stdout if self.stdout else sys.stderr

    # ---------------------------------------------------------------------------------------------
    # In words

    def count(self) -> str:
        """What is done of what there is: "3 of 8 shards", "1.0 MB of 3.9 MB"."""
        parts = [self.eta.done] if self.eta.total is None else [self.eta.done, self.eta.total]
        if self.unit == "B":
            return " of ".join(filesize.decimal(int(part)) for part in parts)
        return " of ".join(f"{part:,.0f}" for part in parts) + (self.unit and f" {self.unit}")

    def state(self) -> str:
        """How it stands: count, speed, and time left or gone."""
        speed = self.eta.speed()
        words = [self.count()] if self.eta.done or self.eta.total is not None else []
        if speed is not None:
            words.append(f"{filesize.decimal(int(speed))}/s" if self.unit == "B" else pace(speed))
        return ", ".join([*words, self.rest()])

    def rest(self) -> str:
        """The time left, or gone where that is not known."""
        left = self.eta.left()
        gone = self.clock() - self._began
        return f"{duration(gone)} so far" if left is None else f"{duration(left)} left"


class _Words(rich.progress.ProgressColumn):
    """A column of words that are asked for when it is drawn."""

    def __init__(self, words: Callable[[], str], column: Column) -> None:
        super().__init__(column)
        self.words = words

    def render(self, task: rich.progress.Task) -> Text:
        return Text(self.words())


_shown: list[rich.progress.Progress] = []  # those begun on the terminal; the last one is visible


def _start(display: rich.progress.Progress) -> None:
    display.start()
    # It would be hidden, and stay so behind a process that is killed
    display.console.show_cursor(True)


def pace(speed: float) -> str:
    """A speed, in the unit that makes a readable number of it."""
    if speed >= 1:
        return f"{speed:,.1f}/s"
    return f"{speed * 60:.1f}/min" if speed >= 1 / 60 else f"{speed * 3600:.1f}/h"


def duration(seconds: float) -> str:
    """12 s, 3:20 min, 2:05 h: two numbers say enough."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02} h"


def track(items: Collection[T], what: str, unit: str = "") -> Iterator[T]:
    """The items; of how many the work is done, a bar tells."""
    with Progress(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.advance()
