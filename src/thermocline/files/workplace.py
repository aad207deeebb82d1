"""A folder beside an output where unfinished work waits for its next start."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from thermocline.errors import HardwareError, ModelFormatError, OutputError, ThermoclineError, UsageError, printable
from thermocline.files.atomic import atomic_write
from thermocline.files.strict_json import parse_object

RUN: Final = "run"
"""The state that tells whose work it is. It comes first and goes last, so that nothing passes for another run's."""
Useless = Callable[[Mapping[str, Any]], Iterable[Path] | None]


class Workplace:
    """The folder OUTPUT.work, of one run at a time. `identity` is what a second start must have in common with it.

    Raises:
        UsageError: `output` names no file.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        if not output.name:  # . and /
            raise UsageError(f"the output (-o) is {output}, which is a folder; name a file to write")
        self.folder = output.with_name(output.name + ".work")
        self._identity = json.loads(json.dumps(identity))

    @contextmanager
    def occupied(self, *, restart: bool = False, useless: Useless = lambda found: None) -> Iterator[None]:
        """Make the folder, or go on in the one that is there; `restart` empties it first.

        `useless` hears the identity of a run with other inputs or settings and tells which of its files this one
        cannot use: they are removed. None: all is to be left as it is.

        Raises:
            UsageError: another run is at work in it, or it is of a run with other inputs or settings.
            OutputError: it cannot be made.
        """
        with self.explained():
            self.folder.mkdir(exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"another run is at work in {printable(str(self.folder))}; let it finish") from None
            self._take_over(restart=restart, useless=useless)
            yield
        finally:
            os.close(descriptor)

    def _take_over(self, *, restart: bool, useless: Useless) -> None:
        found = {} if restart else self.read_state(RUN)
        if found == self._identity:
            return
        gone = useless(found) if found else self.files()
        if gone is None:
            raise UsageError(
                f"an unfinished run with other inputs or settings is kept in "
                f"{printable(str(self.folder))}: repeat its command to finish it, or give --restart to forget it"
            )
        with self.explained():
            for file in gone:
                file.unlink(missing_ok=True)
        try:
            self.write_state(RUN, self._identity)
        except OutputError:
            with suppress(OSError):
                self.folder.rmdir()  # if nothing is kept in it
            raise

    def files(self) -> list[Path]:
        """All that is there; what tells whose it is comes last."""
        return sorted(self.folder.iterdir(), key=lambda file: file.name == f"{RUN}.json")

    def read_state(self, name: str) -> dict[str, Any]:
        """What was written down under `name`; empty if nothing was.

        Raises:
            ModelFormatError: it is damaged.
        """
        path = self.folder / f"{name}.json"
        try:
            return dict(parse_object(path.read_bytes(), path, "state"))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ModelFormatError(path, "state", f"cannot be read: {error.strerror}") from error

    def write_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Write down `state`, whole or not at all."""
        content = json.dumps(state).encode()
        with atomic_write(self.folder / f"{name}.json", size=len(content)) as file:
            file.write(content)

    def forget_state(self, name: str) -> None:
        """Remove what was written down under `name`, if anything was."""
        with self.explained():
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    @contextmanager
    def kept(self, begun: Callable[[], bool], other: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Where the block fails, keep what a second start can go on with, and say so.

        Everything is removed where nothing was `begun`, or where the same command would fail alike: what it was given
        is wrong, so that the next one will be another. `other` tells whether that one could go on with it.

        Raises:
            OutputError: the block did; the message tells what is kept, as does a note on any other exception.
        """
        try:
            yield
        except BaseException as error:
            alike = self._fails_alike(error)
            if not begun() or (alike and not other()):
                self.remove()
                raise
            which = "one with other settings" if alike else "the same command"
            told = f"what was done is kept in {printable(str(self.folder))}: {which} goes on with it"
            if isinstance(error, OutputError):
                raise OutputError(f"{error}; {told}") from error
            error.add_note(told)
            raise

    def _fails_alike(self, error: BaseException) -> bool:
        if isinstance(error, ModelFormatError):
            return Path(error.path).parent != self.folder
        return isinstance(error, ThermoclineError) and not isinstance(error, OutputError | HardwareError)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        with suppress(OSError):
            for file in self.files():
                file.unlink()
            self.folder.rmdir()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the system refuses into an error that says where.

        Raises:
            OutputError: something in the block failed.
        """
        try:
            yield
        except OSError as error:
            where = printable(str(self.folder))
            raise OutputError(f"{where}: cannot be written: {error.strerror or error}") from error
