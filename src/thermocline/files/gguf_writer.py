"""Writing GGUF v3 files, tensor by tensor, so that they appear whole or not at all.

Source of the layout: the GGUF specification of ggml, version 3.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from thermocline.errors import OutputError, printable
from thermocline.files.atomic import AtomicFile, atomic_write
from thermocline.files.formats import GGML_TYPES, BlockFormat
from thermocline.files.gguf_types import (
    DEFAULT_ALIGNMENT,
    DTYPES,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_KEY,
    MAX_NAME,
    PACKERS,
    POWERINFER_MAGIC,
    VERSION,
    ValueType,
    padded,
)
from thermocline.files.resumable import Resume, resumable_write, was_put_in_place
from thermocline.files.strings import StringArray
from thermocline.files.weight import Bytes, Weight

_U32 = PACKERS[ValueType.UINT32]
_U64 = PACKERS[ValueType.UINT64]
_ALIGNMENT_KEY: Final = "general.alignment"
_BY_DTYPE: Final = {dtype.newbyteorder("="): kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written, whose bytes are made when their turn comes.

    `shape` has the slowest axis first: (rows, columns), or (n,). `produce` returns uint8 of any shape with
    as many bytes as `shape` and `format` make; it is called once and its result is dropped after writing.
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    produce: Callable[[], Bytes]

    @property
    def nbytes(self) -> int:
        """Stored bytes, without padding."""
        return prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Iterable[NewTensor | Weight],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    powerinfer: bool = False,
    resume: Resume | None = None,
) -> int:
    """Write a GGUF file and return its size in bytes.

    `powerinfer` gives it the magic of PowerInfer's sparse models, in which vectors may be empty. With `resume`, a
    second call goes on where one that was killed stopped; its identity has to tell where the tensors' bytes come from.

    Metadata values are str, bool, numpy scalars (which give the stored type), Python ints (UINT32, or INT32,
    UINT64, INT64 where they need it), Python floats (FLOAT32), and as arrays: 1-D numpy arrays, StringArray, or
    non-empty lists and tuples of one of the kinds before (ints in them: INT32, or INT64 where they need it).
    `GgufFile.typed_metadata` gives those of a file.
    A matrix of one row is stored as a vector, as ggml does. At most one tensor is in memory at a time.

    Raises:
        OutputError: the file could not be written (the old one, if any, is untouched), or a name, a
            value or a tensor's bytes are not what the format takes.
        UsageError: with `resume`, another run writes this file, or the unfinished one is not the same.
    """
    path = Path(path)
    planned = [_planned(tensor, empty=powerinfer) for tensor in tensors]
    if alignment & (alignment - 1) or not 8 <= alignment <= 1 << 20:
        raise OutputError(f"alignment is {alignment}; allowed: powers of two in 8 to 1048576")
    values = {key: value for key, value in metadata.items() if key != _ALIGNMENT_KEY}
    if alignment != DEFAULT_ALIGNMENT or _ALIGNMENT_KEY in metadata:
        values[_ALIGNMENT_KEY] = np.uint32(alignment)
    header = _header(POWERINFER_MAGIC if powerinfer else MAGIC, values, planned, alignment)
    size = padded(len(header), alignment) + sum(padded(t.nbytes, alignment) for t in planned)
    if resume is None:
        with atomic_write(path, size=size) as file:
            _write_padded(file, header, alignment)
            for tensor in planned:
                _write_padded(file, _produced(tensor), alignment)
        return size
    resume = replace(resume, identity={**resume.identity, "header": hashlib.sha256(header).hexdigest()})
    if was_put_in_place(path, header, size, resume):
        return size
    with resumable_write(path, size, resume) as parts:
        if not parts.parts:
            _write_padded(parts, header, alignment)
            parts.part()
        for tensor in planned[parts.parts - 1 :]:
            _write_padded(parts, _produced(tensor), alignment)
            parts.part()
    return size


def _planned(tensor: NewTensor | Weight, *, empty: bool) -> NewTensor:
    if isinstance(tensor, Weight):
        weight = tensor
        tensor = NewTensor(weight.name, weight.format, weight.shape, lambda: weight.data)
    shape = tensor.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    label = f'tensor "{printable(tensor.name, 80)}"'
    if not tensor.name.isprintable() or not 1 <= len(tensor.name.encode()) <= MAX_NAME:
        raise OutputError(f"{label}: names take 1 to {MAX_NAME} bytes, all printable")
    if GGML_TYPES.get(tensor.format.ggml_type) is not tensor.format:
        raise OutputError(f"{label}: GGUF cannot store {tensor.format.name}")
    smallest = 0 if empty and len(shape) == 1 else 1
    if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < smallest or shape[-1] % tensor.format.block:
        raise OutputError(
            f"{label}: shape {list(shape)}; allowed: 1 to {MAX_DIMENSIONS} axes, none empty, "
            f"the last a multiple of {tensor.format.block}"
        )
    return NewTensor(tensor.name, tensor.format, shape, tensor.produce)


def _produced(tensor: NewTensor) -> Bytes:
    data = np.ascontiguousarray(tensor.produce())
    if data.dtype != np.uint8 or data.nbytes != tensor.nbytes:
        raise OutputError(
            f'tensor "{printable(tensor.name, 80)}": {data.nbytes} bytes of {data.dtype} were made; '
            f"{list(tensor.shape)} {tensor.format.name} takes {tensor.nbytes} of uint8"
        )
    return data.reshape(-1)


def _write_padded(file: AtomicFile, content: bytes | Bytes, alignment: int) -> None:
    file.write(content)
    file.write(bytes(padded(len(content), alignment) - len(content)))


def _header(magic: bytes, metadata: Mapping[str, Any], tensors: Sequence[NewTensor], alignment: int) -> bytes:
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        repeated = next(name for i, name in enumerate(names) if name in names[:i])
        raise OutputError(f'tensor "{repeated}" is given twice')
    chunks = [magic, _U32.pack(VERSION), _U64.pack(len(tensors)), _U64.pack(len(metadata))]
    for key, value in metadata.items():
        name = _string(key)
        if not 1 <= len(name) - _U64.size <= MAX_KEY:
            raise OutputError(f'key "{printable(key, 80)}": keys take 1 to {MAX_KEY} bytes')
        chunks += [name, _value(key, value)]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        chunks += [_string(tensor.name), _U32.pack(len(axes)), struct.pack(f"<{len(axes)}Q", *axes)]
        chunks += [_U32.pack(tensor.format.ggml_type), _U64.pack(offset)]
        offset = padded(offset + tensor.nbytes, alignment)
    return b"".join(chunks)


def _string(text: str | bytes) -> bytes:
    try:
        raw = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise OutputError(f'"{printable(str(text), 80)}" is not text that UTF-8 can store') from error
    return _U64.pack(len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """The number of the value's type, then the value."""
    if isinstance(value, StringArray | list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        element, content = _elements(key, value)
        return _U32.pack(ValueType.ARRAY) + _U32.pack(element) + _U64.pack(len(value)) + content
    if isinstance(value, str):
        return _U32.pack(ValueType.STRING) + _string(value)
    kind = _type_of(key, value)
    return _U32.pack(kind) + _number(key, kind, value)


def _elements(key: str, values: Any) -> tuple[ValueType, bytes]:
    if isinstance(values, StringArray):
        return ValueType.STRING, b"".join(map(_string, values.iter_raw()))
    if isinstance(values, np.ndarray):
        kind = _BY_DTYPE.get(values.dtype.newbyteorder("="))
        if kind is None:
            raise OutputError(f'key "{printable(key, 80)}": GGUF cannot store arrays of {values.dtype}')
        return kind, values.astype(DTYPES[kind]).tobytes()
    if not values:
        raise OutputError(f'key "{printable(key, 80)}": an empty list has no element type; give a numpy array')
    if all(isinstance(value, str | bytes) for value in values):
        return ValueType.STRING, b"".join(map(_string, values))
    kinds = {_type_of(key, value) for value in values}
    if all(type(value) is int for value in values):
        kinds = {ValueType.INT32 if min(values) >= -(1 << 31) and max(values) < 1 << 31 else ValueType.INT64}
    if len(kinds) > 1:
        raise OutputError(
            f'key "{printable(key, 80)}": elements of several types: {", ".join(sorted(k.name for k in kinds))}'
        )
    kind = kinds.pop()
    return kind, b"".join(_number(key, kind, value) for value in values)


def _number(key: str, kind: ValueType, value: Any) -> bytes:
    try:
        return PACKERS[kind].pack(value.item() if isinstance(value, np.generic) else value)
    except (struct.error, OverflowError) as error:
        raise OutputError(f'key "{printable(key, 80)}": {value} does not fit {kind.name}') from error


def _type_of(key: str, value: object) -> ValueType:
    """The stored type of a number or a truth value."""
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, np.generic) and value.dtype in _BY_DTYPE:
        return _BY_DTYPE[value.dtype]
    if isinstance(value, float):
        return ValueType.FLOAT32
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return ValueType.UINT32
        if -(1 << 31) <= value < 0:
            return ValueType.INT32
        return ValueType.INT64 if value < 0 else ValueType.UINT64
    raise OutputError(f'key "{printable(key, 80)}": GGUF cannot store a {type(value).__name__}')
