"""A position in a GGUF header that never leaves it."""

from __future__ import annotations

import struct
from array import array
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, printable
from thermocline.files.gguf_types import DTYPES, PACKERS, ValueType
from thermocline.files.mapped import MappedFile
from thermocline.files.strings import StringArray

MAX_HEADER: Final = 1 << 29
"""Most bytes of a header; the largest known, with a vocabulary of 262k tokens, take 30 MB."""
MAX_ARRAY: Final = 1 << 24
"""Most elements of a metadata array."""
MAX_STRINGS: Final = 1 << 23
"""Most strings in all arrays of a file together."""

_U32 = PACKERS[ValueType.UINT32]
_U64 = PACKERS[ValueType.UINT64]


class Cursor:
    """Reads values one after another from the start of a mapped file.

    Every size that the file claims is held against the bytes that remain before anything is read, made or
    looped over. All methods raise ModelFormatError with the byte and the field.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self._end = min(file.size, MAX_HEADER)
        self._strings_left = MAX_STRINGS

    @property
    def remaining(self) -> int:
        """Bytes to the end of the file, or to the most that a header may take."""
        return self._end - self.position

    def wrong(self, field: str, problem: str, *, offset: int | None = None) -> ModelFormatError:
        """The error for what was found at `offset`, or here."""
        at = self.position if offset is None else offset
        return ModelFormatError(self.file.path, printable(field, 100), problem, offset=at)

    def need(self, size: int, field: str) -> None:
        """Refuse unless `size` bytes remain."""
        if size > self.remaining:
            raise self._too_short(self.position + size, field)

    def u32(self, field: str) -> int:
        """A 32-bit count or type number."""
        return int(self._scalar(_U32, field))

    def u64(self, field: str) -> int:
        """A 64-bit count, length or offset."""
        return int(self._scalar(_U64, field))

    def text(self, field: str, limit: int = MAX_HEADER) -> str:
        """A string of at most `limit` bytes: its 8-byte length, then UTF-8."""
        start = self.position
        length = self.u64(f"length of {field}")
        if length > limit:
            raise self.wrong(f"length of {field}", f"found {length}; allowed: at most {limit} bytes", offset=start)
        self.need(length, field)
        raw = self.file.buffer[self.position : self.position + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(field, f"is not UTF-8 (byte {error.start} of {length})") from error
        self.position += length
        return text

    def value(self, key: str) -> tuple[ValueType, ValueType | None, Any]:
        """A typed value: its type, the type of its elements if it is an array, and the value."""
        kind = self._value_type(key)
        if kind is ValueType.ARRAY:
            element = self._value_type(f"elements of {key}")
            return kind, element, self._array(key, element)
        if kind is ValueType.STRING:
            return kind, None, self.text(key)
        start = self.position
        value = self._scalar(PACKERS[kind], key)
        if kind is ValueType.BOOL:
            if value not in (0, 1):
                raise self.wrong(key, f"found boolean {value}; allowed: 0, 1", offset=start)
            return kind, None, bool(value)
        return kind, None, value

    def _value_type(self, field: str) -> ValueType:
        start = self.position
        number = self.u32(f"type of {field}")
        try:
            return ValueType(number)
        except ValueError:
            raise self.wrong(f"type of {field}", f"found {number}; allowed: 0 to 12", offset=start) from None

    def _array(self, key: str, element: ValueType) -> StringArray | npt.NDArray[Any]:
        start = self.position
        count = self.u64(f"length of {key}")
        if element is ValueType.ARRAY:
            raise self.wrong(f"elements of {key}", "arrays in arrays are not allowed", offset=start - 4)
        width = 8 if element is ValueType.STRING else DTYPES[element].itemsize
        if count * width > self.remaining:
            raise self._too_short(self.position + count * width, f"{key} of {count} elements")
        if count > MAX_ARRAY:
            raise self.wrong(f"length of {key}", f"found {count}; allowed: at most {MAX_ARRAY} elements", offset=start)
        if element is ValueType.STRING:
            return StringArray(self.file, key, self._walk_strings(key, count))
        numbers = np.frombuffer(self.file.buffer, DTYPES[element], count, self.position)
        if element is ValueType.BOOL and numbers.view(np.uint8).max(initial=0) > 1:
            raise self.wrong(key, "found booleans other than 0 and 1")
        self.position += count * width
        return numbers

    def _walk_strings(self, key: str, count: int) -> npt.NDArray[np.int64]:
        """Where each of `count` strings ends, after where the first begins."""
        if count > self._strings_left:
            raise self.wrong(key, f"{count} strings; allowed: at most {MAX_STRINGS} in the arrays of a file")
        self._strings_left -= count
        # A vocabulary with its merges has 400,000 strings: nothing but the walk itself belongs in this loop. A
        # length past the end makes the next one unreadable; the last is checked below.
        unpack, buffer, position = _U64.unpack_from, self.file.buffer, self.position
        bounds = array("q", [position])
        append = bounds.append
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
                append(position)
        except (struct.error, OverflowError):
            position = self._end + 1
        if position > self._end:
            last = len(bounds) - 1
            entry = f"{key}[{last - 1 if bounds[last] > self._end else last}]"
            raise self.wrong(
                entry, f"ends past byte {self._end}, the last a header can take here: incomplete download?"
            )
        self.position = position
        return np.frombuffer(bounds, np.int64)

    def _scalar(self, packer: struct.Struct, field: str) -> Any:
        self.need(packer.size, field)
        (value,) = packer.unpack_from(self.file.buffer, self.position)
        self.position += packer.size
        return value

    def _too_short(self, needed: int, field: str) -> ModelFormatError:
        if self._end < self.file.size:
            return self.wrong(field, f"needs a header of {needed} bytes; allowed: at most {MAX_HEADER}")
        return self.wrong(field, f"incomplete download? have {self.file.size} bytes, need at least {needed}")
