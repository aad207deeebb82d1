"""Tensors of PyTorch's `.pt` files, read without executing anything, and written so that PyTorch reads them.

Source of the layout: what `torch.save` of PyTorch 1.6 and later makes: a zip archive of stored entries, in one
folder: `data.pkl`, a pickle that describes the tensors, and `data/N`, the bytes of each storage.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from thermocline.errors import ModelFormatError, OutputError, printable
from thermocline.files.mapped import MappedFile, map_file
from thermocline.files.pickle_machine import MAX_PICKLE, Global, refuse, run_pickle
from thermocline.files.signature import looks_like
from thermocline.files.stored_zip import read_stored, write_stored
from thermocline.files.weight import Bytes

Array = npt.NDArray[Any]

MAX_AXES: Final = 8
MAX_KEY: Final = 512
"""Most characters of a tensor's name."""

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}
_STORAGES: Final = {dtype: name for name, dtype in _DTYPES.items() if name != "BFloat16Storage"}
_MAX_ELEMENTS: Final = 1 << 48
_LEGACY: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """The elements of one `data/N`; those of bfloat16 as their 16 bits."""

    values: Array
    bfloat16: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A tensor as the pickle describes it: a view on its storage, which never leaves it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def array(self) -> Array:
        values = self.storage.values
        steps = tuple(stride * values.itemsize for stride in self.strides)
        view: Array = as_strided(values[self.offset :], self.shape, steps, writeable=False)
        return (view.astype(np.uint32) << 16).view(np.float32) if self.storage.bfloat16 else view


def read_tensor_pt(path: Path | str) -> Array | dict[str, Array]:
    """The tensor, or the tensors by name, that `torch.save` wrote to `path`.

    Arrays are read-only views on the mapped file in the file's dtype; bfloat16, which numpy has not, is widened to
    float32. No code of the file is run and nothing is imported for it (see `files.pickle_machine`).

    Raises:
        ModelFormatError: the file is truncated, in one of PyTorch's older formats, holds anything but dense
            tensors, or its tensors leave their storages.
    """
    path = Path(path)
    file = map_file(path, minimum=4)
    entries = _contents(file)
    reader = _Reader(path, entries)
    found = run_pickle(bytes(entries["data.pkl"]), path, _GLOBALS, reader.storage)
    tensors = _tensors(path, found)
    # Several tensors can share bytes; more elements than bytes is a small file that asks for a large memory.
    elements = sum(tensor.elements for tensor in tensors.values())
    if elements > file.size:
        problem = f"{elements} elements in a file of {file.size} bytes; allowed: at most one a byte"
        raise ModelFormatError(path, "tensors", problem)
    if isinstance(found, _Tensor):
        return found.array()
    return {name: tensor.array() for name, tensor in tensors.items()}


def write_tensor_pt(path: Path | str, tensors: Array | Mapping[str, Array]) -> None:
    """Write one tensor, or tensors by name, so that `torch.load` reads them, also with `weights_only=True`.

    Raises:
        OutputError: the file could not be written, or an array's dtype is none of PyTorch's.
    """
    path = Path(path)
    named = {"": tensors} if isinstance(tensors, np.ndarray) else dict(tensors)
    described, storages = [], []
    for number, (name, array) in enumerate(named.items()):
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _STORAGES or array.ndim > MAX_AXES:
            problem = f'tensor "{printable(name, 80)}" of {array.ndim} axes of {array.dtype}'
            raise OutputError(f"{printable(str(path))}: {problem}: allowed are 8 axes of {_listed(_STORAGES)}")
        described.append(_describe(array, _STORAGES[dtype], number))
        storages.append(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
    body = described[0] if isinstance(tensors, np.ndarray) else _describe_dict(list(named), described)
    program = b"\x80\x02" + body + b"."
    if len(program) > MAX_PICKLE:
        raise OutputError(f"{printable(str(path))}: {len(named)} tensors take more than {MAX_PICKLE} bytes to describe")
    entries: list[tuple[str, bytes | memoryview]] = [("archive/data.pkl", program), ("archive/byteorder", b"little")]
    entries += [(f"archive/data/{i}", storage) for i, storage in enumerate(storages)]
    write_stored(path, [*entries, ("archive/version", b"3\n")])


# Reading


def _contents(file: MappedFile) -> dict[str, Bytes]:
    """The entries, without the name of the one folder that they are in."""
    if file.buffer[:4] != b"PK\3\4":
        raise ModelFormatError(file.path, "magic", f"is not a zip archive of torch.save; {_older(file)}", offset=0)
    entries = read_stored(file)
    folders = {name.partition("/")[0] for name in entries}
    contents = {name.partition("/")[2]: data for name, data in entries.items()}
    if len(folders) != 1 or "data.pkl" not in contents:
        listed = ", ".join(printable(name, 40) for name in sorted(folders)[:5])
        raise ModelFormatError(file.path, "zip", f"needs data.pkl in its one folder; it has {listed or 'nothing'}")
    if "constants.pkl" in contents or any(name.startswith("code/") for name in contents):
        problem = "is a TorchScript program, not tensors: save its state dict with torch.save"
        raise ModelFormatError(file.path, "zip", problem)
    order = bytes(contents.get("byteorder", np.empty(0, np.uint8))[:16])
    if order not in (b"", b"little"):
        raise ModelFormatError(file.path, "byteorder", f"found {printable(repr(order))}; allowed: little")
    return contents


def _older(file: MappedFile) -> str:
    remedy = "load it in PyTorch and save it again"
    if file.buffer[: len(_LEGACY)] == _LEGACY:
        return f"it is in PyTorch's legacy pickle format of before 1.6, which is never opened: {remedy}"
    if file.buffer[257:262] == b"ustar":
        return f"it is in PyTorch's legacy tar format of before 0.1.10, which is never opened: {remedy}"
    return looks_like(file)


class _Reader:
    """Makes storages of the persistent ids in the pickle."""

    def __init__(self, path: Path, entries: Mapping[str, Bytes]) -> None:
        self._path = path
        self._entries = entries

    def storage(self, identity: object) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) != 5:
            refuse("a persistent id is not that of a storage")
        kind, dtype, key, location, count = identity
        texts = isinstance(kind, str) and isinstance(key, str) and isinstance(location, str)
        if not texts or kind != "storage" or not isinstance(dtype, Global) or dtype.apply is not None:
            refuse("a persistent id is not that of a storage")
        name = dtype.name.removeprefix("torch.")
        data = self._entries.get(f"data/{key}")
        if data is None:
            refuse(f"there is no entry data/{printable(key, 40)} for a storage")
        numpy_type = _DTYPES[name]
        if not _whole(count) or count * numpy_type.itemsize != len(data):
            shown = count if _whole(count) else "no number of"
            refuse(f"data/{printable(key, 40)} has {len(data)} bytes; {shown} elements of {name} are claimed")
        if numpy_type == np.bool_ and data.max(initial=0) > 1:
            refuse(f"data/{printable(key, 40)} has booleans other than 0 and 1")
        return _Storage(data.view(numpy_type), name == "BFloat16Storage")


def _rebuild(arguments: tuple[Any, ...]) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)`."""
    if len(arguments) not in (6, 7):
        refuse(f"a tensor of {len(arguments)} arguments; allowed: 6 or 7")
    storage, offset, shape, strides, grad, hooks, *metadata = arguments
    if not isinstance(storage, _Storage) or not isinstance(grad, bool):
        refuse("a tensor without a storage")
    if not isinstance(hooks, dict) or hooks or any(metadata):
        refuse("a tensor with hooks or metadata")
    if not (_wholes(shape) and _wholes(strides) and len(shape) == len(strides) <= MAX_AXES and _whole(offset)):
        refuse(f"a tensor whose shape, strides and offset are not at most {MAX_AXES} whole numbers from 0")
    available = len(storage.values)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if prod(shape) > available or (offset > available if 0 in shape else last >= available):
        refuse(f"a tensor of shape {list(shape)} and strides {list(strides)} at {offset} leaves {available} elements")
    return _Tensor(storage, offset, shape, strides)


def _ordered(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        refuse("an OrderedDict with arguments")
    return {}


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _wholes(values: object) -> bool:
    return isinstance(values, tuple) and len(values) <= MAX_AXES and all(_whole(value) for value in values)


_GLOBALS: Final = {
    "collections OrderedDict": Global("collections.OrderedDict", _ordered),
    "torch._utils _rebuild_tensor_v2": Global("torch._utils._rebuild_tensor_v2", _rebuild),
} | {f"torch {name}": Global(f"torch.{name}") for name in _DTYPES}


def _tensors(path: Path, found: object) -> dict[str, _Tensor]:
    """What the pickle made, if it is tensors and nothing else."""
    if isinstance(found, _Tensor):
        return {"": found}
    if not isinstance(found, dict):
        raise ModelFormatError(path, "pickle", "holds neither a tensor nor a dictionary of tensors")
    for name, value in found.items():
        label = f'entry "{printable(name, 80)}"'
        if not isinstance(value, _Tensor):
            raise ModelFormatError(path, label, f"is a {type(value).__name__.lstrip('_')}; allowed: tensors")
        if len(name) > MAX_KEY:
            raise ModelFormatError(path, label, f"a name of {len(name)} characters; allowed: at most {MAX_KEY}")
    return found


# Writing: the opcodes of protocol 2


def _describe(array: Array, storage: str, number: int) -> bytes:
    """A call of `_rebuild_tensor_v2` for an array in C order in the storage `data/{number}`."""
    strides = [prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    identity = _text("storage") + f"ctorch\n{storage}\n".encode() + _text(str(number)) + _text("cpu")
    shape, steps = (b"(" + b"".join(map(_integer, numbers)) + b"t" for numbers in (array.shape, strides))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + identity
        + _integer(array.size)
        + b"tQ"
        + _integer(0)
        + shape
        + steps
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _describe_dict(names: Sequence[str], described: Sequence[bytes]) -> bytes:
    items = b"".join(_text(name) + tensor for name, tensor in zip(names, described, strict=True))
    return b"ccollections\nOrderedDict\n)R(" + items + b"u"


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(number: int) -> bytes:
    return b"J" + struct.pack("<i", number) if number < 1 << 31 else b"\x8a\x08" + struct.pack("<q", number)


def _listed(names: Mapping[np.dtype[Any], str]) -> str:
    return ", ".join(str(dtype) for dtype in names)
