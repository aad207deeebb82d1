"""A layer's FFN in a recorded step: the hot slice on the device, the cold one by the CPU's worker, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.model.feed_forward import Neurons, Tally
from thermocline.model.layer import Layer, LayerPredictor
from thermocline.model.network import Transformer
from thermocline.model.workspace import Views, Workspace
from thermocline.ops.contract import ALL, ActiveSet
from thermocline.ops.cuda.crossing import Crossing
from thermocline.ops.cuda.feedforward import DeviceSet
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.handover import ColdWorker
from thermocline.runtime.taped import Taping, threshold_of

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """What both sides hand over, in pinned memory but for `back` (n_embd), which is the device's.

    `x` and `partial` float32 (n_embd), `ids` int32 (the most cold neurons) and `count` int32 (1) are the worker's
    mailbox. `residual` float32 (1, n_embd) is the residual stream; `hot_ids` and `hot_count` are what the CPU selects
    for the device.
    """

    x: Tensor
    partial: Tensor
    ids: Tensor
    count: Tensor
    residual: Tensor
    hot_ids: Tensor
    hot_count: Tensor
    back: Tensor


@dataclass(frozen=True, slots=True)
class Crossed:
    """A layer's FFN in a recorded step: the hot slice on the device, the cold one by the worker as `number`.

    `number` 0 means that nothing is cold. With a predictor on the device `threshold` selects from each side's own
    scores. With one on the host the worker selects: as `asked` before both sides begin, or where nothing is hot
    (`asked` 0, `resided`) when it computes.
    """

    ops: CudaOps
    hot: ResidentNeurons | None
    number: int
    depth: int
    crossing: Crossing | None
    box: Box | None
    threshold: float | None
    asked: int = 0
    resided: bool = False

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
        crossing, box = self.crossing, self.box
        hot, cold = self._asked(views) if self.asked else self._cut(views, active)
        if self.number and crossing is not None and box is not None:
            box.x.copy_(views.normed[0], non_blocking=True)
            if self.resided:
                box.residual.copy_(views.x, non_blocking=True)
            if isinstance(cold, DeviceSet):
                listed: Any = cold.indices
                box.ids[: len(listed)].copy_(listed, non_blocking=True)
                assert cold.count is not None
                box.count.copy_(cold.count, non_blocking=True)
            crossing.post(self.number)
        if self.hot is not None:
            self.hot.ffn(views.normed, hot, views.x, skip_zeros=skip_zeros)
        if self.number and crossing is not None and box is not None:
            crossing.wait(self.number)
            box.back.copy_(box.partial, non_blocking=True)
            views.x.add_(box.back)

    def _asked(self, views: Views) -> tuple[ActiveSet, ActiveSet]:
        """The hot set, as the worker selects it; the cold one stays in the mailbox."""
        crossing, box = self.crossing, self.box
        assert crossing is not None
        assert box is not None
        box.residual.copy_(views.x, non_blocking=True)
        crossing.post(self.asked)
        crossing.wait(self.asked)
        ids = self.ops.scratch.take("both lists", (self.depth,), torch.int32)
        count = self.ops.scratch.take("both counts", (1,), torch.int32)
        ids.copy_(box.hot_ids[: self.depth], non_blocking=True)
        count.copy_(box.hot_count, non_blocking=True)
        return DeviceSet(ids, count), ALL  # type: ignore[arg-type]

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


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the layers of the device are told that leave a part to the CPU's worker."""

    ops: CudaOps
    box: Box
    worker: ColdWorker
    taping: Taping

    def crossed(self, layer: Layer) -> Crossed:
        """The FFN of such a layer, its cold part and the host's predictor made known to the worker.

        Raises:
            UsageError: neurons are on disk, or are cut more often than a captured step can.
        """
        transformer, box, worker = self.taping.transformer, self.box, self.worker
        hot, cold = (
            [part for part in layer.ffn.parts if (part.device.tier is Tier.VRAM) is there] for there in (True, False)
        )
        slices = [part for part in layer.ffn.parts if isinstance(part, ResidentNeurons)]
        if len(slices) < len(layer.ffn.parts) or len(hot) > 1 or len(cold) > 1:
            raise UsageError("a captured step takes one slice of neurons in RAM and one on the GPU; run it uncaptured")
        first = slices[0] if hot else None
        block = slices[-1].block if cold else None
        depth, threshold = first.stop if first else 0, threshold_of(transformer, layer)
        ffn = Crossed(self.ops, first, 0, depth, None, box, threshold)
        predictor = _of_host(transformer, layer)
        if predictor is not None and first is None and block is not None:
            x, partial = box.x.numpy()[None], box.partial.numpy()[None]
            tape = self.taping.predicted(predictor, block, x, partial)
            return replace(ffn, number=worker.add_tape(tape), resided=True)
        if predictor is not None:
            cuts = [(0, depth, box.hot_ids.numpy(), box.hot_count.numpy())]
            if block is not None:
                cuts.append((depth, depth + block.neurons, box.ids.numpy(), box.count.numpy()))
            ffn = replace(ffn, asked=worker.add_tape(self.taping.lists(predictor, cuts)))
        if block is None:
            return ffn
        skip = transformer.mode is not Mode.DENSE
        return replace(ffn, number=worker.add(block, skip_zeros=skip, listed=threshold is not None))


def is_shared(transformer: Transformer, layer: Layer) -> bool:
    """Whether a layer of the device leaves something to the CPU.

    Raises:
        UsageError: it does so in a way that cannot be captured.
    """
    if layer.device.tier is not Tier.VRAM:
        return False
    return _of_host(transformer, layer) is not None or any(p.device.tier is not Tier.VRAM for p in layer.ffn.parts)


def reaching(layer: Layer, ffn: Crossed) -> Layer:
    """The layer with that FFN; a predictor of the host's is reached by it."""
    predictor = layer.predictor
    if predictor is not None and predictor.device is not layer.device:
        predictor = None
    return replace(layer, ffn=ffn, predictor=predictor)  # type: ignore[arg-type]


def _of_host(transformer: Transformer, layer: Layer) -> LayerPredictor | None:
    """The host's predictor of a layer of the device, None where it has its own or none is used."""
    predictor = layer.predictor
    if threshold_of(transformer, layer) is None or predictor is None or predictor.device is layer.device:
        return None
    if transformer.spec.parallel:
        raise UsageError("a captured step of a network with parallel attention has its predictors on the GPU")
    return predictor
