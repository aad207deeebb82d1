"""One layer's fit on data that is not as varied as it might be."""

from __future__ import annotations

import numpy as np
import pytest

from thermocline.activity.capture import LayerData, pack_levels
from thermocline.config import TrainSettings

pytest.importorskip("torch")
from thermocline.activity.fitting import Fitter

N_EMBD, N_FF, ROWS, TOKENS = 1024, 96, 64, 4096


def test_a_text_that_repeats_itself() -> None:
    """Its streams fill few directions; the moments of all others are zero, which rounding must not make negative."""
    random = np.random.default_rng(2)
    rows = random.standard_normal((ROWS, N_EMBD)).astype(np.float16)
    first = random.standard_normal((N_FF, N_EMBD)).astype(np.float32)
    energy = np.maximum(rows.astype(np.float32) @ first.T, 0)
    places = np.arange(TOKENS) % ROWS
    data = LayerData(rows[places], pack_levels(energy)[places], rows, energy.astype(np.float16))
    fitter = Fitter(data, first, N_FF, TrainSettings(train_on="cpu", epochs=1))
    told = fitter.scores(fitter.fit(96), rows) > 0
    assert ((energy > 0) == told).mean() > 0.85
