"""What a step says of itself: exact, in order, late by one step at most; and the collector."""

from __future__ import annotations

import gc

import pytest
import torch

from nanochat import meter
from nanochat.meter import HostCopy, Meter, QuietCollector, StepRecord


class Clock:
    """Takes the place of time.perf_counter."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter.time, "perf_counter", clock)
    return clock


def record(step: int) -> StepRecord:
    return StepRecord(step, 1.0, 10 * step, False, HostCopy(torch.tensor([step + 0.5, 2.0 * step])))


@pytest.mark.parametrize("lag", [False, True])
def test_every_step_is_accounted_for_once_and_in_order(lag: bool, clock: Clock) -> None:
    seen: list[tuple[int, float, float, float]] = []
    m = Meter(lambda r, loss, norm, s: seen.append((r.step, loss, norm, s)), lag)
    known = []
    for step in range(1, 5):
        m.begin()
        clock.now += 1
        m.end(record(step))
        known.append(len(seen))
        clock.now += 0.25  # for data: part of the next step
    assert known == ([0, 1, 2, 3] if lag else [1, 2, 3, 4])
    m.flush()
    assert [row[:3] for row in seen] == [(k, k + 0.5, 2.0 * k) for k in range(1, 5)]
    # All of the time belongs to some step, the wait at the end to the one that was waited for
    assert sum(row[3] for row in seen) == (5.0 if lag else 4.75)
    m.flush()
    assert len(seen) == 4


def test_the_clock_stands_still_during_an_evaluation(clock: Clock) -> None:
    seconds: list[float] = []
    m = Meter(lambda r, loss, norm, s: seconds.append(s), lag=True)
    for step in range(1, 4):
        m.begin()
        clock.now += 1
        m.end(record(step))
        if step == 2:
            m.pause()
            clock.now += 100
    m.pause()
    assert seconds == [2.0, 0.0, 1.0]  # of the first two, queued together, the sum is known


def test_without_gaps_only_the_steps_themselves_count(clock: Clock) -> None:
    seconds: list[float] = []
    m = Meter(lambda r, loss, norm, s: seconds.append(s), lag=False, gaps=False)
    for step in range(1, 4):
        m.begin()
        clock.now += step
        m.end(record(step))
        clock.now += 100  # replies are sampled
    assert seconds == [1.0, 2.0, 3.0]


def test_numbers_are_those_of_the_moment_they_were_copied() -> None:
    assert HostCopy(torch.tensor([1.5, 2.0])).read() == [1.5, 2.0]


@pytest.mark.gpu
def test_a_gpu_s_numbers_are_read_without_waiting_for_what_comes_after() -> None:
    big = torch.randn(4096, 4096, device="cuda")
    value = torch.zeros(2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value += 1
        copy = HostCopy(value)
        value += 1
        for _ in range(50):
            big = big @ big * 1e-3
        end = torch.cuda.Event()
        end.record()
        assert copy.read() == [1.0, 1.0]
        assert not end.query()  # the queue was not empty yet
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_collector_is_quiet_between_evaluations_and_restored() -> None:
    assert gc.isenabled()
    collections: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collections.append(info["generation"])

    quiet = QuietCollector()
    quiet.after_step()
    assert gc.isenabled()  # not started: somebody else's process
    quiet.start()
    gc.callbacks.append(note)
    try:
        quiet.after_step()
        assert not gc.isenabled() and collections == [2] and gc.get_freeze_count() > 0
        for _ in range(3):
            garbage: list[object] = []
            garbage.append(garbage)
            quiet.after_step()
        assert collections == [2]
        quiet.collect()
        quiet.collect()  # no step since
        assert collections == [2, 2]
        for _ in range(QuietCollector.EVERY):
            quiet.after_step()
        assert collections == [2, 2, 2]
    finally:
        gc.callbacks.remove(note)
        quiet.restore()
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        quiet = QuietCollector()
        quiet.start()
        quiet.after_step()
        quiet.restore()
        assert not gc.isenabled()
    finally:
        gc.enable()
