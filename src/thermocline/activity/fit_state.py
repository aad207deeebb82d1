"""How far the fit of a layer is, kept on disk so that a second start goes on in the middle of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from thermocline.errors import ModelFormatError
from thermocline.files.pace import Pace
from thermocline.files.sidecar import SidecarKind, read_sidecar, write_sidecar

Arrays = Mapping[str, npt.NDArray[Any]]

SAVE_SECONDS: Final = 30.0
"""How much of a fit a killed run loses at most; of one that has just begun it loses less."""


class FitState:
    """The file `path` with the state of one fit at a time: of some rank, to be made in some number of steps.

    The model by `fingerprint` and `name` is the one whose layer it is.
    """

    def __init__(self, path: Path, fingerprint: str, name: str) -> None:
        self._path, self._fingerprint, self._name = path, fingerprint, name
        self._pace = Pace(SAVE_SECONDS, at_once=False)

    def begin(self, rank: int, steps: int) -> tuple[int, Arrays]:
        """How many steps of this fit were made, and what it was then; (0, {}) if the file is of another, or none.

        Raises:
            FingerprintError: it is of another model.
            ModelFormatError: it is damaged.
        """
        self._pace = Pace(SAVE_SECONDS, at_once=False)
        if not self._path.exists():
            return 0, {}
        kept = read_sidecar(self._path, SidecarKind.JOURNAL)
        kept.require_model(self._fingerprint, self._name)
        if (kept.info.get("rank"), kept.info.get("steps")) != (rank, steps):
            return 0, {}
        done = kept.info.get("done")
        if type(done) is not int or not 0 < done < steps:
            raise ModelFormatError(self._path, "info.done", "does not tell how far the fit was")
        return done, kept.arrays

    def save(self, rank: int, steps: int, done: int, arrays: Callable[[], Arrays]) -> None:
        """Write down what the fit is after `done` of its steps, where it is time to.

        Raises:
            OutputError: it could not be written.
        """
        if done == steps or not self._pace.due():
            return
        info = {"rank": rank, "steps": steps, "done": done}
        write_sidecar(self._path, SidecarKind.JOURNAL, self._fingerprint, info, arrays(), model_name=self._name)
        self._pace.saved()

    def forget(self) -> None:
        """The fit is done, and kept elsewhere."""
        self._path.unlink(missing_ok=True)
