"""Scores of a low-rank predictor, and the neurons that they select."""

import numpy as np
import pytest

from thermocline import _native
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0
from thermocline.files.quantize import to_float

FORMATS = (F32, F16, BF16, Q8_0, Q4_0)
EPS = 2.0**-24


def matrices(weight, make, formats, neurons, rank, width):
    return weight(make((rank, width)), formats[0]), weight(make((neurons, rank)), formats[1])


def score_bound(linear_bound, x, fc1, fc2, hidden):
    """How far scores may be off: the error of the hidden layer carried through fc2, and fc2's own."""
    first, second = to_float(fc1).astype(np.float64), to_float(fc2).astype(np.float64)
    off = linear_bound(x, first, fc1.format)  # relu does not enlarge it
    return off @ np.abs(second).T + linear_bound(hidden + off, second, fc2.format)


@pytest.mark.parametrize("fc2", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("fc1", FORMATS, ids=lambda f: f.name)
def test_scores_agree_with_reference(ops, reference, skewed, weight, fence, linear_bound, fc1, fc2):
    for neurons, rank, width, tokens in [(1, 32, 32, 1), (97, 64, 96, 1), (300, 96, 64, 3), (64, 32, 160, 19)]:
        a, b = matrices(weight, skewed, (fc1, fc2), neurons, rank, width)
        x, scores = skewed((tokens, width)), fence((tokens, neurons), fill=9)
        expected = np.empty((tokens, neurons), np.float32)
        ops.predict(x, ops.place(a), ops.place(b), scores.array)
        reference.predict(x, a, b, expected)
        hidden = np.maximum(x.astype(np.float64) @ to_float(a).astype(np.float64).T, 0)
        bound = score_bound(linear_bound, x, a, b, hidden) + EPS * np.abs(expected)
        assert (np.abs(scores.check() - expected.astype(np.float64)) <= bound).all()


def test_ranks_and_widths_of_any_size(ops, reference, rng, weight, linear_bound):
    for neurons, rank, width in [(1, 1, 1), (15, 17, 31), (33, 5, 16), (7, 0, 8), (0, 3, 8)]:
        make = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        a, b = matrices(weight, make, (F16, F32), neurons, rank, width)
        x, scores = make((2, width)), np.full((2, neurons), 9, np.float32)
        expected = np.empty_like(scores)
        ops.predict(x, ops.place(a), ops.place(b), scores)
        reference.predict(x, a, b, expected)
        hidden = np.maximum(x.astype(np.float64) @ to_float(a).astype(np.float64).T, 0)
        assert (np.abs(scores - expected) <= score_bound(linear_bound, x, a, b, hidden) + EPS * np.abs(expected)).all()


def test_the_relu_between_is_there(ops, weight):
    """One hidden unit that is negative for the token gives nothing, one that is positive gives its column."""
    fc1, fc2 = np.array([[1, 0], [-1, 0]], np.float32), np.array([[3, 50], [-5, 70]], np.float32)
    scores = np.empty((1, 2), np.float32)
    ops.predict(np.array([[2, 9]], np.float32), ops.place(weight(fc1, F32)), ops.place(weight(fc2, F32)), scores)
    assert scores.tolist() == [[6, -10]]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_scores_depend_on_neither_threads_nor_company(team, skewed, weight, company, fmt):
    neurons, rank, width, tokens = 700, 160, 288, 35
    a, b = matrices(weight, skewed, (fmt, fmt), neurons, rank, width)
    x, seen = skewed((tokens, width)), set()
    for ops in team:
        fc1, fc2 = ops.place(a), ops.place(b)
        few = company(ops, fmt)
        scores, part = np.empty((tokens, neurons), np.float32), np.empty((few, neurons), np.float32)
        ops.predict(x, fc1, fc2, scores)
        seen.add(scores.tobytes())
        for end in (few, 21, tokens):
            ops.predict(x[end - few : end], fc1, fc2, part)
            assert part.tobytes() == scores[end - few : end].tobytes()
    assert len(seen) == 1


def scattered(rng, shape):
    """Scores around a threshold of 0.5, many exactly at it, and some that are no finite number."""
    scores = rng.choice(np.array([0.25, 0.5, 0.75], np.float32), shape)
    odd = rng.integers(0, 12, shape)
    for kind, value in enumerate((np.nan, np.inf, -np.inf, np.nextafter(np.float32(0.5), np.float32(0)))):
        scores[odd == kind] = value
    return scores


def test_selected_are_those_that_reach_the_threshold(ops, reference, rng, fence):
    for tokens in (0, 1, 2, 5):
        for neurons in (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 1000):
            scores, out = scattered(rng, (tokens, neurons)), fence((neurons,))
            for threshold in (0.5, np.inf, -np.inf, 2.0, 1e300, -1e300):
                ids = out.array.view(np.int32)
                active = ops.select(scores, threshold, ids).indices
                wanted = reference.select(scores, threshold, np.empty(neurons, np.int32)).indices
                np.testing.assert_array_equal(active, wanted)
                assert active.dtype == np.int32
                out.check()


def test_a_selected_set_lies_in_the_array_that_was_given(ops, reference):
    for each in (ops, reference):
        out = np.zeros(40, np.int32)
        active = each.select(np.ones((1, 40), np.float32), 0.0, out).indices
        assert np.shares_memory(active, out)
        assert active.tolist() == list(range(40))


def test_any_pattern_of_a_vector_is_listed_in_order(ops):
    """Every subset of eight neighbours, at every place in a vector of sixteen."""
    out = np.empty(24, np.int32)
    for shift in (0, 3, 8):
        for bits in range(256):
            scores = np.zeros((1, 24), np.float32)
            places = [shift + i for i in range(8) if bits >> i & 1]
            scores[0, places] = 1
            assert ops.select(scores, 0.5, out).indices.tolist() == places


def test_a_threshold_that_is_no_number_is_refused(ops, reference):
    for each in (ops, reference):
        with pytest.raises(ValueError, match="threshold is not a number"):
            each.select(np.ones((1, 4), np.float32), float("nan"), np.empty(4, np.int32))


def test_decoding_takes_no_new_scratch(team, rng, weight):
    make = lambda shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    a, b = matrices(weight, make, (Q8_0, Q8_0), 500, 64, 128)
    ops = team[1]
    fc1, fc2, scores, out = ops.place(a), ops.place(b), np.empty((1, 500), np.float32), np.empty(500, np.int32)
    sizes = set()
    for _ in range(5):
        ops.predict(make((1, 128)), fc1, fc2, scores)
        ops.select(scores, 0.0, out)
        sizes.add(ops.scratch_bytes)
    assert len(sizes) == 1


def placed(rows, columns):
    return _native.Matrix(np.zeros((rows, 4 * columns), np.uint8), 0, rows, columns)


REFUSALS = {
    "x has shape": ((1, 9), (4, 8), (5, 4), (1, 5)),
    "fc2 has another rank": ((1, 8), (4, 8), (5, 3), (1, 5)),
    "scores has shape": ((1, 8), (4, 8), (5, 4), (1, 6)),
    "scores has shape.*": ((2, 8), (4, 8), (5, 4), (1, 5)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message):
    x, fc1, fc2, scores = REFUSALS[message]
    with pytest.raises(ValueError, match=message):
        _native.Context(1).predict(np.zeros(x, np.float32), placed(*fc1), placed(*fc2), np.zeros(scores, np.float32))
    with pytest.raises(ValueError, match="out has shape"):
        _native.Context(1).select(np.zeros((1, 5), np.float32), 0.0, np.zeros(4, np.int32))
