"""The CPU's ops with one kind of matrix more: those of the trunk that are read anew for every pass (`pieces.py`).

The embedding's table gives the rows of the tokens that are asked for. A matrix of a linear map comes in pieces of rows.
Rows are independent of one another, so that results are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.reader import ReadStats, RecordReader
from thermocline.memory.arena import Memory
from thermocline.memory.pieces import PieceStream, StreamedMatrix
from thermocline.ops.contract import Array, Matrix
from thermocline.ops.cpu import CpuOps


class StreamingOps(CpuOps):
    """The CPU's ops, for matrices in memory and for streamed ones. One thread uses it at a time."""

    def __init__(
        self, threads: int, isa: str = "auto", open_reader: Callable[[Path], RecordReader] | None = None
    ) -> None:
        """See `CpuOps`; `open_reader` is there for tests."""
        super().__init__(threads, isa)
        self.pieces = PieceStream(open_reader)

    def reserve(self, memory: Memory) -> None:
        """Take the buffers from `memory`, before anything is streamed.

        Raises:
            BudgetError: the budget has no room for them.
        """
        self.pieces.reserve(memory)

    def stream(self, weight: Weight) -> StreamedMatrix:
        """A matrix that stays on disk.

        Raises:
            UsageError, HardwareError: it is not mapped from a file, or that file is gone.
        """
        return self.pieces.matrix(weight)

    @property
    def stats(self) -> ReadStats:
        """What was read so far."""
        return self.pieces.stats

    def close(self) -> None:
        """Let go of the files."""
        self.pieces.close()

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """See the contract."""
        if not isinstance(table, StreamedMatrix):
            super().embed(table, tokens, out)
            return
        wanted, inverse = np.unique(tokens, return_inverse=True)
        start = 0
        for data in self.pieces.rows(table, wanted.astype(np.int64)):
            mine = np.flatnonzero((inverse >= start) & (inverse < start + len(data)))
            found = np.empty((len(mine), out.shape[1]), np.float32)
            super().embed(self.place(rows_of(table.weight, data)), (inverse[mine] - start).astype(np.int32), found)
            out[mine] = found
            start += len(data)

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
            for start, data in self.pieces.pieces(matrix):
                part = slice(start, start + len(data))
                piece = self.place(rows_of(matrix.weight, data))
                into = out[:, part] if len(x) == 1 else np.ascontiguousarray(out[:, part])
                mine = None if bias is None else (bias[part],)
                super().linear(x, (piece,), (into,), mine, add=add)
                if len(x) > 1:
                    out[:, part] = into


def rows_of(weight: Weight, data: Bytes) -> Weight:
    """Some rows of a weight, whose bytes are `data` (n, row_bytes)."""
    return Weight(weight.name, weight.format, (len(data), weight.columns), data)
