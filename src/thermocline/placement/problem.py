"""What is to be placed, where, and under which budgets; and what any placement of it takes and costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.activity.predictor import MOST_TOKENS
from thermocline.errors import UsageError
from thermocline.hardware.machine import Machine, Tier
from thermocline.ops.cuda.sizes import scratch_bytes
from thermocline.placement.cost import LARGEST_CLUSTER, CostModel, FfnMode, Phase
from thermocline.placement.footprint import Footprint
from thermocline.placement.ledger import Demand, Ledger, Purpose
from thermocline.placement.workload import Overheads, Workload

MOVING_BYTES = 1 << 20
"""Of RAM: what records pass through that change places while a model runs."""
TABLE_BYTES = 4
"""Of a GPU, for each neuron: where it lies, if it may change places."""

SCALE_BYTES = 8
"""Of a neuron, where the CPU's kernels compute: the largest scale and minimum of its down row, which they keep."""


class LayerPlace(NamedTuple):
    """Where one layer lives: `home` of attention and cache, the predictor's tier, depths in clusters.

    With the home on disk, the attention's weights are read anew for every pass, and the cache is in RAM.

    Clusters before `hot` are in VRAM, from there to `warm` in RAM, the rest on disk.
    """

    home: Tier
    predictor: Tier
    hot: int
    warm: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything lives."""

    embedding: Tier
    head: Tier
    layers: tuple[LayerPlace, ...]


@dataclass(frozen=True)
class Problem:
    """A model to be placed on a machine for a workload.

    `budgets` are bytes of VRAM and RAM; a tier that is not named may be used whole. `temperatures` is
    (n_layer, n_ff), hottest first, or None for unknown (see `CostModel`). `watched` says that somebody counts what
    fires, for which activations are kept, and may move neurons.
    `scattered` says that the file has its neurons in another order than the temperatures; see `CostModel`.
    `no_disk` is what would give a machine with a disk a disk tier, for refusals; empty where nothing would.

    Raises:
        UsageError: a budget is not a whole number of bytes or names a tier without one.
    """

    footprint: Footprint
    machine: Machine
    workload: Workload
    mode: FfnMode
    temperatures: npt.NDArray[np.floating] | None = None
    budgets: Mapping[Tier, int] = field(default_factory=dict)
    overheads: Overheads = field(default_factory=Overheads)
    cluster: int = LARGEST_CLUSTER
    watched: bool = False
    scattered: bool = False
    no_disk: str = ""

    def __post_init__(self) -> None:
        for tier in self.budgets:
            if tier not in (Tier.VRAM, Tier.RAM):
                raise UsageError(f"a budget for {tier} has no meaning; allowed: vram and ram")
        self.ledger()  # refuses budgets that are no numbers of bytes

    @cached_property
    def cost(self) -> CostModel:
        """The model of time."""
        return CostModel(
            self.footprint,
            self.machine,
            self.workload,
            self.mode,
            self.temperatures,
            self.cluster,
            scattered=self.scattered,
        )

    @property
    def limits(self) -> dict[Tier, int]:
        """Bytes of each tier: the budget, or else the whole memory."""
        gpu = self.machine.gpu
        whole = {Tier.RAM: self.machine.cpu.capacity} | ({Tier.VRAM: gpu.capacity} if gpu else {})
        return {tier: self.budgets.get(tier, size) for tier, size in whole.items()}

    def ledger(self) -> Ledger:
        """An empty account with this problem's limits."""
        return Ledger(self.limits)

    def on_disk(self, placement: Placement) -> bool:
        """Whether a placement leaves anything on disk."""
        homes = (placement.embedding, placement.head, *(place.home for place in placement.layers))
        return Tier.DISK in homes or any(place.warm < self.cost.clusters for place in placement.layers)

    def fixed(self, tier: Tier, *, disk: bool = True) -> list[Demand]:
        """What a tier takes beside weights and cache as soon as anything is computed there.

        Without `disk`, nothing is left on the machine's disk, so that nothing is staged that comes from there.
        """
        f, w, o = self.footprint, self.workload, self.overheads
        tokens = max(min(w.ubatch, w.context), w.batch)
        neurons = f.n_ff * self.watched
        if tier is not Tier.VRAM or not o.unpacks:
            neurons += f.n_ff * (1 + f.gated)
        token = 4 * (2 * f.n_embd + 4 * f.n_q + neurons)
        outputs = 4 * w.batch * (f.n_embd + f.n_vocab)
        scratch = 0
        if tier is Tier.VRAM and o.unpacks:
            scratch = scratch_bytes(
                tokens, n_embd=f.n_embd, n_ff=f.n_ff, n_vocab=f.n_vocab, n_q=f.n_q, gated=f.gated, context=w.context
            )
        scores = 4 * (min(tokens, MOST_TOKENS) + 1) * f.n_ff if self.mode is FfnMode.PREDICTED else 0
        scales = 0 if tier is Tier.VRAM and o.unpacks else SCALE_BYTES * f.n_ff * f.n_layer
        size = tokens * token + outputs + scratch + scores + scales + f.rope_token * w.context
        if tier is Tier.RAM and self.machine.gpu is not None and not o.unpacks:
            size, token = 2 * size, 2 * token  # its kernels and the device's, which are the same, each have scratch
        demands = [
            Demand(tier, Purpose.ACTIVATIONS, size, "--ubatch-size", tokens, token),
            Demand(tier, Purpose.MARGIN, o.margin_vram if tier is Tier.VRAM else o.margin_ram),
        ]
        moving = MOVING_BYTES if self.watched and tier is Tier.RAM else 0
        disk = disk and self.machine.disk is not None
        if self.machine.gpu is not None or disk:
            read = disk and tier is Tier.RAM
            demands.append(Demand(tier, Purpose.STAGING, max(o.staging, o.reading * read) + f.biases * read + moving))
        if tier is Tier.VRAM:
            tables = TABLE_BYTES * f.n_ff * f.n_layer if self.watched and o.unpacks else 0
            demands.append(Demand(tier, Purpose.GRAPHS, o.graphs + tables))
        return demands

    def room(self, tier: Tier, *, disk: bool = True) -> int:
        """Bytes left for weights and cache; negative where even the fixed part does not fit. `disk` as for `fixed`."""
        return self.limits.get(tier, 0) - sum(d.nbytes for d in self.fixed(tier, disk=disk))

    def placed(self, placement: Placement) -> list[Demand]:
        """What a placement takes for weights, predictors and caches."""
        f, w, bounds = self.footprint, self.workload, self.cost.bounds
        sums: dict[tuple[Tier, Purpose], int] = {}

        def add(tier: Tier, purpose: Purpose, nbytes: int) -> None:
            if tier is Tier.DISK:
                return
            sums[tier, purpose] = sums.get((tier, purpose), 0) + int(nbytes)

        if not f.tied or placement.embedding is not placement.head:
            add(placement.embedding, Purpose.EMBEDDING, f.embedding)
        add(placement.embedding, Purpose.EMBEDDING, f.positions)
        add(placement.head, Purpose.OUTPUT, f.head)
        if placement.head is Tier.DISK:
            add(Tier.RAM, Purpose.OUTPUT, f.head_vectors)
        for layer, place in enumerate(placement.layers):
            add(place.home, Purpose.ATTENTION, f.attention[layer])
            if place.home is Tier.DISK:
                add(Tier.RAM, Purpose.ATTENTION, f.vectors[layer])
            add(Tier.RAM if place.home is Tier.DISK else place.home, Purpose.KV, f.kv_layer(w.context, w.batch))
            if self.mode is FfnMode.PREDICTED:
                add(place.predictor, Purpose.PREDICTOR, f.predictor[layer])
            add(Tier.VRAM, Purpose.FFN, self.cost.record_bytes[layer] * int(bounds[place.hot]))
            warm = int(bounds[place.warm] - bounds[place.hot])
            add(Tier.RAM, Purpose.FFN, self.cost.record_bytes[layer] * warm)
        step = f.kv_token * w.batch
        homes: list[Tier] = [Tier.RAM if place.home is Tier.DISK else place.home for place in placement.layers]
        return [
            Demand(t, p, n, "--ctx-size", w.context, step * homes.count(t)) if p is Purpose.KV else Demand(t, p, n)
            for (t, p), n in sums.items()
            if n
        ]

    def demands(self, placement: Placement) -> list[Demand]:
        """Everything that a placement takes, the fixed part of each side that is used included."""
        placed = self.placed(placement)
        used = [tier for tier in self.limits if tier is Tier.RAM or any(d.tier is tier for d in placed)]
        disk = self.on_disk(placement)
        return placed + [d for tier in used for d in self.fixed(tier, disk=disk)]

    def seconds(self, placement: Placement) -> float:
        """Predicted seconds per token of output, its share of the prompt included."""
        cost = self.cost
        time = cost.embedding(placement.embedding) + cost.head(placement.head)
        for layer, place in enumerate(placement.layers):
            time += sum(p.weight * float(cost.layer(p, layer, *place).total) for p in cost.phases)
        homes = [placement.embedding, *(place.home for place in placement.layers), placement.head]
        return time + sum(cost.edge(a, b) for a, b in pairwise(homes))

    def phase_seconds(self, placement: Placement, phase: Phase) -> float:
        """Predicted seconds of one pass; embedding and head are counted with decode only."""
        cost = self.cost
        time = sum(float(cost.layer(phase, layer, *place).total) for layer, place in enumerate(placement.layers))
        homes = [placement.embedding, *(place.home for place in placement.layers), placement.head]
        time += sum(cost.edge_of(phase, a, b) for a, b in pairwise(homes))
        if phase is cost.decode:
            time += (cost.embedding(placement.embedding, (phase,)) + cost.head(placement.head)) / phase.weight
        return time
