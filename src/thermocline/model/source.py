"""Where a model comes from, and the questions that every family asks of its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from thermocline.errors import UnsupportedModelError, printable
from thermocline.files.metadata import Metadata
from thermocline.files.weight import Weight


class NetworkSource(Protocol):
    """What a network needs of an opened model: a GGUF file (`kind` "gguf") or a Hugging Face folder (`kind` "hf").

    `metadata` holds the header's key values or config.json; `weights` the tensors by the names they have
    there, one-dimensional ones as one row.
    """

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Metadata: ...

    @property
    def weights(self) -> Mapping[str, Weight]: ...

    @property
    def fingerprint(self) -> str: ...


def require_neutral(metadata: Metadata, neutral: Mapping[str, object], prefix: str = "") -> None:
    """Refuse keys that would change the arithmetic in a way that is not implemented.

    `neutral` gives, for each such key (after `prefix`), the one value that changes nothing.

    Raises:
        UnsupportedModelError: a key has another value.
    """
    for name, harmless in neutral.items():
        value = metadata.get(prefix + name)
        if value is not None and value != harmless:
            raise UnsupportedModelError(
                f"{printable(str(metadata.path))}: {prefix}{name} is {printable(repr(value), 40)}; "
                f"implemented is only {'its absence' if harmless is None else repr(harmless)}"
            )


def uniform(metadata: Metadata, key: str, bounds: tuple[int, int], default: int | None = None) -> int:
    """A whole number given once, or as an array with the same number for every layer.

    Raises:
        ModelFormatError: it is missing without a default, of another type or out of bounds.
        UnsupportedModelError: it differs between layers.
    """
    low, high = bounds
    if not isinstance(metadata.get(key), list | np.ndarray):
        return metadata.integer(key, low, high) if default is None else metadata.integer(key, low, high, default)
    distinct = set(metadata.array(key, "integer").tolist())
    if len(distinct) != 1:
        raise UnsupportedModelError(
            f"{printable(str(metadata.path))}: {key} differs between layers; implemented are layers of one size"
        )
    value = int(distinct.pop())
    if not low <= value <= high:
        raise metadata.wrong(key, f"whole numbers in {low} to {high}")
    return value
