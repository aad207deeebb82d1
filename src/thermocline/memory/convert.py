"""Writing models as GGUF files: a Hugging Face folder converted, or any model as neuron records ready to map."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from thermocline.activity.applied import AppliedOrder, applied_order
from thermocline.activity.inside import predictor_inside, predictor_metadata, without_predictor
from thermocline.activity.order import Order
from thermocline.activity.predictor import Predictor
from thermocline.activity.statistics import Activity
from thermocline.activity.store import activity_inside, activity_metadata
from thermocline.errors import UsageError, printable
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from thermocline.files.gguf import GgufFile
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.quantize import converted
from thermocline.files.resumable import Resume
from thermocline.files.weight import Bytes, PickedWeight, Weight
from thermocline.memory.layout import Layout, lay_out, stored_format
from thermocline.memory.reblock import Reblocked
from thermocline.memory.tokenizer_metadata import gguf_tokenizer
from thermocline.model.header import gguf_header
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec

OUTTYPES: Final[dict[str, BlockFormat]] = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
"""Formats to convert to, by the names llama.cpp's converter gives them."""

TYPES: Final[dict[str, BlockFormat]] = OUTTYPES | {"q4_k": Q4_K, "q5_k": Q5_K, "q6_k": Q6_K}
"""Formats to quantise to."""

FILE_TYPES: Final[dict[str, int]] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""`general.file_type`: the format of most tensors (source: ggml's `llama_ftype`)."""

PREDICTOR = re.compile(r"blk\.\d+\.fc[12]\.weight")

Progress = Callable[[int, int, str], None]
"""Told before each tensor: the bytes of those before it, the bytes of all, and the tensor's name."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written. `reblocked` tells what was stored anew and how exactly, `notes` what could not be kept."""

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
    order: Order | None = None,
    activity: Activity | None = None,
    predictor: Predictor | None = None,
    predicting: bool = True,
    threads: int = 1,
    restart: bool = False,
    replace: bool = True,
    progress: Progress | None = None,
) -> WriteReport:
    """Write `source` as a GGUF file, one tensor in memory at a time; `outtype` None keeps each tensor's format.

    A second call goes on where one that was killed stopped, unless `restart`. Without `replace` a file that is there
    is kept.

    With an `order`, each layer's neurons are stored in it (records only), and the file tells so. An `activity` of the
    source and a `predictor` go inside, in place of those that are there. What is inside stays, its neurons in the same
    order as the network's; but not `predicting`, predictors stay behind, which other engines cannot read.

    Raises:
        UsageError: the outtype is unknown, the order is for records and these are none, or the file is there.
        ModelFormatError, UnsupportedModelError: the source cannot be read, or GGUF cannot say what it is.
        NumericalError: a number is NaN or infinite, or does not fit the format.
        OutputError: the file could not be written; an old one is untouched.
    """
    if outtype is not None and outtype not in TYPES:
        raise UsageError(f"outtype is {printable(outtype)}; allowed: {', '.join(TYPES)}")
    if order is not None and not records:
        raise UsageError("an order needs neuron records; in the standard layout neurons stay where they are")
    fmt = None if outtype is None else TYPES[outtype]
    places = None if order is None else order.order
    layout = lay_out(source, fmt, records=records, order=places, threads=threads)
    metadata, notes = source_metadata(source, layout.spec)
    metadata["general.file_type"] = np.uint32(_file_type(layout.tensors))
    metadata["general.quantization_version"] = np.uint32(2)
    metadata |= order_metadata(source, layout.spec, order) | counts_metadata(source, order, activity)
    tensors: tuple[NewTensor, ...] = layout.tensors
    carried = _carried(source)
    if not predicting:
        metadata, predictor = without_predictor(metadata), None
        notes = (*notes, *(["the predictor inside is left out: other engines cannot read it"] if carried else []))
    elif predictor is None and isinstance(source, GgufFile):
        inside = predictor_inside(source)  # one of another network is not carried on
        predictor = inside if fmt is not None or order is not None else None
    if predictor is not None:
        predictor.require_fits(source.path, layout.spec)
        metadata = without_predictor(metadata) | predictor_metadata(predictor, measured=fmt is None)
        tensors = (*tensors, *predictor_tensors(predictor, fmt, order))
    elif predicting:
        tensors = (*tensors, *carried)
    resume = resume_of(source, predictor, layout, restart=restart, replace=replace)
    size = write_gguf(path, metadata, announced(tensors, progress), resume=resume)
    return WriteReport(path, size, tuple(layout.reblocked), (*notes, *_widened(layout, fmt)))


def resume_of(
    source: NetworkSource, predictor: Predictor | None, layout: Layout, *, restart: bool, replace: bool
) -> Resume:
    """What tells a run that writes these tensors from any other, beside the file's header. Their errors are kept."""
    digest = hashlib.sha256()
    for layer in () if predictor is None else predictor.layers:
        digest.update(layer.fc1.data.tobytes())
        digest.update(layer.fc2.data.tobytes())
    return Resume(
        {"model": source.fingerprint, "predictor": digest.hexdigest()},
        lambda: [asdict(one) for one in layout.reblocked],
        lambda told: layout.reblocked.extend(Reblocked(**one) for one in told),
        restart,
        replace,
    )


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


def order_metadata(source: NetworkSource, spec: ModelSpec, order: Order | None) -> dict[str, object]:
    """Keys that tell in which order the neurons are, after `order` and after one that the source was written in."""
    before = applied_order(source.metadata, spec)
    if order is None:
        return {} if before is None else before.metadata
    after = AppliedOrder(order.model_fingerprint, order.order) if before is None else before.then(order.order)
    return after.metadata


def counts_metadata(source: NetworkSource, order: Order | None, activity: Activity | None) -> dict[str, object]:
    """Keys with the counts of `activity`, or of what is inside the source, for the numbers that `order` gives."""
    if activity is None and isinstance(source, GgufFile):
        activity = activity_inside(source)
    if activity is None:
        return {}
    return activity_metadata(activity if order is None else activity.reordered(order.order))


def predictor_tensors(predictor: Predictor, fmt: BlockFormat | None, order: Order | None) -> list[NewTensor]:
    """A predictor's matrices in `fmt` (None keeps each one's own), its neurons in the same order as the network's.

    K-quants become Q8_0: no predictor is quantised more than twice.
    """
    tensors = []
    for index, layer in enumerate(predictor.layers):
        fc2: Weight = layer.fc2 if order is None else PickedWeight("fc2", layer.fc2, order.order[index])
        for name, weight in ((f"blk.{index}.fc1.weight", layer.fc1), (f"blk.{index}.fc2.weight", fc2)):
            wanted = weight.format if fmt is None else Q8_0 if fmt.block > Q8_0.block else fmt
            target = stored_format(name, weight.shape, wanted) if weight.rows > 1 else wanted
            tensors.append(NewTensor(name, target, weight.shape, partial(converted, weight, target)))
    return tensors


def announced(tensors: Sequence[NewTensor], progress: Progress | None) -> tuple[NewTensor, ...]:
    """The same tensors, that tell `progress` when their turn comes."""
    if progress is None:
        return tuple(tensors)
    total, done, told = sum(t.nbytes for t in tensors), 0, []
    for tensor in tensors:
        told.append(NewTensor(tensor.name, tensor.format, tensor.shape, _telling(tensor, progress, done, total)))
        done += tensor.nbytes
    return tuple(told)


def _telling(tensor: NewTensor, progress: Progress, done: int, total: int) -> Callable[[], Bytes]:
    def produce() -> Bytes:
        progress(done, total, tensor.name)
        return tensor.produce()

    return produce


def _carried(source: NetworkSource) -> list[NewTensor]:
    """PowerInfer's predictors, carried over as they are."""
    if not isinstance(source, GgufFile):
        return []
    found = [tensor for name, tensor in source.tensors.items() if PREDICTOR.fullmatch(name)]
    return [NewTensor(t.name, t.format, t.shape, partial(getattr, t, "data")) for t in found]


def _widened(layout: Layout, fmt: BlockFormat | None) -> tuple[str, ...]:
    """A note on matrices whose rows are no whole number of blocks."""
    if fmt is None:
        return ()
    odd = [t for t in layout.tensors if t.shape[0] > 1 and t.shape[1] % fmt.block]
    if not odd:
        return ()
    formats = " or ".join(sorted({t.format.name for t in odd}))
    return (
        f"{len(odd)} matrices are {formats}: their rows, as {odd[0].name}'s {odd[0].shape[1]}, are no whole "
        f"number of {fmt.name} blocks of {fmt.block}",
    )


def _file_type(tensors: Sequence[NewTensor]) -> int:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.format.name] = sizes.get(tensor.format.name, 0) + tensor.nbytes
    return FILE_TYPES[max(sizes, key=lambda name: sizes[name])]
