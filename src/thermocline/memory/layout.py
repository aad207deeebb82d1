"""A model as the tensors of a GGUF file, each made only when it is written.

Canonical names in the usual order; q and k with rotary pairs as neighbours where the family's files have
them so; the down projection in rows of n_ff, or as neuron records in PowerInfer's layout (`ffn_down_t`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.gguf_writer import NewTensor
from thermocline.files.quantize import dequantize, from_float, quantize
from thermocline.files.weight import Bytes, Weight
from thermocline.memory.reblock import TILE, Reblocked, transpose
from thermocline.model.families import family_of
from thermocline.model.header import rope_factors
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import check_tensors, expected_tensors


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a new file. `reblocked` fills with what transposing did, as the tensors are made."""

    spec: ModelSpec
    tensors: tuple[NewTensor, ...]
    reblocked: list[Reblocked] = field(default_factory=list)


def lay_out(source: NetworkSource, fmt: BlockFormat | None, *, records: bool) -> Layout:
    """The tensors of a file that holds the source's network, in format `fmt` (None keeps each one's own).

    Vectors are F32 always. With Q4_0, embedding and head are Q8_0: few bytes, which decide much. Rows that are
    no whole number of blocks become F16.

    Raises:
        ModelFormatError: the source contradicts itself.
        UnsupportedModelError: it asks for what is not implemented.
    """
    family = family_of(source)
    spec = family.spec(source)
    weights = family.weights(source, spec)
    check_tensors(source.path, spec, weights)
    permuted = source.kind == "hf" and family.interleaved
    heads = {"attn_q": spec.n_head, "attn_k": spec.n_head_kv} if permuted else {}
    reblocked: list[Reblocked] = []
    tensors: list[NewTensor] = []
    for name, shape in expected_tensors(spec, records=records).items():
        weight = weights.get(name)
        if weight is None and shape[0] > 1:
            tensors.append(_new_transpose(weights[_other_layout(name)], name, shape, fmt, reblocked))
        else:
            tensors.append(_new_tensor(weight or weights[_other_layout(name)], name, shape, fmt, heads))
    tensors = [*family.file_tensors(spec, tensors)]
    factors = rope_factors(spec.rope)
    if factors is not None:
        table = from_float("rope_freqs.weight", factors[None], F32)
        tensors.append(NewTensor(table.name, F32, table.shape, lambda: table.data))
    return Layout(spec, tuple(tensors), reblocked)


def neighbours(heads: int, rows: int) -> npt.NDArray[np.intp]:
    """The order of rows that makes rotary pairs (i, i + half) of each head neighbours (2i, 2i + 1)."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _new_tensor(
    weight: Weight, name: str, shape: tuple[int, int], fmt: BlockFormat | None, heads: Mapping[str, int]
) -> NewTensor:
    target = _target(name, shape, fmt or weight.format)
    parts = heads.get(name.split(".")[-2], 0)
    return NewTensor(name, target, shape, lambda: _converted(weight, target, parts))


def _new_transpose(
    weight: Weight, name: str, shape: tuple[int, int], fmt: BlockFormat | None, reblocked: list[Reblocked]
) -> NewTensor:
    target = _target(name, shape, fmt or weight.format)

    def produce() -> Bytes:
        out = np.empty((shape[0], target.row_bytes(shape[1])), dtype=np.uint8)
        reblocked.append(transpose(weight, out, target))
        return out

    return NewTensor(name, target, shape, produce)


def _converted(weight: Weight, target: BlockFormat, heads: int) -> Bytes:
    """The weight in another format; with `heads`, its rows (of a vector, its elements) become neighbours."""
    if weight.rows == 1:
        values = dequantize(weight.data, weight.format, weight.columns)
        return quantize(values[:, neighbours(heads, weight.columns)] if heads else values, target)
    data = weight.data[neighbours(heads, weight.rows)] if heads else weight.data
    if target is weight.format:
        return data
    out = np.empty((weight.rows, target.row_bytes(weight.columns)), dtype=np.uint8)
    for start in range(0, weight.rows, TILE):
        rows = slice(start, start + TILE)
        out[rows] = quantize(dequantize(data[rows], weight.format, weight.columns), target)
    return out


def _target(name: str, shape: tuple[int, int], fmt: BlockFormat) -> BlockFormat:
    if shape[0] == 1:
        return F32
    if fmt is Q4_0 and name in {"token_embd.weight", "output.weight"}:
        fmt = Q8_0
    return fmt if shape[1] % fmt.block == 0 else F16


def _other_layout(name: str) -> str:
    return name.replace("ffn_down_t.", "ffn_down.") if "ffn_down_t." in name else name.replace("_down.", "_down_t.")
