"""Sidecars: what belongs to a model but lies beside it, such as activity statistics and predictors.

A sidecar is a safetensors file. Its `__metadata__` says what it is and to which model it belongs; matrices in block
formats, for which safetensors has no type, are stored as the bytes of their rows. Two sums guard it: the checksum
over what the file is (kind, model, tensors), which is also its identity, and the seal over all notes, so that
`update_info` changes what is said about the tensors without making another file of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import (
    FingerprintError,
    ModelFormatError,
    NumericalError,
    OutputError,
    UnsupportedModelError,
    printable,
)
from thermocline.files.atomic import atomic_write
from thermocline.files.formats import BF16, BY_NAME, F16, F32
from thermocline.files.mapped import map_file
from thermocline.files.quantize import all_finite
from thermocline.files.safetensors_header import MAX_HEADER, MAX_TENSORS, read_safetensors_header
from thermocline.files.strict_json import parse_object
from thermocline.files.tensors import Tensor
from thermocline.files.weight import Bytes, Weight

VERSION: Final = "1"
"""Of the layout; a file of another version is refused."""

_VERSION_NOTE, _SEAL_NOTE = "thermocline.sidecar", "thermocline.seal"
_NOTES: Final = {name: f"thermocline.{name}" for name in ("kind", "model", "model_name", "info", "weights", "checksum")}
_DTYPES: Final = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAMES: Final = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_NATIVE: Final = {F32.name: 4, F16.name: 2, BF16.name: 2}
_ALIGNMENT: Final = 64

AnyArray = npt.NDArray[Any]


class SidecarKind(StrEnum):
    """What a sidecar holds. An audit is of a predictor inside a model; a journal is unfinished work that its maker will
    go on with.
    """

    ACTIVITY = "activity"
    PREDICTOR = "predictor"
    ORDER = "order"
    AUDIT = "audit"
    JOURNAL = "journal"


FROM_FOLDERS: Final = (SidecarKind.ACTIVITY, SidecarKind.PREDICTOR)
"""What PowerInfer keeps in folders."""


@dataclass(frozen=True, slots=True, eq=False)
class Sidecar:
    """An opened sidecar. `arrays` and `weights` are read-only views on the mapped file.

    `model_fingerprint` and `model_name` tell whose it is, `info` is what its maker wrote down about it (JSON), and
    `checksum` (64 hex digits over kind, model and tensors) is its identity.
    """

    path: Path
    kind: SidecarKind
    model_fingerprint: str
    model_name: str
    info: Mapping[str, Any]
    arrays: Mapping[str, AnyArray]
    weights: Mapping[str, Weight]
    checksum: str

    def require_model(self, fingerprint: str, name: str = "") -> None:
        """Refuse to be used with any model but its own.

        Raises:
            FingerprintError: `fingerprint` is another model's.
        """
        if fingerprint != self.model_fingerprint:
            raise FingerprintError(
                self.path,
                named(self.model_name, self.model_fingerprint),
                named(name, fingerprint),
                f"give the {self.kind} that was made with this model, or make it anew",
            )

    def require_finite(self) -> None:
        """Look at every number.

        Raises:
            NumericalError: one is NaN or infinite; the tensor is named.
        """
        for name, array in self.arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise _not_finite(self.path, name)
        for name, weight in self.weights.items():
            if not all_finite(weight):
                raise _not_finite(self.path, name)


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as it will lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    alignment: int


def write_sidecar(
    path: Path | str,
    kind: SidecarKind,
    model_fingerprint: str,
    info: Mapping[str, Any],
    tensors: Mapping[str, AnyArray | Weight],
    *,
    model_name: str = "",
) -> str:
    """Write a sidecar, whole or not at all; returns its checksum.

    `model_fingerprint` is `ModelSource.fingerprint`. `tensors` are numpy arrays of booleans, integers or floats, of
    any shape, and `Weight`s in any readable format.

    Raises:
        OutputError: it could not be written (the old file, if any, is untouched), or a name, a type or `info` is
            not what the format takes.
    """
    path = Path(path)
    if not _is_fingerprint(model_fingerprint):
        raise OutputError(f"{printable(str(path))}: {printable(model_fingerprint, 80)} is no fingerprint of a model")
    stored = [_stored(path, name, tensor) for name, tensor in tensors.items()]
    stored.sort(key=lambda tensor: (-tensor.alignment, tensor.name))
    if len(stored) > MAX_TENSORS:
        raise OutputError(f"{printable(str(path))}: {len(stored)} tensors; allowed: at most {MAX_TENSORS}")
    formats = {
        name: {"format": tensor.format.name, "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
        if isinstance(tensor, Weight)
    }
    notes = {
        _VERSION_NOTE: VERSION,
        _NOTES["kind"]: SidecarKind(kind).value,
        _NOTES["model"]: model_fingerprint,
        _NOTES["model_name"]: model_name,
        _NOTES["info"]: _json(path, info),
        _NOTES["weights"]: _json(path, formats),
    }
    checksum = notes[_NOTES["checksum"]] = _checksum(notes, {t.name: (t.dtype, t.shape, t.data) for t in stored})
    notes[_SEAL_NOTE] = _seal(notes)
    header = _header(path, notes, stored)
    with atomic_write(path, size=len(header) + sum(t.data.nbytes for t in stored)) as file:
        file.write(header)
        for tensor in stored:
            file.write(tensor.data)
    return checksum


def read_sidecar(path: Path | str, kind: SidecarKind | None = None, *, verify: bool = True) -> Sidecar:
    """Open a sidecar; `kind` is what it has to be, None for any.

    `verify` reads all of it to compare the checksum; without, only the notes are held to their seal.

    Raises:
        ModelFormatError: it is not a sidecar, or another kind of one, or damaged.
        UnsupportedModelError: it is of a version that this one cannot read.
    """
    path = Path(path)
    if path.is_dir():
        hint = f": of PowerInfer's folders `thermocline {kind} import` makes one" if kind in FROM_FOLDERS else ""
        raise ModelFormatError(path, "file", f"is a folder; needed is one file{hint}")
    header = read_safetensors_header(map_file(path, minimum=8))
    notes = header.notes
    _check_notes(path, notes, kind)
    info = parse_object(notes[_NOTES["info"]].encode(), path, "info")
    formats = parse_object(notes[_NOTES["weights"]].encode(), path, "weights")
    unknown = next((name for name in formats if name not in header.tensors), None)
    if unknown is not None:
        raise ModelFormatError(path, "weights", f'tensor "{printable(unknown, 80)}" is not in the file')
    weights = {name: _weight(path, header.tensors[name], fields) for name, fields in formats.items()}
    arrays = {name: _array(path, tensor) for name, tensor in header.tensors.items() if name not in formats}
    checksum = notes[_NOTES["checksum"]]
    if verify:
        found = _checksum(notes, {n: (t.format.name, t.shape, t.data) for n, t in header.tensors.items()})
        if found != checksum:
            raise ModelFormatError(path, "checksum", "does not fit the content: the file is damaged; make it anew")
    return Sidecar(
        path=path,
        kind=SidecarKind(notes[_NOTES["kind"]]),
        model_fingerprint=notes[_NOTES["model"]],
        model_name=notes[_NOTES["model_name"]],
        info=info,
        arrays=arrays,
        weights=weights,
        checksum=checksum,
    )


def is_sidecar(path: Path | str, kind: SidecarKind) -> bool:
    """Whether a file says that it is a sidecar of this kind, of whatever version; it may be damaged beyond that."""
    try:
        return read_safetensors_header(map_file(Path(path), minimum=8)).notes.get(_NOTES["kind"]) == kind
    except ModelFormatError:
        return False


def update_info(path: Path | str, changes: Mapping[str, Any]) -> Sidecar:
    """Replace top-level keys of a sidecar's `info` (a value of None removes one), whole or not at all.

    The tensors and the checksum stay.

    Raises:
        ModelFormatError, UnsupportedModelError: as `read_sidecar`.
        OutputError: as `write_sidecar`.
    """
    old = read_sidecar(path)
    info = {key: value for key, value in {**old.info, **changes}.items() if value is not None}
    write_sidecar(path, old.kind, old.model_fingerprint, info, {**old.arrays, **old.weights}, model_name=old.model_name)
    return read_sidecar(path)


def require_finite(path: Path | str, tensors: Mapping[str, AnyArray | Weight]) -> None:
    """Refuse NaN and infinity before they are written to `path`.

    Raises:
        NumericalError: a tensor holds one; it is named.
    """
    for name, tensor in tensors.items():
        finite = all_finite(tensor) if isinstance(tensor, Weight) else bool(np.isfinite(tensor).all())
        if not finite:
            raise _not_finite(path, name)


def _stored(path: Path, name: str, tensor: AnyArray | Weight) -> _Stored:
    label = f'{printable(str(path))}: tensor "{printable(name, 80)}"'
    if not name or not name.isprintable() or name == "__metadata__":
        raise OutputError(f"{label}: names are printable and not empty")
    if isinstance(tensor, Weight):
        if BY_NAME.get(tensor.format.name) is not tensor.format:
            raise OutputError(f"{label}: {tensor.format.name} cannot be stored; allowed are {', '.join(BY_NAME)}")
        if 0 in tensor.shape:
            raise OutputError(f"{label}: is empty, {tensor.rows} x {tensor.columns}")
        data = np.ascontiguousarray(tensor.data)
        native = tensor.format.name in _NATIVE
        dtype, shape = (tensor.format.name, tensor.shape) if native else ("U8", data.shape)
        return _Stored(name, dtype, shape, data.reshape(-1), _NATIVE.get(tensor.format.name, 2))
    array = np.asarray(tensor)
    shape = array.shape
    little = array.dtype.newbyteorder("<")
    if little not in _NAMES:
        raise OutputError(f"{label}: arrays of {array.dtype} cannot be stored")
    flat = np.ascontiguousarray(array, dtype=little).reshape(-1).view(np.uint8)
    return _Stored(name, _NAMES[little], shape, flat, little.itemsize)


def _json(path: Path, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"{printable(str(path))}: info is not JSON: {error}") from error


def _header(path: Path, notes: Mapping[str, str], stored: list[_Stored]) -> bytes:
    listed: dict[str, Any] = {"__metadata__": notes}
    start = 0
    for tensor in stored:
        stop = start + tensor.data.nbytes
        listed[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    try:
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{printable(str(path))}: a name or info is not text that UTF-8 can store") from error
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise OutputError(f"{printable(str(path))}: names and info take {len(text)} bytes; allowed: {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _check_notes(path: Path, notes: Mapping[str, str], kind: SidecarKind | None) -> None:
    if _VERSION_NOTE not in notes:
        raise ModelFormatError(path, _VERSION_NOTE, "is missing: this safetensors file is no sidecar of thermocline")
    version = notes[_VERSION_NOTE]
    if version != VERSION:
        raise UnsupportedModelError(
            f"{printable(str(path))}: is a sidecar of version {printable(version, 20)}; this program reads "
            f"{VERSION}: update it, or make the file anew"
        )
    for name in (*_NOTES.values(), _SEAL_NOTE):
        if name not in notes:
            raise ModelFormatError(path, name, "is missing")
    if notes[_SEAL_NOTE] != _seal(notes):
        raise ModelFormatError(path, "notes", "do not fit their seal: the file is damaged; make it anew")
    found = notes[_NOTES["kind"]]
    if found not in list(SidecarKind):
        raise ModelFormatError(path, "kind", f"is {printable(found, 40)}; known are {', '.join(SidecarKind)}")
    if kind is not None and found != kind:
        raise ModelFormatError(path, "kind", f"this is a file of kind {found}; needed is one of kind {kind}")
    if not _is_fingerprint(notes[_NOTES["model"]]):
        raise ModelFormatError(path, "model", "is no fingerprint of 64 hex digits")


def _is_fingerprint(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _weight(path: Path, tensor: Tensor, fields: Any) -> Weight:
    """The tensor as the block format that the notes tell."""
    label = f'tensor "{printable(tensor.name, 80)}"'
    if not isinstance(fields, dict) or fields.keys() != {"format", "shape"}:
        raise ModelFormatError(path, label, "its note needs format and shape, and nothing else")
    name, shape = fields["format"], fields["shape"]
    if not isinstance(name, str) or name not in BY_NAME:
        raise ModelFormatError(path, label, f"is in an unknown format; known are {', '.join(BY_NAME)}")
    fmt = BY_NAME[name]
    counts = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 1 <= n < 1 << 40 for n in shape)
    if not counts or shape[1] % fmt.block:
        raise ModelFormatError(path, label, f"its shape is not two counts, the second a multiple of {fmt.block}")
    rows, columns = shape
    wanted = (name, (rows, columns)) if name in _NATIVE else ("U8", (rows, fmt.row_bytes(columns)))
    if (tensor.format.name, tensor.shape) != wanted:
        found = f"{tensor.format.name} {list(tensor.shape)}"
        raise ModelFormatError(path, label, f"is stored as {found}; {name} {shape} is {wanted[0]} {list(wanted[1])}")
    return Weight(tensor.name, fmt, (rows, columns), tensor.data.reshape(rows, -1))


def _array(path: Path, tensor: Tensor) -> AnyArray:
    dtype = _DTYPES.get(tensor.format.name)
    if dtype is None:
        label = f'tensor "{printable(tensor.name, 80)}"'
        raise ModelFormatError(path, label, f"is of type {tensor.format.name}; readable are {', '.join(_DTYPES)}")
    if tensor.format.name == "BOOL" and tensor.data.size and tensor.data.max() > 1:
        raise ModelFormatError(path, f'tensor "{printable(tensor.name, 80)}"', "holds what is neither true nor false")
    return tensor.data.view(dtype).reshape(tensor.shape)


def _checksum(notes: Mapping[str, str], tensors: Mapping[str, tuple[str, tuple[int, ...], Bytes]]) -> str:
    """SHA-256 in hex over kind, model, formats and every tensor, in the order of their names."""
    digest = hashlib.sha256()
    _feed(digest, *(notes[_NOTES[name]] for name in ("kind", "model", "weights")))
    for name, (dtype, shape, data) in sorted(tensors.items()):
        _feed(digest, name, dtype, str(list(shape)))
        digest.update(data.data)
    return digest.hexdigest()


def _seal(notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(notes.keys() - {_SEAL_NOTE}):
        _feed(digest, name, notes[name])
    return digest.hexdigest()


def _feed(digest: Any, *texts: str) -> None:
    """Add texts with their lengths, so that no two lists of texts look the same."""
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)


def named(name: str, fingerprint: str) -> str:
    """How messages call a model: equal names do not make equal models."""
    return f"{name} ({fingerprint[:12]})" if name else fingerprint[:12]


def _not_finite(path: Path | str, name: str) -> NumericalError:
    return NumericalError(
        f'{printable(str(path))}: tensor "{printable(name, 80)}" holds NaN or infinity; make the file anew'
    )
