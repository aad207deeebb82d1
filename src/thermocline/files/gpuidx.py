"""PowerInfer's GPU index: which neurons of each layer lie on the GPU (`MODEL.generated.gpuidx`).

Source of the layout: PowerInfer's exporter and loader (Song et al., SOSP 2024). It is a GGUF file of the magic
`PWRI` with two vectors of int32 for each layer, which PowerInfer reads by position: `blk.N.gpu_idx`, a mask of
n_ff, and `blk.N.gpu_bucket`, the numbers of the neurons in it, rising.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import ModelFormatError, OutputError, printable
from thermocline.files.formats import GGML_TYPES
from thermocline.files.gguf import GPU_INDEX
from thermocline.files.gguf_header import Header, read_header
from thermocline.files.gguf_types import POWERINFER_MAGIC
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.mapped import map_file
from thermocline.files.metadata import Metadata
from thermocline.files.tensors import Tensor
from thermocline.files.weight import Bytes

SUFFIX: Final = ".generated.gpuidx"
"""What PowerInfer appends to the model's file name."""

_I32: Final = next(fmt for fmt in GGML_TYPES.values() if fmt.name == "I32")
_CAPACITY: Final = "split.vram_capacity"
_MAX_CAPACITY: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, eq=False)
class GpuIndex:
    """Of every layer the mask (n_ff,), true where a neuron lies on the GPU.

    `vram_capacity` is the bytes that PowerInfer had for them: it uses the file as long as it has as many.
    """

    masks: tuple[npt.NDArray[np.bool_], ...]
    vram_capacity: int

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.masks)

    @property
    def n_ff(self) -> int:
        """Neurons of a layer."""
        return len(self.masks[0])

    def bucket(self, layer: int) -> npt.NDArray[np.int32] | None:
        """The neurons on the GPU, rising; None where it holds none or all of the layer, which is then not split."""
        bucket = _numbers(self.masks[layer])
        return bucket if 0 < len(bucket) < self.n_ff else None


def read_gpu_index(path: Path | str, *, n_layer: int | None = None, n_ff: int | None = None) -> GpuIndex:
    """Read a GPU index and hold its masks and buckets to each other.

    `n_layer` and `n_ff` are those of the model it is for, where it is known: PowerInfer itself checks neither the
    width nor whether the index was made for this model.

    Raises:
        ModelFormatError: it is truncated, no GPU index, or a mask or a bucket is not what it should be.
    """
    path = Path(path)
    file = map_file(path, minimum=4)
    header = read_header(file)
    metadata = Metadata(path, header.values)
    _require_index(path, header, metadata)
    if file.size > header.end:
        raise ModelFormatError(path, "size", f"{file.size - header.end} bytes follow the last tensor")
    capacity = metadata.integer(_CAPACITY, 0, _MAX_CAPACITY)
    tensors = list(header.tensors.values())
    layers = len(tensors) // 2
    if not tensors or len(tensors) % 2:
        raise ModelFormatError(path, "tensors", f"found {len(tensors)}; allowed: two for each layer")
    claimed = metadata.integer(f"{GPU_INDEX}.block_count", 1, 1 << 12, layers)
    wanted = n_layer if n_layer is not None else claimed
    if layers != wanted or layers != claimed:
        problem = f"holds {layers}; its block_count is {claimed}" + (f", the model has {n_layer}" if n_layer else "")
        raise ModelFormatError(path, "layers", problem)
    width = n_ff if n_ff is not None else tensors[0].elements
    masks = [_mask(path, i, tensors[2 * i], tensors[2 * i + 1], width) for i in range(layers)]
    return GpuIndex(tuple(masks), capacity)


def is_gpu_index(path: Path | str) -> bool:
    """Whether a file is a GPU index that can be read."""
    try:
        read_gpu_index(path)
    except ModelFormatError:
        return False
    return True


def write_gpu_index(path: Path | str, masks: Sequence[npt.NDArray[Any]], vram_capacity: int) -> int:
    """Write a GPU index, whole or not at all, and return its size in bytes.

    `masks` are booleans (or 0 and 1) of every layer; `vram_capacity` in bytes.

    Raises:
        OutputError: it could not be written, the masks are none, or differ in length.
    """
    shown = printable(str(path))
    widths = {mask.shape for mask in masks}
    if len(widths) != 1 or any(mask.ndim != 1 or not len(mask) or ((mask != 0) & (mask != 1)).any() for mask in masks):
        raise OutputError(f"{shown}: masks must be vectors of 0 and 1 of one length, one a layer")
    if not 0 <= vram_capacity <= _MAX_CAPACITY:
        raise OutputError(f"{shown}: a VRAM capacity of {vram_capacity} bytes; allowed: 0 to 2^63-1")
    metadata = {
        "general.architecture": GPU_INDEX,
        f"{GPU_INDEX}.block_count": np.uint32(len(masks)),
        _CAPACITY: np.uint64(vram_capacity),
    }
    return write_gguf(path, metadata, list(_vectors(masks)), powerinfer=True)


def _vectors(masks: Sequence[npt.NDArray[Any]]) -> Iterator[NewTensor]:
    for layer, mask in enumerate(masks):
        for name, values in (("gpu_idx", mask.astype("<i4")), ("gpu_bucket", _numbers(mask != 0))):
            yield NewTensor(f"blk.{layer}.{name}", _I32, values.shape, _Raw(values))


@dataclass(frozen=True, slots=True)
class _Raw:
    """Makes the bytes of a vector."""

    values: npt.NDArray[np.int32]

    def __call__(self) -> Bytes:
        return self.values.view(np.uint8)


def _numbers(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    return np.flatnonzero(mask).astype("<i4")


def _require_index(path: Path, header: Header, metadata: Metadata) -> None:
    if header.magic != POWERINFER_MAGIC:
        raise ModelFormatError(path, "magic", "is an ordinary GGUF file, not PowerInfer's GPU index", offset=0)
    kind = metadata.text("general.architecture", limit=1000)
    if kind != GPU_INDEX:
        problem = f"found {printable(kind, 40)}; allowed: {GPU_INDEX}"
        raise ModelFormatError(path, "general.architecture", problem)


def _mask(path: Path, layer: int, mask: Tensor, bucket: Tensor, width: int) -> npt.NDArray[np.bool_]:
    for tensor, name in ((mask, "gpu_idx"), (bucket, "gpu_bucket")):
        if tensor.name != f"blk.{layer}.{name}":
            problem = f"found at the place of blk.{layer}.{name}, which is read by position"
            raise ModelFormatError(path, _label(tensor), problem)
        if tensor.format is not _I32 or len(tensor.shape) != 1:
            problem = f"found {tensor.format.name} of shape {list(tensor.shape)}; allowed: a vector of I32"
            raise ModelFormatError(path, _label(tensor), problem)
    if mask.elements != width:
        raise ModelFormatError(path, _label(mask), f"has {mask.elements} neurons; wanted are {width}")
    values = mask.data.view("<i4")
    lies_on_gpu: npt.NDArray[np.bool_] = values != 0
    strange = lies_on_gpu & (values != 1)
    if strange.any():
        raise ModelFormatError(path, _label(mask), f"found {values[strange][0]}; allowed: 0, 1")
    found, wanted = bucket.data.view("<i4"), _numbers(lies_on_gpu)
    # Of a layer that lies whole on the GPU, PowerInfer does not look at the bucket.
    whole = len(wanted) == width and not len(found)
    if not whole and not np.array_equal(found, wanted):
        problem = f"its {len(found)} neurons are not the {len(wanted)} of the mask, rising"
        raise ModelFormatError(path, _label(bucket), problem)
    return lies_on_gpu


def _label(tensor: Tensor) -> str:
    return f'tensor "{printable(tensor.name, 80)}"'
