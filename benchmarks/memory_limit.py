"""Runs commands under a limit of memory that counts their page cache too: a control group below our own.

Both versions of control groups are tried. Where neither can be made (no rights, not mounted, not delegated), `why` says
so, and nothing is limited.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")
NAME = "thermocline-benchmark"


class MemoryLimit:
    """A control group whose processes together get at most `nbytes`; gone again after the block it is used in."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.why = ""
        self._folder: Path | None = None
        self._version = 0
        self._new = False
        for folder, limit in _candidates():
            try:
                folder.mkdir()
                self._new = True
                (folder / limit).write_text(str(nbytes))
            except OSError as error:
                self.why = f"{folder}: {error.strerror}"
                self._remove(folder)
                continue
            self._folder, self.why = folder, ""
            self._version = 1 if limit == "memory.limit_in_bytes" else 2
            break

    @property
    def means(self) -> str:
        """How memory is limited, for the result; empty where it is not."""
        if self._folder is None:
            return ""
        return f"control group (version {self._version}) of {self.nbytes:,} bytes, page cache included"

    def run(self, command: Sequence[str]) -> tuple[str, int]:
        """The command's standard output, and the most bytes that it was charged (0: unknown).

        Raises:
            CalledProcessError: it failed, as one that is out of memory does.
        """
        folder = self._folder
        if folder is not None:
            with contextlib.suppress(OSError):  # version 2 cannot always be reset
                (folder / "memory.max_usage_in_bytes").write_text("0")

        def enter() -> None:
            if folder is not None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        return done.stdout, self._peak()

    def _peak(self) -> int:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self._folder is not None and (self._folder / name).exists():
                return int((self._folder / name).read_text())
        return 0

    def __enter__(self) -> MemoryLimit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / "memory.force_empty").write_text("0")
            self._remove(self._folder)

    def _remove(self, folder: Path) -> None:
        if self._new:
            with contextlib.suppress(OSError):
                folder.rmdir()
            self._new = False


def _candidates() -> list[tuple[Path, str]]:
    """Groups that could be made, below the one that we are in, with the names of their limits."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        name = f"{NAME}-{os.getpid()}"
        if controllers == "memory":
            found.append((ROOT / "memory" / path.lstrip("/") / name, "memory.limit_in_bytes"))
        elif not controllers:
            roots = (root for root in (ROOT, ROOT / "unified") if (root / "cgroup.controllers").exists())
            found += [(root / path.lstrip("/") / name, "memory.max") for root in roots]
    return found
