"""Matrices of the trunk that memory has no room for: read anew for every pass, in pieces, while the last is computed.

`StreamingOps` are the CPU's ops with one kind of matrix more. The embedding's table gives the rows of the tokens
that are asked for. A matrix of a linear map comes in pieces of rows through two buffers. Rows are independent of one
another, so that results are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.machine import Tier
from thermocline.hardware.reader import Reader, ReadStats, RecordReader
from thermocline.memory.arena import Memory
from thermocline.memory.disk_store import LARGEST_READ, Place, Way, merged, place_of
from thermocline.ops.contract import Array, Matrix
from thermocline.ops.cpu import CpuOps
from thermocline.placement.ledger import Purpose

PIECE = 4 << 20
"""Bytes of one of the two buffers: long enough to read at the disk's full rate."""
IN_FLIGHT = 8
BUFFERS = 2
STREAMING_BYTES = BUFFERS * PIECE + IN_FLIGHT * LARGEST_READ
"""Bytes that streaming takes, whatever is streamed."""


@dataclass(frozen=True, slots=True)
class StreamedMatrix:
    """A weight that stays in its file."""

    weight: Weight
    place: Place

    @property
    def rows(self) -> int:
        """Outputs of the linear map."""
        return self.weight.rows


class StreamingOps(CpuOps):
    """The CPU's ops, for matrices in memory and for streamed ones. One thread uses it at a time."""

    def __init__(
        self, threads: int, isa: str = "auto", open_reader: Callable[[Path], RecordReader] | None = None
    ) -> None:
        """See `CpuOps`; `open_reader` is there for tests."""
        super().__init__(threads, isa)
        self._halves: tuple[Bytes, ...] = ()
        self._open = open_reader or (lambda path: Reader(path, depth=IN_FLIGHT, largest=LARGEST_READ))
        self._readers: dict[Path, RecordReader] = {}

    def reserve(self, memory: Memory) -> None:
        """Take the buffers from `memory`, before anything is streamed.

        Raises:
            BudgetError: the budget has no room for them.
        """
        buffer = self.to_host(memory.arenas[Tier.RAM].array((BUFFERS * PIECE,), "uint8", Purpose.STAGING))
        self._halves = tuple(buffer[i * PIECE : (i + 1) * PIECE] for i in range(BUFFERS))

    def stream(self, weight: Weight) -> StreamedMatrix:
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
        each = [reader.stats for reader in self._readers.values()]
        return ReadStats(sum(s.requests for s in each), sum(s.nbytes for s in each), sum(s.busy for s in each))

    def close(self) -> None:
        """Let go of the files."""
        for reader in self._readers.values():
            reader.close()

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """See the contract."""
        if not isinstance(table, StreamedMatrix):
            super().embed(table, tokens, out)
            return
        row = table.place.stride
        room = PIECE // row
        for start in range(0, len(tokens), room):
            wanted, inverse = np.unique(tokens[start : start + room], return_inverse=True)
            buffer = self._halves[0][: len(wanted) * row]
            offsets, sizes = table.place.offset + wanted.astype(np.int64) * row, np.full(len(wanted), row)
            pieces = np.stack([offsets, sizes, np.arange(len(wanted)) * row], axis=1)
            reader = self._readers[table.place.path]
            reader.wait(reader.submit(*merged(pieces, Way(0, LARGEST_READ)), buffer))
            rows = self.place(_rows(table.weight, buffer.reshape(-1, row)))
            super().embed(rows, inverse.astype(np.int32), out[start : start + room])

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """See the contract."""
        if not any(isinstance(matrix, StreamedMatrix) for matrix in matrices):
            super().linear(x, matrices, outs, biases, add=add)
            return
        for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
            bias = None if biases is None else biases[i]
            if not isinstance(matrix, StreamedMatrix):
                super().linear(x, (matrix,), (out,), None if bias is None else (bias,), add=add)
                continue
            for start, data in self._pieces(matrix):
                part = slice(start, start + len(data))
                piece = self.place(_rows(matrix.weight, data))
                into = out[:, part] if len(x) == 1 else np.ascontiguousarray(out[:, part])
                mine = None if bias is None else (bias[part],)
                super().linear(x, (piece,), (into,), mine, add=add)
                if len(x) > 1:
                    out[:, part] = into

    def _pieces(self, matrix: StreamedMatrix) -> Iterator[tuple[int, Bytes]]:
        """First row and bytes of each piece, the next one being read meanwhile."""
        row, reader = matrix.place.stride, self._readers[matrix.place.path]
        step = PIECE // row
        starts = range(0, matrix.rows, step)
        tickets: list[int] = []

        def submit(number: int) -> None:
            start = starts[number]
            size = (min(start + step, matrix.rows) - start) * row
            whole = np.array([[matrix.place.offset + start * row, size, 0]], np.int64)
            requests, parts = merged(whole, Way(0, LARGEST_READ))
            tickets.append(reader.submit(requests, parts, self._halves[number % BUFFERS]))

        try:
            submit(0)
            for number, start in enumerate(starts):
                if number + 1 < len(starts):
                    submit(number + 1)
                reader.wait(tickets.pop(0))
                count = min(step, matrix.rows - start)
                yield start, self._halves[number % BUFFERS][: count * row].reshape(count, row)
        finally:
            for ticket in tickets:
                reader.wait(ticket)


def _rows(weight: Weight, data: Bytes) -> Weight:
    return Weight(weight.name, weight.format, (len(data), weight.columns), data)
