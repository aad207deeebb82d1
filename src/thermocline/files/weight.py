"""A matrix as it lies on disk or in memory."""

from __future__ import annotations

from dataclasses import dataclass

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
