"""Zip archives whose entries are stored as they are, which is how PyTorch uses the format.

Source of the layout: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.3. Nothing is ever decompressed, so nothing
can grow, and nothing is extracted, so names are never paths.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from thermocline.errors import ModelFormatError, OutputError, printable
from thermocline.files.atomic import atomic_write
from thermocline.files.mapped import MappedFile
from thermocline.files.weight import Bytes

MAX_ENTRIES: Final = 1 << 14
"""Most entries of an archive."""
MAX_NAME: Final = 512
"""Most bytes of an entry's name."""

_ALIGNMENT: Final = 64
_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END_64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64: Final = struct.Struct("<4sIQI")
_MOST_COMMENT: Final = 0xFFFF
_IN_EXTRA_64: Final = 0xFFFFFFFF
_STORED: Final = 0
_ENCRYPTED: Final = 1
_UTF8: Final = 1 << 11
_DATE_1980: Final = 33


@dataclass(frozen=True, slots=True)
class _Directory:
    """Where the table of entries lies, and how many it has."""

    start: int
    stop: int
    count: int


def read_stored(file: MappedFile) -> Mapping[str, Bytes]:
    """The entries of an archive by name, as views on the file.

    Checksums are not looked at: PyTorch can be told to write none.

    Raises:
        ModelFormatError: the archive is truncated, has compressed, encrypted or overlapping entries, names
            that are given twice or lead outside of it, or tables that contradict each other.
    """
    directory = _directory(file)
    position = directory.start
    entries: dict[str, Bytes] = {}
    spans: list[tuple[int, int, str]] = []
    for _ in range(directory.count):
        name, start, size, position = _entry(file, position, directory)
        if name in entries:
            raise _wrong(file, name, "is given twice", position)
        entries[name] = file.view(start, start + size)
        spans.append((start, start + size, name))
    if position != directory.stop:
        problem = f"{directory.count} entries end at {position}, the table at {directory.stop}"
        raise ModelFormatError(file.path, "zip directory", problem, offset=position)
    _require_apart(file, spans)
    return entries


def write_stored(path: Path | str, entries: Iterable[tuple[str, bytes | memoryview]]) -> None:
    """Write an archive, whole or not at all, with every entry's data at a multiple of 64 bytes.

    Raises:
        OutputError: it could not be written, or would need 4 GiB or more.
    """
    path = Path(path)
    listed = [(name.encode(), content) for name, content in entries]
    size = sum(len(data) + 2 * len(name) + _LOCAL.size + _ALIGNMENT + _CENTRAL.size for name, data in listed)
    if size >= _IN_EXTRA_64:
        raise OutputError(f"{printable(str(path))}: {size} bytes; archives of 4 GiB and more are not written")
    central = []
    with atomic_write(path, size=size) as file:
        for name, data in listed:
            start = file.tell()
            common = (20, _UTF8, _STORED, 0, _DATE_1980, zlib.crc32(data), len(data), len(data), len(name))
            # An unknown extra field is skipped by every reader; as in PyTorch's own files it moves the data.
            fill = -(start + _LOCAL.size + len(name) + 4) % _ALIGNMENT
            padding = struct.pack("<2H", 0x4246, fill) + bytes(fill)
            file.write(_LOCAL.pack(b"PK\3\4", *common, len(padding)) + name + padding)
            file.write(data)
            central.append(_CENTRAL.pack(b"PK\1\2", 20, *common, 0, 0, 0, 0, 0, start) + name)
        start, table = file.tell(), b"".join(central)
        file.write(table + _END.pack(b"PK\5\6", 0, 0, len(central), len(central), len(table), start, 0))


def _directory(file: MappedFile) -> _Directory:
    """Find the table by the record at the end of the file, or the larger one of ZIP64 before it."""
    first = max(0, file.size - _END.size - _MOST_COMMENT)
    at = file.buffer.rfind(b"PK\5\6", first)
    if at < 0 or at + _END.size > file.size:
        problem = "has no end record: not a zip archive, or an incomplete download"
        raise ModelFormatError(file.path, "zip", problem, offset=file.size)
    _, disk, disk_start, here, count, size, start, comment = _END.unpack_from(file.buffer, at)
    if at + _END.size + comment != file.size:
        raise ModelFormatError(file.path, "zip", "bytes follow its end record", offset=at)
    locator = at - _LOCATOR_64.size
    if locator >= 0 and file.buffer[locator : locator + 4] == b"PK\6\7":
        at = _LOCATOR_64.unpack_from(file.buffer, locator)[2]
        if at > locator - _END_64.size or file.buffer[at : at + 4] != b"PK\6\6":
            raise ModelFormatError(file.path, "zip", f"its ZIP64 record is not at {at}", offset=locator)
        _, _, _, _, disk, disk_start, here, count, size, start = _END_64.unpack_from(file.buffer, at)
    if disk or disk_start or here != count:
        raise ModelFormatError(file.path, "zip", "is a part of a split archive", offset=at)
    if count > MAX_ENTRIES:
        raise ModelFormatError(file.path, "zip", f"{count} entries; allowed: at most {MAX_ENTRIES}", offset=at)
    if start + size > at or count * _CENTRAL.size > size:
        problem = f"{count} entries in {size} bytes at {start} do not fit before {at}"
        raise ModelFormatError(file.path, "zip directory", problem, offset=at)
    return _Directory(start, start + size, count)


def _entry(file: MappedFile, at: int, directory: _Directory) -> tuple[str, int, int, int]:
    """One row of the table: its name, where its data lies and how many bytes, and where the next row begins."""
    if at + _CENTRAL.size > directory.stop or file.buffer[at : at + 4] != b"PK\1\2":
        raise ModelFormatError(file.path, "zip directory", "has no entry here", offset=at)
    fields = _CENTRAL.unpack_from(file.buffer, at)
    flags, method, packed, size, name_size, extra_size, comment = (fields[i] for i in (3, 4, 8, 9, 10, 11, 12))
    local = fields[16]
    body = at + _CENTRAL.size
    stop = body + name_size + extra_size + comment
    if stop > directory.stop:
        raise ModelFormatError(file.path, "zip directory", "an entry ends past the table", offset=at)
    name = _name(file, body, name_size)
    extra = file.buffer[body + name_size : body + name_size + extra_size]
    size, packed, local = _from_extra(file, name, extra, (size, packed, local), at)
    if method != _STORED or flags & _ENCRYPTED or packed != size:
        kind = "encrypted" if flags & _ENCRYPTED else "compressed"
        raise _wrong(file, name, f"is {kind}; entries must be stored as they are, as torch.save does", at)
    if local + _LOCAL.size > directory.start or file.buffer[local : local + 4] != b"PK\3\4":
        raise _wrong(file, name, f"has no header at {local}", at)
    parts = _LOCAL.unpack_from(file.buffer, local)
    start = local + _LOCAL.size + parts[9] + parts[10]
    if file.buffer[local + _LOCAL.size : local + _LOCAL.size + parts[9]] != name.encode():
        raise _wrong(file, name, f"has another name in its header at {local}", at)
    if start + size > directory.start:
        raise _wrong(file, name, f"{size} bytes at {start} end past {directory.start}, where the table begins", at)
    return name, start, size, stop


def _name(file: MappedFile, at: int, size: int) -> str:
    if not 1 <= size <= MAX_NAME:
        raise ModelFormatError(file.path, "zip directory", f"a name of {size} bytes; allowed: 1 to 512", offset=at)
    try:
        name = file.buffer[at : at + size].decode()
    except UnicodeDecodeError as error:
        raise ModelFormatError(file.path, "zip directory", "a name is not UTF-8", offset=at) from error
    if not name.isprintable() or "\\" in name or name.startswith("/") or ".." in name.split("/"):
        raise _wrong(file, name, "is not a plain name inside the archive", at)
    return name


def _from_extra(
    file: MappedFile, name: str, extra: bytes, given: tuple[int, int, int], at: int
) -> tuple[int, int, int]:
    """Size, packed size and header offset, those of all ones taken from the ZIP64 extra field, in this order."""
    if _IN_EXTRA_64 not in given:
        return given
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + length]
            numbers = iter(np.frombuffer(wide, "<u8", len(wide) // 8).tolist())
            found = [next(numbers, -1) if value == _IN_EXTRA_64 else value for value in given]
            if min(found) >= 0:
                return found[0], found[1], found[2]
        position += 4 + length
    raise _wrong(file, name, "has no ZIP64 sizes", at)


def _require_apart(file: MappedFile, spans: list[tuple[int, int, str]]) -> None:
    """Entries that share bytes are how small archives hold large contents."""
    end = 0
    for start, stop, name in sorted(spans):
        if start < end and stop > start:
            raise _wrong(file, name, "overlaps the entry before it", start)
        end = max(end, stop)


def _wrong(file: MappedFile, name: str, problem: str, at: int) -> ModelFormatError:
    return ModelFormatError(file.path, f'zip entry "{printable(name, 80)}"', problem, offset=at)
