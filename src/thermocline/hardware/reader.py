"""Reads of a file past the page cache, with several in flight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.errors import HardwareError, printable

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What a reader has done: requests, bytes in whole blocks, and seconds with something in flight."""

    requests: int = 0
    nbytes: int = 0
    busy: float = 0.0

    def since(self, earlier: ReadStats) -> ReadStats:
        """The difference to an earlier account."""
        return ReadStats(self.requests - earlier.requests, self.nbytes - earlier.nbytes, self.busy - earlier.busy)

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(self.requests + other.requests, self.nbytes + other.nbytes, self.busy + other.busy)

    @property
    def bandwidth(self) -> float:
        """Bytes/s while something was in flight, 0 where nothing was."""
        return self.nbytes / self.busy if self.busy > 0 else 0.0


class RecordReader(Protocol):
    """What carries reads out; a test may put a faulty one in the place of `Reader`."""

    @property
    def largest(self) -> int:
        """Most bytes of one request."""

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""

    def submit(self, requests: Ints, parts: Ints, out: Bytes) -> int:
        """Start reads; see `Reader.submit`."""

    def wait(self, ticket: int) -> None:
        """Wait for them; see `Reader.wait`."""

    def close(self) -> None:
        """Let go of the file."""


class Reader:
    """A file that is read by `depth` threads. One thread at a time submits and waits.

    `direct` tells whether reads pass the page cache by; where the file system does not allow that, what was read
    is dropped from the cache at once. A file that is removed or replaced under its name is read to the end.
    """

    def __init__(self, path: Path | str, *, depth: int = 16, largest: int = 1 << 20, direct: bool = True) -> None:
        """Open `path` for requests of up to `largest` bytes.

        Raises:
            HardwareError: it cannot be opened.
        """
        self.path = Path(path)
        try:
            self._native: _native.Reader | None = _native.Reader(str(path), depth, largest, direct)
        except OSError as error:
            raise HardwareError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
        self.direct = self._native.direct
        self.depth = depth
        self.size = self._native.size
        self._open: dict[int, Any] = {}

    @property
    def largest(self) -> int:
        """Most bytes of one request."""
        return self._reader.largest

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""
        return ReadStats(*self._reader.stats())

    def submit(self, requests: Ints, parts: Ints, out: Bytes) -> int:
        """Start reading; the ticket for `wait`.

        `requests` (n, 3) are offset and bytes in the file, and how many of the next `parts` lie inside. `parts`
        (m, 3) are offset in the file, bytes, and place in `out` (bytes), which is written to until `wait` returns.

        Raises:
            ValueError: a request or a part lies outside the file, its request or `out`.
        """
        ticket = self._reader.submit(requests, parts, out)
        self._open[ticket] = out
        return ticket

    def wait(self, ticket: int) -> None:
        """Return when nothing of the ticket is in flight any more.

        Raises:
            HardwareError: a read failed, or the file ended early.
        """
        try:
            self._reader.wait(ticket)
        except OSError as error:
            raise HardwareError(
                f"{printable(str(self.path))}: cannot be read: {error.strerror}; the file has changed or its disk fails"
            ) from error
        finally:
            self._open.pop(ticket, None)

    def close(self) -> None:
        """Wait for what is in flight and let go of the file; twice does no harm."""
        self._native = None
        self._open.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _reader(self) -> _native.Reader:
        if self._native is None:
            raise HardwareError(f"{printable(str(self.path))}: this reader is closed")
        return self._native
