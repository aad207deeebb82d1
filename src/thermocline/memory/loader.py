"""From an opened model to a network ready to run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.activity.predictor import Predictor
from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.files.quantize import all_finite, to_float
from thermocline.files.weight import Bytes, Weight
from thermocline.memory.reblock import Reblocked, Transposer, not_finite, record_format, transpose
from thermocline.memory.residence import Reading, lock, touch
from thermocline.model.families import family_of
from thermocline.model.network import Layer, LayerPredictor, Norm, Transformer, resolve_mode
from thermocline.model.rope import rope_table
from thermocline.model.source import NetworkSource
from thermocline.model.spec import ModelSpec
from thermocline.model.tensors import check_tensors, has_records
from thermocline.ops.contract import Array, Matrix, NeuronBlock, Ops


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did. `mapped_bytes` stay in the file's mapping, `resident_bytes` were made anew.

    The predictor's are counted apart.
    """

    mapped_bytes: int
    resident_bytes: int
    reblocked: tuple[Reblocked, ...]
    seconds: float
    predictor_bytes: int = 0

    @property
    def worst_reblocked(self) -> Reblocked | None:
        """The transposed tensor with the largest error, None if nothing was transposed."""
        return max(self.reblocked, key=lambda r: r.max_abs_error, default=None)


def load_transformer(
    source: NetworkSource,
    ops: Ops,
    *,
    n_ctx: int = 0,
    mode: Mode = Mode.AUTO,
    predictor: Predictor | None = None,
    check: bool = False,
    mlock: bool = False,
    progress: Reading | None = None,
) -> tuple[Transformer, LoadReport]:
    """Read the spec, hold the tensors to it, and place them where `ops` computes.

    `n_ctx` is the longest context that will be run, 0 the model's own. Norms and biases are always looked at
    for NaN and infinity, and so are predictors, and down projections while they are transposed; `check` looks at
    every weight. With a `predictor`, the mode may be predicted, or changed to it later. Mapped weights are read in
    their order, which `progress` is told about, and with `mlock` kept in memory.

    Raises:
        ModelFormatError: the source contradicts itself, or the predictor is of another network.
        UnsupportedModelError: it asks for what is not implemented.
        NumericalError: weights are not finite.
        UsageError: the network cannot run in that mode.
        HardwareError: the system does not allow so much memory to be locked.
    """
    began = time.perf_counter()
    family = family_of(source)
    spec = family.spec(source)
    mode = resolve_mode(mode, spec.ffn, predictor=predictor is not None)
    weights = family.weights(source, spec)
    check_tensors(source.path, spec, weights)
    touch(source.path, weights.values(), progress)
    if check:
        check_finite(weights, ops)
    loading = _Loading(spec, ops, weights)
    predictors = (None,) * spec.n_layer if predictor is None else loading.predictors(source, predictor)
    n_ctx = n_ctx or spec.n_ctx_train
    if spec.n_positions and n_ctx > spec.n_ctx_train:
        raise UsageError(
            f"{spec.name} has learned positions for {spec.n_ctx_train} tokens only; use a --ctx-size up to that"
        )
    transformer = Transformer(
        spec=spec,
        ops=ops,
        embedding=ops.place(weights["token_embd.weight"]),
        layers=tuple(loading.layer(i, predictors[i]) for i in range(spec.n_layer)),
        output_norm=loading.norm("output_norm"),
        head=(ops.place(weights["token_embd.weight" if spec.tied_embeddings else "output.weight"]),),
        rope=None if spec.rope is None else resident(ops, rope_table(spec.rope, n_ctx)),
        positions=ops.place(weights["position_embd.weight"]) if spec.n_positions else None,
        n_ctx=n_ctx,
        mode=mode,
    )
    if mlock:
        lock(loading.held())
    return transformer, loading.report(time.perf_counter() - began)


@runtime_checkable
class FiniteChecker(Protocol):
    """An implementation of ops that looks for NaN and infinity natively."""

    def check_finite(self, matrix: Matrix) -> int:
        """The first row that holds one, or -1."""


def check_finite(weights: Mapping[str, Weight], ops: Ops) -> None:
    """Look at every weight (of block formats, at every scale).

    Raises:
        NumericalError: one is NaN or infinite; the tensor is named.
    """
    for name, weight in weights.items():
        finite = ops.check_finite(ops.place(weight)) < 0 if isinstance(ops, FiniteChecker) else all_finite(weight)
        if not finite:
            raise not_finite(name)


def first_bytes(spec: ModelSpec, weights: Mapping[str, Weight]) -> tuple[int, ...]:
    """Bytes of each layer's matrix that tells which neurons are zero: the gate, or up where there is none."""
    name = "ffn_gate" if spec.ffn.gated else "ffn_up"
    return tuple(weights[f"blk.{layer}.{name}.weight"].nbytes for layer in range(spec.n_layer))


def resident(ops: Ops, values: npt.NDArray[np.float32]) -> Array:
    """`values` as an array of the implementation."""
    array = ops.array(values.shape)
    ops.to_host(array)[...] = values
    return array


@dataclass(slots=True)
class _Loading:
    """The account kept while tensors are placed."""

    spec: ModelSpec
    ops: Ops
    weights: Mapping[str, Weight]
    resident_bytes: int = 0
    reblocked: list[Reblocked] = field(default_factory=list)
    records_made: list[Bytes] = field(default_factory=list)
    predictor_bytes: int = 0

    def layer(self, index: int, predictor: LayerPredictor | None) -> Layer:
        spec, blk = self.spec, f"blk.{index}."
        qkv = [self.ops.place(self.weights[f"{blk}attn_{part}.weight"]) for part in "qkv"]
        bias = [self.vector(f"{blk}attn_{part}.bias") for part in "qkv"] if spec.qkv_bias else None
        return Layer(
            attn_norm=self.norm(blk + "attn_norm"),
            qkv=(qkv[0], qkv[1], qkv[2]),
            qkv_bias=(bias[0], bias[1], bias[2]) if bias else None,
            q_norm=self.vector(blk + "attn_q_norm.weight") if spec.qk_norm else None,
            k_norm=self.vector(blk + "attn_k_norm.weight") if spec.qk_norm else None,
            out=(self.ops.place(self.weights[blk + "attn_output.weight"]),),
            out_bias=(self.vector(blk + "attn_output.bias"),) if spec.out_bias else None,
            ffn_norm=None if spec.shared_norm else self.norm(blk + "ffn_norm"),
            ffn=self.neurons(blk),
            down_bias=self.vector(blk + self.down_bias) if spec.ffn_bias else None,
            window=spec.windows[index],
            predictor=predictor,
        )

    def predictors(self, source: NetworkSource, predictor: Predictor) -> tuple[LayerPredictor, ...]:
        """The layers' predictors, looked at for NaN and infinity."""
        predictor.require_fits(source.path, self.spec)
        matrices: dict[str, Weight] = {}
        for index, layer in enumerate(predictor.layers):
            matrices |= {f"predictor of layer {index}, fc1": layer.fc1, f"predictor of layer {index}, fc2": layer.fc2}
        check_finite(matrices, self.ops)
        self.predictor_bytes = predictor.nbytes
        tokens = predictor.batches(first_bytes(self.spec, self.weights))
        return tuple(
            LayerPredictor(self.ops.place(layer.fc1), self.ops.place(layer.fc2), threshold, most)
            for layer, threshold, most in zip(predictor.layers, predictor.thresholds, tokens, strict=True)
        )

    def neurons(self, blk: str) -> NeuronBlock:
        """The layer's FFN; where neurons can be skipped, or the file has them so, on records."""
        spec, records = self.spec, self.weights.get(blk + "ffn_down_t.weight")
        down = records or self.weights[blk + "ffn_down.weight"]
        if records is None and spec.ffn.sparse:
            down = records = self.records(down)
        return NeuronBlock(
            gate=self.ops.place(self.weights[blk + "ffn_gate.weight"]) if spec.ffn.gated else None,
            up=self.ops.place(self.weights[blk + "ffn_up.weight"]),
            down=self.ops.place(down),
            records=records is not None,
            kind=spec.ffn,
            neurons=spec.n_ff,
            up_bias=self.vector(blk + "ffn_up.bias") if spec.ffn_bias else None,
        )

    def records(self, down: Weight) -> Weight:
        """`down` transposed into memory of its own."""
        fmt = record_format(down)
        out = self.ops.to_host(self.ops.array((down.columns, fmt.row_bytes(down.rows)), "uint8"))
        if isinstance(self.ops, Transposer):
            worst, rms = self.ops.transpose_requantize(self.ops.place(down), out, fmt)
            if not np.isfinite(worst):
                raise not_finite(down.name)
            self.reblocked.append(Reblocked(down.name, fmt.name, worst, rms))
        else:
            self.reblocked.append(transpose(down, out, fmt))
        self.resident_bytes += out.nbytes
        self.records_made.append(out)
        return Weight(down.name.replace("ffn_down", "ffn_down_t"), fmt, (down.columns, down.rows), out)

    @property
    def down_bias(self) -> str:
        """What a layer's bias of the down projection is called in this file."""
        return "ffn_down_t.bias" if has_records(self.weights) else "ffn_down.bias"

    def norm(self, name: str) -> Norm:
        """A norm by the name of its tensors."""
        return Norm(self.vector(name + ".weight"), self.vector(name + ".bias") if self.spec.layer_norm else None)

    def vector(self, name: str) -> Array:
        """A norm or a bias as float32."""
        values = to_float(self.weights[name])[0]
        if not np.isfinite(values).all():
            raise not_finite(name)
        self.resident_bytes += values.nbytes
        return resident(self.ops, values)

    def held(self) -> list[Bytes]:
        """The bytes of all matrices that tokens are computed with."""
        return [w.data for w in self._mapped()] + self.records_made

    def _mapped(self) -> list[Weight]:
        transposed = {r.tensor for r in self.reblocked}
        return [w for w in self.weights.values() if w.rows > 1 and w.name not in transposed]

    def report(self, seconds: float) -> LoadReport:
        mapped = sum(w.nbytes for w in self._mapped())
        return LoadReport(mapped, self.resident_bytes, tuple(self.reblocked), seconds, self.predictor_bytes)
