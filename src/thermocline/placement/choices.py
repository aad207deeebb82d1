"""Every way to place every part of a model, with its time and its bytes, as arrays.

The parts form a chain: embedding, layers, output head. Each part has options; an option's home is where it leaves
the residual stream, and two neighbours with different homes pay for a crossing between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thermocline.hardware.machine import Tier
from thermocline.placement.cost import FfnMode, Sides
from thermocline.placement.problem import LayerPlace, Placement, Problem

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of a chain of N parts with H homes and up to n options for each home.

    `cost` is seconds per token of output, infinite where there is no such option; `vram` and `ram` are bytes,
    whole numbers held as float64, exact below 2^53. All are (N, H, n). `edge` (H, H) is the seconds between
    neighbours. Options that differ only in `warm` are neighbours and have the same VRAM: they form a group,
    and `starts` are the groups' first options. `predictor` (H, n), `hot` and `warm` (n) say what a layer's
    options are. `limits` are the bytes of VRAM and RAM that the parts may take.
    """

    homes: tuple[Tier, ...]
    cost: Floats
    vram: Floats
    ram: Floats
    edge: Floats
    starts: Ints
    predictor: Ints
    hot: Ints
    warm: Ints
    limits: tuple[int, int]

    def placement(self, homes: Ints, options: Ints) -> Placement:
        """The placement that a path through the chain stands for."""
        layers = tuple(
            LayerPlace(
                self.homes[h], self.homes[self.predictor[h, option]], int(self.hot[option]), int(self.warm[option])
            )
            for h, option in zip(homes[1:-1], options[1:-1], strict=True)
        )
        return Placement(self.homes[homes[0]], self.homes[homes[-1]], layers)


def choices_of(
    problem: Problem,
    *,
    disk: bool,
    trunk: bool = False,
    vram: bool,
    prompt_weight: float = 1.0,
    tied: Tier | None,
    homes_of: Placement | None = None,
) -> Choices:
    """All options of a problem; with `homes_of` those that leave everything but depths where that placement has it.

    `disk` and `vram` say whether these tiers may be used, `trunk` whether parts of the trunk may be on disk too.
    `prompt_weight` multiplies the time of prefill.
    `tied` is where the one table of tied embeddings is, None if there are two.
    """
    f, cost = problem.footprint, problem.cost
    homes = (Tier.VRAM, Tier.RAM) if vram else (Tier.RAM,)
    # Where even the trunk finds no room, parts of it are read anew for every pass.
    homes = (*homes, Tier.DISK) if trunk else homes
    predictor, hot, warm = _grid(problem, homes, disk)
    n = len(hot)
    shape = (f.n_layer + 2, len(homes), n)
    seconds, v, r = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
    hots, warms = np.arange(hot[-1] + 1)[:, None], np.arange(warm[0], cost.clusters + 1)[None]
    for h, home in enumerate(homes):
        for part, size, time in ((0, f.embedding, cost.embedding(home)), (-1, f.head, cost.head(home))):
            if tied in (None, home):
                seconds[part, h, 0] = time
                positions = f.positions if part == 0 else 0
                if home is not Tier.DISK:
                    (v if home is Tier.VRAM else r)[part, h, 0] = (0 if tied and part == 0 else size) + positions
                elif part:
                    r[part, h, 0] = f.head_vectors
    for layer in range(f.n_layer):
        sides = [cost.sides(phase, layer, hots, warms) for phase in cost.phases]
        for h in range(len(homes)):
            _layer(problem, layer, homes, h, (predictor[h], hot, warm), sides, prompt_weight, seconds, v, r)
    if homes_of is not None:
        _keep_homes(homes_of, homes, predictor, problem.mode, seconds)
    edges = [[_edge(problem, a, b, prompt_weight) for b in homes] for a in homes]
    starts = np.flatnonzero(np.diff(hot, prepend=-1) != 0)
    limits = (problem.room(Tier.VRAM) if vram else 0, problem.room(Tier.RAM, disk=disk or trunk))
    return Choices(homes, seconds, v, r, np.array(edges), starts, predictor, hot, warm, limits)


def _keep_homes(placement: Placement, homes: tuple[Tier, ...], predictor: Ints, mode: FfnMode, seconds: Floats) -> None:
    """Leave no option that moves anything but neurons."""
    ends = (placement.embedding, *(layer.home for layer in placement.layers), placement.head)
    for part, kept in enumerate(ends):
        seconds[part, [h for h, home in enumerate(homes) if home is not kept]] = np.inf
    if mode is FfnMode.PREDICTED:
        for layer, place in enumerate(placement.layers):
            seconds[layer + 1][predictor != homes.index(place.predictor)] = np.inf


def _grid(problem: Problem, homes: tuple[Tier, ...], disk: bool) -> tuple[Ints, Ints, Ints]:
    """Predictor's home (H, n), hot and warm depths (n) of every option of a layer."""
    last = problem.cost.clusters
    hots = range(last + 1) if Tier.VRAM in homes else range(1)
    depths = [(k, m) for k in hots for m in (range(k, last + 1) if disk else (last,))]
    hot, warm = (np.array(column, np.int64) for column in zip(*depths, strict=True))
    if problem.mode is not FfnMode.PREDICTED:
        own = np.arange(len(homes), dtype=np.int64)[:, None]
        return np.broadcast_to(own, (len(homes), len(hot))), hot, warm
    held = sum(home is not Tier.DISK for home in homes)
    places = np.repeat(np.arange(held, dtype=np.int64), len(hot))
    return np.broadcast_to(places, (len(homes), len(places))), np.tile(hot, held), np.tile(warm, held)


def _layer(
    problem: Problem,
    layer: int,
    homes: tuple[Tier, ...],
    h: int,
    grid: tuple[Ints, Ints, Ints],
    sides: list[Sides],
    prompt_weight: float,
    seconds: Floats,
    v: Floats,
    r: Floats,
) -> None:
    """Fill in one layer's options for one home."""
    f, cost, work = problem.footprint, problem.cost, problem.workload
    predictor, hot, warm = grid
    at = layer + 1
    cache = f.kv_layer(work.context, work.batch)
    trunk = f.attention[layer] + cache
    record = cost.record_bytes[layer]
    v[at, h] = record * cost.bounds[hot] + (trunk if homes[h] is Tier.VRAM else 0)
    r[at, h] = (
        record * (cost.bounds[warm] - cost.bounds[hot])
        + {
            Tier.VRAM: 0,
            Tier.RAM: trunk,
            Tier.DISK: f.vectors[layer] + cache,
        }[homes[h]]
    )
    hots, warms = np.arange(hot[-1] + 1)[:, None], np.arange(warm[0], cost.clusters + 1)[None]
    for place, tier in enumerate(homes):
        chosen = predictor == place
        if not chosen.any():
            continue
        table = np.zeros(())
        for phase, both in zip(cost.phases, sides, strict=True):
            weight = phase.weight * (1.0 if phase is cost.decode else prompt_weight)
            table = table + weight * cost.layer(phase, layer, homes[h], tier, hots, warms, both).total
        seconds[at, h, chosen] = table[hot[chosen], warm[chosen] - warm[0]]
        if problem.mode is FfnMode.PREDICTED:
            (v if tier is Tier.VRAM else r)[at, h, chosen] += f.predictor[layer]


def _edge(problem: Problem, a: Tier, b: Tier, prompt_weight: float) -> float:
    cost = problem.cost
    return sum(
        phase.weight * (1.0 if phase is cost.decode else prompt_weight) * cost.edge_of(phase, a, b)
        for phase in cost.phases
    )
