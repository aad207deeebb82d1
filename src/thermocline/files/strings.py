"""Large arrays of strings that stay bytes on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError
from thermocline.files.mapped import MappedFile

_PREFIX = 8


class StringArray(Sequence[str]):
    """Strings of a GGUF array, decoded on access.

    Entry i lies at `bounds[i] + 8` to `bounds[i + 1]`, after its 8-byte length; the reader has checked all of
    them. Vocabularies of broken converters hold bytes that are not UTF-8: `raw` gives those as they are, while
    access as text refuses them with ModelFormatError that names the entry.
    """

    def __init__(self, file: MappedFile, name: str, bounds: npt.NDArray[np.int64]) -> None:
        self._file = file
        self._name = name
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._decode(self.raw(index), range(len(self))[index])

    def __iter__(self) -> Iterator[str]:
        for i, entry in enumerate(self.iter_raw()):
            yield self._decode(entry, i)

    def raw(self, index: int) -> bytes:
        """Entry `index` as the file's bytes."""
        i = range(len(self))[index]
        return self._file.buffer[int(self._bounds[i]) + _PREFIX : int(self._bounds[i + 1])]

    def iter_raw(self) -> Iterator[bytes]:
        """All entries as the file's bytes."""
        first = int(self._bounds[0])
        content = self._file.buffer[first : int(self._bounds[-1])]
        bounds = (self._bounds - first).tolist()
        for start, stop in pairwise(bounds):
            yield content[start + _PREFIX : stop]

    def _decode(self, entry: bytes, index: int) -> str:
        try:
            return entry.decode()
        except UnicodeDecodeError as error:
            path: Path = self._file.path
            offset = int(self._bounds[index]) + _PREFIX
            raise ModelFormatError(path, f"{self._name}[{index}]", "is not UTF-8", offset=offset) from error
