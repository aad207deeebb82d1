"""Waiting for a device: asleep while it cannot be done yet, and not for ever where nothing moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from thermocline.errors import HardwareError
from thermocline.ops.handover import ColdWorker

Look = Callable[[], bool]
"""Whether the device has done all that it was given."""

PATIENCE: Final = 60.0
"""Seconds that a step without the CPU's help may take."""
SLEEPS: Final = 0.75
"""Share of the shortest of the last steps that its caller sleeps before it looks without pause."""
LONGEST: Final = 0.05
"""Seconds that it sleeps at most."""
SLICE: Final = 0.001
"""Seconds that it sleeps between two looks."""
STEPS: Final = 8


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
        HardwareError: the device itself does not come to an end.
    """
    patience = worker.patience if worker is not None else PATIENCE
    began = time.monotonic()
    while not done():
        waited = time.monotonic() - began
        if waited > 2 * patience + 5:
            raise HardwareError(f"the GPU has not finished a step after {waited:.0f} s; restart the program")
        if worker is not None and (waited > patience or not worker.alive):
            worker.release(
                "the CPU did not compute its neurons in time"
                if worker.alive
                else "the worker of the CPU's neurons died"
            )
