"""How fast this machine reads memory: measured, and remembered for this machine."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thermocline import _native
from thermocline.errors import OutputError
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
    room = int(find_memory().available * MEMORY_SHARE)
    buffer = np.ones(max(1 << 20, min(max(BUFFER, LARGE_CACHES * cache), MOST, room)), np.uint8)
    single = _best(buffer, 1, seconds)
    return Bandwidth(single, single if threads == 1 else _best(buffer, threads, seconds), threads, time.time())


def _best(buffer: np.ndarray[Any, np.dtype[np.uint8]], threads: int, seconds: float) -> float:
    context = _native.Context(threads, "auto")
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        best = max(best, _native.read_bandwidth(context, buffer) / 1e9)
        if time.perf_counter() >= end:
            return best


def home() -> Path:
    """Where this machine's measurements are kept: $THERMOCLINE_HOME, or thermocline/ in the user's cache folder."""
    chosen = os.environ.get("THERMOCLINE_HOME")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "thermocline"


def recall(fingerprint: str) -> Bandwidth | None:
    """What was measured on this machine before, None if nothing was or the file is not ours to trust."""
    try:
        kept = json.loads((home() / "machine.json").read_text())
        if kept["fingerprint"] != fingerprint:
            return None
        found = kept["bandwidth"]
        return Bandwidth(float(found["single"]), float(found["all"]), int(found["threads"]), float(found["measured"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(fingerprint: str, bandwidth: Bandwidth) -> Path:
    """Write the measurement where `recall` finds it, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = home()
    target = folder / "machine.json"
    text = json.dumps({"fingerprint": fingerprint, "bandwidth": asdict(bandwidth)}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".machine-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}; set THERMOCLINE_HOME to a folder of yours"
        ) from error
    return target
