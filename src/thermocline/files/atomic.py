"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.errors import OutputError, UsageError, printable

Content = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


class AtomicFile:
    """The file under construction that `atomic_write` hands out: bytes go in at the end, unbuffered."""

    def __init__(self, path: Path, descriptor: int, size: int = 0) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size

    def write(self, content: Content) -> int:
        """Append `content`, all of it; returns its size in bytes.

        Raises:
            OutputError: it could not be written, for instance because the disk is full.
        """
        view = content.data if isinstance(content, np.ndarray) else memoryview(content)
        left = view.cast("B") if view.nbytes else view[:0]
        with explained(self._path):
            while left:
                written = os.write(self._descriptor, left)
                self._size += written
                left = left[written:]
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is buffered; there for callers that expect a file."""


@contextmanager
def atomic_write(path: Path | str, *, size: int = 0) -> Iterator[AtomicFile]:
    """Write a new file `path`, which appears when the block ends without an exception.

    The bytes go to a temporary file beside it, which is flushed to the disk and then renamed, so that a crash
    at any time leaves the old file or the new one. On an exception the temporary file is removed and the old
    file is untouched. `size` is how many bytes there will be, checked against the free space first. A link is
    replaced, not followed. Leavings of killed writers of the same name are removed.

    Raises:
        OutputError: the folder is missing or not writable, the disk is full, `path` is not a regular file, or
            the system refuses a step.
    """
    path = Path(path)
    mode = existing_mode(path)
    with explained(path):
        require_space(path, size)
        _remove_leavings(path)
        temporary, descriptor = _create(path)
    try:
        yield AtomicFile(path, descriptor)
        with explained(path):
            put_in_place(temporary, descriptor, path, mode)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)
    with explained(path, "is written, but may not survive a power failure"):
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Make a new folder `path`, which appears with all its files when the block ends without an exception.

    The block writes into the folder that it is given, a temporary one beside `path`. An empty folder is replaced;
    leavings of killed writers of the same name are removed.

    Raises:
        OutputError: `path` is there and not an empty folder, its parent is missing or not writable, the disk is
            full, or the system refuses a step.
    """
    path = Path(path)
    with explained(path):
        unnamed = not path.name  # such as . and /
        if unnamed or path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise OutputError(f"{printable(str(path))}: is there already: remove it, or name a new folder")
        _remove_leavings(path)
        temporary, descriptor = _create(path, folder=True)
    try:
        yield temporary
        with explained(path):
            sync_folder(temporary)
            temporary.replace(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OutputError):  # which may name a file in the temporary folder
            told = str(error).replace(printable(str(temporary)), printable(str(path)))
            raise OutputError(told) from error
        raise
    finally:
        os.close(descriptor)
    with explained(path, "is written, but may not survive a power failure"):
        sync_folder(path.parent)


def put_in_place(temporary: Path, descriptor: int, path: Path, mode: int | None) -> None:
    """Let a finished file be `path`, with the permissions `mode` (None leaves its own)."""
    if mode is not None:
        os.fchmod(descriptor, mode)
    os.fsync(descriptor)
    temporary.replace(path)


def existing_mode(path: Path) -> int | None:
    """Permissions of the file that will be replaced; None if there is none."""
    with explained(path):
        try:
            found = path.lstat().st_mode
        except FileNotFoundError:
            return None
    if stat.S_ISLNK(found):
        return None
    if not stat.S_ISREG(found):
        kind = "a folder" if stat.S_ISDIR(found) else "not a regular file"
        raise OutputError(f"{printable(str(path))}: is {kind}; name a file to write")
    return stat.S_IMODE(found)


def require_kind(path: Path | str, what: str, is_one: Callable[[Path], bool], flag: str = "-o") -> None:
    """Refuse to replace a file of another kind: an input or a model that is named as the output by mistake.

    `what` is the kind in words, `is_one` tells whether a file is of it. An empty file may be anything.

    Raises:
        UsageError: `path` is there and of another kind.
        OutputError: it cannot be looked at.
    """
    path = Path(path)
    with explained(path):
        free = not path.is_file() or not path.stat().st_size or is_one(path)
    if not free:
        raise UsageError(
            f"{printable(str(path))} is there and is no {what}: name another file with {flag}, or remove it first"
        )


def begins(path: Path, words: bytes) -> bool:
    """Whether a file begins with `words`, in small letters or large ones."""
    with path.open("rb") as file:
        return file.read(len(words)).lower() == words.lower()


def require_space(path: Path, size: int) -> None:
    """Refuse to write more than there is room for.

    Raises:
        OutputError: the disk of `path` has not `size` bytes free.
    """
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    if size > free:
        raise OutputError(
            f"{printable(str(path))}: needs {size:,} bytes, {free:,} are free on its disk: free {size - free:,} more"
        )


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."


def _create(path: Path, *, folder: bool = False) -> tuple[Path, int]:
    """A new temporary file or folder beside `path`, locked for as long as its writer lives."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(6)}.partial")
        if folder:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        else:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for a leaving before the lock was on it


def _remove_leavings(path: Path) -> None:
    """Remove temporary files of `path` whose writer no longer lives: their lock is free."""
    prefix = _prefix(path)
    for entry in path.parent.iterdir():
        if not (entry.name.startswith(prefix) and entry.name.endswith(".partial")):
            continue
        with suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as safe as its files are."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to sync for a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path, problem: str = "cannot be written") -> Iterator[None]:
    """Turn what the system refuses into an error that names `path`.

    Raises:
        OutputError: something in the block failed.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{printable(str(path))}: {problem}: {error.strerror or error}") from error
