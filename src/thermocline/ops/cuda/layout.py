"""Matrices as the kernels want them, on the very bytes that a file's blocks take.

A block of Q8_0 or Q4_0 holds its scale beside its numbers: 34 or 18 bytes, which no vector load fits. So in every row
the numbers of all blocks come first and their scales after them. Rows keep their length, floats and K-quants stay as
they are. A KV cache in Q8_0 has the numbers of all rows first: rows of 34 bytes for every 32 elements would end where
no vector load begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import gcd
from typing import Any, Final

import torch

from thermocline.files.formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat

Tensor = torch.Tensor

CHUNK: Final = 16 << 20
"""Bytes of a matrix that are rearranged at a time."""


class Kind(IntEnum):
    """How elements lie in a row (see `kernels.rows`)."""

    FLOAT = 0
    Q8_0 = 1
    Q4_0 = 2
    Q4_K = 3
    Q5_K = 4
    Q6_K = 5
    BF16 = 6


KINDS: Final[dict[BlockFormat, tuple[Kind, torch.dtype]]] = {
    F32: (Kind.FLOAT, torch.float32),
    F16: (Kind.FLOAT, torch.float16),
    BF16: (Kind.BF16, torch.int16),
    Q8_0: (Kind.Q8_0, torch.int8),
    Q4_0: (Kind.Q4_0, torch.uint8),
    Q4_K: (Kind.Q4_K, torch.uint8),
    Q5_K: (Kind.Q5_K, torch.uint8),
    Q6_K: (Kind.Q6_K, torch.uint8),
}


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMatrix:
    """A placed matrix: `numbers` (rows, elements of a row's bytes), and the scales of the same rows, if apart."""

    format: BlockFormat
    rows: int
    columns: int
    numbers: Tensor
    scales: Tensor | None

    @property
    def kind(self) -> Kind:
        """How its elements lie."""
        return KINDS[self.format][0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, which are the file's."""
        return self.rows * self.format.row_bytes(self.columns)

    def arguments(self, name: str) -> dict[str, Any]:
        """The matrix as arguments of a kernel that calls it `name`.

        The length of a row is given in units of as many bytes as every row begins at a multiple of, up to a vector
        load's 16: of a length Triton only knows whether 16 divides it, and would load the others byte by byte.
        """
        width = self.format.row_bytes(self.columns)
        align = gcd(width, 16)
        return {
            name: self.numbers,
            f"{name}_length": width // align,
            f"{name}_scales": self.scales,
            f"{name.upper()}_KIND": int(self.kind),
            f"{name.upper()}_ALIGN": align,
        }


def arranged(raw: Tensor, fmt: BlockFormat, columns: int) -> DeviceMatrix:
    """The matrix in `raw` (rows, row_bytes), uint8 as in a file, whose rows are rearranged where they lie."""
    dtype = KINDS[fmt][1]
    rows, width = raw.shape
    if _is_split(fmt) and raw.device.type != "meta":
        step = max(1, CHUNK // max(width, 1))
        for start in range(0, rows, step):
            part = raw[start : start + step]
            part.copy_(rows_apart(part, fmt))
    scales = None
    if _is_split(fmt):
        scales = _viewed(raw, torch.float16)[:, columns // fmt.block * (fmt.block_bytes - 2) // 2 :]
    return DeviceMatrix(fmt, rows, columns, _viewed(raw, dtype), scales)


def rows_apart(rows: Tensor, fmt: BlockFormat) -> Tensor:
    """Rows of a file (n, row_bytes) as they are arranged."""
    if not _is_split(fmt):
        return rows
    blocks = rows.view(len(rows), -1, fmt.block_bytes)
    return torch.cat([blocks[..., 2:].flatten(1), blocks[..., :2].flatten(1)], 1)


def rows_of_file(rows: Tensor, fmt: BlockFormat) -> Tensor:
    """Arranged rows (n, row_bytes) as a file has them."""
    if not _is_split(fmt):
        return rows
    blocks = rows.shape[1] // fmt.block_bytes
    numbers, scales = (part.reshape(len(rows), blocks, -1) for part in rows.tensor_split([-2 * blocks], 1))
    return torch.cat([scales, numbers], 2).flatten(1)


def cached(array: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Keys or values (heads, context, `dim`) of a cache as its rows lie, and the scales of their blocks, if apart.

    An array of uint8 is whole, not cut from another: it begins with all numbers and ends with all scales, of which each
    row has one for every block.
    """
    if array.dtype is not torch.uint8:
        return array, None
    heads, context, _ = array.shape
    flat, size = array.view(-1), heads * context * dim
    scales = flat[size:].view(torch.float16).view(heads, context, dim // Q8_0.block)
    return flat[:size].view(torch.int8).view(heads, context, dim), scales


def _is_split(fmt: BlockFormat) -> bool:
    return KINDS[fmt][0] in (Kind.Q8_0, Kind.Q4_0)


def _viewed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (rows, row_bytes) as elements (rows, elements of a row)."""
    rows, width = raw.shape
    return raw.view(-1).view(dtype).view(rows, width // dtype.itemsize)
