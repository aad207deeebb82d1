"""A model as the tensors of a GGUF file, each made only when it is written.

Canonical names in the usual order, or as the family's files have them; q and k with rotary pairs as neighbours where
the family's files have them so; the down projection in rows of n_ff, or as neuron records in PowerInfer's layout
(`ffn_down_t`), the neurons in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import F16, F32, Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from thermocline.files.gguf_writer import NewTensor
from thermocline.files.quantize import from_float, quantize, to_float
from thermocline.files.weight import Bytes, PickedWeight, Weight
from thermocline.memory.checks import check_finite
from thermocline.memory.reblock import Reblocked, store, transpose
from thermocline.model.families import family_of
from thermocline.model.header import rope_factors
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import check_tensors, expected_tensors
from thermocline.ops.cpu import CpuOps

Order = npt.NDArray[np.integer[Any]]
Make = Callable[[Weight, BlockFormat, Order | None], Bytes]

VOCABULARY: Final = {"token_embd.weight", "output.weight"}
FINER: Final[dict[BlockFormat, BlockFormat]] = {Q4_0: Q8_0, Q4_K: Q6_K, Q5_K: Q6_K}
"""What embedding and head are stored in instead: few bytes, which decide much."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a new file. `reblocked` fills with what storing them anew did, as the tensors are made."""

    spec: ModelSpec
    tensors: tuple[NewTensor, ...]
    reblocked: list[Reblocked] = field(default_factory=list)


def lay_out(
    source: NetworkSource, fmt: BlockFormat | None, *, records: bool, order: Order | None = None, threads: int = 1
) -> Layout:
    """The tensors of a file that holds the source's network, in format `fmt` (None keeps each one's own).

    Vectors are F32 always. Embedding and head get a finer format than Q4_0, Q4_K and Q5_K, unless they are in that
    already, and learned positions F16 instead of any block format. Rows that are no whole number of blocks become Q8_0
    in place of a K-quant, else F16.
    `order` (n_layer, n_ff), for records only, names each layer's neurons in the order in which they are stored.

    Raises:
        ModelFormatError: the source contradicts itself.
        UnsupportedModelError: it asks for what is not implemented.

    Whoever makes a tensor hears NumericalError where it is not finite, or does not fit its format.
    """
    family = family_of(source)
    spec = family.spec(source)
    weights = family.weights(source, spec)
    check_tensors(source.path, spec, weights)
    permuted = source.kind == "hf" and family.interleaved
    heads = {"attn_q": spec.n_head, "attn_k": spec.n_head_kv} if permuted else {}
    maker = _Maker(weights, fmt, heads, order, threads, CpuOps(threads))
    made = [maker.tensor(name, shape) for name, shape in expected_tensors(spec, records=records).items()]
    tensors = [*family.file_tensors(spec, made)]
    factors = rope_factors(spec.rope)
    if factors is not None:
        table = from_float("rope_freqs.weight", factors[None], F32)
        tensors.append(NewTensor(table.name, F32, table.shape, lambda: table.data))
    return Layout(spec, tuple(tensors), maker.reblocked)


def neighbours(heads: int, rows: int) -> npt.NDArray[np.intp]:
    """The order of rows that makes rotary pairs (i, i + half) of each head neighbours (2i, 2i + 1)."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def stored_format(
    name: str, shape: tuple[int, int], fmt: BlockFormat, stored: BlockFormat | None = None
) -> BlockFormat:
    """The format that a tensor (rows, columns), `stored` in one, gets where `fmt` is asked for; see `lay_out`."""
    if shape[0] == 1:
        return F32
    if name in VOCABULARY and fmt is not stored:
        fmt = FINER.get(fmt, fmt)
    if name == "position_embd.weight" and fmt.block > 1:
        return F16
    fits = (f for f in (fmt, Q8_0 if fmt.block > Q8_0.block else F16) if shape[1] % f.block == 0)
    return next(fits, F16)


@dataclass(slots=True)
class _Maker:
    """What all tensors of a new file have in common."""

    weights: Mapping[str, Weight]
    fmt: BlockFormat | None
    heads: Mapping[str, int]
    order: Order | None
    threads: int
    ops: CpuOps
    reblocked: list[Reblocked] = field(default_factory=list)

    def tensor(self, name: str, shape: tuple[int, int]) -> NewTensor:
        weight = self.weights.get(name)
        down = weight is None and shape[0] > 1
        if weight is None:
            weight = self.weights[_other_layout(name)]
        target = stored_format(name, shape, self.fmt or weight.format, weight.format)
        rows = self.rows(name, max(shape) if shape[0] == 1 else shape[0])
        make = self.transposed if down else self.vector if shape[0] == 1 else self.matrix
        return NewTensor(name, target, shape, partial(self.checked, make, weight, target, rows))

    def checked(self, make: Make, weight: Weight, target: BlockFormat, rows: Order | None) -> Bytes:
        """The bytes that `make` makes, of a weight that is finite: copies, too, are looked at."""
        check_finite({weight.name: weight}, self.ops)
        return make(weight, target, rows)

    def rows(self, name: str, count: int) -> Order | None:
        """The order of a matrix's rows, or a vector's elements; None where they stay as they are."""
        part = name.split(".")[-2]
        if part in self.heads:
            return neighbours(self.heads[part], count)
        # The bias of down is one of outputs, not of neurons.
        if self.order is None or part not in {"ffn_gate", "ffn_up", "ffn_down_t"} or name.endswith("down_t.bias"):
            return None
        rows: Order = self.order[int(name.split(".")[1])]
        return rows

    def vector(self, weight: Weight, target: BlockFormat, rows: Order | None) -> Bytes:
        values = to_float(weight)
        return quantize(values if rows is None else values[:, rows], target)

    def matrix(self, weight: Weight, target: BlockFormat, rows: Order | None) -> Bytes:
        if rows is not None:
            weight = PickedWeight(weight.name, weight, rows)
        if target is weight.format:
            return weight.data
        out = _room(weight.shape, target)
        self.reblocked.append(store(weight, out, target, threads=self.threads))
        return out

    def transposed(self, weight: Weight, target: BlockFormat, rows: Order | None) -> Bytes:
        out = _room(weight.shape[::-1], target)
        places = None if rows is None else np.argsort(rows)
        self.reblocked.append(transpose(weight, out, target, places, threads=self.threads, ops=self.ops))
        return out


def _room(shape: tuple[int, ...], fmt: BlockFormat) -> Bytes:
    return np.empty((shape[0], fmt.row_bytes(shape[1])), dtype=np.uint8)


def _other_layout(name: str) -> str:
    return name.replace("ffn_down_t.", "ffn_down.") if "ffn_down_t." in name else name.replace("_down.", "_down_t.")
