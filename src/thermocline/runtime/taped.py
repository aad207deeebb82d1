"""What of a decode step the CPU computes alone, written on tapes: runs of whole layers, predictors, the output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thermocline.config import Mode
from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.memory.neuron_store import ResidentNeurons
from thermocline.model.feed_forward import FeedForward
from thermocline.model.layer import Layer, LayerPredictor
from thermocline.model.network import Transformer
from thermocline.model.workspace import Workspace
from thermocline.ops.contract import FfnWork, NeuronBlock
from thermocline.ops.cpu import CpuOps
from thermocline.ops.device import Host
from thermocline.ops.tape import TapeOps

Floats = Any


@dataclass(frozen=True, slots=True)
class Stage:
    """Neighbouring layers of one home. `number` is what the worker calls them, 0 where they are the device's."""

    tier: Tier
    layers: range
    number: int = 0


def stages_of(transformer: Transformer) -> list[Stage]:
    """The layers by homes, in order; and an empty stage of the host's at the end where the head alone is there."""
    stages: list[Stage] = []
    for index, layer in enumerate(transformer.layers):
        tier = layer.device.tier
        first = stages.pop().layers.start if stages and stages[-1].tier is tier else index
        stages.append(Stage(tier, range(first, index + 1)))
    end = len(transformer.layers)
    if transformer.exit.tier is Tier.RAM and (not stages or stages[-1].tier is not Tier.RAM):
        stages.append(Stage(Tier.RAM, range(end, end)))
    return stages


def threshold_of(transformer: Transformer, layer: Layer) -> float | None:
    """The threshold of a layer that is predicted for single tokens, None for one that is not."""
    predictor = layer.predictor
    if transformer.mode is not Mode.PREDICTED or predictor is None or predictor.tokens < 1:
        return None
    return predictor.threshold


@dataclass(frozen=True, slots=True)
class Taping:
    """What tapes are written for: a transformer with its cache and workspace, and the host's arrays of a step.

    `residual` float32 (1, n_embd) holds the residual stream before and after, `position` int32 (1) the token's.
    """

    transformer: Transformer
    ops: CpuOps
    cache: KVCache
    workspace: Workspace
    residual: Floats
    position: Any

    def stage(self, stage: Stage) -> TapeOps:
        """The layers of the stage from `residual` to `residual`, and the head, if that is the host's and they are last.

        Raises:
            UsageError: something of them is on another device or on disk.
        """
        tape = TapeOps(self.ops)
        device, transformer = Host(tape), self.transformer
        views = self.workspace.on(Tier.RAM).views(1)
        if self.residual is not views.x:
            tape.copy(self.residual, views.x)
        layers = list(transformer.layers)
        layers[stage.layers.start : stage.layers.stop] = [_on(device, layers[index]) for index in stage.layers]
        taped = replace(transformer, layers=tuple(layers))
        taped.record(stage.layers, views, self.position, self.cache, self.workspace)
        if stage.layers.stop == len(layers) and transformer.exit.tier is Tier.RAM:
            replace(taped, exit=device).record_logits(self.workspace)
        else:
            tape.copy(views.x, self.residual)
        return tape

    def predicted(self, predictor: LayerPredictor, block: NeuronBlock, x: Floats, partial: Floats) -> TapeOps:
        """`partial` (1, n_embd) = the FFN of `x` (1, n_embd) by the neurons that `residual` selects, all the host's."""
        tape, views = self._scores(predictor), self.workspace.on(Tier.RAM).views(1)
        active = tape.select(views.scores, predictor.threshold, views.active)
        tape.copy(np.zeros_like(partial), partial)
        skip = self.transformer.mode is not Mode.DENSE
        tape.ffn(x, block, active, partial, skip_zeros=skip)
        return tape

    def lists(self, predictor: LayerPredictor, cuts: Sequence[tuple[int, int, Any, Any]]) -> TapeOps:
        """For every cut (start, stop, ids, count) the neurons that `residual` selects, counted from `start`."""
        tape, scores = self._scores(predictor), self.workspace.on(Tier.RAM).views(1).scores
        for start, stop, ids, count in cuts:
            tape.select_into(scores[0, start:stop][None], predictor.threshold, ids[: stop - start], count)
        return tape

    def _scores(self, predictor: LayerPredictor) -> TapeOps:
        tape = TapeOps(self.ops)
        tape.predict(self.residual, predictor.fc1, predictor.fc2, self.workspace.on(Tier.RAM).views(1).scores)
        return tape


class TapedStep:
    """The decode step of a network that is the CPU's alone, replayed for every token: no Python between the layers."""

    def __init__(self, transformer: Transformer, cache: KVCache, workspace: Workspace) -> None:
        """For tokens of the sequence in `cache`; `workspace` is that of its other steps.

        Raises:
            UsageError: a part of the step is on another device, on disk, or may change its place.
        """
        ops = transformer.exit.ops
        if [device.tier for device in transformer.devices] != [Tier.RAM] or type(ops) is not CpuOps:
            raise UsageError("a taped step needs all of a network in RAM")
        self._transformer, self._cache, self._views = transformer, cache, workspace.views(1)
        self._token, self._position = np.zeros(1, np.int32), np.zeros(1, np.int32)
        taping = Taping(transformer, ops, cache, workspace, self._views.x, self._position)
        self._tape = taping.stage(Stage(Tier.RAM, range(len(transformer.layers))))
        self._logits = workspace.logits

    def run(self, token: int, position: int) -> tuple[Floats, FfnWork]:
        """Logits (n_vocab) of the token after `token`, which is at `position`, and the work of all FFNs.

        The logits are overwritten by the next step. Both numbers were checked.
        """
        self._token[0], self._position[0] = token, position
        self._transformer.embed(self._token, self._position, self._views.x, self._views.normed)
        work = self._tape.play()
        self._cache.fill(position + 1)
        return self._logits[0], work


def _on(device: Host, layer: Layer) -> Layer:
    """The host's layer, computed by another device over the same memory."""
    parts, predictor = [], layer.predictor
    for part in layer.ffn.parts:
        if not isinstance(part, ResidentNeurons) or part.device.tier is not Tier.RAM:
            raise UsageError(f"a captured step needs all neurons of a layer whose attention is in {Tier.RAM} there too")
        parts.append(replace(part, device=device))
    if predictor is not None:
        if predictor.device.tier is not Tier.RAM:
            raise UsageError(f"a captured step needs the predictor of a layer in {Tier.RAM} there too")
        predictor = replace(predictor, device=device)
    ffn = FeedForward.of(device, parts, layer.ffn.order)
    return replace(layer, device=device, ffn=ffn, predictor=predictor)
