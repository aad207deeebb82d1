"""Writing models as GGUF files: a Hugging Face folder converted, or any model as neuron records ready to map."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from thermocline.errors import UsageError
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.weight import Bytes
from thermocline.memory.layout import Layout, lay_out
from thermocline.memory.reblock import Reblocked
from thermocline.memory.tokenizer_metadata import gguf_tokenizer
from thermocline.model.header import gguf_header
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec

OUTTYPES: dict[str, BlockFormat] = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
"""Formats to convert to, by the names llama.cpp's converter gives them."""

FILE_TYPES: dict[str, int] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""`general.file_type`: the format of most tensors (source: ggml's `llama_ftype`)."""

PREDICTOR = re.compile(r"blk\.\d+\.fc[12]\.weight")

Progress = Callable[[int, int, str], None]
"""Told before each tensor: how many are written, how many there will be, and the tensor's name."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written. `notes` tells what could not be kept."""

    path: Path
    nbytes: int
    reblocked: tuple[Reblocked, ...]
    notes: tuple[str, ...]


def convert(
    source: NetworkSource,
    path: Path,
    outtype: str | None = None,
    *,
    records: bool = False,
    progress: Progress | None = None,
) -> WriteReport:
    """Write `source` as a GGUF file, one tensor in memory at a time; `outtype` None keeps each tensor's format.

    Raises:
        UsageError: the outtype is unknown.
        ModelFormatError, UnsupportedModelError: the source cannot be read, or GGUF cannot say what it is.
        OutputError: the file could not be written; an old one is untouched.
    """
    if outtype is not None and outtype not in OUTTYPES:
        raise UsageError(f"outtype is {outtype}; allowed: {', '.join(OUTTYPES)}")
    fmt = None if outtype is None else OUTTYPES[outtype]
    layout = lay_out(source, fmt, records=records)
    metadata, notes = source_metadata(source, layout.spec)
    metadata["general.file_type"] = np.uint32(_file_type(layout.tensors))
    metadata["general.quantization_version"] = np.uint32(2)
    tensors = (*layout.tensors, *_predictors(source))
    if progress is not None:
        tensors = _announced(tensors, progress)
    size = write_gguf(path, metadata, tensors)
    return WriteReport(path, size, tuple(layout.reblocked), (*notes, *_widened(layout, fmt)))


def write_records(source: NetworkSource, path: Path, progress: Progress | None = None) -> WriteReport:
    """Write `source` in PowerInfer's tensor layout, each tensor in its own format, so that loading maps it as it is."""
    return convert(source, path, records=True, progress=progress)


def source_metadata(source: NetworkSource, spec: ModelSpec) -> tuple[dict[str, object], tuple[str, ...]]:
    """The header that describes `spec`, with what else the source says (its tokenizer above all), and notes on that."""
    header = gguf_header(spec)
    if isinstance(source, GgufFile):
        kept = {key: value for key, value in source.typed_metadata().items() if not key.startswith("split.")}
        return kept | header, ()
    eos = source.metadata.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    if not (source.path / "tokenizer.json").exists():
        return header, (f"{source.path} has no tokenizer.json, so the file has no tokenizer",)
    tokenizer, notes = gguf_tokenizer(source.path, spec.n_vocab, first if isinstance(first, int) else None)
    return header | tokenizer, notes


def _predictors(source: NetworkSource) -> list[NewTensor]:
    """PowerInfer's predictors, carried over as they are."""
    if not isinstance(source, GgufFile):
        return []
    found = [tensor for name, tensor in source.tensors.items() if PREDICTOR.fullmatch(name)]
    return [NewTensor(t.name, t.format, t.shape, partial(getattr, t, "data")) for t in found]


def _widened(layout: Layout, fmt: BlockFormat | None) -> tuple[str, ...]:
    """A note on matrices whose rows are no whole number of blocks."""
    wide = [t for t in layout.tensors if t.format is F16 and t.shape[0] > 1]
    if fmt is None or fmt is F16 or not wide:
        return ()
    return (
        f"{len(wide)} matrices are F16: their rows, as {wide[0].name}'s {wide[0].shape[1]}, are no whole "
        f"number of {fmt.name} blocks of {fmt.block}",
    )


def _file_type(tensors: tuple[NewTensor, ...]) -> int:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.format.name] = sizes.get(tensor.format.name, 0) + tensor.nbytes
    return FILE_TYPES[max(sizes, key=lambda name: sizes[name])]


def _announced(tensors: tuple[NewTensor, ...], progress: Progress) -> tuple[NewTensor, ...]:
    def announce(index: int, tensor: NewTensor) -> NewTensor:
        def produce() -> Bytes:
            progress(index, len(tensors), tensor.name)
            return tensor.produce()

        return NewTensor(tensor.name, tensor.format, tensor.shape, produce)

    return tuple(announce(i, tensor) for i, tensor in enumerate(tensors))
