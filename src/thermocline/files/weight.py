"""A matrix as it lies on disk or in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import BlockFormat

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A named matrix in a block format, never copied to be used.

    `shape` is (rows, columns); a vector is one row. Rows lie one after another, each a whole number
    of blocks. `data` is a uint8 view of shape (rows, row_bytes) on mapped or resident bytes.
    """

    name: str
    format: BlockFormat
    shape: tuple[int, int]
    data: Bytes

    @property
    def rows(self) -> int:
        """Number of rows (outputs of a linear map, neurons of a record matrix)."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.rows * self.format.row_bytes(self.columns)

    def slice(self, start: int, stop: int) -> Weight:
        """Rows `start` to `stop` as a view on the same bytes."""
        return Weight(self.name, self.format, (stop - start, self.columns), self.data[start:stop])


class PickedWeight(Weight):
    """Rows of another weight in an order of their own, gathered anew whenever `data` is asked for.

    So a model can be described, and written tensor by tensor, without a copy of all its re-ordered matrices.
    """

    __slots__ = ("_rows", "_source")
    _rows: npt.NDArray[np.integer[Any]]
    _source: Weight

    def __init__(self, name: str, source: Weight, rows: npt.NDArray[np.integer[Any]]) -> None:
        for field, value in (("name", name), ("format", source.format), ("shape", (len(rows), source.columns))):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_rows", rows)

    @property
    def data(self) -> Bytes:
        """A new array (rows, row_bytes)."""
        gathered: Bytes = self._source.data[self._rows]
        return gathered

    def slice(self, start: int, stop: int) -> Weight:
        """Rows `start` to `stop`, still to be gathered."""
        return PickedWeight(self.name, self._source, self._rows[start:stop])
