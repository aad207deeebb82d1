"""How fast this machine reads memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from thermocline import _native
from thermocline.hardware.memory import find_memory

BUFFER = 256 << 20
"""Bytes read in a pass: far more than the caches of ordinary machines, and a small share of their memory."""
LARGE_CACHES = 4
"""The buffer is at least this many times the last level cache, as far as MOST allows."""
MOST = 1 << 30
MEMORY_SHARE = 1 / 8
"""And no more than this of the free memory."""
SECONDS = 0.25
"""How long each measurement reads; bandwidth of shared machines changes from one second to the next."""

Buffer = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Read bandwidth in 10⁹ bytes a second, with one thread and with `threads`; `measured` is Unix time."""

    single: float
    all: float
    threads: int
    measured: float


@dataclass(frozen=True, slots=True)
class Load:
    """Something that moves bytes: `rate` measures how many a second, `once` does it for some milliseconds at most."""

    rate: Callable[[], float]
    once: Callable[[], object]


def together(one: Load, other: Load) -> tuple[float, float]:
    """Bytes/s of each of two loads while the other is kept up in another thread."""
    return _beside(other, one), _beside(one, other)


def memory_load(buffer: Buffer, threads: int, seconds: float) -> Load:
    """Reading `buffer` with so many threads, which may run on any core."""
    context = _native.Context(threads, "auto", False)
    return Load(
        rate=lambda: best_rate(buffer, threads, seconds, pin=False),
        once=lambda: _native.read_bandwidth(context, buffer),
    )


def measure_bandwidth(threads: int, cache: int = 0, seconds: float = SECONDS) -> Bandwidth:
    """Read a buffer that no cache holds for a while; the best pass counts.

    `cache` is the size of the last level cache in bytes.
    """
    buffer = read_buffer(cache)
    single = best_rate(buffer, 1, seconds) / 1e9
    return Bandwidth(
        single, single if threads == 1 else best_rate(buffer, threads, seconds) / 1e9, threads, time.time()
    )


def read_buffer(cache: int) -> Buffer:
    """Memory to read, larger than a last level cache of `cache` bytes."""
    room = int(find_memory().available * MEMORY_SHARE)
    return np.ones(max(1 << 20, min(max(BUFFER, LARGE_CACHES * cache), MOST, room)), np.uint8)


def best_rate(buffer: Buffer, threads: int, seconds: float, *, pin: bool = True) -> float:
    """Bytes/s of the best pass over `buffer` in `seconds`."""
    context = _native.Context(threads, "auto", pin)
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        best = max(best, _native.read_bandwidth(context, buffer))
        if time.perf_counter() >= end:
            return best


def _beside(other: Load, one: Load) -> float:
    """What `one` reaches while `other` runs again and again."""
    stop, started = threading.Event(), threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                other.once()
                started.set()
        finally:
            started.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    started.wait(10)
    try:
        return one.rate()
    finally:
        stop.set()
        thread.join()
