"""The contract that every implementation of the arithmetic fulfils.

Arrays are opaque to `model` and `runtime`: numpy arrays for `reference` and `cpu`. Of an array the caller asks no
more than what numpy and torch share: cutting along the first axis, `reshape`, and assigning to items.
Activations are float32, C-contiguous, and lead with the tokens of the batch: T. Every op writes into arrays that
the caller made beforehand with `Ops.array`, so that a decode step allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.files.weight import Weight

Array = Any
"""An array of the implementation's own kind."""

Matrix = Any
"""A weight where the implementation wants it; made by `Ops.place`."""


class Activation(StrEnum):
    """Scalar nonlinearity of the FFN. GELU is the exact one, x times the normal distribution's Φ(x)."""

    SILU = "silu"
    RELU = "relu"
    RELU2 = "relu2"
    GELU = "gelu"


@dataclass(frozen=True, slots=True)
class FfnKind:
    """The formula of an FFN neuron: what its gate and up dot products g and u make of it.

    gated:     h = act(g) * u            (SwiGLU, ReGLU)
    both:      h = act(g) * act(u)       (dReLU)
    otherwise: h = act(u)                (no gate: ReLU, ReLU², GELU)

    `threshold` is FATReLU's: relu(x) is x where x > threshold, else 0. It applies to RELU and RELU2 only.
    """

    activation: Activation
    gated: bool
    both: bool = False
    threshold: float = 0.0

    @property
    def sparse(self) -> bool:
        """Whether neurons can be exactly zero, so that skipping them is free of error."""
        return self.activation in (Activation.RELU, Activation.RELU2)


@dataclass(frozen=True, slots=True)
class NeuronBlock:
    """A contiguous slice of one layer's neurons in their order.

    `gate` (None if the family has none) and `up` have one row of n_embd per neuron. `down` is either
    neuron records (`records`: one row of n_embd per neuron, transposed) or the standard layout (n_embd rows
    of one element per neuron). Only records can be skipped. `up_bias` (neurons), if there is one, is added to
    up's products before the activation. `rows` (neurons, int32; records only) tells where each neuron lies in the
    matrices, which then may have fewer rows or more; None means at its own number. It must hold for active neurons.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    records: bool
    kind: FfnKind
    neurons: int
    up_bias: Array | None = None
    rows: Array | None = None


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """Sorted int32 neuron indices of a block to compute; `indices` None means all of them.

    They lie on the host or where the implementation computes; `Ops.ffn` takes both.
    """

    indices: npt.NDArray[np.int32] | None = None


ALL = ActiveSet()


class FfnWork(NamedTuple):
    """What an FFN call did. Rows are counted once per call, firing neurons once per token."""

    gate_rows: int
    up_rows: int
    down_rows: int
    fired: int


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Cached keys and values of one layer and sequence: (n_head_kv, n_ctx, head_dim), float16 or float32.

    Or Q8_0: uint8 (n_head_kv, n_ctx, bytes of head_dim elements), whole blocks only. What lies where in these bytes is
    the implementation's own affair.
    """

    keys: Array
    values: Array


class Arrays(Protocol):
    """What makes arrays: an implementation of the ops, or a memory that keeps an account of them."""

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """A zeroed array.

        Raises:
            MemoryError: there is no room for it.
        """


class Ops(Arrays, Protocol):
    """The arithmetic of a transformer on one device."""

    name: str
    """Short name for reports, such as `cpu/avx512`."""

    def place(self, weight: Weight) -> Matrix:
        """The weight where this implementation computes.

        Where the weight's bytes are in that memory already (an array made by `array`, uint8), a view on them: nothing
        is copied. The memory room fills such arrays by `upload` before it places them.
        """

    def upload(self, values: npt.NDArray[Any], out: Array) -> None:
        """Copy `values` of the host into `out`, of the same shape and dtype; they may be overwritten afterwards."""

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """The array as numpy, once it is computed; a view where possible."""

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """Rows `tokens` (T) of `table` into `out` (T, n_embd). Token ids are checked by the caller."""

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """Over the last axis: x / sqrt(mean(x²) + eps) * weight. `out` may be `x`."""

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
        """Over the last axis: (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias. `out` may be `x`."""

    def add(self, x: Array, y: Array) -> None:
        """Add y, which is (T, n), or (n) for every token, to x (T, n)."""

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """outs[i] (T, rows_i) = x (T, columns) @ matrices[i]ᵀ + biases[i]; `add` adds to `outs` instead.

        The matrices share `x`, which is quantised once for all of them where they are integer formats.
        """

    def rope(
        self, arrays: tuple[Array, ...], table: Array, positions: npt.NDArray[np.int32], *, interleaved: bool
    ) -> None:
        """Rotate each of `arrays` (T, heads, head_dim) in place; heads may be more in one than in another.

        `table` is (n_ctx, 2, rotary_dim / 2) float32: cosines and sines of each position. Rotated are the
        first rotary_dim elements of each head: pairs (2i, 2i+1) if `interleaved`, else (i, i + rotary_dim/2).
        """

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: KVLayer,
        start: int,
        scale: float,
        window: int,
        out: Array,
    ) -> None:
        """Write k and v at `start`, then causal grouped-query attention.

        q and `out` are (T, n_head, head_dim), k and v (T, n_head_kv, head_dim). Query t sees positions
        max(0, start + t - window + 1) to start + t; `window` 0 means no limit.
        """

    def ffn(
        self,
        x: Array,
        block: NeuronBlock,
        active: ActiveSet,
        out: Array,
        *,
        skip_zeros: bool,
        hidden: Array | None = None,
    ) -> FfnWork:
        """Add the block's part of the FFN of `x` (T, n_embd) to `out` (T, n_embd).

        Only neurons in `active` are computed. With `skip_zeros` (records only) a neuron whose gate is zero
        for every token costs no up row, and one whose activation is zero for every token costs no down row.
        `hidden` (T, neurons), if given, receives the activations.
        The sum does not depend on `skip_zeros` nor on threads, bit for bit.
        """

    def predict(self, x: Array, fc1: Matrix, fc2: Matrix, scores: Array) -> None:
        """Scores (T, neurons) = relu(x (T, n_embd) @ fc1ᵀ) @ fc2ᵀ: how likely each neuron is to fire.

        `fc1` has rank rows of n_embd, `fc2` a row of rank for each neuron. Source: the predictors of PowerInfer
        (Song et al., SOSP 2024).
        """

    def select(self, scores: Array, threshold: float, out: Array) -> ActiveSet:
        """The neurons whose score is at least `threshold` for any token; NaN scores never are.

        `scores` is (T, neurons), `out` int32 (neurons); the set is a view of `out`, overwritten by the next call.

        Raises:
            ValueError: the threshold is NaN.
        """
