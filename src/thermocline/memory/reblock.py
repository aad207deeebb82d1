"""Weights stored anew: in another format, or a down projection as neuron records; and what that did to them.

A standard file stores the down projection in rows of n_ff, in which one neuron is a column scattered over
the whole matrix. Transposed, a neuron is one row. That is exact for F32, F16 and BF16; block formats are quantised
anew along the other axis (K-quants as Q8_0), and the error is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.errors import NumericalError, printable
from thermocline.files.formats import Q8_0, BlockFormat
from thermocline.files.quantize import Floats, dequantize, quantize
from thermocline.files.weight import Bytes, Weight
from thermocline.ops.contract import Matrix

TILE = 256
"""Rows made at a time: of a 4096-wide model 4 MB in float32, which is near a core's cache."""
NATIVE_TILE = 16 * TILE
"""Rows made by one call of native ops, which tile by themselves."""


@dataclass(frozen=True, slots=True)
class Reblocked:
    """What storing one tensor anew did to it. Errors are absolute, in the weights' own units.

    `source` is the format before, `format` the one after; `rms` the root mean square of the weights themselves.
    """

    tensor: str
    format: str
    max_abs_error: float
    rms_error: float
    source: str = ""
    rms: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root mean square of the errors as a share of that of the weights; 0 where those are all zero."""
        return self.rms_error / self.rms if self.rms else 0.0


@runtime_checkable
class Transposer(Protocol):
    """An implementation of ops that transposes natively, into any format but K-quants."""

    def place(self, weight: Weight) -> Matrix:
        """A handle on the weight."""

    def transpose_requantize(self, matrix: Matrix, out: Bytes, fmt: BlockFormat) -> tuple[float, float, float]:
        """Write the transpose of `matrix` in `fmt` into `out`.

        Returns the largest absolute and the root mean square error, and the root mean square of the elements; the
        largest error is not finite if an element is not or does not fit.
        """


def transpose(
    source: Weight,
    out: Bytes,
    fmt: BlockFormat,
    places: npt.NDArray[np.integer] | None = None,
    *,
    threads: int = 1,
    ops: Transposer | None = None,
) -> Reblocked:
    """Write the transpose of `source` (rows, columns) as rows of `fmt` into `out` (columns, row_bytes), by tiles.

    Column i becomes row i, or row `places[i]`. `ops` do it several times faster, to the same bytes.

    Raises:
        NumericalError: the matrix holds NaN or infinity.
    """

    def piece(start: int) -> _Error:
        stop = min(start + TILE, source.columns)
        cut = slice(source.format.row_bytes(start), source.format.row_bytes(stop))
        rows = np.ascontiguousarray(dequantize(source.data[:, cut], source.format, stop - start).T)
        if not np.isfinite(rows).all():
            raise not_finite(source.name)
        stored = quantize(rows, fmt)
        out[slice(start, stop) if places is None else places[start:stop]] = stored
        return _Error.of(rows, dequantize(stored, fmt, source.rows))

    def native(start: int) -> _Error:
        assert ops is not None
        stop = min(start + NATIVE_TILE, source.columns)
        cut = slice(source.format.row_bytes(start), source.format.row_bytes(stop))
        part = np.ascontiguousarray(source.data[:, cut])
        rows = out[start:stop] if places is None else np.empty((stop - start, out.shape[1]), np.uint8)
        matrix = ops.place(Weight(source.name, source.format, (source.rows, stop - start), part))
        worst, rms, size = ops.transpose_requantize(matrix, rows, fmt)
        if not math.isfinite(worst):  # the tiles find out what is wrong
            return _Error.all(piece(at) for at in range(start, stop, TILE))
        if places is not None:
            out[places[start:stop]] = rows
        count = source.rows * (stop - start)
        return _Error(worst, count * rms**2, count * size**2)

    if ops is not None and fmt.block <= Q8_0.block:
        return _summed(source, fmt, _each(native, range(0, source.columns, NATIVE_TILE), 1))
    return _summed(source, fmt, _each(piece, range(0, source.columns, TILE), threads))


def store(source: Weight, out: Bytes, fmt: BlockFormat, *, threads: int = 1) -> Reblocked:
    """Write `source` in `fmt` into `out` (rows, row_bytes), by tiles.

    Raises:
        NumericalError: a number does not fit the format.
    """

    def piece(start: int) -> _Error:
        rows = source.slice(start, min(start + TILE, source.rows))
        exact = dequantize(rows.data, source.format, source.columns)
        out[start : start + len(exact)] = quantize(exact, fmt)
        return _Error.of(exact, dequantize(out[start : start + len(exact)], fmt, source.columns))

    return _summed(source, fmt, _each(piece, range(0, source.rows, TILE), threads))


def not_finite(tensor: str) -> NumericalError:
    """The error for a tensor that holds NaN or infinity."""
    return NumericalError(f"tensor {printable(tensor)} holds NaN or infinity; the file is damaged or badly converted")


@dataclass(frozen=True, slots=True)
class _Error:
    """Of some weights: the largest error, the sum of the squares of errors, and that of the weights."""

    worst: float
    squares: float
    weights: float

    @classmethod
    def of(cls, exact: Floats, stored: Floats) -> _Error:
        error = np.subtract(stored, exact)
        worst = max(float(error.max(initial=0)), -float(error.min(initial=0)))
        return cls(worst, _squares(error), _squares(exact))

    @classmethod
    def all(cls, errors: Iterable[_Error]) -> _Error:
        """Of several pieces together."""
        worst, squares, weights = zip(*((e.worst, e.squares, e.weights) for e in errors), strict=True)
        return cls(max(worst), sum(squares), sum(weights))


def _squares(x: Floats) -> float:
    """The sum of the squares of rows, each in float32, which is fast and good to a few parts in a million."""
    return float(np.einsum("ij,ij->i", x, x).sum(dtype=np.float64))


def _each(piece: Callable[[int], _Error], starts: Iterable[int], threads: int) -> list[_Error]:
    if threads < 2:
        return [piece(start) for start in starts]
    with ThreadPoolExecutor(threads) as team:
        return list(team.map(piece, starts))


def _summed(source: Weight, fmt: BlockFormat, errors: list[_Error]) -> Reblocked:
    count = max(source.rows * source.columns, 1)
    return Reblocked(
        source.name,
        fmt.name,
        max((e.worst for e in errors), default=0.0),
        math.sqrt(sum(e.squares for e in errors) / count),
        source.format.name,
        math.sqrt(sum(e.weights for e in errors) / count),
    )
