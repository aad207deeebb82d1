"""The price of a byte: relaxes the budgets, bounds the optimum, and says which options can still matter.

If a byte of VRAM costs a price in seconds, each layer takes the clusters that save more than they cost, and those
only: greedy by saved time per byte. Choosing among whole options instead of single clusters lets fixed costs
(crossings, launches) enter: a layer splits only if splitting pays for itself. The right price uses up the budget.
For any price the priced optimum less the price of the budget is a lower bound on every placement that fits
(Lagrangian duality; the best price gives the bound of the linear relaxation, Geoffrion 1974). Time against bytes is
piecewise linear in the price, so intersecting tangents finds the best price exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from thermocline.placement.choices import Choices

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Payload = TypeVar("Payload")

STEEP_RAM, STEEP_VRAM = 1e-3, 1.0
"""Seconds per byte: at this price nothing is bought that can be avoided; VRAM's must outweigh RAM's."""
ROUNDS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """One option for every part: homes and options (N), seconds, bytes of VRAM and RAM."""

    homes: Ints
    options: Ints
    cost: float
    vram: int
    ram: int


@dataclass(frozen=True, slots=True)
class Point(Generic[Payload]):
    """What some price buys: its cost in seconds and its use in bytes."""

    cost: float
    use: float
    payload: Payload


@dataclass(frozen=True, slots=True)
class Deal(Generic[Payload]):
    """The best price, the bound that it proves, and the points just within (`below`) and beyond the limit."""

    price: float
    bound: float
    below: Point[Payload]
    above: Point[Payload] | None


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The relaxation's result: prices of VRAM and RAM, lower bound, and the best path that fits (None: none seen).

    `seen` are (part, home, option) of all paths that any price bought: the corners of time against bytes.
    """

    price_vram: float
    price_ram: float
    bound: float
    path: Path | None
    seen: frozenset[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class Open:
    """A part's options that can still matter: homes, options, seconds, bytes, all (k)."""

    home: Ints
    option: Ints
    cost: Floats
    vram: Floats
    ram: Floats


def relax(choices: Choices) -> Relaxed | None:
    """Find the best prices; None if not even a mixture of options fits the limits."""
    return _Relaxation(choices).solve()


def best_price(evaluate: Callable[[float], Point[Payload]], limit: float, steep: float) -> Deal[Payload] | None:
    """The price at which what is bought just fits `limit`; None if nothing does.

    `evaluate(price)` minimises cost + price * use; `steep` is a price that avoids all use that can be avoided.
    """
    above = evaluate(0.0)
    if above.use <= limit:
        return Deal(0.0, above.cost, above, None)
    below = evaluate(steep)
    if below.use > limit:
        return None
    price = value = 0.0
    for _ in range(ROUNDS):
        price = max(0.0, (below.cost - above.cost) / (above.use - below.use))
        line = above.cost + price * above.use
        point = evaluate(price)
        value = point.cost + price * point.use
        if value >= line - 1e-12 * abs(line):
            break
        if point.use <= limit:
            below = point
        else:
            above = point
    return Deal(price, value - price * limit, below, above)


def walk(best: Floats, edge: Floats) -> tuple[Ints, float]:
    """The cheapest chain of homes (N) through the cost of each part at each home (N, H) (Viterbi)."""
    rows, edges, homes = best.tolist(), edge.tolist(), range(best.shape[1])
    so_far, back = rows[0], []
    for row in rows[1:]:
        came = [min(homes, key=lambda a, b=b: so_far[a] + edges[a][b]) for b in homes]  # type: ignore[misc]
        so_far = [so_far[a] + edges[a][b] + row[b] for b, a in enumerate(came)]
        back.append(came)
    here = min(homes, key=lambda h: so_far[h])
    total, chain = so_far[here], [here]
    for came in reversed(back):
        here = came[here]
        chain.append(here)
    return np.array(chain[::-1], np.int64), total


def tails(best: Floats, edge: Floats) -> Floats:
    """The cost of the cheapest rest of the chain after each part and home: (N, H)."""
    rest = np.zeros_like(best)
    for i in range(len(best) - 2, -1, -1):
        rest[i] = (edge + (best[i + 1] + rest[i + 1])[None, :]).min(axis=1)
    return rest


def slack(choices: Choices, relaxed: Relaxed) -> tuple[Floats, Floats]:
    """How much above the bound the best path through each option is, and the priced tails.

    (N, H, n) and (N, H). No placement better than a known one uses an option whose slack exceeds the gap
    between that one and the bound.
    """
    priced = choices.cost + relaxed.price_vram * choices.vram + relaxed.price_ram * choices.ram
    best = priced.min(axis=2)
    after = tails(best, choices.edge)
    before = tails(best[::-1], choices.edge.T)[::-1]
    limit_v, limit_r = choices.limits
    spent = relaxed.price_vram * limit_v + relaxed.price_ram * limit_r
    return priced + (before + after)[:, :, None] - spent - relaxed.bound, after


class _Relaxation:
    """Nested search: for a price of RAM the best price of VRAM, and among these the best price of RAM."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.vram = choices.vram[:, :, choices.starts]
        self.ends = np.append(choices.starts[1:], len(choices.hot))
        self.path: Path | None = None
        self.seen: set[tuple[int, int, int]] = set()
        self.price_vram = 0.0

    def solve(self) -> Relaxed | None:
        deal = best_price(self._at_ram_price, self.choices.limits[1], STEEP_RAM)
        if deal is None:
            return None
        self._at_ram_price(deal.price)  # so that the prices belong together
        return Relaxed(self.price_vram, deal.price, deal.bound, self.path, frozenset(self.seen))

    def _at_ram_price(self, price: float) -> Point[None]:
        """Cost and RAM of the mixture of placements that just fills the VRAM."""
        priced = self.choices.cost + price * self.choices.ram if price else self.choices.cost
        grouped = np.minimum.reduceat(priced, self.choices.starts, axis=2)
        limit = self.choices.limits[0]
        deal = best_price(lambda p: self._at_prices(priced, grouped, p, price), limit, STEEP_VRAM)
        if deal is None:  # cannot be: RAM is a home for everything
            return Point(np.inf, np.inf, None)
        self.price_vram = deal.price
        ram = float(deal.below.payload.ram)
        if deal.above is not None:
            share = (limit - deal.below.use) / (deal.above.use - deal.below.use)
            ram += share * (deal.above.payload.ram - ram)
        return Point(deal.bound - price * ram, ram, None)

    def _at_prices(self, priced: Floats, grouped: Floats, price: float, price_ram: float) -> Point[Path]:
        matrix = grouped + price * self.vram if price else grouped
        group = matrix.argmin(axis=2)
        homes, _ = walk(np.take_along_axis(matrix, group[:, :, None], 2)[:, :, 0], self.choices.edge)
        parts = np.arange(len(homes))
        chosen = group[parts, homes]
        first, last = self.choices.starts[chosen], self.ends[chosen]
        options = first.copy()
        for i in np.flatnonzero(last - first > 1):
            options[i] += int(priced[i, homes[i], first[i] : last[i]].argmin())
        path = path_of(self.choices, homes, options)
        self.seen.update(zip(parts.tolist(), homes.tolist(), options.tolist(), strict=True))
        if path.vram <= self.choices.limits[0] and path.ram <= self.choices.limits[1]:
            self.path = path if self.path is None or path.cost < self.path.cost else self.path
        return Point(path.cost + price_ram * path.ram, path.vram, path)


def path_of(choices: Choices, homes: Ints, options: Ints) -> Path:
    """A path with its time and bytes added up."""
    at = (np.arange(len(homes)), homes, options)
    cost = float(choices.cost[at].sum() + choices.edge[homes[:-1], homes[1:]].sum())
    return Path(homes, options, cost, int(choices.vram[at].sum()), int(choices.ram[at].sum()))
