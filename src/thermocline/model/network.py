"""The forward pass, written once against the ops contract.

Prefill and decode are two shapes of the same call: a step takes the tokens of one or several sequences, each
with its own KV cache, and gives logits. Every layer has a home, the device of its attention and cache; the residual
stream is carried along where a layer's home is not that of the one before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from thermocline.config import Mode
from thermocline.errors import ContextError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.model.feed_forward import NOTHING, Neurons, Tally
from thermocline.model.layer import Layer, Norm
from thermocline.model.observers import Counter, Observer, SelectionObserver
from thermocline.model.spec import ModelSpec
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ALL, ActiveSet, Array, Arrays, FfnKind, FfnWork, KVLayer, Matrix, Ops
from thermocline.ops.device import Device


class SequenceCache(Protocol):
    """Keys and values of one sequence; positions 0 to `length` - 1 are filled."""

    @property
    def length(self) -> int: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def layers(self) -> Sequence[KVLayer]: ...

    def fill(self, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` neighbouring tokens of a step that continue one sequence from position `start`.

    `start` is an int, or where a step is recorded an array (1) of the device.
    """

    cache: SequenceCache
    start: Any
    count: int


class Outputs(StrEnum):
    """Which tokens of a step get logits."""

    LAST = "last"
    ALL = "all"
    NONE = "none"


class StepResult(NamedTuple):
    """`logits` (outputs, n_vocab) is a view of the workspace, overwritten by the next step; `work` sums the layers.

    `hot` is the part of the work that was done beside VRAM.
    """

    logits: Array
    work: FfnWork
    hot: FfnWork = NOTHING


@dataclass(frozen=True, slots=True)
class Transformer:
    """A network ready to run: spec, placed weights, and how its FFN is computed (never `Mode.AUTO`).

    The embeddings are on device `entry`, output norm and head on device `exit`.
    """

    spec: ModelSpec
    entry: Device
    embedding: Matrix
    layers: tuple[Layer, ...]
    exit: Device
    output_norm: Norm
    head: tuple[Matrix]
    positions: Matrix | None
    n_ctx: int
    mode: Mode

    @property
    def ops(self) -> Ops:
        """The arithmetic of the device that makes the logits; of all, where there is one device."""
        return self.exit.ops

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device that computes, fastest memory first."""
        found = {device.tier: device for device in self._used()}
        return tuple(found[tier] for tier in Tier if tier in found)

    def _used(self) -> Iterator[Device]:
        yield self.entry
        yield self.exit
        for layer in self.layers:
            yield layer.device
            yield from (part.device for part in layer.ffn.parts)
            if layer.predictor is not None:
                yield layer.predictor.device

    def workspace(
        self,
        max_tokens: int,
        max_outputs: int | None = None,
        *,
        observed: bool = False,
        arrays: Mapping[Tier, Arrays] | None = None,
    ) -> Workspace:
        """A workspace with what each device needs, made by its ops or by `arrays`."""
        homes = {layer.device.tier for layer in self.layers}
        scoring = {layer.predictor.device.tier for layer in self.layers if layer.predictor is not None}
        spaces: dict[Tier, Workspace] = {}
        for device in self.devices:
            tier = device.tier
            spaces[tier] = Workspace(
                self.spec,
                device.ops if arrays is None else arrays[tier],
                max_tokens,
                max_outputs,
                observed=observed,
                scored=self.scored if tier in scoring else 0,
                trunk=tier in homes,
                logits=tier is self.exit.tier,
                others=spaces,
            )
        return spaces[self.exit.tier]

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
        tally: Tally | None = None,
        counter: Counter | None = None,
    ) -> StepResult:
        """Run `tokens` (T), which are the segments' tokens one after another, and extend their caches.

        Logits come for every token, or for the last of each segment, in order, or not at all (0 rows). `tally` is
        cleared, and tells afterwards what the step did. `observer` and `counter` want an observed workspace.

        Raises:
            ContextError: a segment goes beyond its cache or beyond the table of rotations.
            UsageError: tokens, segments or workspace do not fit one another.
        """
        positions = self.check(
            tokens, segments, workspace, outputs, watched=observer is not None or counter is not None
        )
        tally = Tally() if tally is None else tally
        tally.clear()
        n, here = len(tokens), self.entry
        views = workspace.on(here.tier).views(n)
        clock = time.perf_counter() if tally.timed else 0.0
        self.embed(tokens, positions, views.x, views.normed)
        for index, layer in enumerate(self.layers):
            if layer.device is not here:
                views = _moved(views, here, layer.device, workspace, tally)
                here = layer.device
            self._attend(index, layer, views, positions, segments)
            if tally.timed:
                clock = tally.lap(f"attention {layer.home}", clock, layer.device)
            self._feed_forward(index, layer, views, workspace, tally, observer, counter)
            if tally.timed:
                clock = tally.lap("ffn", clock)
        for segment in segments:
            segment.cache.fill(segment.start + segment.count)
        if self.exit is not here and outputs is not Outputs.NONE:
            views = _moved(views, here, self.exit, workspace, tally)
        logits = self._logits(views, segments, workspace, outputs)
        if tally.timed:
            tally.lap("head", clock, self.exit)
        return StepResult(logits, *_summed(tally))

    def record(
        self, layers: Iterable[int], views: Views, position: Array, cache: SequenceCache, workspace: Workspace
    ) -> None:
        """Take the residual stream of one token, `views.x`, through neighbouring `layers` of one home.

        No value is looked at, so that the calls can be written down once and done again for other tokens: `position` is
        an int32 array (1) of that device. Nothing is checked, and the length of the cache is left alone.
        """
        segments, tally = (Segment(cache, position, 1),), Tally()
        for index in layers:
            self._attend(index, self.layers[index], views, position, segments)
            self._feed_forward(index, self.layers[index], views, workspace, tally)

    def record_logits(self, workspace: Workspace) -> Array:
        """Logits (1, n_vocab) of the token whose residual stream is in the workspace of the exit; see `record`."""
        return self._logits(workspace.views(1), (), workspace, Outputs.ALL)

    def rehearse(self, tier: Tier, tokens: int, start: int, cache: SequenceCache, workspace: Workspace) -> None:
        """Compute what one device has of a step of `tokens` tokens at `start`, on whatever its arrays hold.

        Nothing crosses, and no token's result is right: it shows what memory such a step takes. Caches lose their
        positions from `start` on.
        """
        views = workspace.on(tier).views(tokens)
        positions, segments = np.arange(start, start + tokens, dtype=np.int32), (Segment(cache, start, tokens),)
        sent = False
        for index, layer in enumerate(self.layers):
            if layer.device.tier is tier:
                self._attend(index, layer, views, positions, segments)
            ffn, predictor = layer.ffn, layer.predictor
            predicted = self.mode is Mode.PREDICTED and predictor is not None and tokens <= predictor.tokens
            if ffn.sent is not None and tokens >= ffn.sent_from and not (sent or predicted):
                ffn, sent = ffn.sent, True  # all that travel take the same buffers
            if predictor is not None and predicted and predictor.device.tier is tier:
                predictor.device.ops.predict(views.x, predictor.fc1, predictor.fc2, views.scores)
                predictor.device.ops.select(views.scores, predictor.threshold, views.active)
            for part in ffn.parts:
                if part.device.tier is tier:
                    self._rehearse_part(part, views, beside=len(ffn.parts) > 1, predicted=predicted)
        if self.exit.tier is tier:
            self._logits(views, segments, workspace, Outputs.LAST)

    def _rehearse_part(self, part: Neurons, views: Views, *, beside: bool, predicted: bool) -> None:
        """`beside` others a device works in a thread of its own, for which libraries have workspaces of their own."""
        some = ActiveSet(np.arange(part.stop - part.start, dtype=np.int32)) if predicted else ALL

        def work() -> FfnWork:
            return part.ffn(views.normed, some, views.x, skip_zeros=self.mode is not Mode.DENSE)

        if beside:
            part.device.begin(work)
            part.device.end()
        else:
            work()

    def embed(self, tokens: Array, positions: Array, x: Array, spare: Array) -> None:
        """Write the residual stream of `tokens` at `positions` into `x` (T, n_embd); `spare`, its like, is overwritten.

        All of them are on the device of the entry; tokens and positions may be on the host.
        """
        ops = self.entry.ops
        ops.embed(self.embedding, tokens, x)
        if self.positions is not None:
            ops.embed(self.positions, positions + (self.spec.position_offset or 0), spare)
            ops.add(x, spare)

    def _norm(self, ops: Ops, x: Array, norm: Norm, out: Array) -> None:
        if norm.bias is None:
            ops.rms_norm(x, norm.weight, self.spec.norm_eps, out)
        else:
            ops.layer_norm(x, norm.weight, norm.bias, self.spec.norm_eps, out)

    def _attend(
        self,
        index: int,
        layer: Layer,
        views: Views,
        positions: npt.NDArray[np.int32],
        segments: Sequence[Segment],
    ) -> None:
        ops, spec = layer.device.ops, self.spec
        self._norm(ops, views.x, layer.attn_norm, views.normed)
        ops.linear(views.normed, layer.qkv, views.qkv, layer.qkv_bias)
        if layer.q_norm is not None:
            ops.rms_norm(views.q, layer.q_norm, spec.norm_eps, views.q)
            ops.rms_norm(views.k, layer.k_norm, spec.norm_eps, views.k)
        if spec.rope is not None:
            ops.rope((views.q, views.k), layer.rope, positions, interleaved=spec.rope.interleaved)
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
        layer.device.ops.linear(views.mixed_flat, layer.out, (views.x,), layer.out_bias, add=True)

    def _feed_forward(
        self,
        index: int,
        layer: Layer,
        views: Views,
        workspace: Workspace,
        tally: Tally,
        observer: Observer | None = None,
        counter: Counter | None = None,
    ) -> None:
        active = self._select(layer, views, workspace, tally, observer is not None)
        if layer.ffn_norm is not None:
            self._norm(layer.device.ops, views.x, layer.ffn_norm, views.normed)
        if observer is not None:
            observer.ffn_input(index, views.x, views.normed)
            if isinstance(observer, SelectionObserver):
                observer.ffn_active(index, layer.ffn.named(active))
        if self.spec.parallel:
            self._add_attention(layer, views)
        skip, watched = self.mode is not Mode.DENSE, observer is not None or counter is not None
        layer.ffn.run(
            views,
            workspace,
            active,
            skip_zeros=skip,
            tally=tally,
            hidden=watched,
            meanwhile=self._lookahead(index, layer, views),
        )
        if layer.down_bias is not None:
            layer.device.ops.add(views.x, layer.down_bias)
        if observer is not None:
            observer.ffn_hidden(index, layer.ffn.gather(workspace, len(views.x)))
        if counter is not None:
            counter.ffn_fired(index, layer.ffn.fired(workspace, len(views.x)))

    def _lookahead(self, index: int, layer: Layer, views: Views) -> Callable[[], None] | None:
        """What foresees the next layer's active set while this one's is read from disk; None where nothing reads ahead.

        The residual stream changes little from one layer to the next, so that what the next predictor sees in it now is
        most of what it will select. Source of the idea: Deja Vu (Liu et al., ICML 2023).
        """
        following = self.layers[index + 1] if index + 1 < len(self.layers) else None
        predictor = None if following is None else following.predictor
        if self.mode is not Mode.PREDICTED or following is None or predictor is None or not following.ffn.foresees:
            return None
        if len(views.x) > predictor.tokens or not layer.device is following.device is predictor.device:
            return None

        def foresee() -> None:
            ops = predictor.device.ops
            ops.predict(views.x, predictor.fc1, predictor.fc2, views.scores)
            following.ffn.foresee(ops.select(views.scores, predictor.threshold, views.active))

        return foresee

    def _select(self, layer: Layer, views: Views, workspace: Workspace, tally: Tally, to_host: bool) -> ActiveSet:
        """The neurons to compute: those that the predictor selects for any token, or all.

        They are on the host where it has to know them: to tell of them, or to cut them for several parts.
        """
        predictor = layer.predictor
        if self.mode is not Mode.PREDICTED or predictor is None or len(views.x) > predictor.tokens:
            return ALL
        there = views
        if predictor.device is not layer.device:
            there = _moved(views, layer.device, predictor.device, workspace, tally)
        ops, began = predictor.device.ops, time.perf_counter() if tally.timed else 0.0
        ops.predict(there.x, predictor.fc1, predictor.fc2, there.scores)
        active = ops.select(there.scores, predictor.threshold, there.active)
        if tally.timed:
            tally.lap("predictor", began, predictor.device)
        if to_host or predictor.device is not layer.device or len(layer.ffn.parts) > 1:
            return ActiveSet(ops.to_host(active.indices))
        return active

    def _has_scores(self, workspace: Workspace, tokens: int) -> bool:
        tiers = {layer.predictor.device.tier for layer in self.layers if layer.predictor is not None}
        return all(workspace.on(tier).scored >= tokens for tier in tiers)

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
        self._norm(self.ops, source, self.output_norm, normed)
        self.ops.linear(normed, self.head, (logits,))
        return logits

    def check(
        self,
        tokens: npt.NDArray[np.int32],
        segments: Sequence[Segment],
        workspace: Workspace,
        outputs: Outputs,
        *,
        watched: bool = False,
    ) -> npt.NDArray[np.int32]:
        """Refuse what would read or write outside an array; the positions of the tokens (T). Raises as `step` does."""
        n = len(tokens)
        if not 1 <= n <= workspace.max_tokens:
            raise UsageError(f"a step of {n} tokens does not fit a workspace of 1 to {workspace.max_tokens}")
        wanted = n if outputs is Outputs.ALL else 0 if outputs is Outputs.NONE else len(segments)
        if wanted > workspace.max_outputs:
            raise UsageError(f"{wanted} rows of logits do not fit a workspace of {workspace.max_outputs}")
        if sum(s.count for s in segments) != n or any(s.count < 1 for s in segments):
            raise UsageError(f"segments of {[s.count for s in segments]} tokens do not divide a step of {n}")
        if watched and workspace.hidden is None:
            raise UsageError("an observer needs a workspace made with observed=True")
        if n <= self.scored and not self._has_scores(workspace, n):
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


def _moved(views: Views, here: Device, there: Device, workspace: Workspace, tally: Tally) -> Views:
    """The residual stream taken to another device."""
    moved = workspace.on(there.tier).views(len(views.x))
    tally.carry(here, views.x, there, moved.x)
    return moved


def _summed(tally: Tally) -> tuple[FfnWork, FfnWork]:
    """The work of all parts, and of those beside VRAM."""
    gate = up = down = fired = 0
    hot = NOTHING
    for part, work in tally.work:
        gate += work.gate_rows
        up += work.up_rows
        down += work.down_rows
        fired += work.fired
        if part.device.tier is Tier.VRAM:
            hot = FfnWork(*(a + b for a, b in zip(hot, work, strict=True)))
    return FfnWork(gate, up, down, fired), hot


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
