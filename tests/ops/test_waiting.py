"""How the host waits for a device: by a clock that the tests move."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from thermocline.ops.cuda import waiting
from thermocline.ops.cuda.waiting import Nap


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
