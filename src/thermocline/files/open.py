"""One way in for every kind of model."""

from __future__ import annotations

from pathlib import Path

from thermocline.errors import ModelFormatError
from thermocline.files.gguf import GgufFile
from thermocline.files.safetensors_folder import HfFolder


def open_model(path: Path | str, *, strict: bool = False) -> GgufFile | HfFolder:
    """Open a GGUF file (of a split model: the first part) or a Hugging Face folder.

    `strict` turns what would be a warning into an error.

    Raises:
        ModelFormatError: there is no such model, or it is not what it should be; the message says what it
            looks like instead.
    """
    path = Path(path)
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise ModelFormatError(path, "file", f"not a file name: {error}") from error
    return HfFolder.open(path, strict=strict) if is_folder else GgufFile.open(path, strict=strict)
