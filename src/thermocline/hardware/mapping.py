"""Files as memory, and what happens when one becomes shorter, or its disk fails, while it is in use.

The system ends a process that reads what is gone. A `Mapping` has it say why before; inside `sheltered`, what is gone
reads as zeros, and an error tells that at the end.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline import _native
from thermocline.errors import HardwareError, printable

GONE = "became shorter while it was in use, or its disk failed"


class Mapping(mmap.mmap):
    """A file that is mapped from end to end, read-only; `watch` must be called once."""

    path: Path = Path()
    _number = -1

    def watch(self, path: Path) -> None:
        """Have the process say which file it was, `path`, should it die of it."""
        self.path = path
        address = np.frombuffer(self, np.uint8).ctypes.data
        self._number = _native.watch_mapping(address, len(self), f"thermocline: {printable(str(path), 180)}: {GONE}\n")

    @property
    def number(self) -> int:
        """Of the mapping, among those that are watched; -1 if it is not."""
        return self._number

    def __del__(self) -> None:
        number, self._number = self._number, -1
        if number >= 0:
            _native.forget_mapping(number)


def mapping_below(view: npt.NDArray[Any]) -> Mapping | None:
    """The mapping that an array is a view on; None for arrays made in memory."""
    base: object = view
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, Mapping) else None


def mappings_below(views: Iterable[npt.NDArray[Any]]) -> tuple[Mapping, ...]:
    """The mappings that the arrays are views on, each once, in the order of their first view."""
    return tuple({id(m): m for view in views if (m := mapping_below(view)) is not None and view.nbytes}.values())


@contextlib.contextmanager
def sheltered(mappings: Sequence[Mapping]) -> Iterator[None]:
    """Whoever reads what is gone of these files reads zeros, and the block ends with an error, now and ever after.

    Errors that the block ends with itself may come of the zeros: they are that error's cause.

    Raises:
        HardwareError: something was missed; nothing of what was computed from it is worth anything.
    """
    watched = [mapping for mapping in mappings if mapping.number >= 0]
    for mapping in watched:
        _native.shelter_mapping(mapping.number, 1)
    try:
        yield
    except Exception as error:
        _require_whole(watched, error)
        raise
    finally:
        for mapping in watched:
            _native.shelter_mapping(mapping.number, -1)
    _require_whole(watched)


def _require_whole(mappings: Sequence[Mapping], cause: Exception | None = None) -> None:
    for mapping in mappings:
        if _native.lost_mapping(mapping.number):
            words = f"{printable(str(mapping.path))}: {GONE}: what was computed is lost; load it again"
            raise HardwareError(words) from cause
