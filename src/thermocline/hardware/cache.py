"""Where measurements of this machine are kept, and how they get there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from thermocline.errors import OutputError

LARGEST = 1 << 20
"""Bytes that such a file may have."""


def home() -> Path:
    """The folder: $THERMOCLINE_HOME, or thermocline/ in the user's cache folder."""
    chosen = os.environ.get("THERMOCLINE_HOME")
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "thermocline"


def recall(fingerprint: str) -> dict[str, Any] | None:
    """What was kept of the machine with this fingerprint; None if nothing was or the file is not ours to trust."""
    try:
        with (home() / "machine.json").open("rb") as file:
            kept = json.loads(file.read(LARGEST))
        return kept if isinstance(kept, dict) and kept.get("fingerprint") == fingerprint else None
    except (OSError, ValueError, RecursionError):
        return None


def remember(fingerprint: str, content: dict[str, Any]) -> Path:
    """Write `content` where `recall` finds it, whole or not at all.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = home()
    target = folder / "machine.json"
    text = json.dumps({"fingerprint": fingerprint, **content}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".machine-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}; set THERMOCLINE_HOME to a folder of yours"
        ) from error
    return target
