"""Saves are frequent at the start and rare later."""

from __future__ import annotations

from thermocline.files.pace import Pace


def test_saves_come_at_growing_intervals() -> None:
    now, saves = 0.0, []
    pace = Pace(20.0, lambda: now)
    while now < 100:
        if pace.due():
            saves.append(now)
            pace.saved()
        now += 0.25
    assert saves == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 51.0, 71.0, 91.0]


def test_the_first_save_can_be_left_out() -> None:
    now, saves = 0.0, []
    pace = Pace(3.0, lambda: now, at_once=False)
    while now < 12:
        if pace.due():
            saves.append(now)
            pace.saved()
        now += 0.25
    assert saves == [1.0, 3.0, 6.0, 9.0]
    assert Pace(0.0, lambda: now, at_once=False).due()


def test_without_an_interval_every_time_is_due() -> None:
    pace = Pace(0.0, lambda: 0.0)
    for _ in range(3):
        assert pace.due()
        pace.saved()


def test_the_time_that_a_save_takes_is_no_interval() -> None:
    now = 0.0
    pace = Pace(20.0, lambda: now)
    assert pace.due()
    now = 50.0  # that long it took
    pace.saved()
    assert not pace.due()
