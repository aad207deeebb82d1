"""A decode step captured once and replayed for every token: no Python between the layers, on either side.

Everything of the step is in one CUDA graph. At a layer whose neurons are split, the stream copies the normed vector
(and the list of selected cold neurons) into pinned memory and posts it; a native worker computes the cold neurons while
the GPU computes the hot ones; the stream waits for the sum and adds it. Where there is no graph (Triton's interpreter,
or the plain crossing), the same calls are made anew for each token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from thermocline.config import CrossingKind, Mode
from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.model.feed_forward import Neurons, Tally
from thermocline.model.network import Layer, Transformer
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ALL, ActiveSet, Arrays, FfnWork
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.crossing import Crossing, choose
from thermocline.ops.cuda.feedforward import DeviceSet
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.handover import PATIENCE, ColdWorker, Mailbox

Floats = Any
SLEEPS = 0.75
"""Share of the time of the last step that its caller sleeps before it looks whether this one is done."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """A layer's FFN in a recorded step: the hot slice on the device, the cold one by the worker as layer `number`.

    `number` 0 means that nothing is cold. With a predictor, `threshold` selects from each side's own scores.
    """

    ops: CudaOps
    hot: ResidentNeurons | None
    number: int
    depth: int
    crossing: Crossing | None
    box: tuple[torch.Tensor, ...]
    threshold: float | None

    @property
    def parts(self) -> Sequence[Neurons]:
        """The part on the device."""
        return () if self.hot is None else (self.hot,)

    foresees = False

    def run(
        self,
        views: Views,
        workspace: Workspace,
        active: ActiveSet,
        *,
        skip_zeros: bool,
        tally: Tally,
        hidden: bool,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """See `FeedForward.run`; nothing here looks at a value."""
        hot, cold = self._cut(views, active)
        if self.number and self.crossing is not None:
            x, partial, back, ids, count = self.box
            x.copy_(views.normed[0], non_blocking=True)
            if isinstance(cold, DeviceSet):
                listed: Any = cold.indices
                ids[: len(listed)].copy_(listed, non_blocking=True)
                assert cold.count is not None
                count.copy_(cold.count, non_blocking=True)
            self.crossing.post(self.number)
        if self.hot is not None:
            self.hot.ffn(views.normed, hot, views.x, skip_zeros=skip_zeros)
        if self.number and self.crossing is not None:
            self.crossing.wait(self.number)
            back.copy_(partial, non_blocking=True)
            views.x.add_(back)

    def _cut(self, views: Views, active: ActiveSet) -> tuple[ActiveSet, ActiveSet]:
        """Hot and cold set, each counted from its own first neuron: selected anew, as both sides are neighbours."""
        if active is ALL or self.threshold is None:
            return ALL, ALL
        if not self.number or self.hot is None:
            return (active, active)
        ops, n = self.ops, views.scores.shape[1]
        ids = ops.scratch.take("both lists", (n,), torch.int32)
        counts = ops.scratch.take("both counts", (2,), torch.int32)
        for i, (start, stop) in enumerate(((0, self.depth), (self.depth, n))):
            ops.select_into(views.scores[:, start:stop], self.threshold, ids[start:stop], counts[i : i + 1])
        return DeviceSet(ids[: self.depth], counts[:1]), DeviceSet(ids[self.depth :], counts[1:])  # type: ignore[arg-type]


class CapturedStep:
    """One sequence's decode step, ready to be replayed.

    Attributes:
        notice: why not the best way of crossing, if so.
        captured: whether it is a graph.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache: KVCache,
        *,
        way: CrossingKind = CrossingKind.AUTO,
        patience: float = PATIENCE,
        arrays: Mapping[Tier, Arrays] | None = None,
    ) -> None:
        """Every layer's home and the head must be on the GPU. `arrays` make the workspace, as for `Transformer`.

        Raises:
            UsageError: a part of the step is elsewhere, or the way of crossing does not exist here.
        """
        ops = transformer.exit.ops
        homes = {layer.device.tier for layer in transformer.layers} | {transformer.exit.tier}
        if not isinstance(ops, CudaOps) or homes != {Tier.VRAM}:
            raise UsageError("a captured step needs all attention and the output head on the GPU; run it uncaptured")
        self.ops, self.cache = ops, cache
        self.notice: str | None = None
        self._arrays: Arrays = ops if arrays is None else arrays[Tier.VRAM]
        self._embeds_here = transformer.entry is not transformer.exit
        self._worker, self._crossing, box = self._worker_of(transformer, way, patience)
        self._transformer = self._crossed(transformer, box)
        self._workspace = transformer.workspace(1, 1, arrays=arrays)
        self._token, self._position = self._pair((1,), torch.int32), self._pair((1,), torch.int32)
        self._x = self._pair((1, transformer.spec.n_embd), torch.float32)
        self._embedded = tuple(np.zeros((1, transformer.spec.n_embd), np.float32) for _ in range(2))
        self._took = 0.0
        self._counts = self._pair((4,), torch.int64)
        self._logits = self.ops.streams.pinned((1, transformer.spec.n_vocab), torch.float32)
        self._replay: Callable[[], None] = self._record
        self.captured = False
        self._rehearse()
        if ops.streams.real and (self._crossing is None or self._crossing.captured):
            ops.scratch.hold()
            self._replay, self.captured = ops.streams.captured(self._record), True

    @property
    def way(self) -> CrossingKind | None:
        """How the sides cross; None where no layer is split."""
        return None if self._crossing is None else self._crossing.way

    def run(self, token: int, position: int) -> tuple[Floats, FfnWork, FfnWork]:
        """Logits (n_vocab) of the token after `token`, which is at `position`; work of the GPU, and of the CPU.

        The logits are overwritten by the next step.

        Raises:
            HardwareError: the CPU's side failed, died or was too slow. The next step may succeed.
        """
        self._position[0][0] = position
        self._token[0][0] = token
        if self._embeds_here:
            x, spare = self._embedded
            self._transformer.embed(np.array([token], np.int32), np.array([position], np.int32), x, spare)
            self._x[0].numpy()[...] = x
        began = time.perf_counter()
        with self._worker.step() if self._worker is not None else nullcontext():
            try:
                self._replay()
            finally:  # also who interrupts waits for what was begun
                self.ops.streams.settle(self._worker, SLEEPS * self._took)
        self._took = time.perf_counter() - began
        self.cache.length = position + 1
        cold = self._worker.take_work() if self._worker is not None else FfnWork(0, 0, 0, 0)
        return self._logits.numpy()[0], FfnWork(*self._counts[0].tolist()), cold

    def _record(self) -> None:
        for host, there in (self._token, self._position, *((self._x,) if self._embeds_here else ())):
            there.copy_(host, non_blocking=True)
        counts_host, counts = self._counts
        counts.zero_()
        with self.ops.counting(counts):
            token: torch.Tensor | None = self._token[1]
            if self._embeds_here:
                self._workspace.views(1).x.copy_(self._x[1])
                token = None
            logits = self._transformer.record(token, self._position[1], self.cache, self._workspace)
        self._logits.copy_(logits, non_blocking=True)
        counts_host.copy_(counts, non_blocking=True)

    def _rehearse(self) -> None:
        """Run once, at the cache's end: kernels are compiled, and their scratch is made."""
        self._position[0][0] = self.cache.n_ctx - 1
        streams = self.ops.streams
        with streams.aside(), self._worker.step() if self._worker is not None else nullcontext():
            try:
                self._record()
            finally:
                streams.settle(self._worker)
        if self._worker is not None:
            self._worker.take_work()

    def _worker_of(
        self, transformer: Transformer, way: CrossingKind, patience: float
    ) -> tuple[ColdWorker | None, Crossing | None, tuple[torch.Tensor, ...]]:
        cold = [p for layer in transformer.layers for p in layer.ffn.parts if p.device.tier is not Tier.VRAM]
        if not cold:
            return None, None, ()
        host = cold[0].device.ops
        if not isinstance(host, CpuOps) or not all(isinstance(part, ResidentNeurons) for part in cold):
            raise UsageError("a captured step takes cold neurons from RAM alone; run it uncaptured")
        tensors: list[torch.Tensor] = []

        def made(shape: tuple[int, ...], dtype: str) -> Any:
            tensors.append(self.ops.streams.pinned(shape, getattr(torch, dtype)))
            return tensors[-1].numpy()

        n_embd = transformer.spec.n_embd
        mailbox = Mailbox.of(made, n_embd, max(part.stop - part.start for part in cold))
        worker = ColdWorker(host, mailbox, patience)
        skip = transformer.mode.value != "dense"
        for layer in transformer.layers:
            for part in layer.ffn.parts:
                if part.device.tier is not Tier.VRAM:
                    assert isinstance(part, ResidentNeurons)
                    worker.add(part.block, skip_zeros=skip, listed=_threshold(transformer, layer) is not None)
        crossing, self.notice = choose(way, worker, self.ops.streams)
        _, x, partial, ids, count = tensors
        back = self._arrays.array((n_embd,))
        return worker, crossing, (x, partial, back, ids, count)

    def _crossed(self, transformer: Transformer, box: tuple[torch.Tensor, ...]) -> Transformer:
        layers, number = [], 0
        for layer in transformer.layers:
            hot = [p for p in layer.ffn.parts if p.device.tier is Tier.VRAM]
            cold = [p for p in layer.ffn.parts if p.device.tier is not Tier.VRAM]
            number += len(cold)
            if len(hot) > 1 or len(cold) > 1:
                raise UsageError("a captured step takes one slice of neurons a side; run it uncaptured")
            first = hot[0] if hot else None
            assert first is None or isinstance(first, ResidentNeurons)
            at, depth, threshold = number if cold else 0, first.stop if first else 0, _threshold(transformer, layer)
            ffn = Crossed(self.ops, first, at, depth, self._crossing, box, threshold)
            layers.append(replace(layer, ffn=ffn))  # type: ignore[arg-type]
        return replace(transformer, layers=tuple(layers))

    def _pair(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """An array of the host and one of the device."""
        return self.ops.streams.pinned(shape, dtype), self._arrays.array(shape, str(dtype).removeprefix("torch."))


def _threshold(transformer: Transformer, layer: Layer) -> float | None:
    """The threshold of a layer that is predicted for single tokens, None for one that is not."""
    predictor = layer.predictor
    if transformer.mode is not Mode.PREDICTED or predictor is None or predictor.tokens < 1:
        return None
    if predictor.device is not layer.device:
        raise UsageError("a captured step needs its predictors on the GPU; run it uncaptured")
    return predictor.threshold
