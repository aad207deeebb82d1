"""Mode exact below RAM: a neuron's first row, its gate or else up, tells whether the rest of its record is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.files.weight import Bytes, Weight
from thermocline.memory.reads import Way
from thermocline.ops.contract import Array, FfnKind
from thermocline.ops.device import Device

Longs = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]


class Scanner(Protocol):
    """What reads rows of the file; see `memory.pieces.PieceStream`."""

    def matrix(self, weight: Weight) -> Any:
        """A matrix that can be read."""

    def pieces(self, matrix: Any) -> Iterator[tuple[int, Bytes]]:
        """First row and bytes of each piece, from end to end."""

    def rows(self, matrix: Any, numbers: Longs, way: Way) -> Iterator[Bytes]:
        """The rows with these numbers, rising, some at a time."""


class FirstRows:
    """A layer's first rows on disk. `weight` has them by the file's numbers; the products are those that the kernels of
    the FFN make, bit for bit.
    """

    def __init__(self, scanner: Scanner, weight: Weight, kind: FfnKind, device: Device, way: Way) -> None:
        self._scanner, self._weight, self._device, self._way = scanner, weight, device, way
        self._matrix = scanner.matrix(weight)
        self._threshold = np.float32(kind.threshold)
        self._share = 0.25  # of the rows that let something through, as it was the last time

    def pay(self, record: int) -> bool:
        """Whether the rows have fewer bytes than the records, of `record` bytes, that they would leave unread."""
        return bool((1 - self._share) * record > self._weight.data.shape[1])

    def let_through(self, x: Array, numbers: Longs, bias: npt.NDArray[np.float32] | None) -> tuple[Places, Bytes]:
        """The neurons that let any token of `x` through: their places in `numbers` (any order), rising, and their rows.

        `bias` (n) is added before. NaN is let through: whoever computes with it shall see it.

        Raises:
            HardwareError: the rows could not be read.
        """
        order, ops, like = np.argsort(numbers), self._device.ops, self._weight
        places, rows = [np.empty(0, np.intp)], [np.empty((0, like.data.shape[1]), np.uint8)]
        for some, data in self._read(numbers[order]):
            out, mine = ops.array((len(x), len(data))), order[some]
            ops.linear(x, (ops.place(Weight(like.name, like.format, (len(data), like.columns), data)),), (out,))
            products = ops.to_host(out)
            if bias is not None:
                products = np.add(products, bias[mine])
            found = np.flatnonzero((~(products <= self._threshold)).any(axis=0))
            places.append(mine[found])
            rows.append(data[found])
        found, taken = np.concatenate(places), np.concatenate(rows)
        self._share = len(found) / max(1, len(numbers))
        rising = np.argsort(found)
        return found[rising], taken[rising]

    def _read(self, numbers: Longs) -> Iterator[tuple[slice, Bytes]]:
        """The rows with these numbers, which rise, by pieces; or all rows, from end to end, where that is sooner."""
        start = 0
        if self._way.alone(numbers, self._weight.rows, self._weight.data.shape[1]):
            for data in self._scanner.rows(self._matrix, numbers, self._way):
                yield slice(start, start + len(data)), data
                start += len(data)
            return
        for row, data in self._scanner.pieces(self._matrix):
            begin, end = np.searchsorted(numbers, (row, row + len(data)))
            if end > begin:
                yield slice(begin, end), data[numbers[begin:end] - row]
