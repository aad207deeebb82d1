"""Sets a layer's threshold, and says what the predictor selects with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import UsageError

Floats = npt.NDArray[np.float32]
Score = Callable[[npt.NDArray[np.float16]], Floats]

CHUNK: Final = 512
"""Tokens scored at once."""
CURVE: Final = (0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999)
"""Energy recalls at which the share of selected neurons is told."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a layer's active neurons are told, over some tokens.

    `recall`: share of the firing neurons that are selected. `energy_recall`: share of their energy, |activation| x
    norm of the down row, that these carry. `precision`: share of the selected neurons that fire. `selected` and
    `active`: mean shares of the layer's neurons that are selected, and that fire. Nothing to be told counts as told.
    """

    recall: float
    energy_recall: float
    precision: float
    selected: float
    active: float

    @classmethod
    def of(cls, counts: Counts) -> Quality:
        """From sums."""

        def share(part: float, whole: float, empty: float = 1.0) -> float:
            return part / whole if whole else empty

        return cls(
            share(counts.hits, counts.fired),
            share(counts.energy_hit, counts.energy),
            share(counts.hits, counts.selected),
            share(counts.selected, counts.neurons, 0.0),
            share(counts.fired, counts.neurons, 0.0),
        )

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class Counts:
    """Sums over tokens: neurons, those that fired, were selected, and both; their energy, and that of the selected."""

    neurons: int = 0
    fired: int = 0
    selected: int = 0
    hits: int = 0
    energy: float = 0.0
    energy_hit: float = 0.0

    def add(self, selected: npt.NDArray[np.bool_], energy: npt.NDArray[Any]) -> None:
        """Count tokens: what was selected, and the neurons' energies, 0 where one was silent (both T, n_ff)."""
        fired = energy > 0
        self.neurons += fired.size
        self.fired += int(np.count_nonzero(fired))
        self.selected += int(np.count_nonzero(selected))
        self.hits += int(np.count_nonzero(fired & selected))
        self.energy += float(energy.sum(dtype=np.float64))
        self.energy_hit += float(energy.sum(where=selected, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold, the quality at it, and (energy recall, share selected) of other thresholds."""

    threshold: float
    quality: Quality
    curve: tuple[tuple[float, float], ...]


def calibrate(
    score: Score,
    check: npt.NDArray[np.float16],
    energy: npt.NDArray[np.float16],
    *,
    energy_recall: float,
    recall: float = 0.0,
) -> Calibration:
    """The highest threshold at which both recalls are reached on the tokens of `check` (V, n_embd).

    `energy` (V, n_ff) is 0 where a neuron was silent. A layer in which none fired gets a threshold of 0.

    Raises:
        UsageError: there is no token to measure with.
    """
    if not len(check):
        raise UsageError("the text is too short: none of it could be kept for measuring; give at least two sequences")
    scores, energies = _of_the_firing(score, check, energy)
    order = np.argsort(-scores, kind="stable")
    scores, reached = scores[order], np.cumsum(energies[order], dtype=np.float64)
    if not len(scores):
        counts = _count(score, check, energy, (0.0,))
        return Calibration(0.0, Quality.of(counts[0]), ())
    needed = max(_places(reached, energy_recall), math.ceil(recall * len(scores)) - 1)
    thresholds = [float(scores[place]) for place in (needed, *(_places(reached, share) for share in CURVE))]
    counts = _count(score, check, energy, tuple(thresholds))
    qualities = [Quality.of(count) for count in counts]
    curve = tuple((q.energy_recall, q.selected) for q in qualities[1:])
    return Calibration(thresholds[0], qualities[0], curve)


def _of_the_firing(
    score: Score, check: npt.NDArray[np.float16], energy: npt.NDArray[np.float16]
) -> tuple[Floats, Floats]:
    scores, energies = [], []
    for rows, found in _scored(score, check):
        part = energy[rows].astype(np.float32)
        fired = part > 0
        scores.append(found[fired])
        energies.append(part[fired])
    return np.concatenate(scores), np.concatenate(energies)


def _count(
    score: Score, check: npt.NDArray[np.float16], energy: npt.NDArray[np.float16], thresholds: tuple[float, ...]
) -> list[Counts]:
    counts = [Counts() for _ in thresholds]
    for rows, scores in _scored(score, check):
        part = energy[rows].astype(np.float32)
        for count, threshold in zip(counts, thresholds, strict=True):
            count.add(scores >= np.float32(threshold), part)
    return counts


def _scored(score: Score, check: npt.NDArray[np.float16]) -> Iterator[tuple[slice, Floats]]:
    for start in range(0, len(check), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, score(check[rows])


def _places(reached: npt.NDArray[np.float64], share: float) -> int:
    """How far down the list the share is reached."""
    return min(int(np.searchsorted(reached, share * reached[-1])), len(reached) - 1)
