"""A file that holds a model's neuron records bundled: gate, up and down row of a neuron side by side, one read each.

`M.bundle` lies beside the model `M.gguf`. Its first HEADER bytes are a line of JSON (format, version, the model's
fingerprint, and of each layer where its records begin, their bytes and stride) and zeros; then come the layers.
Records begin at whole blocks of the disk where that wastes little, so that a direct read fetches nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thermocline.errors import ModelFormatError
from thermocline.files.atomic import atomic_write
from thermocline.files.weight import Bytes, Weight
from thermocline.hardware.reader import Reader
from thermocline.memory.reads import Place, place_of

FORMAT, VERSION = "thermocline-bundle", 1
BLOCK = 4096
HEADER = 32 * BLOCK
"""Room for the line of JSON: enough for a thousand layers."""
WASTE = 1 / 8
"""Most of a record's bytes that are left empty to begin the next one at a whole block."""
ROWS = 256
"""Records that are in memory at once while a bundle is written."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: of each layer the offset of its first record, and the bytes from one to the next."""

    path: Path
    offsets: tuple[int, ...]
    strides: tuple[int, ...]

    def places(self, layer: int, row_bytes: Sequence[int]) -> list[Place]:
        """Where a layer's matrices lie, which have rows of so many bytes."""
        starts = np.cumsum([0, *row_bytes[:-1]])
        return [Place(self.path, self.offsets[layer] + int(at), self.strides[layer]) for at in starts]


def bundle_path(model: Path) -> Path:
    """Where a model's bundle lies."""
    return model.with_name(f"{model.name.removesuffix('.gguf')}.bundle")


def layer_matrices(weights: Mapping[str, Weight], layer: int) -> list[Weight] | None:
    """Gate (if there is one), up and down of a layer with neuron records; None for another layout."""
    blk = f"blk.{layer}.ffn_"
    if f"{blk}down_t.weight" not in weights:
        return None
    gate = [weights[f"{blk}gate.weight"]] if f"{blk}gate.weight" in weights else []
    return [*gate, weights[f"{blk}up.weight"], weights[f"{blk}down_t.weight"]]


def write_bundle(
    path: Path, fingerprint: str, layers: Sequence[Sequence[Weight]], progress: Progress | None = None
) -> int:
    """Write the records of `layers` (each its matrices), whole or not at all; the file's size in bytes.

    The model is read past the page cache.

    Raises:
        OutputError: the file could not be written.
        UsageError, HardwareError: the model's bytes are in no file, or cannot be read.
    """
    sizes = [[w.format.row_bytes(w.columns) for w in layer] for layer in layers]
    counts = [layer[0].rows for layer in layers]
    strides = [_stride(sum(row_bytes)) for row_bytes in sizes]
    offsets, end = [], HEADER
    for count, stride in zip(counts, strides, strict=True):
        offsets.append(end)
        end += -(-count * stride // BLOCK) * BLOCK
    about = {"format": FORMAT, "version": VERSION, "model": fingerprint, "size": end}
    header = json.dumps(about | {"counts": counts, "offsets": offsets, "strides": strides}).encode()
    readers: dict[Path, Reader] = {}
    try:
        with atomic_write(path, size=end) as file:
            file.write(header + b"\n" + bytes(HEADER - len(header) - 1))
            for number, layer in enumerate(layers):
                places = [place_of(weight) for weight in layer]
                for place in places:
                    if place.path not in readers:
                        readers[place.path] = Reader(place.path, depth=4, largest=max(map(max, sizes)) * ROWS)
                for start in range(0, counts[number], ROWS):
                    count = min(ROWS, counts[number] - start)
                    rows = np.zeros((count, strides[number]), np.uint8)
                    at = 0
                    for place, size in zip(places, sizes[number], strict=True):
                        rows[:, at : at + size] = _read(readers[place.path], place, start, count, size)
                        at += size
                    file.write(rows)
                file.write(bytes(-counts[number] * strides[number] % BLOCK))
                if progress is not None:
                    progress(number + 1, len(layers))
    finally:
        for reader in readers.values():
            reader.close()
    return end


def read_bundle(path: Path, fingerprint: str, layers: Sequence[Sequence[Weight]]) -> Bundle:
    """Open a model's bundle.

    Raises:
        ModelFormatError: it is none, is damaged, or of another model.
    """
    try:
        with path.open("rb") as file:
            head = file.readline(1 << 20)
        size = path.stat().st_size
        found: dict[str, Any] = json.loads(head)
        offsets, strides, counts = (tuple(int(x) for x in found[name]) for name in ("offsets", "strides", "counts"))
        stated = (found["format"], found["version"], found["model"], found["size"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFormatError(
            path, "header", f"cannot be read: {error}; remove the file to have it made anew"
        ) from error
    if stated != (FORMAT, VERSION, fingerprint, size) or not len(offsets) == len(strides) == len(counts) == len(layers):
        raise ModelFormatError(path, "header", "is of another model or damaged; remove the file to have it made anew")
    for layer, offset, stride, count in zip(layers, offsets, strides, counts, strict=True):
        record = sum(w.format.row_bytes(w.columns) for w in layer)
        if count != layer[0].rows or stride < record or offset < HEADER or offset + count * stride > size:
            raise ModelFormatError(path, "offsets", "do not fit the model; remove the file to have it made anew")
    return Bundle(path, offsets, strides)


def _stride(record: int) -> int:
    whole = -(-record // BLOCK) * BLOCK
    return whole if whole - record <= WASTE * record else record


def _read(reader: Reader, place: Place, start: int, count: int, size: int) -> Bytes:
    out = np.empty(count * size, np.uint8)
    offset = place.offset + start * place.stride
    one = np.array([[offset, count * size, 1]], np.int64)
    reader.wait(reader.submit(one, np.array([[offset, count * size, 0]], np.int64), out))
    return out.reshape(count, size)
