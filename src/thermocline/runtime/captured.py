"""A decode step captured once and replayed for every token: no Python between the layers, on either side.

Everything of the step is in one CUDA graph. At a layer whose neurons are split, the stream copies the normed vector
(and the list of selected cold neurons) into pinned memory and posts it; a native worker computes the cold neurons while
the GPU computes the hot ones; the stream waits for the sum and adds it. Where neighbouring layers are the CPU's, it
posts the residual stream, and the worker plays the tape of all of them. Where there is no graph (Triton's interpreter,
or the plain crossing), the same calls are made anew for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from thermocline.config import CrossingKind
from thermocline.errors import UsageError
from thermocline.hardware.machine import Tier
from thermocline.memory.kv_cache import KVCache
from thermocline.model.network import Transformer
from thermocline.ops.contract import Arrays, FfnWork
from thermocline.ops.cpu import CpuOps
from thermocline.ops.cuda.crossing import Crossing, choose
from thermocline.ops.cuda.ops import CudaOps
from thermocline.ops.cuda.waiting import Nap
from thermocline.ops.handover import PATIENCE, ColdWorker, Mailbox
from thermocline.runtime.crossed import Box, Sharing, is_shared, reaching
from thermocline.runtime.taped import Taping, stages_of

Floats = Any


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
        """A part of the step must be on the GPU. `arrays` make the workspace, as for `Transformer`.

        Raises:
            UsageError: a part of the step is on disk, or the way of crossing does not exist here.
        """
        devices = {device.tier: device for device in transformer.devices}
        ops = devices[Tier.VRAM].ops if Tier.VRAM in devices else None
        if not isinstance(ops, CudaOps):
            raise UsageError("a captured step needs a part of every token on the GPU; run it uncaptured")
        self.ops, self.cache = ops, cache
        self.notice: str | None = None
        self._arrays: Arrays = ops if arrays is None else arrays[Tier.VRAM]
        self._workspace = transformer.workspace(1, 1, arrays=arrays)
        n_embd, streams = transformer.spec.n_embd, ops.streams
        self._token, self._position = self._pair((1,), torch.int32), self._pair((1,), torch.int32)
        self._counts = self._pair((4,), torch.int64)
        self._residual = streams.pinned((1, n_embd), torch.float32)
        self._spare = np.zeros((1, n_embd), np.float32)
        self._position[0][0] = cache.n_ctx - 1  # what runs before the first token overwrites nothing
        self._stages = stages_of(transformer)
        self._worker, self._crossing, self._transformer = self._shared(transformer, way, patience)
        self._embeds_here = transformer.entry.tier is not Tier.VRAM
        self._there = transformer.exit.tier is Tier.VRAM
        pinned = streams.pinned((1, transformer.spec.n_vocab), torch.float32) if self._there else None
        self._pinned = pinned
        self._logits: Floats = self._workspace.logits if pinned is None else pinned.numpy()
        self._nap = Nap()
        self._replay: Callable[[], None] = self._record
        self.captured = False
        self._rehearse()
        if streams.real and (self._crossing is None or self._crossing.captured):
            ops.scratch.hold()
            self._replay, self.captured = streams.captured(self._record), True

    @property
    def way(self) -> CrossingKind | None:
        """How the sides cross; None where nothing is the CPU's."""
        return None if self._crossing is None else self._crossing.way

    def run(self, token: int, position: int) -> tuple[Floats, FfnWork, FfnWork]:
        """Logits (n_vocab) of the token after `token`, which is at `position`; work of the GPU, and of the CPU.

        The logits are overwritten by the next step.

        Raises:
            HardwareError: the CPU's side failed, died or was too slow. The next step may succeed.
        """
        with self._worker.step() if self._worker is not None else nullcontext():
            # Not before: a worker that an earlier step gave up on may still use what is overwritten here.
            self._position[0][0] = position
            self._token[0][0] = token
            if self._embeds_here:
                here = np.array([token], np.int32), np.array([position], np.int32)
                self._transformer.embed(*here, self._residual.numpy(), self._spare)
            try:
                self._replay()
            finally:  # also who interrupts waits for what was begun
                self.ops.streams.settle(self._worker, self._nap)
        self.cache.fill(position + 1)
        cold = self._worker.take_work() if self._worker is not None else FfnWork(0, 0, 0, 0)
        return self._logits[0], FfnWork(*self._counts[0].tolist()), cold

    def rest(self) -> None:
        """Return when the CPU's side is idle, as other steps need it: one that was given up on may go on for a while.

        Raises:
            HardwareError: it does so for longer than a step is waited for.
        """
        if self._worker is not None:
            with self._worker.step():
                pass

    def _record(self) -> None:
        position, counts_host, counts = self._position[1], *self._counts
        for host, there in (self._token, self._position):
            there.copy_(host, non_blocking=True)
        counts.zero_()
        views = self._workspace.on(Tier.VRAM).views(1)
        with self.ops.counting(counts):
            if not self._embeds_here:
                self._transformer.embed(self._token[1], position, views.x, views.normed)
            up = not self._embeds_here
            for stage in self._stages:
                up = self._carried(views.x, up, stage.tier)
                if stage.number:
                    self._crossed(stage.number)
                else:
                    self._transformer.record(stage.layers, views, position, self.cache, self._workspace)
            if self._pinned is not None:
                self._carried(views.x, up, Tier.VRAM)
                self._pinned.copy_(self._transformer.record_logits(self._workspace), non_blocking=True)
        counts_host.copy_(counts, non_blocking=True)

    def _carried(self, x: torch.Tensor, up: bool, tier: Tier) -> bool:
        """Take the residual stream to `tier`, from the device if it is `up` there; whether it is then."""
        wanted = tier is Tier.VRAM
        if up and not wanted:
            self._residual.copy_(x, non_blocking=True)
        elif wanted and not up:
            x.copy_(self._residual, non_blocking=True)
        return wanted

    def _crossed(self, number: int) -> None:
        assert self._crossing is not None
        self._crossing.post(number)
        self._crossing.wait(number)

    def _rehearse(self) -> None:
        """Run once, at the cache's end: kernels are compiled, and their scratch is made."""
        streams = self.ops.streams
        with streams.aside(), self._worker.step() if self._worker is not None else nullcontext():
            try:
                self._record()
            finally:
                streams.settle(self._worker)
        if self._worker is not None:
            self._worker.take_work()

    def _shared(
        self, transformer: Transformer, way: CrossingKind, patience: float
    ) -> tuple[ColdWorker | None, Crossing | None, Transformer]:
        """The worker of all that is the CPU's, how it is reached, and the transformer whose layers reach it."""
        here = [stage for stage in self._stages if stage.tier is not Tier.VRAM]
        shared = [is_shared(transformer, layer) for layer in transformer.layers]
        if not (here or any(shared)):
            return None, None, transformer
        host = next(device.ops for device in transformer.devices if device.tier is not Tier.VRAM)
        if not isinstance(host, CpuOps):
            raise UsageError("a captured step takes what is not on the GPU from RAM alone; run it uncaptured")
        box, mailbox = self._box(transformer)
        worker = ColdWorker(host, mailbox, patience)
        arrays = self._residual.numpy(), self._position[0].numpy()
        taping = Taping(transformer, host, self.cache, self._workspace, *arrays)
        self._stages = [
            replace(stage, number=worker.add_tape(taping.stage(stage))) if stage in here else stage
            for stage in self._stages
        ]
        sharing = Sharing(self.ops, box, worker, taping)
        parts = [
            sharing.crossed(layer) if both else None for layer, both in zip(transformer.layers, shared, strict=True)
        ]
        crossing, self.notice = choose(way, worker, self.ops.streams)
        layers = tuple(
            layer if part is None else reaching(layer, replace(part, crossing=crossing))
            for layer, part in zip(transformer.layers, parts, strict=True)
        )
        return worker, crossing, replace(transformer, layers=layers)

    def _box(self, transformer: Transformer) -> tuple[Box, Mailbox]:
        tensors: list[torch.Tensor] = []
        pinned = self.ops.streams.pinned

        def made(shape: tuple[int, ...], dtype: str) -> Any:
            tensors.append(pinned(shape, getattr(torch, dtype)))
            return tensors[-1].numpy()

        n_embd, n_ff = transformer.spec.n_embd, transformer.spec.n_ff
        mailbox = Mailbox.of(made, n_embd, n_ff)
        _, x, partial, ids, count = tensors
        selected = pinned((n_ff,), torch.int32), pinned((1,), torch.int32)
        return Box(x, partial, ids, count, self._residual, *selected, self._arrays.array((n_embd,))), mailbox

    def _pair(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """An array of the host and one of the device."""
        return self.ops.streams.pinned(shape, dtype), self._arrays.array(shape, str(dtype).removeprefix("torch."))
