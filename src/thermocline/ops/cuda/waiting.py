"""Waiting for a device: asleep while it cannot be done yet, and not for ever where nothing moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from thermocline.errors import HangError
from thermocline.ops.handover import ColdWorker

Look = Callable[[], bool]
"""Whether the device has done all that it was given."""

PATIENCE: Final = 60.0
"""Seconds that a step without the CPU's help may take."""
HANGS: Final = 5.0
"""Seconds beyond twice the patience, after which a device in which nothing moves is given up."""
SLEEPS: Final = 0.75
"""Share of the shortest of the last steps that its caller sleeps before it looks without pause."""
LONGEST: Final = 0.05
"""Seconds that it sleeps at most."""
SLICE: Final = 0.001
"""Seconds that it sleeps between two looks."""
STEPS: Final = 8
BETWEEN: Final = 0.1
"""Seconds between two looks that count at most: a process that is stopped wastes nobody's patience."""


class Nap:
    """Waits for one step after another, and sleeps while the device must be busy: the cores have other work than to
    look. How long that is follows from the shortest of the last steps, so that a slow one makes no other slow.
    """

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=STEPS)

    def wait(self, done: Look, worker: ColdWorker | None) -> None:
        """See `finish`."""
        began = time.perf_counter()
        until = began + min(LONGEST, SLEEPS * min(self._took, default=0.0))
        slept = False
        while not (over := done()) and (left := until - time.perf_counter()) > 0:
            time.sleep(min(left, SLICE))
            slept = True
        if not over:
            finish(done, worker)
        took = time.perf_counter() - began
        self._took.append(took / 2 if over and slept else took)  # who overslept does not know how long it took


def finish(done: Look, worker: ColdWorker | None) -> None:
    """Return when `done`, a look at the device. What nobody answers in time is answered with nothing, and told.

    Raises:
        HangError: the device itself does not come to an end.
    """
    patience = worker.patience if worker is not None else PATIENCE
    quiet = Quiet(worker)
    late = False
    while not done():
        waited = quiet.seconds()
        if waited > 2 * patience + HANGS:
            raise HangError(f"the GPU has not finished a step after {waited:.0f} s; restart the program")
        if worker is not None and (late or waited > patience or not worker.alive):
            late = True  # the step has failed: none of its other crossings is waited for
            if worker.release(
                "the CPU did not compute its neurons in time"
                if worker.alive
                else "the worker of the CPU's neurons died"
            ):
                quiet = Quiet(worker)


class Quiet:
    """For how long the worker was handed nothing, as far as somebody looked."""

    def __init__(self, worker: ColdWorker | None) -> None:
        self._worker = worker
        self._crossings = self._counted()
        self._seconds, self._last = 0.0, time.monotonic()

    def seconds(self) -> float:
        """Since the last crossing, or since this was made."""
        now, crossings = time.monotonic(), self._counted()
        if crossings != self._crossings:
            self._crossings, self._seconds = crossings, 0.0
        else:
            self._seconds += min(now - self._last, BETWEEN)
        self._last = now
        return self._seconds

    def _counted(self) -> int:
        return self._worker.crossings if self._worker is not None else 0
