"""Matrices that memory has no room for, read from end to end in every pass, by pieces that go round a ring of buffers.

Passes are alike: what followed a matrix the last time is read ahead behind its last piece. So the disk goes on
reading while attention or neurons are computed, and what was read in vain is only forgotten.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.errors import HardwareError
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.hardware.reader import Reader, ReadStats, RecordReader
from thermocline.memory.arena import Memory
from thermocline.memory.reads import Place, Way, merged, place_of, triples
from thermocline.placement.ledger import Purpose

PIECE = 2 << 20
"""Bytes of a buffer."""
BUFFERS = 4
"""Pieces that are read or computed with at a time: enough to keep all reads in flight."""
IN_FLIGHT = 8
LARGEST_READ = 256 << 10
"""Bytes of one read. Half as many of twice the size were 5 % slower, measured in turns."""
PIECES_BYTES = (BUFFERS + 1) * PIECE + IN_FLIGHT * LARGEST_READ
"""Bytes that reading takes, whatever is read; one buffer is for rows that are asked for by number."""


SINGLE = Way(0, LARGEST_READ)
"""Nothing is read but what is asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class StreamedMatrix:
    """A weight that stays in its file."""

    weight: Weight
    place: Place

    @property
    def rows(self) -> int:
        """Outputs of the linear map."""
        return self.weight.rows


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A piece that is being read."""

    matrix: StreamedMatrix
    number: int
    ticket: int
    buffer: Bytes


class PieceStream:
    """The ring. One thread uses it at a time; `open_reader` is there for tests."""

    def __init__(self, open_reader: Callable[[Path], RecordReader] | None = None) -> None:
        self._open = open_reader or (lambda path: Reader(path, depth=IN_FLIGHT, largest=LARGEST_READ))
        self._readers: dict[Path, RecordReader] = {}
        self._free: list[Bytes] = []
        self._some = np.empty(0, np.uint8)
        self._ahead: deque[_Ahead] = deque()
        self._after: dict[int, StreamedMatrix] = {}
        self._last: StreamedMatrix | None = None

    def reserve(self, memory: Memory) -> None:
        """Take the buffers from `memory`, before anything is read.

        Raises:
            BudgetError: the budget has no room for them.
        """
        array = memory.arenas[Tier.RAM].array(((BUFFERS + 1) * PIECE,), "uint8", Purpose.STAGING)
        whole = memory.host.ops.to_host(array)
        self._free = [whole[i * PIECE : (i + 1) * PIECE] for i in range(BUFFERS)]
        self._some = whole[BUFFERS * PIECE :]

    def matrix(self, weight: Weight) -> StreamedMatrix:
        """A matrix that stays on disk.

        Raises:
            UsageError, HardwareError: it is not mapped from a file, or that file is gone.
        """
        place = place_of(weight)
        if place.path not in self._readers:
            self._readers[place.path] = self._open(place.path)
        return StreamedMatrix(weight, place)

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""
        return sum((reader.stats for reader in self._readers.values()), ReadStats())

    def close(self) -> None:
        """Let go of the files."""
        self._forget()
        for reader in self._readers.values():
            reader.close()

    def rows(self, matrix: StreamedMatrix, numbers: npt.NDArray[np.int64], way: Way = SINGLE) -> Iterator[Bytes]:
        """The rows with these numbers, rising, as many at a time as a buffer holds; each overwritten by the next.

        Raises:
            HardwareError: they cannot be read.
        """
        stride, reader = matrix.place.stride, self._readers[matrix.place.path]
        room = len(self._some) // stride
        for start in range(0, len(numbers), room):
            some = numbers[start : start + room]
            pieces = triples(matrix.place.offset + some * stride, stride, np.arange(len(some)) * stride)
            reader.wait(reader.submit(*merged(pieces, way), self._some))
            yield self._some[: len(some) * stride].reshape(-1, stride)

    def pieces(self, matrix: StreamedMatrix) -> Iterator[tuple[int, Bytes]]:
        """First row and bytes of each piece, what follows being read meanwhile.

        Raises:
            HardwareError: a read failed; what was read ahead is forgotten.
        """
        if self._last is not None:
            self._after[id(self._last)] = matrix
        self._last = matrix
        step, stride = _step(matrix), matrix.place.stride
        try:
            for number, start in enumerate(range(0, matrix.rows, step)):
                if not self._ahead or self._ahead[0].matrix is not matrix or self._ahead[0].number != number:
                    self._forget()
                    self._read(matrix, number)
                self._fill()
                piece = self._ahead.popleft()
                try:
                    self._readers[matrix.place.path].wait(piece.ticket)
                    count = min(step, matrix.rows - start)
                    yield start, piece.buffer[: count * stride].reshape(count, stride)
                finally:
                    self._free.append(piece.buffer)
        except BaseException:
            self._forget()
            self._last = None
            raise

    def _fill(self) -> None:
        """Read on behind what is being read, as long as there are buffers and it is known what follows."""
        while self._free:
            tail = self._ahead[-1]
            if (tail.number + 1) * _step(tail.matrix) < tail.matrix.rows:
                self._read(tail.matrix, tail.number + 1)
                continue
            following = self._after.get(id(tail.matrix))
            if following is None:
                return
            self._read(following, 0)

    def _read(self, matrix: StreamedMatrix, number: int) -> None:
        step, stride = _step(matrix), matrix.place.stride
        start = number * step
        size = (min(start + step, matrix.rows) - start) * stride
        buffer = self._free.pop()
        try:
            reads = _from_end_to_end(matrix.place.offset + start * stride, size)
            ticket = self._readers[matrix.place.path].submit(*reads, buffer)
        except BaseException:
            self._free.append(buffer)
            raise
        self._ahead.append(_Ahead(matrix, number, ticket, buffer))

    def _forget(self) -> None:
        """Let what was read ahead go; nothing may still be written into a buffer that is used for something else."""
        while self._ahead:
            piece = self._ahead.popleft()
            with contextlib.suppress(HardwareError):  # whoever wants these bytes will see it
                self._readers[piece.matrix.place.path].wait(piece.ticket)
            self._free.append(piece.buffer)


def _step(matrix: StreamedMatrix) -> int:
    """Rows of a piece."""
    return PIECE // matrix.place.stride


def _from_end_to_end(offset: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Requests and parts for `Reader.submit` of bytes that lie together: as `merged` makes them, but sooner."""
    at = np.arange(0, size, LARGEST_READ)
    sizes = np.minimum(LARGEST_READ, size - at)
    return triples(offset + at, sizes, 1), triples(offset + at, sizes, at)
