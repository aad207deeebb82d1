"""Down projections as neuron records: transposed, so that a neuron is one row.

A standard file stores the down projection in rows of n_ff, in which one neuron is a column scattered over
the whole matrix. Transposing is exact for F32, F16 and BF16; block formats are quantised anew along the other
axis (K-quants as Q8_0), and the error is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from thermocline.errors import NumericalError, printable
from thermocline.files.formats import BlockFormat
from thermocline.files.quantize import dequantize, quantize
from thermocline.files.weight import Bytes, Weight
from thermocline.ops.contract import Matrix

TILE = 256
"""Rows made at a time: of a 4096-wide model 4 MB in float32, which is near a core's cache."""


@dataclass(frozen=True, slots=True)
class Reblocked:
    """What transposing one tensor did to it. Errors are absolute, in the weights' own units."""

    tensor: str
    format: str
    max_abs_error: float
    rms_error: float


@runtime_checkable
class Transposer(Protocol):
    """An implementation of ops that transposes natively."""

    def transpose_requantize(self, matrix: Matrix, out: Bytes, fmt: BlockFormat) -> tuple[float, float]:
        """Write the transpose of `matrix` in `fmt` into `out`; largest absolute and root mean square error."""


def transpose(source: Weight, out: Bytes, fmt: BlockFormat) -> Reblocked:
    """Write the transpose of `source` (rows, columns) as rows of `fmt` into `out` (columns, row_bytes), by tiles.

    Raises:
        NumericalError: the matrix holds NaN or infinity.
    """
    worst, squares = 0.0, 0.0
    for start in range(0, source.columns, TILE):
        stop = min(start + TILE, source.columns)
        cut = slice(source.format.row_bytes(start), source.format.row_bytes(stop))
        rows = np.ascontiguousarray(dequantize(source.data[:, cut], source.format, stop - start).T)
        if not np.isfinite(rows).all():
            raise not_finite(source.name)
        out[start:stop] = quantize(rows, fmt)
        error = dequantize(out[start:stop], fmt, source.rows).astype(np.float64) - rows
        worst, squares = max(worst, float(np.abs(error).max())), squares + float((error**2).sum())
    return Reblocked(source.name, fmt.name, worst, math.sqrt(squares / (source.rows * source.columns)))


def not_finite(tensor: str) -> NumericalError:
    """The error for a tensor that holds NaN or infinity."""
    return NumericalError(f"tensor {printable(tensor)} holds NaN or infinity; the file is damaged or badly converted")
