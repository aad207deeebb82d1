"""Large files that are made part by part, whole or not at all; a second start goes on with what a killed one made.

Until it is whole, such a file lies in the folder FILE.work (see `workplace`). What counts of it is noted there from
time to time, after the parts so far are safe on the disk; what a killed run wrote beyond is made anew. That it is whole
is noted before it gets its name, so that of a run killed after that a second start knows that all was done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from thermocline.errors import ModelFormatError, OutputError, UsageError, printable
from thermocline.files.atomic import AtomicFile, existing_mode, explained, put_in_place, require_space, sync_folder
from thermocline.files.pace import Pace
from thermocline.files.workplace import Workplace

SAVE_SECONDS: Final = 20.0
"""How much work a killed run loses at most, beside the part it was at; one that has just begun loses less."""
STATE: Final = "parts"


@dataclass(frozen=True, slots=True)
class Resume:
    """What a run must have in common with one that it goes on with (JSON), and what is told of the parts.

    `told` gives what is to be kept with the parts made so far (JSON), `recall` takes it back; `restart` forgets an
    unfinished run, and without `replace` a file that is there is kept.
    """

    identity: Mapping[str, Any]
    told: Callable[[], Any]
    recall: Callable[[Any], None]
    restart: bool = False
    replace: bool = True


class ResumableFile(AtomicFile):
    """The file under construction. `parts` counts those that need not be made again; call `part` after each new one."""

    def __init__(self, path: Path, descriptor: int, place: Workplace, resume: Resume) -> None:
        state = place.read_state(STATE)
        try:
            self.parts, size = int(state.get("parts", 0)), int(state.get("bytes", 0))
            if state:
                resume.recall(state["told"])
            if not 0 <= size <= os.fstat(descriptor).st_size or self.parts < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ModelFormatError(place.folder, STATE, "is damaged; give --restart to begin anew") from None
        super().__init__(path, descriptor, size)
        self._place, self._resume, self._whole = place, resume, size
        self._pace = Pace(SAVE_SECONDS, at_once=False)
        self.kept = bool(state)
        os.ftruncate(descriptor, size)
        os.lseek(descriptor, size, os.SEEK_SET)

    def part(self) -> None:
        """A part is complete."""
        self.parts, self._whole = self.parts + 1, self.tell()
        if self._pace.due():
            self.save()

    def save(self, *, whole: bool = False) -> None:
        """Make the complete parts safe, cut off what is beyond, and note how many they are, and if they are all.

        Raises:
            OutputError: the disk refuses.
        """
        with explained(self._path):
            os.ftruncate(self._descriptor, self._whole)
            os.fsync(self._descriptor)
        state = {"parts": self.parts, "bytes": self._whole, "told": self._resume.told(), "whole": whole}
        self._place.write_state(STATE, state)
        self._pace.saved()
        self.kept = True


@contextmanager
def resumable_write(path: Path, size: int, resume: Resume) -> Iterator[ResumableFile]:
    """Write a new file `path` of `size` bytes, which appears when the block ends without an exception.

    Raises:
        UsageError: another run writes this file, the unfinished one is not the same, or it is there and to be kept.
        OutputError: as `atomic_write`; what was made is kept, if it took some time.
    """
    require_new(path, replace=resume.replace)
    mode, place = existing_mode(path), Workplace(path, resume.identity)
    temporary = place.folder / "file"
    with explained(path):
        require_space(path, size - (temporary.stat().st_size if temporary.is_file() else 0))
    with place.occupied(restart=resume.restart, useless=lambda found: None if temporary.exists() else place.files()):
        if not temporary.exists():
            place.forget_state(STATE)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            file = ResumableFile(path, descriptor, place, resume)
            with place.kept(lambda: file.kept), _saved(file):
                yield file
                file.save(whole=True)
                with explained(path):
                    put_in_place(temporary, descriptor, path, mode)
        finally:
            os.close(descriptor)
        place.remove()
    with explained(path, "is written, but may not survive a power failure"):
        sync_folder(path.parent)


def was_put_in_place(path: Path, head: bytes, size: int, resume: Resume) -> bool:
    """Whether this very run was killed after it had given its file, which begins with `head`, its name: all is done.

    Raises:
        UsageError: another run is at work on it.
        OutputError: as `resumable_write`.
    """
    place = Workplace(path, resume.identity)
    if resume.restart or not place.folder.is_dir() or (place.folder / "file").exists():
        return False
    with place.occupied(useless=lambda found: place.files()):
        state = place.read_state(STATE)
        done = bool(state.get("whole")) and _is(path, head, size)
        if done:
            resume.recall(state.get("told", []))
        place.remove()
    return done


def _is(path: Path, head: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size and file.read(len(head)) == head
    except OSError:
        return False


def require_new(path: Path, *, replace: bool) -> None:
    """Refuse to touch a file that is there, unless it is to be replaced.

    Raises:
        UsageError: it is there.
    """
    if path.exists() and not replace:
        raise UsageError(f"{printable(str(path))} is there already; --force replaces it")


def may_be_ours(path: Path) -> bool:
    """Whether `path` may have been made by a run that was killed at its end; `was_put_in_place` knows."""
    return Workplace(path, {}).folder.is_dir()


@contextmanager
def _saved(file: ResumableFile) -> Iterator[None]:
    """Where the block fails and some of the file was noted already, note all that is complete."""
    try:
        yield
    except BaseException:
        if file.kept:
            with suppress(OutputError):
                file.save()
        raise
