"""The header of one safetensors file, read and checked without touching the data.

Source of the layout and its rules: the README of the safetensors project, section "Format".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from thermocline.errors import ModelFormatError, printable
from thermocline.files.formats import BF16, F16, F32, BlockFormat
from thermocline.files.mapped import MappedFile
from thermocline.files.signature import looks_like
from thermocline.files.strict_json import parse_object
from thermocline.files.tensors import Tensor

MAX_HEADER: Final = 100_000_000
"""Most bytes of the header, by the format's own rule."""
MAX_TENSORS: Final = 1 << 16
_PREFIX: Final = 8
_MAX_AXES: Final = 8

_WIDTHS: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4,
    "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_FORMATS: Final[dict[str, BlockFormat]] = {f.name: f for f in (F32, F16, BF16)} | {
    name: BlockFormat(name, -1, 1, width) for name, width in _WIDTHS.items()
}


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What one safetensors file holds; `size` is where its data begins, `notes` are its `__metadata__`."""

    tensors: Mapping[str, Tensor]
    size: int
    notes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors_header(file: MappedFile) -> SafetensorsHeader:
    """Parse and check the header: tensors must fill the file without holes, overlaps or bytes left over.

    Raises:
        ModelFormatError: any rule of the format is broken.
    """
    length = int.from_bytes(file.buffer[:_PREFIX], "little")
    allowed = min(MAX_HEADER, file.size - _PREFIX)
    if not 2 <= length <= allowed or file.buffer[_PREFIX : _PREFIX + 1] != b"{":
        found = f"found {length}; allowed: 2 to {allowed} and then an object"
        raise ModelFormatError(file.path, "header length", f"{found}; {looks_like(file)}", offset=0)
    start = _PREFIX + length
    listed = parse_object(file.buffer[_PREFIX:start], file.path, "header")
    notes = _notes(file, listed.pop("__metadata__", {}))
    if len(listed) > MAX_TENSORS:
        raise ModelFormatError(file.path, "header", f"found {len(listed)} tensors; allowed: at most {MAX_TENSORS}")
    entries = [_entry(file, name, fields) for name, fields in listed.items()]
    _check_layout(file, sorted(entries, key=lambda e: (e.start, e.stop)), start)
    tensors = {e.name: Tensor(e.name, e.format, e.shape, file.view(start + e.start, start + e.stop)) for e in entries}
    return SafetensorsHeader(tensors, start, notes)


def _notes(file: MappedFile, notes: Any) -> dict[str, str]:
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ModelFormatError(file.path, "__metadata__", "is not an object of strings")
    return notes


def _entry(file: MappedFile, name: str, fields: Any) -> _Entry:
    label = f'tensor "{printable(name, 80)}"'
    if not name or not name.isprintable():
        raise ModelFormatError(file.path, label, "has an empty or unprintable name")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFormatError(file.path, label, "needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _FORMATS:
        shown = printable(str(dtype), 40) if isinstance(dtype, str) else type(dtype).__name__
        raise ModelFormatError(file.path, label, f"found dtype {shown}; known are {', '.join(_FORMATS)}")
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise ModelFormatError(file.path, label, f"its shape is not a list of at most {_MAX_AXES} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelFormatError(file.path, label, "its data_offsets are not [begin, end] with begin <= end")
    needed = prod(shape) * _FORMATS[dtype].block_bytes
    if offsets[1] - offsets[0] != needed:
        found = f"{offsets[1] - offsets[0]} bytes of data; {dtype} {shape} takes {needed}"
        raise ModelFormatError(file.path, label, f"found {found}")
    return _Entry(name, _FORMATS[dtype], tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    """Whether it is a list of integers in 0 to 2^63-1, none of them a bool."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(file: MappedFile, entries: list[_Entry], start: int) -> None:
    expected = 0
    for entry in entries:
        if entry.start != expected:
            what = "overlaps the tensor before it" if entry.start < expected else "leaves a hole before it"
            label = f'tensor "{printable(entry.name, 80)}"'
            raise ModelFormatError(file.path, label, f"begins at {entry.start} and {what}, which ends at {expected}")
        expected = entry.stop
    if start + expected > file.size:
        problem = f"incomplete download? have {file.size} bytes, need {start + expected}"
        raise ModelFormatError(file.path, "tensor data", problem, offset=file.size)
    if start + expected < file.size:
        problem = f"{file.size - start - expected} bytes follow the last tensor; allowed: 0"
        raise ModelFormatError(file.path, "size", problem, offset=start + expected)
