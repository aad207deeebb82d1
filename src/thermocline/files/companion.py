"""Where the sidecars of a model lie unless somebody says otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from thermocline.files.sidecar import SidecarKind

_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")


def companion(model: Path | str, kind: SidecarKind) -> Path:
    """The path of `model`'s sidecar of that kind, which need not exist.

    It lies beside the model and has its name: `M.gguf` has `M.predictor.safetensors`, a model in parts
    (`M-00001-of-00003.gguf`) too, and so has a folder `M/`. A link counts by its own name and place.
    """
    path = Path(model)
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    stem = _PART.sub("", path.name.removesuffix(".gguf")) if path.suffix == ".gguf" else path.name
    return path.with_name(f"{stem}.{kind}.safetensors")
