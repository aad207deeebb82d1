"""The slow, plain twin of every op: numpy, accumulating in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import Q8_0
from thermocline.files.quantize import dequantize, quantize, to_float
from thermocline.files.weight import Weight
from thermocline.ops.contract import (
    Activation,
    ActiveSet,
    Array,
    FfnKind,
    FfnWork,
    KVLayer,
    Matrix,
    NeuronBlock,
)


class ReferenceOps:
    """Numpy implementation of the contract; weights are dequantised whenever they are used."""

    name = "reference"

    def place(self, weight: Weight) -> Weight:
        """The weight itself."""
        return weight

    def array(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """A zeroed numpy array."""
        return np.zeros(shape, dtype=dtype)

    def upload(self, values: npt.NDArray[Any], out: Array) -> None:
        """See the contract."""
        np.copyto(out, values)

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """The array itself."""
        return np.asarray(array)

    def embed(self, table: Matrix, tokens: npt.NDArray[np.int32], out: Array) -> None:
        """See the contract."""
        out[...] = dequantize(table.data[tokens], table.format, table.columns)

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """See the contract."""
        wide = x.astype(np.float64)
        out[...] = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
        """See the contract."""
        wide = x.astype(np.float64)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        out[...] = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * weight + bias

    def add(self, x: Array, y: Array) -> None:
        """See the contract."""
        x[...] = x.astype(np.float64) + y

    def linear(
        self,
        x: Array,
        matrices: tuple[Matrix, ...],
        outs: tuple[Array, ...],
        biases: tuple[Array | None, ...] | None = None,
        *,
        add: bool = False,
    ) -> None:
        """See the contract."""
        for i, (matrix, out) in enumerate(zip(matrices, outs, strict=True)):
            y = x.astype(np.float64) @ to_float(matrix).astype(np.float64).T
            bias = biases[i] if biases is not None else None
            if bias is not None:
                y += bias
            out[...] = out + y if add else y

    def rope(
        self, arrays: tuple[Array, ...], table: Array, positions: npt.NDArray[np.int32], *, interleaved: bool
    ) -> None:
        """See the contract."""
        for x in arrays:
            self._rotate(x, table, positions, interleaved)

    @staticmethod
    def _rotate(x: Array, table: Array, positions: npt.NDArray[np.int32], interleaved: bool) -> None:
        cos = table[positions, 0][:, None, :].astype(np.float64)
        sin = table[positions, 1][:, None, :].astype(np.float64)
        half = table.shape[-1]
        first = x[..., 0 : 2 * half : 2] if interleaved else x[..., :half]
        second = x[..., 1 : 2 * half : 2] if interleaved else x[..., half : 2 * half]
        a, b = first.astype(np.float64), second.astype(np.float64)
        first[...] = a * cos - b * sin
        second[...] = a * sin + b * cos

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
        """See the contract."""
        tokens, n_head, _ = q.shape
        stop = start + tokens
        _write(cache.keys, start, k)
        _write(cache.values, start, v)
        group = n_head // cache.keys.shape[0]
        keys = _read(cache.keys, stop).repeat(group, axis=0)
        values = _read(cache.values, stop).repeat(group, axis=0)
        scores = np.einsum("thd,hsd->hts", q.astype(np.float64), keys) * scale
        query, key = np.arange(start, stop)[:, None], np.arange(stop)[None, :]
        hidden = (key > query) | ((window > 0) & (key <= query - window))
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[...] = np.einsum("hts,hsd->thd", weights, values)

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
        """See the contract."""
        if block.rows is not None:
            return self._ffn_of_rows(x, block, block.rows, active, out, skip_zeros, hidden)
        computed = np.zeros(block.neurons, dtype=bool)
        computed[slice(None) if active.indices is None else active.indices] = True
        wide = x.astype(np.float64)
        up = wide @ to_float(block.up).astype(np.float64).T
        if block.up_bias is not None:
            up += block.up_bias
        gate = up if block.gate is None else wide @ to_float(block.gate).astype(np.float64).T
        h = np.where(computed, _neuron(gate, up, block.kind), 0.0)
        down = to_float(block.down).astype(np.float64)
        out[...] = out + (h @ down if block.records else h @ down.T)
        if hidden is not None:
            hidden[...] = h
        return _work(computed, _activate(gate, block.kind) != 0, h, block, skip_zeros)

    def _ffn_of_rows(
        self,
        x: Array,
        block: NeuronBlock,
        rows: Array,
        active: ActiveSet,
        out: Array,
        skip_zeros: bool,
        hidden: Array | None,
    ) -> FfnWork:
        """The same with all rows in their places; neurons that are not active take an active one's row."""
        wanted = np.arange(block.neurons) if active.indices is None else active.indices
        if len(wanted) and not (rows[wanted].min() >= 0 and rows[wanted].max() < block.up.rows):
            raise ValueError("rows do not tell where an active neuron lies")
        if not len(wanted):
            if hidden is not None:
                hidden[...] = 0.0
            return FfnWork(0, 0, 0, 0)
        places = np.full(block.neurons, rows[wanted[0]], np.intp)
        places[wanted] = rows[wanted]

        def ordered(weight: Weight) -> Weight:
            return Weight(weight.name, weight.format, (block.neurons, weight.columns), weight.data[places])

        whole = NeuronBlock(
            gate=None if block.gate is None else ordered(block.gate),
            up=ordered(block.up),
            down=ordered(block.down),
            records=True,
            kind=block.kind,
            neurons=block.neurons,
            up_bias=block.up_bias,
        )
        return self.ffn(x, whole, active, out, skip_zeros=skip_zeros, hidden=hidden)

    def predict(self, x: Array, fc1: Matrix, fc2: Matrix, scores: Array) -> None:
        """See the contract."""
        hidden = x.astype(np.float64) @ to_float(fc1).astype(np.float64).T
        scores[...] = np.where(hidden > 0, hidden, 0) @ to_float(fc2).astype(np.float64).T

    def select(self, scores: Array, threshold: float, out: Array) -> ActiveSet:
        """See the contract."""
        if np.isnan(threshold):
            raise ValueError("threshold is not a number")
        with np.errstate(over="ignore"):  # beyond float32 it is infinite
            limit = np.float32(threshold)
        found = np.flatnonzero((scores >= limit).any(axis=0))
        out[: len(found)] = found
        return ActiveSet(out[: len(found)])


def _write(cache: npt.NDArray[Any], start: int, x: npt.NDArray[np.float32]) -> None:
    """Rows x (T, heads, head_dim) to a cache from position `start` on."""
    rows = x.swapaxes(0, 1)
    to = cache[:, start : start + len(x)]
    to[...] = quantize(rows.reshape(-1, x.shape[-1]), Q8_0).reshape(to.shape) if cache.dtype == np.uint8 else rows


def _read(cache: npt.NDArray[Any], stop: int) -> npt.NDArray[np.float64]:
    """The first `stop` positions of every head."""
    rows = cache[:, :stop]
    if cache.dtype == np.uint8:
        columns = cache.shape[-1] // Q8_0.block_bytes * Q8_0.block
        rows = dequantize(rows.reshape(-1, cache.shape[-1]), Q8_0, columns).reshape(*rows.shape[:2], columns)
    return rows.astype(np.float64)


def _work(
    computed: npt.NDArray[np.bool_],
    opened: npt.NDArray[np.bool_],
    h: npt.NDArray[np.float64],
    block: NeuronBlock,
    skip_zeros: bool,
) -> FfnWork:
    rows = int(computed.sum())
    skip = skip_zeros and block.records
    up = int((computed & opened.any(axis=0)).sum()) if skip and block.gate is not None else rows
    down = int((h != 0).any(axis=0).sum()) if skip else rows
    return FfnWork(rows if block.gate is not None else 0, up, down, int(np.count_nonzero(h)))


def _neuron(gate: npt.NDArray[np.float64], up: npt.NDArray[np.float64], kind: FfnKind) -> npt.NDArray[np.float64]:
    if not kind.gated:
        return _activate(up, kind)
    return _activate(gate, kind) * (_activate(up, kind) if kind.both else up)


def _activate(x: npt.NDArray[np.float64], kind: FfnKind) -> npt.NDArray[np.float64]:
    if kind.activation is Activation.SILU:
        smooth: npt.NDArray[np.float64] = x / (1 + np.exp(-x))
        return smooth
    if kind.activation is Activation.GELU:
        bell: npt.NDArray[np.float64] = x * 0.5 * (1 + _erf(x / math.sqrt(2)))
        return bell
    kept: npt.NDArray[np.float64] = np.where(x > kind.threshold, x, 0.0)
    return kept * kept if kind.activation is Activation.RELU2 else kept


_erf = np.vectorize(math.erf, otypes=[np.float64])
