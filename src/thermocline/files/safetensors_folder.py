"""Opening model folders as Hugging Face writes them: config.json and one or more safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from thermocline.errors import ModelFormatError, printable
from thermocline.files.mapped import MappedFile, map_file, read_small
from thermocline.files.metadata import Metadata
from thermocline.files.safetensors_header import SafetensorsHeader, read_safetensors_header
from thermocline.files.source import fingerprint
from thermocline.files.strict_json import parse_object
from thermocline.files.tensors import Tensor, Weights

CONFIG: Final = "config.json"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
COMPANIONS: Final = frozenset(
    {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
"""Other files of a folder that may be read."""

_MAX_JSON: Final = 64 << 20
_MAX_SHARDS: Final = 4096
_SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HfFolder:
    """A model folder: config.json as metadata, and its tensors as views on the mapped shards.

    Nothing in the folder is ever executed or unpickled; `auto_map` and its like are only values here. Tensor
    data may lie unaligned to its elements, which numpy and the kernels allow.
    """

    kind = "hf"

    def __init__(
        self,
        path: Path,
        config: bytes,
        files: tuple[MappedFile, ...],
        headers: tuple[SafetensorsHeader, ...],
        warnings: tuple[str, ...],
    ) -> None:
        self.path = path
        self._config = config
        self.metadata = Metadata(path / CONFIG, parse_object(config, path / CONFIG, "content"))
        self._files = files
        self._headers = headers
        self.tensors: Mapping[str, Tensor] = {name: t for h in headers for name, t in h.tensors.items()}
        self.weights = Weights(self.tensors)
        self.warnings = warnings

    @classmethod
    def open(cls, path: Path | str, *, strict: bool = False) -> HfFolder:
        """Read config.json, map the safetensors files and check their headers and index.

        `strict` refuses an index that disagrees with the shards in ways that do no harm (a wrong total size,
        tensors it does not list), which are otherwise warnings.

        Raises:
            ModelFormatError: a file is missing, not what it should be, truncated, or breaks a rule of its format.
        """
        path = Path(path)
        _require_model_folder(path)
        config = read_small(path / CONFIG, _MAX_JSON)
        # Where both are present, the single file wins, as in transformers.
        index = None if (path / SINGLE).exists() else _Index.read(path / INDEX)
        files = tuple(map_file(path / name, minimum=8) for name in (index.shards if index else [SINGLE]))
        headers = tuple(read_safetensors_header(file) for file in files)
        warnings = index.check(files, headers, strict=strict) if index else ()
        return cls(path, config, files, headers, warnings)

    @property
    def config(self) -> Metadata:
        """config.json; the same as `metadata`."""
        return self.metadata

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over config, headers and samples of the data (see `files.source.fingerprint`)."""
        tables = [np.frombuffer(self._config, np.uint8)]
        tables += [f.view(0, h.size) for f, h in zip(self._files, self._headers, strict=True)]
        return fingerprint(tables, self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files together."""
        return sum(file.size for file in self._files)

    def companion(self, name: str) -> Path | None:
        """Path of another file of the folder, such as tokenizer.json; None if it is not there.

        Raises:
            ValueError: `name` is not one of `COMPANIONS`.
        """
        if name not in COMPANIONS:
            raise ValueError(f"{name} is not a companion file")
        path = self.path / name
        return path if path.exists() else None

    def json(self, name: str) -> Metadata | None:
        """A companion file's values; None if it is not there.

        Raises:
            ModelFormatError: it is not a JSON object, or too large.
        """
        path = self.companion(name)
        return None if path is None else Metadata(path, parse_object(read_small(path, _MAX_JSON), path, "content"))

    def close(self) -> None:
        """Let go of the files. Weights that were handed out stay valid, and keep their map alive."""
        self.tensors, self._files, self._headers = {}, (), ()
        self.weights = Weights({})

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Index:
    """model.safetensors.index.json: which shard holds which tensor."""

    def __init__(self, path: Path, homes: Mapping[str, str], total: Any) -> None:
        self.path = path
        self.homes = homes
        self.total = total
        self.shards = sorted(set(homes.values()))

    @classmethod
    def read(cls, path: Path) -> _Index:
        content = Metadata(path, parse_object(read_small(path, _MAX_JSON), path, "content"))
        homes = content.section("weight_map")
        for tensor, shard in homes.items():
            # A name and nothing else: no folder, no parent, no absolute path.
            if not isinstance(shard, str) or len(shard) > 255 or not _SHARD_NAME.fullmatch(shard):
                shown = printable(str(shard), 80)
                field = f'weight_map of "{printable(tensor, 80)}"'
                raise ModelFormatError(path, field, f'found "{shown}"; allowed: a plain name that ends in .safetensors')
        names = {tensor: str(shard) for tensor, shard in homes.items()}
        index = cls(path, names, content.section("metadata").get("total_size"))
        if not 1 <= len(index.shards) <= _MAX_SHARDS:
            problem = f"names {len(index.shards)} files; allowed: 1 to {_MAX_SHARDS}"
            raise ModelFormatError(path, "weight_map", problem)
        missing = [name for name in index.shards if not (path.parent / name).exists()]
        if missing:
            problem = f"{len(missing)} of {len(index.shards)} files are missing: {_first(missing)}"
            raise ModelFormatError(path, "weight_map", problem)
        return index

    def check(
        self, files: tuple[MappedFile, ...], headers: tuple[SafetensorsHeader, ...], *, strict: bool
    ) -> tuple[str, ...]:
        """Hold the index to the shards; returns what is odd but harmless, or refuses it if `strict`."""
        found: dict[str, str] = {}
        for file, header in zip(files, headers, strict=True):
            for name in header.tensors:
                if name in found:
                    label = f'tensor "{printable(name, 80)}"'
                    raise ModelFormatError(file.path, label, f"is also in {found[name]}")
                found[name] = file.path.name
        misplaced = [name for name, shard in self.homes.items() if found.get(name) != shard]
        if misplaced:
            problem = f"{len(misplaced)} tensors are not in the file it names: {_first(misplaced)}"
            raise ModelFormatError(self.path, "weight_map", problem)
        odd = []
        if unlisted := [name for name in found if name not in self.homes]:
            odd.append(("weight_map", f"{len(unlisted)} tensors of the files are not listed: {_first(unlisted)}"))
        size = sum(len(tensor.data) for header in headers for tensor in header.tensors.values())
        if self.total is not None and self.total != size:
            odd.append(("total_size", f"found {printable(str(self.total), 40)}; the files hold {size} bytes"))
        errors = [ModelFormatError(self.path, field, problem) for field, problem in odd]
        if errors and strict:
            raise errors[0]
        return tuple(map(str, errors))


def _require_model_folder(path: Path) -> None:
    """Refuse a folder without config.json and safetensors, saying what it holds instead."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError as error:
        raise ModelFormatError(path, "folder", "does not exist") from error
    except OSError as error:
        raise ModelFormatError(path, "folder", f"cannot be listed: {error.strerror}") from error
    if CONFIG in names and (SINGLE in names or INDEX in names):
        return
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if ggufs:
        problem = f"name one of its GGUF files instead: {_first(ggufs)}"
    elif pickled:
        problem = f"its weights are pickles, which are never opened: convert {_first(pickled)} to safetensors or GGUF"
    else:
        problem = f"needs {CONFIG} and {SINGLE} (or {INDEX})"
        others = sorted(name for name in names if name.endswith(".safetensors"))
        problem += f"; it has {_first(others)}" if others else ""
    missing = CONFIG if CONFIG not in names else SINGLE
    raise ModelFormatError(path, "folder", f"is not a model folder, {missing} is missing: {problem}")


def _first(names: list[str]) -> str:
    """The first five of `names`, fit for a message."""
    return ", ".join(printable(name, 80) for name in names[:5]) + (", …" if len(names) > 5 else "")
