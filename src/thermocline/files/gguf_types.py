"""The value types of GGUF metadata (source: the GGUF specification of ggml, version 3)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, Final

import numpy as np

MAGIC: Final = b"GGUF"
POWERINFER_MAGIC: Final = b"PWRI"
"""PowerInfer's sparse models and GPU indices; their vectors may be empty."""
MAGICS: Final = (MAGIC, POWERINFER_MAGIC)
"""First bytes of the files that share this layout and can be read."""
VERSION: Final = 3
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_NAME: Final = 63
"""Most bytes of a tensor's name: ggml stores 64 with the closing zero."""
MAX_KEY: Final = 65535
"""Most bytes of a key."""


class ValueType(IntEnum):
    """The number a file stores before each value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: Final[dict[ValueType, np.dtype[Any]]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
"""Numpy's name of every type of fixed size."""

PACKERS: Final[dict[ValueType, struct.Struct]] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
"""One value of every type of fixed size to and from bytes."""


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`, a power of two."""
    return (size + alignment - 1) & -alignment
