"""Where the prompt comes from: a flag, a file, standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from thermocline.errors import UsageError, printable

MOST = 64 << 20
"""Bytes of a prompt; the longest contexts in use hold some 8 MB of text."""


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """The text of `-p` (`-` reads standard input) or `-f`; None if neither was given.

    Raises:
        UsageError: both were given, or the text cannot be read.
    """
    if prompt is not None and file is not None:
        raise UsageError("give the prompt with -p or with -f, not with both")
    if prompt == "-":
        if sys.stdin is None:
            raise UsageError("the prompt was to come from standard input, which is closed")
        return _text(sys.stdin.buffer.read(MOST + 1), "standard input")
    if prompt is not None:
        # An argument that is no UTF-8 arrives with lone surrogates, which no tokenizer can take.
        return _text(prompt.encode("utf-8", "surrogateescape"), "the prompt")
    if file is None:
        return None
    try:
        with Path(file).open("rb") as opened:
            return _text(opened.read(MOST + 1), printable(file))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"the prompt file {printable(file)} cannot be read: {reason}") from error


def _text(data: bytes, where: str) -> str:
    if len(data) > MOST:
        raise UsageError(f"{where} has more than {MOST:,} bytes; no context holds that much")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
