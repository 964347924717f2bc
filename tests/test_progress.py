"""Progress: one style on a terminal, lines elsewhere, and a time left that is soon right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.progress import Eta, Progress, duration, pace, track
from tests.terminals_for_tests import on_a_terminal


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# ---- the time left


def estimates(
    time_of: Callable[[float], float], total: int, start: int = 0
) -> list[tuple[float, float]]:
    """(share of the run's time that is gone, what is said to be left, relative to what is) after
    each piece of work; time_of: work done (0 to 1) -> time gone (0 to 1)."""
    seconds = 3600.0
    eta = Eta(total, start, 0.0)
    found = []
    for i in range(1, total - start):
        share = time_of(i / (total - start))
        eta.add(1, share * seconds)
        left = eta.left()
        assert left is not None
        found.append((share, left / ((1 - share) * seconds)))
    return found


SLOW_STARTS: dict[str, Callable[[float], float]] = {
    "none": lambda work: work,
    "nothing for a twentieth of the run": lambda work: 0.05 + 0.95 * work,
    # A tenth of the speed for the first 6% of the time
    "slow for a while": lambda work: (
        10 * work / 0.946 if work < 0.00567 else 1 - (1 - work) * 0.945
    ),
    # Speed grows from nothing to its full value in the first twentieth
    "growing": lambda work: (
        0.05 * (work / 0.02564) ** 0.5 if work < 0.02564 else 0.05 + (work - 0.02564) * 0.975
    ),
}


@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("total", [50, 2000, 100_000])
@pytest.mark.parametrize("slow", SLOW_STARTS)
def test_the_time_left_settles_within_a_tenth_of_the_run(slow: str, total: int, start: int) -> None:
    found = estimates(SLOW_STARTS[slow], total + start, start)
    after = [ratio for share, ratio in found if 0.1 <= share < 0.99]
    assert len(after) > 0.8 * total
    assert min(after) > 0.85 and max(after) < 1.15


def test_a_first_step_that_compiles_is_forgotten() -> None:
    """60 s, then 1 s each."""
    eta, now = Eta(600, 0, 0.0), 0.0
    for i in range(66):
        now += 60 if i == 0 else 1
        eta.add(1, now)
        if i in (5, 65):
            assert eta.left() == pytest.approx(599 - i)


def test_work_that_comes_in_waves_is_not_taken_for_speed() -> None:
    """Eight at a time, each wave within a moment."""
    eta = Eta(800, 0, 0.0)
    for wave in range(1, 100):
        for k in range(8):
            eta.add(1, wave * 10 + k * 0.001)
            if 10 <= wave <= 90:
                assert eta.left() == pytest.approx((100 - wave) * 10, rel=0.3)


def test_another_speed_is_seen_a_fifth_of_the_work_later() -> None:
    eta, now = Eta(1000, 0, 0.0), 0.0
    for i in range(700):
        now += 1 if i < 500 else 3
        eta.add(1, now)
    assert eta.left() == pytest.approx(900, rel=0.01)


def test_what_is_thrown_away_is_no_backward_speed() -> None:
    eta = Eta(100, 0, 0.0)
    for second in range(1, 21):
        eta.add(1, second)
    eta.add(-10, 20.0)
    assert eta.done == 10 and eta.speed() == pytest.approx(1)
    assert eta.left() == pytest.approx(90)


def test_millions_of_steps_take_little_memory() -> None:
    eta = Eta(300_000, 0, 0.0)
    for i in range(300_000):
        eta.add(1, i * 0.001)
    assert len(eta._seen) < 1100


def test_before_any_work_nothing_is_said_of_the_rest() -> None:
    assert Eta(10, 0, 0.0).left() is None
    eta = Eta(None, 0, 0.0)
    eta.add(5, 1.0)
    assert (eta.speed(), eta.left()) == (5, None)
    eta = Eta(10, 0, 0.0)
    eta.add(10, 0.0)  # within one tick of the clock
    assert eta.left() is None


# ---- words


def test_numbers_are_said_in_readable_units() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 200, 7500, 360_000)] == [
        "0 s", "59 s", "1:00 min", "3:20 min", "2:05 h", "100:00 h",
    ]  # fmt: skip
    assert [pace(x) for x in (1234.5, 1, 0.5, 0.01)] == ["1,234.5/s", "1.0/s", "30.0/min", "36.0/h"]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(4000, "tokenizing", "shards", clock=clock) as bar:
        for _ in range(25):
            clock.now += 1
            bar.advance(100)
        bar.note("shard 7 is damaged")
        bar.advance(1500)
    said = capsys.readouterr()
    assert said.out == ""  # what a command prints there may be data
    assert said.err.splitlines() == [
        "tokenizing: 1,000 of 4,000 shards, 100.0/s, 30 s left",
        "tokenizing: 2,000 of 4,000 shards, 100.0/s, 20 s left",
        "shard 7 is damaged",
        "tokenizing: 4,000 of 4,000 shards in 25 s",
    ]


def test_bytes_and_what_was_there_before(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(4_000_000, "files", "B", start=500_000, clock=clock, stdout=True) as bar:
        for _ in range(10):
            clock.now += 1
            bar.advance(100_000)
        bar.resize(3_000_000)
        assert bar.state() == "1.5 MB of 3.0 MB, 100.0 kB/s, 15 s left"
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "files: 1.5 MB of 4.0 MB, 100.0 kB/s, 25 s left",
        "files: 1.5 MB of 3.0 MB in 10 s",
    ]


def test_a_task_of_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(None, "merging", clock=clock) as bar:
        assert bar.state() == "0 s so far"
        clock.now += 90
    assert capsys.readouterr().err == "merging: 1:30 min\n"


def test_text_of_ones_own_at_once_or_in_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(10, "base", clock=clock) as bar:
        for i in range(1, 11):
            bar.advance(show=False)
            bar.show(f"step {i}", now=i == 1, last=i == 10)
            clock.now += 3
    said = capsys.readouterr().err.splitlines()
    assert said == ["step 1", "step 5", "step 9", "step 10"]


def test_what_is_over_at_once_or_fails_leaves_no_last_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(track(range(5), "reading", "tensors")) == [0, 1, 2, 3, 4]
    clock = Clock()
    with pytest.raises(ValueError), Progress(3, "reading", clock=clock) as bar:
        bar.advance()
        clock.now += 50
        raise ValueError
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_two_parts_of_one_task(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(1.0, "reading", clock=clock) as bar:
        bar.advance(0.5, show=False)
        bar.show("reading: half")
        clock.now += 30
        bar.restart(400, "merging", "tokens")
        clock.now += 10
        bar.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 100 of 400 tokens, 10.0/s, 30 s left",
        "merging: 100 of 400 tokens in 40 s",
    ]


def test_only_rank_0_speaks_and_of_its_threads_the_main_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        clock = Clock()
        with Progress(3, "reading", clock=clock) as bar:
            clock.now += 20
            bar.advance()
            bar.note("so far")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    monkeypatch.setenv("RANK", "1")
    work()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    work()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_threads_may_advance_it_together() -> None:
    with Progress(8000, "reading") as bar:
        threads = [
            threading.Thread(target=lambda: [bar.advance() for _ in range(1000)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bar.eta.done == 8000


# ---- on a terminal

PROGRAM = """
import sys, time
from nanochat import progress
from nanochat.progress import Progress, track
progress.LINE_SECONDS = 1.0
for _ in track(range(3), "reading [weights]", "tensors"):
    time.sleep(0.4)
print("to stdout")
with Progress(4, "outer", "steps", stdout=True, ticking=False) as outer:
    for i in range(4):
        outer.advance(show=False)
        outer.show(f"outer step {i + 1}/4 | loss [1.0]", now=True)
        if i == 1:
            print("a line [between]")
            with Progress(None, "inner"):
                time.sleep(0.6)
        outer.note("noted")
"""


def test_on_a_terminal_there_is_one_bar_and_what_is_printed_is_above_it() -> None:
    shown = on_a_terminal(PROGRAM)
    assert "reading [weights]" in shown and "━" in shown and "1 of 3 tensors" in shown
    assert "s left" in shown
    lines = shown.replace("\r", "\n").split("\n")
    # Erased, then said for good
    assert "\x1b[1A\x1b[2Kreading [weights]: 3 of 3 tensors in 1 s" in lines
    assert "to stdout" in lines
    assert any(line.endswith("\x1b[2Ka line [between]") for line in lines)
    assert lines.count("\x1b[2Knoted") == 4
    assert any("━" in line and "outer step 2/4 | loss [1.0]" in line for line in lines)
    # The inner bar came after the outer one was erased, and the outer one came back
    inner = [i for i, line in enumerate(lines) if "inner" in line and "━" in line]
    outer = [i for i, line in enumerate(lines) if "outer" in line and "━" in line]
    assert inner and outer[0] < inner[0] and inner[-1] < outer[-1]
    assert not set(range(inner[0], inner[-1])) & set(outer)
    assert shown.rfind("\x1b[?25l") < shown.rfind("\x1b[?25h")  # the cursor is there again


def test_a_terminal_that_can_do_nothing_gets_lines() -> None:
    shown = on_a_terminal(PROGRAM, TERM="dumb")
    assert "\x1b" not in shown and "━" not in shown
    assert "reading [weights]: 3 of 3 tensors in 1 s\r\n" in shown


def test_a_pipe_gets_what_was_printed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"import sys\nsys.stdout = open({str(out)!r}, 'w', encoding='utf-8')\n{PROGRAM}"
    shown = on_a_terminal(program)
    assert "inner" in shown and "to stdout" not in shown
    said = out.read_text(encoding="utf-8")
    assert "\x1b" not in said and "━" not in said
    assert said.startswith("to stdout\nouter step 1/4 | loss [1.0]\nnoted\n")
    assert "a line [between]\n" in said
