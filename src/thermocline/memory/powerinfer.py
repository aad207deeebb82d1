"""A network and its predictors as a model file that PowerInfer's own loader accepts.

Source of tensors, keys and their types: PowerInfer's loader and converters (Song et al., SOSP 2024), of the state
of llama.cpp of November 2023. The loader refuses files with tensors that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from thermocline.activity.order import Order
from thermocline.activity.predictor import Predictor
from thermocline.activity.statistics import Activity
from thermocline.errors import UnsupportedModelError, UsageError, printable
from thermocline.files.formats import F16, Q4_0, BlockFormat
from thermocline.files.gguf_writer import NewTensor, write_gguf
from thermocline.files.powerinfer import THRESHOLD_KEY, PowerinferPredictor
from thermocline.memory.convert import (
    FILE_TYPES,
    Progress,
    WriteReport,
    announced,
    counts_metadata,
    order_metadata,
    predictor_tensors,
    resume_of,
    source_metadata,
)
from thermocline.memory.layout import Layout, lay_out
from thermocline.model.rope import LinearScaling
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec
from thermocline.ops.contract import Activation

OUTTYPES: Final[dict[str, BlockFormat]] = {"f16": F16, "q4_0": Q4_0}
"""The formats that PowerInfer's sparse kernels compute with."""

_KEYS: Final = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "rope.dimension_count",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "tensor_data_layout",
)  # fmt: skip
"""Keys below the architecture that PowerInfer's converter writes."""


def write_powerinfer(
    source: NetworkSource,
    predictor: PowerinferPredictor,
    path: Path,
    outtype: str = "f16",
    *,
    order: Order | None = None,
    activity: Activity | None = None,
    threads: int = 1,
    restart: bool = False,
    replace: bool = True,
    progress: Progress | None = None,
) -> WriteReport:
    """Write `source` with `predictor` as a sparse model of PowerInfer, one tensor in memory at a time.

    Down projections become neuron records, in `order` if there is one; tied embeddings are stored twice, as the loader
    wants them. An `activity` of the source goes inside, or the one that it has. A second
    call goes on where one that was killed stopped, unless `restart`. Without
    `replace` a file that is there is kept.

    Raises:
        UsageError: the outtype is none that PowerInfer's sparse kernels compute with, or the file is there.
        UnsupportedModelError: PowerInfer cannot run the network; the message says what it lacks.
        ModelFormatError: the source contradicts itself, or the predictor is of another model.
        NumericalError: a weight does not fit the format.
        OutputError: the file could not be written; an old one is untouched.
    """
    if outtype not in OUTTYPES:
        raise UsageError(f"outtype is {outtype}; PowerInfer computes sparsely with {', '.join(OUTTYPES)}")
    fmt = OUTTYPES[outtype]
    layout = lay_out(source, fmt, records=True, order=None if order is None else order.order, threads=threads)
    spec = layout.spec
    _require_runnable(source, spec)
    predictor.check(path, n_layer=spec.n_layer, n_embd=spec.n_embd, n_ff=spec.n_ff)
    metadata, notes = _metadata(source, spec)
    metadata["general.file_type"] = np.uint32(FILE_TYPES[fmt.name])
    metadata["general.quantization_version"] = np.uint32(2)
    metadata[THRESHOLD_KEY] = np.float32(predictor.threshold)
    metadata |= order_metadata(source, spec, order) | counts_metadata(source, order, activity)
    inside = Predictor.of_powerinfer(predictor)
    tensors = announced([*_tensors(layout), *predictor_tensors(inside, fmt, order)], progress)
    resume = resume_of(source, inside, layout, restart=restart, replace=replace)
    size = write_gguf(path, metadata, tensors, powerinfer=True, resume=resume)
    return WriteReport(path, size, tuple(layout.reblocked), (*notes, *_notes(spec)))


def _tensors(layout: Layout) -> Iterator[NewTensor]:
    for tensor in layout.tensors:
        yield tensor
        if layout.spec.tied_embeddings and tensor.name == "token_embd.weight":
            yield replace(tensor, name="output.weight")


def _metadata(source: NetworkSource, spec: ModelSpec) -> tuple[dict[str, object], tuple[str, ...]]:
    """The keys of PowerInfer's converter and the tokenizer, without which its loader finds no vocabulary."""
    found, notes = source_metadata(source, spec)
    names = ["general.architecture", "general.name", *(f"{spec.family}.{key}" for key in _KEYS)]
    tokenizer = {key: value for key, value in found.items() if key.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in tokenizer:
        raise _cannot(source, "a model without a tokenizer: it counts the vocabulary by the tokens in the file")
    rule = tokenizer.get("tokenizer.ggml.pre", "default")
    if tokenizer.get("tokenizer.ggml.model") == "gpt2" and rule not in {"default", "gpt-2"}:
        other = (
            f"PowerInfer splits text by GPT-2's rule, not by the tokenizer's {rule}: it makes other tokens of a prompt"
        )
        notes = (*notes, other)
    return {name: found[name] for name in names if name in found} | tokenizer, notes


def _require_runnable(source: NetworkSource, spec: ModelSpec) -> None:
    """Refuse what PowerInfer's graph of the family has not."""
    ffn = spec.ffn
    if spec.family not in _FFN:
        raise _cannot(source, f"family {spec.family}; known are {', '.join(_FFN)}")
    name, *wanted = _FFN[spec.family]
    if ffn.activation is not Activation.RELU or [ffn.gated, ffn.both] != wanted:
        raise _cannot(source, f"this FFN; in {spec.family} it is {name}")
    for problem, present in _LACKS.items():
        if present(spec):
            raise _cannot(source, problem)


_FFN: Final = {
    "llama": ("ReGLU", True, False),
    "bamboo": ("dReLU", True, True),
    "opt": ("ReLU without a gate", False, False),
    "falcon": ("ReLU without a gate", False, False),
}
"""The FFN by family: its name, whether there is a gate, and whether ReLU is on both sides."""

_BIASED: Final = {"opt"}
"""Families whose linear maps have biases."""

_LACKS: Final[dict[str, Callable[[ModelSpec], bool]]] = {
    "biases of attention and FFN": lambda s: (s.qkv_bias or s.out_bias or s.ffn_bias) and s.family not in _BIASED,
    "norms of queries and keys": lambda s: s.qk_norm,
    "heads that are not n_embd together": lambda s: s.n_q != s.n_embd,
    "rotary dimensions that are not the whole head": lambda s: s.rope is not None and s.rope.rotary_dim != s.head_dim,
    "factors of rotary frequencies, nor any scaling but linear": lambda s: (
        s.rope is not None and (s.rope.factors is not None or not isinstance(s.rope.scaling, LinearScaling | None))
    ),
}


def _cannot(source: NetworkSource, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{printable(str(source.path))}: PowerInfer cannot run {what}")


def _notes(spec: ModelSpec) -> tuple[str, ...]:
    """What PowerInfer computes otherwise than the network says."""
    notes = []
    if any(spec.windows):
        notes.append(f"PowerInfer has no sliding window: outputs differ after {min(filter(None, spec.windows))} tokens")
    if spec.ffn.threshold:
        notes.append(f"PowerInfer computes ReLU without the threshold of {spec.ffn.threshold:g}: outputs differ")
    return tuple(notes)
