"""How fast this machine reads memory."""

from __future__ import annotations

import time
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
