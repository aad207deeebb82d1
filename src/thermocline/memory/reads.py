"""Where rows lie on disk, and how many of them come with one read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.errors import HardwareError, UsageError, printable
from thermocline.files.weight import Weight
from thermocline.hardware.machine import ReadCurve

Longs = npt.NDArray[np.int64]

SMALLEST_LIMIT, LARGEST_READ = 64 << 10, 256 << 10
"""Bytes of the largest read, by the disk's curve: every one in flight takes as much memory. The second is far on the
flat end of every curve.
"""
FLAT = 0.75
"""Of the best rate: where it is reached, larger reads gain little."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix's rows lie: `offset` of row 0 in the file `path`, and the bytes from a row to the next."""

    path: Path
    offset: int
    stride: int


@dataclass(frozen=True, slots=True)
class Way:
    """How records are read. `gap` is the most bytes between two pieces that are read over rather than left out; `curve`
    is the disk's, if it is known.
    """

    gap: int
    largest: int = LARGEST_READ
    curve: ReadCurve | None = None

    @classmethod
    def of(cls, curve: ReadCurve | None) -> Way:
        """What a disk's curve says: reading on costs less than beginning anew, up to so many bytes."""
        if curve is None:
            return cls(0)
        largest, fastest = SMALLEST_LIMIT, max(rate for _, rate in curve.points)
        while largest < LARGEST_READ and curve.bandwidth(largest) < FLAT * fastest:
            largest *= 2
        return cls(min(curve.gap, largest // 4), largest, curve)

    def alone(self, numbers: Longs, of: int, size: int) -> bool:
        """Whether rows `numbers` (rising) of `of` neighbours of `size` bytes are read sooner than all of them."""
        if self.curve is None or not len(numbers):
            return 2 * len(numbers) < of
        pieces = triples(numbers * size, size, numbers * size)
        requests, _ = merged(pieces, self)
        nbytes = float(requests[:, 1].sum())
        return nbytes / self.curve.bandwidth(nbytes / len(requests)) < of * size / self.curve.bandwidth(of * size)


def merged(pieces: Longs, way: Way) -> tuple[Longs, Longs]:
    """Requests and parts for `Reader.submit` that fetch pieces (n, 3) of offset, bytes and place.

    Pieces with at most `way.gap` bytes between them share a request of at most `way.largest` bytes; a piece that is
    larger is cut.
    """
    pieces = _cut(pieces, way.largest)
    parts = np.ascontiguousarray(pieces[np.argsort(pieces[:, 0], kind="stable")])
    begin, end = parts[:, 0], parts[:, 0] + parts[:, 1]
    # From each piece: the one before which a request that begins with it ends, for the gap or for its size.
    places = np.arange(len(parts))
    gaps = np.append(np.flatnonzero(begin[1:] - end[:-1] > way.gap) + 1, len(parts))
    after = np.minimum(
        gaps[np.searchsorted(gaps, places, side="right")], np.searchsorted(end, begin + way.largest, side="right")
    )
    following = np.maximum(after, places + 1).tolist()
    firsts, at = [], 0
    while at < len(parts):
        firsts.append(at)
        at = following[at]
    first = np.array(firsts, np.int64)
    last = np.append(first, len(parts))[1:] - 1
    return triples(begin[first], end[last] - begin[first], last - first + 1), parts


def triples(first: Longs, second: Longs | int, third: Longs | int) -> Longs:
    """An array (n, 3) of these columns; `np.stack` takes a multiple of the time for a few hundred rows."""
    made = np.empty((len(first), 3), np.int64)
    made[:, 0], made[:, 1], made[:, 2] = first, second, third
    return made


def _cut(pieces: Longs, largest: int) -> Longs:
    """Pieces of at most `largest` bytes."""
    if not len(pieces) or pieces[:, 1].max() <= largest:
        return pieces
    rows = [
        (offset + at, min(largest, size - at), place + at)
        for offset, size, place in pieces.tolist()
        for at in range(0, size, largest)
    ]
    return np.array(rows, np.int64)


def place_of(weight: Weight, maps: Path = Path("/proc/self/maps")) -> Place:
    """Where the rows of a mapped weight lie in its file.

    Raises:
        UsageError: it is not mapped from a file.
        HardwareError: the file was removed or replaced meanwhile.
    """
    address = weight.data.ctypes.data
    for line in maps.read_text().splitlines():
        bounds, _, offset, device, inode, *name = line.split(None, 5)
        low, high = (int(part, 16) for part in bounds.split("-"))
        if not low <= address < high or inode == "0":
            continue
        path = Path(name[0])
        if not _is_still(path, device, int(inode)):
            raise HardwareError(f"{printable(str(path))}: was removed or replaced while it was loaded; load it again")
        return Place(path, int(offset, 16) + address - low, weight.data.shape[1])
    raise UsageError(f"{printable(weight.name)} is not mapped from a file, so its neurons cannot stay on disk")


def _is_still(path: Path, device: str, inode: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    major, minor = (int(part, 16) for part in device.split(":"))
    return found.st_ino == inode and (os.major(found.st_dev), os.minor(found.st_dev)) == (major, minor)
