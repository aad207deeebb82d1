"""The forward pass, written once against the ops contract.

Prefill and decode are two shapes of the same call: a step takes the tokens of one or several sequences, each
with its own KV cache, and gives logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from thermocline.config import Mode
from thermocline.errors import ContextError, UsageError
from thermocline.model.spec import ModelSpec
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ALL, ActiveSet, Array, FfnKind, FfnWork, KVLayer, Matrix, NeuronBlock, Ops


class SequenceCache(Protocol):
    """Keys and values of one sequence; positions 0 to `length` - 1 are filled."""

    length: int

    @property
    def n_ctx(self) -> int: ...

    @property
    def layers(self) -> Sequence[KVLayer]: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` neighbouring tokens of a step that continue one sequence from position `start`."""

    cache: SequenceCache
    start: int
    count: int


class Outputs(StrEnum):
    """Which tokens of a step get logits."""

    LAST = "last"
    ALL = "all"
    NONE = "none"


class Observer(Protocol):
    """Watches the FFNs of a step. Arrays are the step's own: copy what should outlive the call."""

    def ffn_input(self, layer: int, residual: Array, normed: Array) -> None:
        """Before a layer's FFN: the residual stream and its norm, both (T, n_embd)."""

    def ffn_hidden(self, layer: int, hidden: Array) -> None:
        """After it: the neurons' activations (T, n_ff), zero for those that were not computed."""


@runtime_checkable
class SelectionObserver(Observer, Protocol):
    """An observer that is also told which neurons were computed."""

    def ffn_active(self, layer: int, active: ActiveSet) -> None:
        """Between the two calls of `Observer`: the neurons that are computed, ALL where nothing was predicted."""


@dataclass(frozen=True, slots=True)
class LayerPredictor:
    """A layer's placed predictor: `Ops.predict` scores the residual stream before the FFN's norm.

    Where attention and FFN are parallel, this is the layer's input.

    It is used in steps of up to `tokens` tokens; in longer ones it would cost more than it saves.
    """

    fc1: Matrix
    fc2: Matrix
    threshold: float
    tokens: int


class Norm(NamedTuple):
    """LayerNorm where there is a bias, else RMSNorm."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's placed weights. `qkv` share their input; norms and biases are float32 vectors.

    `ffn_norm` is None where the FFN shares the norm of attention; `down_bias` is added once, after all of the FFN.
    """

    attn_norm: Norm
    qkv: tuple[Matrix, Matrix, Matrix]
    qkv_bias: tuple[Array, Array, Array] | None
    q_norm: Array | None
    k_norm: Array | None
    out: tuple[Matrix]
    out_bias: tuple[Array] | None
    ffn_norm: Norm | None
    ffn: NeuronBlock
    down_bias: Array | None
    window: int
    predictor: LayerPredictor | None = None


class StepResult(NamedTuple):
    """`logits` (outputs, n_vocab) is a view of the workspace, overwritten by the next step; `work` sums the layers."""

    logits: Array
    work: FfnWork


@dataclass(frozen=True, slots=True)
class Transformer:
    """A network ready to run: spec, placed weights, and how its FFN is computed (never `Mode.AUTO`)."""

    spec: ModelSpec
    ops: Ops
    embedding: Matrix
    layers: tuple[Layer, ...]
    output_norm: Norm
    head: tuple[Matrix]
    rope: Array | None
    positions: Matrix | None
    n_ctx: int
    mode: Mode

    def with_mode(self, mode: Mode) -> Transformer:
        """The same weights in another mode.

        Raises:
            UsageError: the network cannot run in that mode.
        """
        return replace(self, mode=resolve_mode(mode, self.spec.ffn, predictor=self.has_predictor))

    @property
    def has_predictor(self) -> bool:
        """Whether mode predicted is possible."""
        return all(layer.predictor is not None for layer in self.layers)

    @property
    def scored(self) -> int:
        """For how many tokens its workspaces need scores: 0 unless the mode is predicted."""
        if self.mode is not Mode.PREDICTED:
            return 0
        return max(layer.predictor.tokens for layer in self.layers if layer.predictor is not None)

    def step(
        self,
        tokens: npt.NDArray[np.int32],
        segments: Sequence[Segment],
        workspace: Workspace,
        outputs: Outputs = Outputs.LAST,
        observer: Observer | None = None,
    ) -> StepResult:
        """Run `tokens` (T), which are the segments' tokens one after another, and extend their caches.

        Logits come for every token, or for the last of each segment, in order, or not at all (0 rows).

        Raises:
            ContextError: a segment goes beyond its cache or beyond the table of rotations.
            UsageError: tokens, segments or workspace do not fit one another.
        """
        positions = self._check(tokens, segments, workspace, outputs, observer)
        views = workspace.views(len(tokens))
        self._embed(tokens, positions, views)
        gate_rows = up_rows = down_rows = fired = 0
        for index, layer in enumerate(self.layers):
            self._attend(index, layer, views, positions, segments)
            work = self._feed_forward(index, layer, views, observer)
            gate_rows += work.gate_rows
            up_rows += work.up_rows
            down_rows += work.down_rows
            fired += work.fired
        for segment in segments:
            segment.cache.length = segment.start + segment.count
        return StepResult(
            self._logits(views, segments, workspace, outputs), FfnWork(gate_rows, up_rows, down_rows, fired)
        )

    def _embed(self, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], views: Views) -> None:
        self.ops.embed(self.embedding, tokens, views.x)
        if self.positions is not None:
            self.ops.embed(self.positions, positions + np.int32(self.spec.position_offset or 0), views.normed)
            self.ops.add(views.x, views.normed)

    def _norm(self, x: Array, norm: Norm, out: Array) -> None:
        if norm.bias is None:
            self.ops.rms_norm(x, norm.weight, self.spec.norm_eps, out)
        else:
            self.ops.layer_norm(x, norm.weight, norm.bias, self.spec.norm_eps, out)

    def _attend(
        self,
        index: int,
        layer: Layer,
        views: Views,
        positions: npt.NDArray[np.int32],
        segments: Sequence[Segment],
    ) -> None:
        ops, spec = self.ops, self.spec
        self._norm(views.x, layer.attn_norm, views.normed)
        ops.linear(views.normed, layer.qkv, views.qkv, layer.qkv_bias)
        if layer.q_norm is not None:
            ops.rms_norm(views.q, layer.q_norm, spec.norm_eps, views.q)
            ops.rms_norm(views.k, layer.k_norm, spec.norm_eps, views.k)
        if spec.rope is not None:
            ops.rope(views.q, self.rope, positions, interleaved=spec.rope.interleaved)
            ops.rope(views.k, self.rope, positions, interleaved=spec.rope.interleaved)
        q, k, v, mixed = views.q, views.k, views.v, views.mixed
        scale, row = spec.attention_scale, 0
        for segment in segments:
            if len(segments) > 1:
                cut = slice(row, row + segment.count)
                q, k, v, mixed = views.q[cut], views.k[cut], views.v[cut], views.mixed[cut]
            ops.attention(q, k, v, segment.cache.layers[index], segment.start, scale, layer.window, mixed)
            row += segment.count
        if not spec.parallel:
            self._add_attention(layer, views)

    def _add_attention(self, layer: Layer, views: Views) -> None:
        self.ops.linear(views.mixed_flat, layer.out, (views.x,), layer.out_bias, add=True)

    def _feed_forward(self, index: int, layer: Layer, views: Views, observer: Observer | None) -> FfnWork:
        active = self._select(layer, views)
        if layer.ffn_norm is not None:
            self._norm(views.x, layer.ffn_norm, views.normed)
        if observer is not None:
            observer.ffn_input(index, views.x, views.normed)
            if isinstance(observer, SelectionObserver):
                observer.ffn_active(index, active)
        if self.spec.parallel:
            self._add_attention(layer, views)
        skip, hidden = self.mode is not Mode.DENSE, None if observer is None else views.hidden
        work = self.ops.ffn(views.normed, layer.ffn, active, views.x, skip_zeros=skip, hidden=hidden)
        if layer.down_bias is not None:
            self.ops.add(views.x, layer.down_bias)
        if observer is not None:
            observer.ffn_hidden(index, views.hidden)
        return work

    def _select(self, layer: Layer, views: Views) -> ActiveSet:
        """The neurons to compute: those that the predictor selects for any token, or all."""
        predictor = layer.predictor
        if self.mode is not Mode.PREDICTED or predictor is None or len(views.x) > predictor.tokens:
            return ALL
        self.ops.predict(views.x, predictor.fc1, predictor.fc2, views.scores)
        return self.ops.select(views.scores, predictor.threshold, views.active)

    def _logits(self, views: Views, segments: Sequence[Segment], workspace: Workspace, outputs: Outputs) -> Array:
        source, rows = views.x, len(views.x)
        if outputs is Outputs.NONE:
            return workspace.logits[:0]
        if outputs is Outputs.LAST and rows > len(segments):
            rows, end = len(segments), 0
            source = workspace.last[:rows]
            for i, segment in enumerate(segments):
                end += segment.count
                source[i] = views.x[end - 1]
        logits, normed = workspace.logits[:rows], views.normed[:rows]
        self._norm(source, self.output_norm, normed)
        self.ops.linear(normed, self.head, (logits,))
        return logits

    def _check(
        self,
        tokens: npt.NDArray[np.int32],
        segments: Sequence[Segment],
        workspace: Workspace,
        outputs: Outputs,
        observer: Observer | None,
    ) -> npt.NDArray[np.int32]:
        """Refuse what would read or write outside an array; the positions of the tokens (T)."""
        n = len(tokens)
        if not 1 <= n <= workspace.max_tokens:
            raise UsageError(f"a step of {n} tokens does not fit a workspace of 1 to {workspace.max_tokens}")
        wanted = n if outputs is Outputs.ALL else 0 if outputs is Outputs.NONE else len(segments)
        if wanted > workspace.max_outputs:
            raise UsageError(f"{wanted} rows of logits do not fit a workspace of {workspace.max_outputs}")
        if sum(s.count for s in segments) != n or any(s.count < 1 for s in segments):
            raise UsageError(f"segments of {[s.count for s in segments]} tokens do not divide a step of {n}")
        if observer is not None and workspace.hidden is None:
            raise UsageError("an observer needs a workspace made with observed=True")
        if workspace.scored < n <= self.scored:
            raise UsageError(f"mode predicted needs a workspace made with scored={self.scored}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.spec.n_vocab:
            raise UsageError(f"token {low if low < 0 else high} is not in the vocabulary of {self.spec.n_vocab}")
        for segment in segments:
            stop, room = segment.start + segment.count, min(segment.cache.n_ctx, self.n_ctx)
            if stop > room:
                raise ContextError(stop, room, "shorten the prompt or raise --ctx-size")
            if not 0 <= segment.start <= segment.cache.length:
                raise UsageError(
                    f"a segment starts at {segment.start}, but its cache is filled up to {segment.cache.length}"
                )
        if len(segments) == 1:
            return np.arange(segments[0].start, segments[0].start + n, dtype=np.int32)
        return np.concatenate([np.arange(s.start, s.start + s.count, dtype=np.int32) for s in segments])


def resolve_mode(mode: Mode, kind: FfnKind, *, predictor: bool = False) -> Mode:
    """The mode that `auto` stands for without an audit: exact where the activation gives zeros, else dense.

    Raises:
        UsageError: exact or predicted was asked for an activation that gives none, or predicted without `predictor`.
    """
    if mode is Mode.AUTO:
        return Mode.EXACT if kind.sparse else Mode.DENSE
    if mode is not Mode.DENSE and not kind.sparse:
        raise UsageError(f"mode {mode} skips neurons that are zero, but {kind.activation} gives none; use --mode dense")
    if mode is Mode.PREDICTED and not predictor:
        raise UsageError("mode predicted needs a predictor, and none was loaded; use --mode exact")
    return mode
