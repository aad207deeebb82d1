"""The header of one GGUF file: key-values and tensor table, read and checked without touching the data.

Source of the layout: the GGUF specification of ggml, version 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

from thermocline.errors import ModelFormatError, printable
from thermocline.files.cursor import Cursor
from thermocline.files.formats import GGML_TYPES, BlockFormat
from thermocline.files.gguf_types import (
    DEFAULT_ALIGNMENT,
    MAGICS,
    MAX_DIMENSIONS,
    MAX_KEY,
    MAX_NAME,
    POWERINFER_MAGIC,
    VERSION,
    ValueType,
    padded,
)
from thermocline.files.mapped import MappedFile
from thermocline.files.metadata import MetadataValue
from thermocline.files.signature import looks_like
from thermocline.files.tensors import Tensor

MAX_COUNT: Final = 1 << 16
"""Most keys and most tensors of a file."""
_SMALLEST_ENTRY: Final = 8 + 1 + 4 + 1
_SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8
_ALIGNMENTS: Final = tuple(1 << n for n in range(3, 21))


@dataclass(frozen=True, slots=True)
class Header:
    """What one GGUF file holds.

    `magic` is its first four bytes, `size` where the tensor table ends, `end` where the last tensor does, padding
    included. `types` gives the stored type of every key, and for arrays that of their elements.
    """

    magic: bytes
    values: Mapping[str, MetadataValue]
    types: Mapping[str, tuple[ValueType, ValueType | None]]
    tensors: Mapping[str, Tensor]
    alignment: int
    size: int
    end: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the tensor table; `at` is the byte where it begins."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int
    at: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def read_header(file: MappedFile) -> Header:
    """Parse and check the whole header.

    Raises:
        ModelFormatError: any rule of the format is broken, or the tensors do not fill the file as they say.
    """
    cursor = Cursor(file)
    magic = _magic(cursor)
    n_tensors, n_values = _counts(cursor)
    values: dict[str, MetadataValue] = {}
    types: dict[str, tuple[ValueType, ValueType | None]] = {}
    for _ in range(n_values):
        at = cursor.position
        key = cursor.text("key", MAX_KEY)
        if not key or key in values:
            problem = "is given twice" if key else "is empty"
            raise cursor.wrong(f'key "{printable(key, 80)}"', problem, offset=at)
        kind, element, values[key] = cursor.value(key)
        types[key] = (kind, element)
    alignment = _alignment(file, values, types)
    entries = _entries(cursor, n_tensors, empty=magic == POWERINFER_MAGIC)
    start = padded(cursor.position, alignment)
    end = _check_layout(file, entries, start, alignment)
    tensors = {
        e.name: Tensor(e.name, e.format, e.shape, file.view(start + e.offset, start + e.offset + e.nbytes))
        for e in entries
    }
    return Header(magic, values, types, tensors, alignment, cursor.position, end)


def _magic(cursor: Cursor) -> bytes:
    magic = bytes(cursor.file.buffer[:4])
    if magic not in MAGICS:
        raise ModelFormatError(cursor.file.path, "magic", f"is not a GGUF file; {looks_like(cursor.file)}", offset=0)
    cursor.position = 4
    return magic


def _counts(cursor: Cursor) -> tuple[int, int]:
    version = cursor.u32("version")
    if version != VERSION:
        hint = " (a big-endian file?)" if version & 0xFFFF == 0 and version else ""
        raise cursor.wrong("version", f"found {version}{hint}; allowed: {VERSION}", offset=4)
    counts = []
    for field, smallest in (("tensor count", _SMALLEST_TENSOR), ("key count", _SMALLEST_ENTRY)):
        at = cursor.position
        count = cursor.u64(field)
        if count > MAX_COUNT:
            raise cursor.wrong(field, f"found {count}; allowed: at most {MAX_COUNT}", offset=at)
        cursor.need(count * smallest, f"{field} {count}")
        counts.append(count)
    return counts[0], counts[1]


def _alignment(
    file: MappedFile,
    values: Mapping[str, MetadataValue],
    types: Mapping[str, tuple[ValueType, ValueType | None]],
) -> int:
    key = "general.alignment"
    if key not in values:
        return DEFAULT_ALIGNMENT
    value = values[key]
    if types[key][0] is not ValueType.UINT32:
        raise ModelFormatError(file.path, key, f"found type {types[key][0].name}; allowed: UINT32")
    if not isinstance(value, int) or value not in _ALIGNMENTS:
        raise ModelFormatError(
            file.path, key, f"found {value}; allowed: powers of two in {_ALIGNMENTS[0]} to {_ALIGNMENTS[-1]}"
        )
    return value


def _entries(cursor: Cursor, count: int, *, empty: bool) -> list[_Entry]:
    """The tensor table; `empty` allows vectors without elements."""
    entries = []
    names = set()
    for _ in range(count):
        entry = _entry(cursor, empty=empty)
        if entry.name in names:
            raise cursor.wrong(_label(entry.name), "is given twice", offset=entry.at)
        names.add(entry.name)
        entries.append(entry)
    return entries


def _entry(cursor: Cursor, *, empty: bool) -> _Entry:
    at = cursor.position
    name = cursor.text("tensor name", MAX_NAME)
    label = _label(name)
    if not name or not name.isprintable():
        raise cursor.wrong(label, "is empty" if not name else "has unprintable characters in its name", offset=at)
    n_dims = cursor.u32(f"dimension count of {label}")
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise cursor.wrong(label, f"found {n_dims} dimensions; allowed: 1 to {MAX_DIMENSIONS}", offset=at)
    shape = tuple(cursor.u64(f"shape of {label}") for _ in range(n_dims))[::-1]
    if (0 in shape and not (empty and n_dims == 1)) or prod(shape) >= 1 << 63:
        listed = list(shape)
        raise cursor.wrong(label, f"found shape {listed}; allowed: 1 to 2^63-1 elements, no axis of 0", offset=at)
    number = cursor.u32(f"type of {label}")
    if number not in GGML_TYPES:
        raise cursor.wrong(label, f"found tensor type {number}, which ggml does not have", offset=at)
    fmt = GGML_TYPES[number]
    if shape[-1] % fmt.block:
        problem = f"rows of {shape[-1]} elements; {fmt.name} needs a multiple of {fmt.block}"
        raise cursor.wrong(label, problem, offset=at)
    return _Entry(name, fmt, shape, cursor.u64(f"offset of {label}"), at)


def _check_layout(file: MappedFile, entries: list[_Entry], start: int, alignment: int) -> int:
    """Hold every offset to the running sum of padded sizes, and the sum to the file; returns the data's end.

    A sum of Python integers cannot wrap, and equality leaves no room for holes, overlaps or stray offsets.
    """
    expected, end = 0, 0
    for entry in entries:
        if entry.offset != expected:
            problem = f"found data offset {entry.offset}; allowed: {expected}, after the tensors before it"
            raise ModelFormatError(file.path, _label(entry.name), problem, offset=entry.at)
        end = expected + entry.nbytes
        expected = padded(end, alignment)
    if start + end > file.size and entries:
        problem = f"incomplete download? have {file.size} bytes, need {start + end}"
        raise ModelFormatError(file.path, "tensor data", problem, offset=file.size)
    return start + expected


def _label(name: str) -> str:
    return f'tensor "{printable(name, 80)}"'
