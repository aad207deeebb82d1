"""From the bound to a placement: what the prices leave open is searched, exactly where it is little enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from thermocline.placement.choices import Choices
from thermocline.placement.exchange import exchange, exchange_all, improve
from thermocline.placement.prices import Open, Path, Relaxed, path_of, slack

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

OPTIONS = 96
"""Most options of a part that are looked at, nearest to the bound first, beside those that some price bought."""
POOL = 192
"""The same for exchanges of two parts."""
PAIRED = 1000
"""Options of all parts of which every pair is looked at."""
ENOUGH = 2e-3
"""A relative gap at which that is not needed."""
WORK = 1_500_000
"""Partial placements looked at in one search, over all parts."""
FEWEST_LABELS = 32
SCATTER = np.uint64(0x9E3779B97F4A7C15)
"""An odd number whose multiples lie everywhere (Knuth's, of the golden ratio)."""
CLOSE = 1e-6
"""A relative gap that needs no search."""


@dataclass(frozen=True, slots=True)
class _Labels:
    """Partial placements that end at the same part: what they cost and take, and how they came about."""

    home: Ints
    cost: Floats
    vram: Floats
    ram: Floats
    parent: Ints
    pick: Ints

    def cut(self, keep: Ints) -> _Labels:
        return _Labels(
            self.home[keep], self.cost[keep], self.vram[keep], self.ram[keep], self.parent[keep], self.pick[keep]
        )


def search(choices: Choices, relaxed: Relaxed) -> tuple[Path | None, bool]:
    """The best placement found, and whether nothing was left out on the way: then it is the optimum."""
    slacks, after = slack(choices, relaxed)
    best = relaxed.path
    if best is not None:
        every, _ = open_options(choices, slacks, relaxed, best, most=None)
        best = improve(choices, every, relaxed, best)
        pool, _ = open_options(choices, slacks, relaxed, best, most=POOL)
        best = exchange(choices, every, pool, best)
        if _close(best, relaxed, CLOSE):
            return best, False
    parts, whole = open_options(choices, slacks, relaxed, best)
    found, complete = _labels(choices, relaxed, parts, after, best)
    # Labels are pruned by their priced cost: the cheapest that is left may waste room and lose to the known one.
    if best is None or (found is not None and found.cost < best.cost):
        best = found
    exact = whole and complete
    if best is None or exact or _close(best, relaxed, ENOUGH):
        return best, exact
    every, _ = open_options(choices, slacks, relaxed, best, most=None)
    best = improve(choices, every, relaxed, best)
    pool, _ = open_options(choices, slacks, relaxed, best, most=PAIRED // len(slacks))
    return exchange_all(choices, every, pool, best), False


def _close(path: Path, relaxed: Relaxed, gap: float) -> bool:
    return path.cost - relaxed.bound <= gap * path.cost


def open_options(
    choices: Choices, slacks: Floats, relaxed: Relaxed, best: Path | None, most: int | None = OPTIONS
) -> tuple[list[Open], bool]:
    """The options of each part whose slack is within the gap, `most` of them, and whether these are all of them.

    All of them are all that a placement better than `best` can use.
    """
    gap = np.inf if best is None else best.cost - relaxed.bound
    bought = np.zeros(slacks.shape, bool)
    bought[tuple(np.array(sorted(relaxed.seen)).T)] = True
    limit = min(gap + 1e-9 * abs(relaxed.bound), np.finfo(np.float64).max)  # what is no option has infinite slack
    parts, whole = [], True
    for i, table in enumerate(slacks):
        home, option = np.divmod(np.flatnonzero(table <= limit), table.shape[1])
        if most is not None and len(home) > most:
            keep = np.union1d(_least(table[home, option], most), np.flatnonzero(bought[i, home, option]))
            home, option, whole = home[keep], option[keep], False
        at = (np.full_like(home, i), home, option)
        parts.append(Open(home, option, choices.cost[at], choices.vram[at], choices.ram[at]))
    return parts, whole


def _least(values: Floats, count: int) -> Ints:
    """Where the `count` least values are, the first of equal ones."""
    last = np.partition(values, count - 1)[count - 1]
    below, equal = np.flatnonzero(values < last), np.flatnonzero(values == last)
    return np.append(below, equal[: count - len(below)])


def _labels(
    choices: Choices, relaxed: Relaxed, parts: list[Open], after: Floats, best: Path | None
) -> tuple[Path | None, bool]:
    """Label-setting dynamic programme over the chain, pruned by the bound; a beam where labels are too many."""
    limit_v, limit_r = choices.limits
    room = relaxed.bound + relaxed.price_vram * limit_v + relaxed.price_ram * limit_r
    gap = np.inf if best is None else best.cost - relaxed.bound
    rest_v = np.append(np.cumsum([p.vram.min() for p in parts][::-1])[::-1][1:], 0.0)
    rest_r = np.append(np.cumsum([p.ram.min() for p in parts][::-1])[::-1][1:], 0.0)
    roomy = sum(p.ram.max() for p in parts) <= limit_r
    most = max(FEWEST_LABELS, WORK // sum(len(p.home) for p in parts))
    trail: list[_Labels] = []
    complete = True
    for i, part in enumerate(parts):
        grown = _grow(trail[-1] if trail else None, part, choices.edge)
        priced = grown.cost + relaxed.price_vram * grown.vram + relaxed.price_ram * grown.ram + after[i, grown.home]
        ok = (grown.vram + rest_v[i] <= limit_v) & (grown.ram + rest_r[i] <= limit_r)
        ok &= priced - room < gap - 1e-12 * abs(relaxed.bound)
        keep = np.flatnonzero(ok)
        keep = keep[_undominated(grown.cut(keep), len(choices.homes), roomy)]
        if len(keep) > most:
            keep, complete = keep[np.argsort(priced[keep], kind="stable")[:most]], False
        if not len(keep):
            return None, complete
        trail.append(grown.cut(keep))
    return _traced(choices, parts, trail), complete


def _grow(labels: _Labels | None, part: Open, edge: Floats) -> _Labels:
    """Every label with every option of the next part."""
    if labels is None:
        zero = np.zeros(len(part.home), np.int64)
        return _Labels(part.home, part.cost, part.vram, part.ram, zero, np.arange(len(part.home)))
    parent = np.repeat(np.arange(len(labels.home)), len(part.home))
    pick = np.tile(np.arange(len(part.home)), len(labels.home))
    home = part.home[pick]
    cost = labels.cost[parent] + edge[labels.home[parent], home] + part.cost[pick]
    return _Labels(home, cost, labels.vram[parent] + part.vram[pick], labels.ram[parent] + part.ram[pick], parent, pick)


def _undominated(labels: _Labels, homes: int, roomy: bool) -> Ints:
    """Labels that no other of the same home beats in time at the same or, where RAM is no matter, less VRAM."""
    keep = []
    for home in range(homes):
        mine = np.flatnonzero(labels.home == home)
        if not len(mine):
            continue
        cost, vram, ram = labels.cost[mine], labels.vram[mine], labels.ram[mine]
        keep.append(mine[_falling(cost, vram) if roomy else _cheapest(cost, vram, ram)])
    return np.sort(np.concatenate(keep)) if keep else np.empty(0, np.int64)


def _falling(cost: Floats, vram: Floats) -> Ints:
    """The labels that are cheaper than all with as much VRAM or less."""
    order = np.lexsort((cost, vram))
    running = np.minimum.accumulate(cost[order])
    found: Ints = order[np.append(True, running[1:] < running[:-1])]
    return found


def _cheapest(cost: Floats, vram: Floats, ram: Floats) -> Ints:
    """The cheapest label, the first of several, of each pair of bytes."""
    mixed = vram.astype(np.uint64) * SCATTER ^ ram.astype(np.uint64)  # one number sorts faster than two
    order = np.argsort(mixed)
    fresh = np.append(True, (np.diff(vram[order]) != 0) | (np.diff(ram[order]) != 0))
    starts = np.flatnonzero(fresh)
    least = np.minimum.reduceat(cost[order], starts)[np.cumsum(fresh) - 1]
    found: Ints = np.minimum.reduceat(np.where(cost[order] == least, order, len(order)), starts)
    return found


def _traced(choices: Choices, parts: list[Open], trail: list[_Labels]) -> Path:
    """The cheapest finished label, followed back to the start."""
    here = int(trail[-1].cost.argmin())
    homes, options = [], []
    for part, labels in zip(reversed(parts), reversed(trail), strict=True):
        pick = int(labels.pick[here])
        homes.append(int(part.home[pick]))
        options.append(int(part.option[pick]))
        here = int(labels.parent[here])
    return path_of(choices, np.array(homes[::-1], np.int64), np.array(options[::-1], np.int64))
