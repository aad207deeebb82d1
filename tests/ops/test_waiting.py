"""How the host waits for a device: by a clock that the tests move."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from thermocline.errors import HangError
from thermocline.ops.cuda import waiting
from thermocline.ops.cuda.waiting import Nap, finish


class Clock:
    """Time that passes where somebody sleeps, and with every look."""

    def __init__(self) -> None:
        self.tick = 1e-5
        self.now = self.slept = 0.0
        self.time = SimpleNamespace(sleep=self.sleep, perf_counter=lambda: self.now, monotonic=lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def look(self, at: float) -> Any:
        """Done from `at` on."""

        def done() -> bool:
            self.now += self.tick
            return self.now >= at

        return done


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(waiting, "time", made.time)
    return made


class Worker:
    """One that takes a crossing at each of some times, and whose device waits for ever unless it is released."""

    patience = 10.0
    alive = True

    def __init__(self, clock: Clock, *times: float) -> None:
        self._clock, self._times = clock, times
        self.released: list[float] = []
        self.open = True

    @property
    def crossings(self) -> int:
        return sum(at <= self._clock.now for at in self._times)

    def release(self, reason: str) -> bool:
        self.released.append(self._clock.now)
        return self.open


def stepped(clock: Clock, nap: Nap, seconds: float) -> tuple[float, float]:
    """How long a step of so many seconds took, and how much of it was slept."""
    began, clock.slept = clock.now, 0.0
    nap.wait(clock.look(began + seconds), None)
    return clock.now - began, clock.slept


def test_a_step_is_slept_through_for_the_most_part(clock: Clock) -> None:
    nap = Nap()
    assert stepped(clock, nap, 0.02)[1] == 0
    for _ in range(20):
        took, slept = stepped(clock, nap, 0.02)
        assert took == pytest.approx(0.02, abs=1e-4)
        assert slept == pytest.approx(0.015, abs=1e-3)


def test_one_slow_step_makes_no_other_slow(clock: Clock) -> None:
    nap = Nap()
    for seconds in (0.02, 0.02, 1.0, *(20 * [0.02])):
        took, slept = stepped(clock, nap, seconds)
        assert took <= seconds + 1e-3
        assert slept <= 0.05
    short = Nap()
    for seconds in (1.0, *(20 * [0.002])):  # the first one of all, of which nothing else is known
        assert stepped(clock, short, seconds)[0] <= seconds + 1.1e-3


def test_who_overslept_aims_lower(clock: Clock) -> None:
    nap = Nap()
    for seconds in (10 * [0.02]) + (10 * [0.0042]):
        last = stepped(clock, nap, seconds)
    assert last[0] == pytest.approx(0.0042, abs=1e-4)


def test_patience_is_for_one_crossing_not_for_a_step(clock: Clock) -> None:
    worker, clock.tick = Worker(clock, *range(8, 80, 8)), 1e-3
    finish(clock.look(75.0), worker)  # type: ignore[arg-type]
    assert not worker.released


def test_a_process_that_was_stopped_goes_on(clock: Clock) -> None:
    worker, done = Worker(clock), clock.look(300.5)

    def look() -> bool:
        if clock.now < 1e-3:
            clock.now = 300.0
        return done()

    finish(look, worker)  # type: ignore[arg-type]
    assert not worker.released


def test_who_gave_up_waits_for_no_other_crossing(clock: Clock) -> None:
    clock.tick = 1e-3
    worker = Worker(clock, *range(12, 400, 12))  # every crossing takes too long
    finish(lambda: clock.look(0.0)() and len(worker.released) >= 32, worker)  # type: ignore[arg-type]
    assert worker.released[0] == pytest.approx(10.0, abs=0.01)
    assert worker.released[-1] < 10.1


def test_a_device_in_which_nothing_moves_is_given_up(clock: Clock) -> None:
    worker, clock.tick = Worker(clock), 1e-2
    worker.open = False
    for some, seconds in ((worker, 25.0), (None, 125.0)):
        began = clock.now
        with pytest.raises(HangError, match=f"after {seconds:.0f} s"):
            finish(lambda: clock.look(1e9)(), some)  # type: ignore[arg-type]
        assert clock.now - began == pytest.approx(seconds, abs=0.1)
