"""Statistics against counting by hand, one token and one neuron at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from thermocline.activity import accumulator as module
from thermocline.activity.accumulator import Accumulator
from thermocline.activity.statistics import SIZE_BINS, Activity, merge_all
from thermocline.errors import FingerprintError, NumericalError, UsageError

MODEL = "ab" * 32
LAYERS, NEURONS = 3, 40
Step = list[np.ndarray]


def random_steps(seed: int, lengths: list[int]) -> list[Step]:
    """For each step, a layer's activations (T, NEURONS) each, mostly zero and unevenly so."""
    random = np.random.default_rng(seed)
    often = random.uniform(0, 0.6, (LAYERS, NEURONS))
    often[:, 3] = 0
    return [
        [
            np.where(random.random((t, NEURONS)) < often[i], random.normal(size=(t, NEURONS)), 0).astype(np.float32)
            for i in range(LAYERS)
        ]
        for t in lengths
    ]


def norms() -> np.ndarray:
    return np.random.default_rng(9).uniform(0.5, 2, (LAYERS, NEURONS))


def count(sequences: list[list[Step]], start: Activity | None = None, *, threshold: float = 0.0) -> Activity:
    empty = Activity.empty(MODEL, "tiny", LAYERS, NEURONS, threshold=threshold)
    accumulator = Accumulator(start or empty, norms())
    for sequence in sequences:
        accumulator.begin_sequence()
        for step in sequence:
            for layer, hidden in enumerate(step):
                accumulator.ffn_input(layer, hidden, hidden)
                accumulator.ffn_hidden(layer, hidden)
    return accumulator.result()


def sets(step: Step, layer: int, threshold: float = 0.0) -> list[set[int]]:
    return [{j for j in range(NEURONS) if abs(float(row[j])) > threshold} for row in step[layer]]


@pytest.mark.parametrize(("threshold", "rows"), [(0.0, 128), (0.7, 128), (0.0, 1), (0.0, 2), (0.7, 3)])
def test_every_count_is_that_of_brute_force(threshold: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    sequences = [random_steps(1, [7, 1, 5]), random_steps(2, [4])]
    activity = count(sequences, threshold=threshold)
    fired, contribution = np.zeros((LAYERS, NEURONS), int), np.zeros((LAYERS, NEURONS))
    sizes, tokens = np.zeros((LAYERS, SIZE_BINS), int), 0
    again, before, foreseen, below = (np.zeros(LAYERS, int) for _ in range(4))
    for sequence in sequences:
        last: list[set[int] | None] = [None] * LAYERS
        for step in sequence:
            tokens += len(step[0])
            for layer in range(LAYERS):
                active = sets(step, layer, threshold)
                for t, now in enumerate(active):
                    sizes[layer, len(now) * SIZE_BINS // (NEURONS + 1)] += 1
                    for j in range(NEURONS):
                        fired[layer, j] += j in now
                        contribution[layer, j] += abs(float(step[layer][t, j])) * norms()[layer, j]
                    if last[layer] is not None:
                        again[layer] += len(now & last[layer])
                        before[layer] += len(now)
                    last[layer] = now
                    if layer and t:
                        lower = sets(step, layer - 1, threshold)
                        alike = [
                            len(lower[t] & lower[s]) / len(lower[t] | lower[s]) if lower[t] | lower[s] else 1.0
                            for s in range(t)
                        ]
                        twin = max(range(t), key=lambda s: (alike[s], s))
                        foreseen[layer] += len(now & active[twin])
                        below[layer] += len(now)
    assert (activity.tokens, activity.sequences) == (tokens, 2)
    assert np.array_equal(activity.fired, fired)
    assert np.allclose(activity.contribution, contribution, rtol=1e-6)
    assert np.array_equal(activity.sizes, sizes)
    assert np.array_equal(activity.token_overlap.shared, again)
    assert np.array_equal(activity.token_overlap.total, before)
    assert np.array_equal(activity.layer_overlap.shared, foreseen)
    assert np.array_equal(activity.layer_overlap.total, below)
    assert fired.sum() > 0
    assert again.sum() > 0
    assert foreseen.sum() > 0


def test_order_is_hottest_first_and_of_equals_the_lower_number() -> None:
    fired = np.array([[2, 5, 2, 0, 5], [1, 1, 1, 1, 1]])
    activity = Activity.from_counts(MODEL, "m", fired, 10)
    assert activity.order.tolist() == [[1, 4, 0, 2, 3], [0, 1, 2, 3, 4]]
    assert activity.order.dtype == np.int32
    assert activity.temperatures[0].tolist() == [0.2, 0.5, 0.2, 0.0, 0.5]
    assert activity.sorted_temperatures[0].tolist() == [0.5, 0.5, 0.2, 0.2, 0.0]
    assert activity.active_share.tolist() == pytest.approx([14 / 50, 0.1])


@pytest.mark.parametrize(
    ("fired", "layers", "whole"),
    [
        ([[8, 1, 1, 0], [5, 5, 5, 5]], [0.25, 1.0], 5 / 8),
        ([[80, 20], [0, 0]], [0.5, 0.0], 0.25),
        ([[79, 21], [0, 0]], [1.0, 0.0], 0.5),
        ([[0, 0], [0, 0]], [0.0, 0.0], 0.0),
    ],
)
def test_share_of_neurons_that_give_80_percent(fired, layers, whole) -> None:
    activity = Activity.from_counts(MODEL, "m", np.array(fired), 100)
    found, all_together = activity.coverage(0.8)
    assert found.tolist() == layers
    assert all_together == whole


def test_chance_is_the_overlap_of_neurons_that_know_nothing_of_each_other() -> None:
    random = np.random.default_rng(3)
    p = random.uniform(0, 1, NEURONS)
    hidden = (random.random((20000, NEURONS)) < p).astype(np.float32)
    accumulator = Accumulator(Activity.empty(MODEL, "m", 1, NEURONS), np.ones((1, NEURONS)))
    accumulator.begin_sequence()
    for start in range(0, 20000, 500):
        accumulator.ffn_hidden(0, hidden[start : start + 500])
    activity = accumulator.result()
    assert activity.token_overlap.share[0] == pytest.approx(activity.chance_overlap[0], abs=0.005)
    assert activity.token_overlap.total[0] == hidden[1:].sum()


def test_layers_that_foresee_each_other_completely() -> None:
    """The second layer copies the first, and every set comes twice: the twin is always found."""
    random = np.random.default_rng(4)
    half = (random.random((8, NEURONS)) < 0.3).astype(np.float32)
    hidden = np.concatenate([half, half[::-1]])
    accumulator = Accumulator(Activity.empty(MODEL, "m", 2, NEURONS), np.ones((2, NEURONS)))
    accumulator.begin_sequence()
    for layer in range(2):
        accumulator.ffn_hidden(layer, hidden)
    overlap = accumulator.result().layer_overlap
    assert overlap.total.tolist() == [0, int(hidden[1:].sum())]
    assert overlap.shared[1] >= half.sum()
    assert np.isnan(overlap.share[0])


@pytest.mark.parametrize("n_ff", [1, 40, 255, 256, 257, 1000])
def test_quantiles_of_sizes_are_right_to_a_bin(n_ff: int) -> None:
    random = np.random.default_rng(n_ff)
    size = random.integers(0, n_ff + 1, 300)
    hidden = np.array([[float(j < s) for j in range(n_ff)] for s in size], np.float32)
    accumulator = Accumulator(Activity.empty(MODEL, "m", 1, n_ff), np.ones((1, n_ff)))
    accumulator.ffn_hidden(0, hidden)
    activity = accumulator.result()
    for q in (0.01, 0.5, 0.99, 1.0):
        exact = np.sort(size)[int(np.ceil(q * 300)) - 1] / n_ff
        found = activity.size_quantile(q)[0]
        assert exact - 1e-12 <= found <= exact + (n_ff // SIZE_BINS + 1 if n_ff > SIZE_BINS else 0) / n_ff + 1e-12


def test_merging_equals_one_run() -> None:
    first, second, third = ([random_steps(i, [5, 3])] for i in range(3))
    merged = merge_all([("x", count(part)) for part in (first, second, third)])
    whole = count(first + second + third)
    assert (merged.tokens, merged.sequences) == (whole.tokens, whole.sequences) == (24, 3)
    for name in ("fired", "sizes"):
        assert np.array_equal(getattr(merged, name), getattr(whole, name))
    for name in ("token_overlap", "layer_overlap"):
        assert np.array_equal(getattr(merged, name).shared, getattr(whole, name).shared)
        assert np.array_equal(getattr(merged, name).total, getattr(whole, name).total)
    assert np.allclose(merged.contribution, whole.contribution, rtol=1e-12)
    resumed = count(third, count(second, count(first)))
    assert np.array_equal(resumed.contribution, whole.contribution)


def test_what_does_not_belong_together_is_not_merged() -> None:
    mine = Activity.from_counts(MODEL, "mine", np.ones((2, 3), int), 1)
    with pytest.raises(FingerprintError, match=r"other.*not to mine"):
        mine.merge(replace(mine, model_fingerprint="cd" * 32, model_name="other"))
    with pytest.raises(UsageError, match=r"x\.safetensors cannot be merged: .*thresholds 0 and 0\.5"):
        mine.merge(replace(mine, threshold=0.5), path="x.safetensors")
    with pytest.raises(UsageError, match="cannot be merged"):
        mine.merge(Activity.from_counts(MODEL, "mine", np.ones((2, 4), int), 1))
    with pytest.raises(UsageError, match="run r1 is in both"):
        replace(mine, runs=({"id": "r1"},)).merge(replace(mine, runs=({"id": "r0"}, {"id": "r1"})))
    with pytest.raises(UsageError, match="no activity"):
        merge_all([])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_no_numbers_are_refused(value: float) -> None:
    accumulator = Accumulator(Activity.empty(MODEL, "m", 2, 3), np.ones((2, 3)))
    with pytest.raises(NumericalError, match="layer 1"):
        accumulator.ffn_hidden(1, np.array([[0, value, 1]], np.float32))


def test_a_summary_is_json_and_tells_nothing_that_is_not_known() -> None:
    empty = Activity.empty(MODEL, "m", 2, 3).summary()
    json.dumps(empty, allow_nan=False)
    assert empty["token_overlap"] is None
    assert empty["layers"][0]["median_active_share"] is None
    full = count([random_steps(5, [30])]).summary()
    assert len(full["layers"]) == LAYERS
    assert full["layers"][0]["never_fired"] == pytest.approx(1 / NEURONS, abs=2 / NEURONS)
    assert 0 < full["neurons_for_80_percent"] < 1
