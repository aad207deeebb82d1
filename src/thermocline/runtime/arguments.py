"""What a program hands over, checked where it comes in: types that no signature enforces, refused in words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from thermocline.errors import UsageError, printable
from thermocline.text.tokenizer import Tokenizer

Settings = TypeVar("Settings")
Member = TypeVar("Member", bound=StrEnum)


def prompt_ids(prompt: object, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt that is no text.

    Raises:
        UsageError: it is not made of ids, or one is outside the vocabulary.
    """
    if not isinstance(prompt, Iterable) or isinstance(prompt, str | bytes | bytearray | memoryview | Mapping):
        raise UsageError(f"prompt is {_shown(prompt)}; allowed: a text, or a list of token ids")
    return tokenizer.checked_ids(prompt)


def texts_of(texts: object) -> tuple[str | Path, ...]:
    """Files and folders to read; a single one is welcome.

    Raises:
        UsageError: they are no paths.
    """
    many = (texts,) if isinstance(texts, str | os.PathLike) else texts
    if not isinstance(many, Iterable):
        raise UsageError(f"texts are {_shown(texts)}; allowed: files and folders")
    return tuple(path_of(text, "a text") for text in many)


def path_of(path: object, name: str) -> str | Path:
    """A path as it is.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(path, str | os.PathLike) or path == "":
        raise UsageError(f"{name} is {_shown(path)}; allowed: a file or a folder")
    return path if isinstance(path, str) else Path(path)


def settings_or_default(kind: type[Settings], settings: object) -> Settings:
    """`settings`, or the defaults where they are None.

    Raises:
        UsageError: they are of another kind.
    """
    if settings is None:
        return kind()
    if not isinstance(settings, kind):
        raise UsageError(f"settings are {_shown(settings)}; allowed: {kind.__name__}(...), or single ones by name")
    return settings


def member(kind: type[Member], value: Any, name: str) -> Member:
    """The member of an enumeration that `value` is, or spells.

    Raises:
        UsageError: it is none.
    """
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} is {printable(str(value))}; allowed: {', '.join(kind)}") from None


def require_whole(**numbers: object) -> None:
    """Refuse what is no whole number, such as '1', 1.5 and True.

    Raises:
        UsageError: one is not; it is named.
    """
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise UsageError(f"{name} is {_shown(value)}; allowed: a whole number")


def _shown(value: object) -> str:
    return printable(repr(value), 60)
