"""The tensors of a model file: all of them listed, and those that can be computed with as weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from thermocline.errors import UnsupportedModelError, printable
from thermocline.files.formats import BlockFormat, require_readable
from thermocline.files.weight import Bytes, Weight


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named array as a file holds it, of any format and rank.

    `shape` has the slowest axis first, as numpy counts: (rows, columns). `data` is a flat uint8 view.
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    data: Bytes

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def weight(self) -> Weight:
        """The tensor as a matrix on the same bytes; a vector is one row, leading axes of 1 are dropped.

        Raises:
            UnsupportedModelError: the format is not readable, the tensor is empty or has more than 2 axes.
        """
        name = printable(self.name, 80)
        require_readable(self.format, name)
        shape = self.shape
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]
        if len(shape) > 2 or 0 in shape:
            raise UnsupportedModelError(
                f"tensor {name} has shape {list(self.shape)}; readable are vectors and matrices"
            )
        rows = shape[0] if len(shape) == 2 else 1
        columns = shape[-1] if shape else 1
        return Weight(self.name, self.format, (rows, columns), self.data.reshape(rows, -1))


class Weights(Mapping[str, Weight]):
    """Tensors by name as weights, made on access.

    A tensor that is listed but cannot be computed with raises UnsupportedModelError when it is asked for, so
    that a file of unknown formats can still be shown.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Weight:
        return self._tensors[name].weight()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
