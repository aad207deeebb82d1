"""Regular files, mapped read-only into memory."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thermocline.errors import ModelFormatError
from thermocline.files.weight import Bytes
from thermocline.hardware.mapping import Mapping


@dataclass(frozen=True, slots=True, eq=False)
class MappedFile:
    """A whole file as read-only memory.

    The mapping holds the file itself, not its name: a file replaced by rename does not change under it.
    It ends when the last view on it does, so a view can outlive this object.
    """

    path: Path
    size: int
    buffer: Mapping

    def view(self, start: int, stop: int) -> Bytes:
        """Bytes `start` to `stop` as uint8, without a copy; the caller has checked them against `size`."""
        return np.frombuffer(self.buffer, np.uint8, stop - start, start)


def map_file(path: Path, *, minimum: int = 1) -> MappedFile:
    """Map a regular file of at least `minimum` bytes.

    Raises:
        ModelFormatError: it is missing, not permitted, not a regular file, or too short.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < minimum:
            raise ModelFormatError(path, "size", f"{size} bytes; at least {minimum} needed: incomplete download?")
        buffer = Mapping(descriptor, 0, access=mmap.ACCESS_READ)
        buffer.watch(path)
        return MappedFile(path, len(buffer), buffer)
    except (OSError, ValueError) as error:
        raise ModelFormatError(path, "file", f"cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)


def read_small(path: Path, limit: int) -> bytes:
    """The whole content of a regular file of at most `limit` bytes.

    Raises:
        ModelFormatError: it is missing, not permitted, not a regular file, or larger.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise ModelFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise ModelFormatError(path, "size", f"more than {limit} bytes; allowed: at most {limit}")
    return content


def open_regular(path: Path) -> int:
    """A descriptor for reading, only ever of a regular file (or a link to one); never blocks.

    Raises:
        ModelFormatError: it is missing, not permitted, or not a regular file.
    """
    try:
        # Looked at before opening: to open some devices is to act on them.
        _require_regular(path, path.stat().st_mode)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFormatError(path, "file", _reason(error)) from error
    except ValueError as error:
        raise ModelFormatError(path, "file", f"not a file name: {error}") from error
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except ModelFormatError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ModelFormatError(path, "file", f"is {kind}; a regular file is needed")


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read: permission denied"
    return f"cannot be opened: {error.strerror}"
