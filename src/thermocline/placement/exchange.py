"""Repairs what prices alone leave unused: moves of one part, then exchanges between two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from thermocline.placement.choices import Choices
from thermocline.placement.prices import Open, Path, Relaxed, path_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EXCHANGES = 200
FULL_EXCHANGES = 40
CORNER = 1e-3
"""Weight of the saving itself among moves that are worth the same at the prices."""
WORTH = 1e-12
"""Relative saving below which a move is rounding."""


class _Move(NamedTuple):
    """A change of one part: its new home and option, and a score below 0 if it is worth making."""

    home: int
    option: int
    score: float


_NONE = _Move(0, 0, np.inf)


@dataclass(frozen=True, slots=True)
class _Moves:
    """Every change of one part of a path: its owner, new home and option, and what changes: seconds and bytes."""

    owner: Ints
    home: Ints
    option: Ints
    cost: Floats
    vram: Floats
    ram: Floats


def improve(choices: Choices, every: list[Open], relaxed: Relaxed, path: Path) -> Path:
    """A path no slower than `path`, by moves of one part to one of `every` option that can make it faster.

    First those that are worth their bytes at the found prices, most of them corners of the relaxation; then
    whatever saves time in the room that is left.
    """
    path = _climb(choices, every, path, (relaxed.price_vram, relaxed.price_ram))
    return _climb(choices, every, path, (0.0, 0.0))


def exchange(choices: Choices, every: list[Open], pools: list[Open], path: Path) -> Path:
    """A path no slower than `path`, by pairs of moves to options of `pools`, one of which gives and one takes."""
    pool = _joined(pools)
    for _ in range(EXCHANGES):
        better = _exchange(choices, pool, path)
        if better is None:
            break
        path = _climb(choices, every, better, (0.0, 0.0))
    return path


def exchange_all(choices: Choices, every: list[Open], pools: list[Open], path: Path) -> Path:
    """The same by looking at every pair: for two budgets that both bind, and pools that are small."""
    pool = _joined(pools)
    for _ in range(FULL_EXCHANGES):
        moves = _moves(choices, pool, path)
        vram, ram = choices.limits[0] - path.vram, choices.limits[1] - path.ram
        saving = np.flatnonzero(moves.cost < 0)  # one of the two must save
        if not len(saving):
            break
        total = moves.cost[saving, None] + moves.cost
        fits = (moves.vram[saving, None] + moves.vram <= vram) & (moves.ram[saving, None] + moves.ram <= ram)
        total[~fits | (moves.owner[saving, None] == moves.owner)] = np.inf
        one, two = np.unravel_index(int(total.argmin()), total.shape)
        if total[one, two] >= -WORTH * path.cost:
            break
        better = _moved(choices, moves, path, [int(saving[one]), int(two)])
        if better.cost >= path.cost:  # neighbours: their crossings were counted apart
            break
        path = _climb(choices, every, better, (0.0, 0.0))
    return path


def _joined(pools: list[Open]) -> tuple[Ints, Ints, Ints]:
    """Owner, home and option of every option of every part."""
    owner = np.concatenate([np.full(len(part.home), i) for i, part in enumerate(pools)])
    return owner, np.concatenate([part.home for part in pools]), np.concatenate([part.option for part in pools])


def _climb(choices: Choices, every: list[Open], path: Path, prices: tuple[float, float]) -> Path:
    """Take the move with the largest saving at these prices as long as one saves time and fits."""
    parts = range(len(path.homes))
    best = [_best_move(choices, every, path, i, prices) for i in parts]
    for _ in range(8 * len(parts)):
        i = min(parts, key=lambda part: best[part].score)
        move = best[i]
        if move.score >= 0:
            break
        homes, options = path.homes.copy(), path.options.copy()
        homes[i], options[i] = move.home, move.option
        moved = path_of(choices, homes, options)
        if moved.vram > choices.limits[0] or moved.ram > choices.limits[1]:
            best[i] = _best_move(choices, every, path, i, prices)  # the room has shrunk since it was found
            continue
        path = moved
        for near in range(max(0, i - 1), min(len(parts), i + 2)):
            best[near] = _best_move(choices, every, path, near, prices)
    return path


def _best_move(choices: Choices, every: list[Open], path: Path, part: int, prices: tuple[float, float]) -> _Move:
    """The best change of one part among its options."""
    here, options = (part, path.homes[part], path.options[part]), every[part]
    if not len(options.home):
        return _NONE
    edges = np.zeros(len(choices.homes))
    if part > 0:
        edges += choices.edge[path.homes[part - 1]]
    if part + 1 < len(path.homes):
        edges += choices.edge[:, path.homes[part + 1]]
    change = options.cost + edges[options.home] - (choices.cost[here] + edges[here[1]])
    vram, ram = options.vram - choices.vram[here], options.ram - choices.ram[here]
    fits = (vram <= choices.limits[0] - path.vram) & (ram <= choices.limits[1] - path.ram)
    score = change
    if any(prices):
        # Corners of the relaxation are worth exactly their price: among equals, the larger saving.
        score = np.maximum(change + prices[0] * vram + prices[1] * ram, -WORTH * path.cost) + CORNER * change
    score = np.where(fits & (change < -WORTH * path.cost), score, np.inf)
    best = int(score.argmin())
    value = float(score[best])
    return _Move(int(options.home[best]), int(options.option[best]), value) if value < 0 else _NONE


def _exchange(choices: Choices, pool: tuple[Ints, Ints, Ints], path: Path) -> Path | None:
    """The pair of moves of two parts that saves most together; None if no pair saves."""
    moves = _moves(choices, pool, path)
    order = np.argsort(moves.vram, kind="stable")
    cost, owner = moves.cost[order], moves.owner[order]
    # How many of the moves, by rising VRAM, may join each one without going over.
    reach = np.searchsorted(moves.vram[order], choices.limits[0] - path.vram - moves.vram[order], side="right")
    total, partner = np.full(len(cost), np.inf), np.zeros(len(cost), np.int64)
    for bit in range(len(path.homes).bit_length()):  # the numbers of two different parts differ in some bit
        for side in (0, 1):
            there = owner >> bit & 1 == side
            sums, best = _running_best(np.where(there, cost, np.inf))
            sums = np.where(there, np.inf, cost + sums[reach])
            total, partner = np.minimum(total, sums), np.where(sums < total, best[reach], partner)
    for one in np.argsort(total, kind="stable")[:8]:
        if total[one] >= -WORTH * path.cost:
            break
        candidate = _moved(choices, moves, path, [int(order[one]), int(order[partner[one]])])
        fits = candidate.vram <= choices.limits[0] and candidate.ram <= choices.limits[1]
        if fits and candidate.cost < path.cost * (1 - WORTH):
            return candidate
    return None


def _running_best(cost: Floats) -> tuple[Floats, Ints]:
    """The smallest of the first 0, 1, ... n costs (infinite for none), and where it is."""
    smallest = np.append(np.inf, np.minimum.accumulate(cost))
    fresh = np.flatnonzero(smallest[1:] < smallest[:-1])
    where = np.zeros(len(smallest), np.int64)
    where[fresh + 1] = fresh
    return smallest, np.maximum.accumulate(where)


def _moves(choices: Choices, pool: tuple[Ints, Ints, Ints], path: Path) -> _Moves:
    owner, home, option = pool
    edge, here, last = choices.edge, path.homes, len(path.homes) - 1
    now = (np.arange(last + 1), here, path.options)
    left = np.where(owner > 0, edge[here[np.maximum(owner - 1, 0)], home], 0.0)
    right = np.where(owner < last, edge[home, here[np.minimum(owner + 1, last)]], 0.0)
    between = edge[here[:-1], here[1:]]
    own = choices.cost[now] + np.append(0.0, between) + np.append(between, 0.0)
    return _Moves(
        owner,
        home,
        option,
        choices.cost[pool] + left + right - own[owner],
        choices.vram[pool] - choices.vram[now][owner],
        choices.ram[pool] - choices.ram[now][owner],
    )


def _moved(choices: Choices, moves: _Moves, path: Path, which: list[int]) -> Path:
    homes, options = path.homes.copy(), path.options.copy()
    homes[moves.owner[which]], options[moves.owner[which]] = moves.home[which], moves.option[which]
    return path_of(choices, homes, options)
