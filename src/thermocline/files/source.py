"""What every opened model offers, whatever files it lies in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from thermocline.files.metadata import Metadata
from thermocline.files.tensors import Tensor
from thermocline.files.weight import Bytes, Weight

_SAMPLE = 256


class ModelSource(Protocol):
    """A model's files, mapped read-only. Weights are views: they stay valid after `close`."""

    @property
    def kind(self) -> str:
        """`gguf` or `hf`: whose names and metadata keys these are."""

    @property
    def path(self) -> Path:
        """The file or the folder."""

    @property
    def metadata(self) -> Metadata:
        """The key-values of a GGUF file, or config.json."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, of any format and rank."""

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The tensors as matrices; those that cannot be computed with raise when they are asked for."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the files but does no harm, one line each."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits that tell this model from any other: see `fingerprint`."""

    def close(self) -> None:
        """Let go of the files."""


def fingerprint(headers: Iterable[Bytes], tensors: Iterable[Tensor]) -> str:
    """SHA-256 in hex over the headers and up to 256 bytes at the start, middle and end of every tensor's data.

    Reading all of a large model would take minutes; the samples tell apart models of the same shape. It is
    no proof against data changed on purpose.
    """
    digest = hashlib.sha256()
    for header in headers:
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header.data)
    for tensor in tensors:
        size = len(tensor.data)
        for start in (0, size // 2, max(0, size - _SAMPLE)):
            digest.update(tensor.data[start : start + _SAMPLE].data)
    return digest.hexdigest()
