"""When to save what a long run has done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FIRST: Final = 1.0
"""Seconds between the first save of a run and the second; to the first, where it does not come at once."""


class Pace:
    """Saves come `at_once` or not, then after 1 s, 2 s, 4 s and so on, and at last every `most` seconds.

    So a run that is killed early has something to go on with, and a long one spends little on saving.
    """

    def __init__(self, most: float, clock: Callable[[], float] = time.monotonic, *, at_once: bool = True) -> None:
        self._most, self._clock = most, clock
        self._wait, self._since = 0.0 if at_once else min(FIRST, most), clock()

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() - self._since >= self._wait

    def saved(self) -> None:
        """All was saved."""
        self._wait, self._since = min(2 * self._wait or FIRST, self._most), self._clock()
