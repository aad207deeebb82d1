"""Devices: a memory with what computes beside it, and how several of them work at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.ops.contract import FfnWork, Ops

Work = Callable[[], FfnWork]


class Device(Protocol):
    """A tier that computes.

    A layer's FFN calls `begin` on every device that holds a part of it, the host last, and then `end` on each: so
    that all of them work at once. Between the two calls the device is busy and its ops are left alone.
    """

    tier: Tier
    ops: Ops
    seconds: float
    """What the work that ended last took, or 0 where that is not known."""

    def begin(self, work: Work) -> None:
        """Do `work`, which calls the device's ops, beside the caller; one piece at a time."""

    def end(self) -> FfnWork:
        """What `work` returned, once it is done; an exception that it raised is raised here."""

    def close(self) -> None:
        """Let go of threads and streams; twice does no harm."""


class Host:
    """The CPU beside RAM: works in the caller's own thread."""

    tier = Tier.RAM

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.seconds = 0.0
        self._done: FfnWork | BaseException | None = None

    def begin(self, work: Work) -> None:
        """See the protocol; the work is done when this returns."""
        self._done, self.seconds = _timed(work)

    def end(self) -> FfnWork:
        """See the protocol."""
        done, self._done = self._done, None
        return _result(done)

    def close(self) -> None:
        """Nothing to let go of."""


class EmulatedDevice:
    """A second device that any machine has: the CPU again, with threads and a worker of its own.

    It stands where a GPU would: its memory is an arena of its own, what it gets and gives crosses by copying, and it
    works while the host works. It makes nothing faster; it lets every machine run and test what a GPU will run.
    """

    tier = Tier.VRAM

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.seconds = 0.0
        self._tasks: SimpleQueue[Work | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[FfnWork | BaseException, float]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending = 0

    def begin(self, work: Work) -> None:
        """See the protocol."""
        if self._thread is None:
            arguments = (self._tasks, self._results)  # not self: a forgotten device must not be kept by its thread
            self._thread = threading.Thread(target=_serve, args=arguments, name="emulated-device", daemon=True)
            self._thread.start()
        while self._pending:  # a caller was interrupted while it waited: what it left is nobody's
            self._take()
        self._pending += 1
        self._tasks.put(work)

    def end(self) -> FfnWork:
        """See the protocol."""
        if not self._pending:
            return _result(None)
        return _result(self._take())

    def _take(self) -> FfnWork | BaseException:
        done, self.seconds = self._results.get()
        self._pending -= 1
        return done

    def close(self) -> None:
        """End the worker."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def __del__(self) -> None:
        self._tasks.put(None)


def _serve(tasks: SimpleQueue[Work | None], results: SimpleQueue[tuple[FfnWork | BaseException, float]]) -> None:
    while (work := tasks.get()) is not None:
        results.put(_timed(work))
        del work  # what it holds on to is free before the next one comes


def _timed(work: Work) -> tuple[FfnWork | BaseException, float]:
    began = time.perf_counter()
    try:
        done: FfnWork | BaseException = work()
    except BaseException as error:  # raised again by whoever waits for the work
        done = error
    return done, time.perf_counter() - began


def _result(done: FfnWork | BaseException | None) -> FfnWork:
    if done is None:
        raise UsageError("a device was asked for work that it was never given")
    if isinstance(done, BaseException):
        raise done
    return done
