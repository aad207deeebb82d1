"""Thresholds: the highest that reaches what was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from thermocline.activity import calibration as module
from thermocline.activity.calibration import Quality, calibrate
from thermocline.errors import UsageError

SCORES = np.array([[4.0, 3.0, 2.0, 1.0], [0.5, -1.0, 2.5, 3.5]], np.float32)
ENERGY = np.array([[1.0, 0.0, 6.0, 1.0], [0.0, 2.0, 0.0, 0.0]], np.float16)
"""Of what fires, in the order of the scores: 1 (4.0), 6 (2.0), 1 (1.0), 2 (-1.0)."""


def scores_of(check: np.ndarray) -> np.ndarray:
    return SCORES[check[:, 0].astype(int)]


CHECK = np.array([[0], [1]], np.float16)


@pytest.mark.parametrize(
    ("energy_recall", "recall", "threshold"),
    [
        (0.05, 0.0, 4.0), (0.1, 0.0, 4.0), (0.11, 0.0, 2.0), (0.7, 0.0, 2.0), (0.71, 0.0, 1.0), (0.9, 0.0, -1.0),
        (0.05, 0.25, 4.0), (0.05, 0.26, 2.0), (0.05, 0.75, 1.0), (0.05, 0.76, -1.0), (0.8, 0.1, 1.0),
    ],
)  # fmt: skip
def test_the_threshold_is_the_highest_that_reaches_both(energy_recall: float, recall: float, threshold: float) -> None:
    found = calibrate(scores_of, CHECK, ENERGY, energy_recall=energy_recall, recall=recall)
    assert found.threshold == threshold
    selected = threshold <= SCORES
    fired = ENERGY > 0
    assert found.quality == Quality(
        recall=fired[selected].sum() / 4,
        energy_recall=float(ENERGY[selected].sum()) / 10,
        precision=fired[selected].sum() / selected.sum(),
        selected=selected.mean(),
        active=0.5,
    )


def test_pieces_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(scores_of, CHECK, ENERGY, energy_recall=0.8)
    monkeypatch.setattr(module, "CHUNK", 1)
    assert calibrate(scores_of, CHECK, ENERGY, energy_recall=0.8) == whole


def test_the_curve_rises() -> None:
    random = np.random.default_rng(3)
    truth = np.maximum(random.normal(size=(300, 40)) - 1, 0).astype(np.float16)
    noisy = truth.astype(np.float32) + random.normal(size=truth.shape).astype(np.float32)
    check = np.arange(300, dtype=np.float16)[:, None]
    curve = calibrate(lambda rows: noisy[rows[:, 0].astype(int)], check, truth, energy_recall=0.9).curve
    recalls, shares = zip(*curve, strict=True)
    assert all(found >= wanted for found, wanted in zip(recalls, module.CURVE, strict=True))
    assert list(shares) == sorted(shares)
    assert 0.05 < shares[0] < shares[-1] < 1.0


def test_a_layer_in_which_nothing_fires_selects_by_zero() -> None:
    found = calibrate(scores_of, CHECK, np.zeros_like(ENERGY), energy_recall=0.9)
    assert (found.threshold, found.quality.recall, found.quality.energy_recall) == (0.0, 1.0, 1.0)
    assert found.quality.selected == 7 / 8


def test_nothing_to_measure_with_is_told() -> None:
    with pytest.raises(UsageError, match="too short"):
        calibrate(scores_of, CHECK[:0], ENERGY[:0], energy_recall=0.9)
