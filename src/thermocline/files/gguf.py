"""Opening GGUF models, whole or in parts, by memory map."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from thermocline.errors import ModelFormatError
from thermocline.files.gguf_header import Header, read_header
from thermocline.files.gguf_split import part_paths, require_one_model
from thermocline.files.gguf_types import DTYPES, POWERINFER_MAGIC
from thermocline.files.mapped import MappedFile, map_file
from thermocline.files.metadata import Metadata
from thermocline.files.source import fingerprint
from thermocline.files.tensors import Tensor, Weights

GPU_INDEX: Final = "generic.gpu_index"
"""What PowerInfer's placement files call their architecture."""
_SMALLEST: Final = 4


class GgufFile:
    """A GGUF v3 model: metadata, and its tensors as views on the mapped file.

    `powerinfer` says whether it is one of PowerInfer's sparse models (magic `PWRI`): its down projections are
    neuron records, its activation is ReLU, and it may hold predictors (see `files.powerinfer`).

    Names and values come from the file and are not to be trusted further than they were checked: names are
    never paths, and `Metadata`'s getters hold values to bounds.
    """

    kind = "gguf"

    def __init__(self, path: Path, files: tuple[MappedFile, ...], headers: tuple[Header, ...], *, strict: bool) -> None:
        self.path = path
        self._files = files
        self._headers = headers
        self.metadata = Metadata(path, headers[0].values)
        self.tensors: Mapping[str, Tensor] = {name: t for h in headers for name, t in h.tensors.items()}
        self.weights = Weights(self.tensors)
        self.powerinfer = headers[0].magic == POWERINFER_MAGIC
        if self.powerinfer:
            _require_records(self)
        self.warnings: tuple[str, ...] = tuple(_trailing_bytes(files, headers, strict=strict))

    @classmethod
    def open(cls, path: Path | str, *, strict: bool = False) -> GgufFile:
        """Map the file, or all parts when given the first (`NAME-00001-of-0000N.gguf`), and check the headers.

        `strict` refuses bytes after the last tensor, which are otherwise a warning.

        Raises:
            ModelFormatError: a file is missing, not GGUF, truncated, breaks a rule of the format, or is
                PowerInfer's without being a sparse model.
        """
        path = Path(path)
        files = [map_file(path, minimum=_SMALLEST)]
        headers = [read_header(files[0])]
        for part in part_paths(path, headers[0]):
            files.append(map_file(part, minimum=_SMALLEST))
            headers.append(read_header(files[-1]))
        require_one_model(path, [f.path for f in files], headers)
        return cls(path, tuple(files), tuple(headers), strict=strict)

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over the headers and samples of the data (see `files.source.fingerprint`)."""
        tables = (f.view(0, h.size) for f, h in zip(self._files, self._headers, strict=True))
        return fingerprint(tables, self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of the file, or of all parts together."""
        return sum(file.size for file in self._files)

    def typed_metadata(self) -> dict[str, Any]:
        """The metadata in the types the file stores, as `write_gguf` takes them: numbers are numpy scalars."""
        types = self._headers[0].types
        return {
            key: DTYPES[types[key][0]].type(value) if types[key][0] in DTYPES else value
            for key, value in self.metadata.items()
        }

    def close(self) -> None:
        """Let go of the file. Weights and arrays that were handed out stay valid, and keep their map alive."""
        self.tensors, self._files, self._headers = {}, (), ()
        self.metadata, self.weights = Metadata(self.path, {}), Weights({})

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_records(file: GgufFile) -> None:
    """Refuse PowerInfer's other files, and models that only claim to be sparse."""
    if file.metadata.text("general.architecture", "") == GPU_INDEX:
        raise ModelFormatError(
            file.path, "general.architecture", "is PowerInfer's GPU index, not a model: name the model it belongs to"
        )
    if "blk.0.ffn_down_t.weight" not in file.tensors:
        raise ModelFormatError(
            file.path, "tensors", "blk.0.ffn_down_t.weight is missing, which every sparse model of PowerInfer has"
        )


def _trailing_bytes(files: tuple[MappedFile, ...], headers: tuple[Header, ...], *, strict: bool) -> list[str]:
    """Bytes that belong to no tensor: an appended archive, or a download that was resumed wrongly."""
    warnings = []
    for file, header in zip(files, headers, strict=True):
        if file.size > header.end:
            problem = f"{file.size - header.end} bytes follow the last tensor, which ends at {header.end}"
            error = ModelFormatError(file.path, "size", problem, offset=header.end)
            if strict:
                raise error
            warnings.append(str(error))
    return warnings
