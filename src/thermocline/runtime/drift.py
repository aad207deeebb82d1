"""Drift: text of another kind warms other neurons, and between requests these take the places of those that cooled.

The depths are solved again with the temperatures seen, everything else staying where it is; then hot and cold neurons
are exchanged in pairs, those first whose temperatures differ most, until the bytes that may be moved are spent. A GPU
keeps its depths, with which its steps were captured. Below
`MARGIN` an exchange would take longer than it saves in the next hundred tokens. What is on disk lies in a cache that
keeps what is used anyway; there, the hottest records that it lacks are read ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from thermocline.activity.predictor import Predictor
from thermocline.errors import BudgetError, ThermoclineError, UsageError, printable
from thermocline.memory.disk_store import DiskStore
from thermocline.memory.movable import Movable, MovableLayer
from thermocline.placement.budget import Budget, BudgetKind, parse_budget
from thermocline.placement.plan import Plan
from thermocline.placement.problem import LayerPlace, Placement, Problem
from thermocline.placement.solver import solve_depths
from thermocline.runtime.counting import FiringCounts, add_to
from thermocline.runtime.placing import Placing
from thermocline.runtime.planning import as_for_a_gpu, computed

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

SHARE = 0.05
"""Of what the memories can carry, in mode auto: moving then takes a twentieth of the time at most."""
MARGIN = 0.02
"""Least difference between two temperatures that makes an exchange worth its bytes."""
WORTH = 0.02
"""Least share of the predicted time that other depths must save: less is noise in the counts."""
FEWEST_TOKENS = 16
"""Fewer say more of chance than of the text."""
LONGEST = 10.0
"""Seconds that count, however long ago the last time was: a request shall not wait for what a night has saved up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What was moved before a request: neurons and bytes, the seconds it took, and the share of what had fired since
    the last time that was hot, before and after.
    """

    neurons: int
    nbytes: int
    seconds: float
    hot_before: float
    hot_after: float

    def line(self) -> str:
        """For people."""
        return (
            f"drift: {self.neurons:,} neurons ({self.nbytes / 1e6:.1f} MB) moved in {self.seconds * 1e3:.0f} ms before "
            f"this answer; of what fired lately, {self.hot_before:.1%} was hot before and {self.hot_after:.1%} after"
        )


@dataclass(slots=True)
class Drift:
    """Moves neurons of one loaded model. `rate` is in bytes a second.

    `movable` is None where only the disk tier adapts, `store` where nothing is on disk.
    """

    counts: FiringCounts
    before: Floats | None
    problem: Problem
    plan: Plan
    predictor: Predictor | None
    stands_in: bool
    rate: float
    movable: Movable | None
    store: DiskStore | None
    rest: Callable[[], None] | None = None
    """Returns when nobody computes with the neurons."""
    failed: str = ""
    _last: float = 0.0

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def adapt(self) -> Moved | None:
        """Move what is worth it; None where nothing was.

        A record that cannot be read ends the moving and not the request: `failed` says why.
        """
        if self.counts.tokens_lately < FEWEST_TOKENS:
            return None
        began = time.monotonic()
        left = int(self.rate * min(began - self._last, LONGEST))
        temperatures = self.counts.temperatures(self.before)
        hot_before = self._hot_share()
        neurons = nbytes = 0
        try:
            if self.rest is not None:
                self.rest()
            if self.movable is not None:
                neurons, nbytes = self._exchange(self.movable, temperatures, left)
            if self.store is not None and left > nbytes:
                read, size = self.store.read_hottest(temperatures, left - nbytes)
                neurons, nbytes = neurons + read, nbytes + size
        except ThermoclineError as error:
            self.failed = str(error)
        moved = Moved(
            neurons=neurons,
            nbytes=nbytes,
            seconds=time.monotonic() - began,
            hot_before=hot_before,
            hot_after=self._hot_share(),
        )
        self.counts.forget_lately()
        self._last = time.monotonic()
        return moved if neurons else None

    def _hot_share(self) -> float:
        """Share of what fired lately that is in the fastest memory: VRAM, or where there is none, the disk's cache."""
        lately, total = self.counts.lately, self.counts.lately.sum()
        if self.movable is not None:
            hot = sum(int(lately[i, layer.order[: layer.hot]].sum()) for i, layer in enumerate(self.movable.layers))
        else:
            hot = 0 if self.store is None else self.store.in_memory(lately)
        return float(hot / total) if total else 0.0

    def _exchange(self, movable: Movable, temperatures: Floats, left: int) -> tuple[int, int]:
        """Exchange neurons between tiers, at most `left` bytes of them; neurons and bytes moved."""
        depths, hot = self._depths(movable, temperatures), self._hot(movable)
        found = []
        for group in movable.groups():
            pairs = _pairs(temperatures[group], hot[group], [depths[i] for i in group])
            for named in pairs:
                named[:, 0] = np.asarray(group)[named[:, 0]]
            found.append(pairs)
        if not found:
            return 0, 0
        promoted, demoted = (np.concatenate(each) for each in zip(*found, strict=True))
        gain = temperatures[tuple(promoted.T)] - temperatures[tuple(demoted.T)]
        best = np.argsort(-gain, kind="stable")
        costs = np.array([_cost(layer) for layer in movable.layers])[promoted[best, 0]]
        best = best[np.cumsum(costs) <= left]
        return len(best), sum(
            movable.exchange(promoted[each], demoted[each]) for each in _by_slots(movable, promoted, best)
        )

    def _hot(self, movable: Movable) -> Bools:
        """Which neurons are in the fastest memory (n_layer, n_ff)."""
        hot = np.zeros(self.counts.lately.shape, bool)
        for index, layer in enumerate(movable.layers):
            hot[index, layer.order[: layer.hot]] = True
        return hot

    def _depths(self, movable: Movable, temperatures: Floats) -> list[int]:
        """How deep VRAM should reach into each layer, were its neurons in the order of these temperatures."""
        now = [layer.hot for layer in movable.layers]
        if movable.within:
            return now
        heat = computed(temperatures, self.problem.mode, self.predictor)
        taken = {tier: max(self.plan.bytes_of(tier), 1) for tier in self.problem.limits}
        problem = replace(self.problem, temperatures=heat, budgets={**self.problem.limits, **taken})
        problem = as_for_a_gpu(problem) if self.stands_in else problem
        bounds = problem.cost.bounds
        here = self._placement([int(np.abs(bounds - hot).argmin()) for hot in now], problem)
        try:
            found = solve_depths(problem, here)
        except BudgetError:  # what is there fits, but not by whole clusters
            return now
        if problem.seconds(found) > (1 - WORTH) * problem.seconds(here):
            return now
        return [int(bounds[layer.hot]) for layer in found.layers]

    def _placement(self, clusters: list[int], problem: Problem) -> Placement:
        """The plan's placement with other depths of VRAM, in clusters."""
        last = problem.cost.clusters
        layers = (
            LayerPlace(layer.home, layer.predictor or layer.home, hot, last if layer.warm == self.plan.n_ff else hot)
            for layer, hot in zip(self.plan.layers, clusters, strict=True)
        )
        return Placement(self.plan.embedding, self.plan.head, tuple(layers))


@dataclass(slots=True)
class Watch:
    """What counts what fires in an engine's steps, and what moves neurons by it; None where nothing moves them.

    `path` is where the counts go in the end, None for nowhere.
    """

    counts: FiringCounts
    drift: Drift | None = None
    path: Path | None = None

    def between(self) -> Moved | None:
        """Between two generations."""
        return None if self.drift is None else self.drift.adapt()

    def keep(self, fingerprint: str, name: str, mode: str) -> None:
        """Add the counts to their file.

        Raises:
            OutputError: it could not be written.
        """
        if self.path is not None and self.counts.tokens:
            add_to(self.path, self.counts.activity(fingerprint, name, mode))


def _cost(layer: MovableLayer) -> int:
    """Bytes that an exchange of two neurons moves."""
    rows = 0 if layer.scored is None else 2 * layer.scored[0].data.shape[1]
    return layer.record_bytes * (2 if layer.slow is not None else 1) + rows


def _by_slots(movable: Movable, promoted: Ints, pairs: Ints) -> list[Ints]:
    """Pairs of neurons, by the slots that their layers share."""
    slots = np.array([id(layer.fast) for layer in movable.layers])[promoted[pairs, 0]]
    return [pairs[slots == each] for each in dict.fromkeys(slots.tolist())]


def _pairs(temperatures: Floats, hot: Bools, depths: list[int]) -> tuple[Ints, Ints]:
    """Cold neurons and the hot ones that they should replace (n, 2): (layer of the group, number), best first.

    As many are hot afterwards as before. `depths` says how many of each layer; where these are not as many in all, the
    hottest of layers that are cut make up for it, or then what is hot stays so.
    """
    n_ff, deep = temperatures.shape[1], np.asarray(depths)[:, None]
    rank = np.argsort(np.argsort(-temperatures, axis=1, kind="stable"), axis=1)
    cut = (deep > 0) & (deep < n_ff)
    # Temperatures are at most 1, so that a group with a higher whole number comes before all of the next.
    score = temperatures + MARGIN * hot + np.select([rank < deep, cut, hot], [6, 4, 2], 0)
    count = int(hot.sum())
    chosen = np.zeros(hot.shape, bool)
    chosen.reshape(-1)[np.argsort(-score.reshape(-1), kind="stable")[:count]] = True
    comes, goes = np.argwhere(chosen & ~hot), np.argwhere(hot & ~chosen)
    comes = comes[np.argsort(-temperatures[comes[:, 0], comes[:, 1]], kind="stable")]
    goes = goes[np.argsort(temperatures[goes[:, 0], goes[:, 1]], kind="stable")]
    gain = temperatures[comes[:, 0], comes[:, 1]] - temperatures[goes[:, 0], goes[:, 1]]
    worth = int(np.count_nonzero(gain >= MARGIN))
    return comes[:worth].astype(np.int64), goes[:worth].astype(np.int64)


def drift_of(
    placing: Placing, movable: Movable | None, counts: FiringCounts, predictor: Predictor | None, stated: str
) -> Drift | None:
    """What moves the neurons of a placed model, `stated` bytes a second; None where none has another place.

    Raises:
        UsageError: `stated` is no rate.
        BudgetError: there is no room for the buffer that records pass through.
    """
    rate = parse_budget(stated, "drift")
    if not rate.amount and rate.kind is not BudgetKind.AUTO:
        raise UsageError(f"drift is {printable(stated)}; allowed: 64MiB, 5%, auto, or leave it out")
    plan, problem, store = placing.plan, placing.problem, placing.below.store
    if plan is None or problem is None or (store is None and (movable is None or not movable.groups())):
        return None
    if movable is not None:
        movable.reserve()
    return Drift(
        counts=counts,
        before=None if placing.order is None else placing.order.by_number,
        problem=problem,
        plan=plan,
        predictor=predictor,
        stands_in=placing.stands_in,
        rate=_bytes_a_second(rate, problem, disk=store is not None),
        movable=movable,
        store=store,
    )


def _bytes_a_second(rate: Budget, problem: Problem, *, disk: bool) -> float:
    """A rate that is stated as it is, or as a share of what the slowest memory that is moved from can carry."""
    if rate.kind is BudgetKind.BYTES:
        return float(rate.amount)
    machine, record = problem.machine, max(problem.cost.record_bytes)
    carries = [machine.cpu.bandwidth]
    if machine.gpu is not None:
        carries.append(machine.link)
    if disk and machine.disk is not None:
        carries.append(machine.disk.curve.bandwidth(record))
    return min(carries) * (SHARE if rate.kind is BudgetKind.AUTO else float(rate.amount))
