"""What a model file says about itself: named values, read through checks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, printable
from thermocline.files.strings import StringArray

MetadataValue = str | int | float | bool | None | StringArray | npt.NDArray[Any] | list[Any] | dict[str, Any]
"""A value of GGUF metadata or of a config.json."""

T = TypeVar("T")


class _Required:
    pass


REQUIRED: Final = _Required()
"""Default of the getters: the key must be there."""


class Metadata(Mapping[str, MetadataValue]):
    """Key-values of the file `path`, with getters that refuse what is missing or out of bounds.

    Every getter raises ModelFormatError naming the key, what was found and what is allowed. A key that is
    absent (or null, in JSON) takes the default, if one is given; the default is not checked.
    """

    def __init__(self, path: Path | str, values: Mapping[str, MetadataValue], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def __getitem__(self, key: str) -> MetadataValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, low: int, high: int, default: T | _Required = REQUIRED) -> int | T:
        """A whole number in `low` to `high`, both included. True, 3.0 and "3" are not whole numbers."""
        allowed = f"a whole number in {low} to {high}"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, allowed)
        return value

    def number(self, key: str, low: float, high: float, default: T | _Required = REQUIRED) -> float | T:
        """A finite number in `low` to `high`, both included; whole numbers count."""
        allowed = f"a finite number in {low:g} to {high:g}"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, allowed)
        if not math.isfinite(value):
            raise self.wrong(key, allowed)
        return float(value)

    def boolean(self, key: str, default: T | _Required = REQUIRED) -> bool | T:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: T | _Required = REQUIRED, *, limit: int = 1 << 20) -> str | T:
        """A string of at most `limit` characters."""
        allowed = f"a string of at most {limit} characters"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        if not isinstance(value, str) or len(value) > limit:
            raise self.wrong(key, allowed)
        return value

    @overload
    def array(
        self, key: str, kind: Literal["integer"], *, length: int | None = ..., default: T | _Required = ...
    ) -> npt.NDArray[np.integer[Any]] | T: ...

    @overload
    def array(
        self, key: str, kind: Literal["float"], *, length: int | None = ..., default: T | _Required = ...
    ) -> npt.NDArray[np.floating[Any]] | T: ...

    def array(
        self,
        key: str,
        kind: Literal["integer", "float"],
        *,
        length: int | None = None,
        default: T | _Required = REQUIRED,
    ) -> npt.NDArray[Any] | T:
        """A 1-D array (n,) of integers or of floats, in the width the file stores; `length` demands its n."""
        allowed = f"an array of {length if length is not None else 'any number of'} {kind}s"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        found = _as_array(value, kind)
        if found is None or (length is not None and len(found) != length):
            raise self.wrong(key, allowed)
        return found

    def strings(self, key: str, *, length: int | None = None, default: T | _Required = REQUIRED) -> Sequence[str] | T:
        """An array of strings: a StringArray from GGUF, a list from JSON; `length` demands its size."""
        allowed = f"an array of {length if length is not None else 'any number of'} strings"
        value = self._values.get(key)
        if value is None:
            return self._default(key, default, allowed)
        is_strings = isinstance(value, StringArray) or (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        )
        if not is_strings or (length is not None and len(cast("Sequence[str]", value)) != length):
            raise self.wrong(key, allowed)
        return cast("Sequence[str]", value)

    def section(self, key: str) -> Metadata:
        """The object under `key` of a JSON file; empty if it is absent or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Metadata(self.path, value or {}, f"{self._prefix}{key}.")

    def wrong(self, key: str, allowed: str) -> ModelFormatError:
        """The error for a value that a caller found unusable: names the key, what was found and what is allowed."""
        return ModelFormatError(
            self.path,
            printable(self._prefix + key, 80),
            f"found {_short(self._values.get(key))}; allowed: {allowed}",
        )

    def _default(self, key: str, default: T | _Required, allowed: str) -> T:
        if isinstance(default, _Required):
            raise ModelFormatError(self.path, printable(self._prefix + key, 80), f"is missing; needed: {allowed}")
        return default


def _as_array(value: MetadataValue, kind: str) -> npt.NDArray[Any] | None:
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in ("iu" if kind == "integer" else "f") else None
    if not isinstance(value, list) or any(isinstance(item, bool) for item in value):
        return None
    if kind == "float" and all(isinstance(item, int | float) for item in value):
        return np.array(value, np.float64)
    if kind == "integer" and all(isinstance(item, int) and abs(item) < 1 << 63 for item in value):
        return np.array(value, np.int64)
    return None


def _short(value: MetadataValue) -> str:
    if isinstance(value, StringArray | list | np.ndarray):
        element = "strings" if isinstance(value, StringArray) else getattr(value, "dtype", "values")
        return f"an array of {len(value)} {element}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        shown = printable(value, 40)
        return f'the string "{shown}"' if len(value) <= 40 else f'a string of {len(value)} characters "{shown}"'
    if isinstance(value, bool):
        return str(value).lower()
    return printable(str(value), 40) if isinstance(value, float) or (value or 0) < 1 << 200 else "a huge number"
