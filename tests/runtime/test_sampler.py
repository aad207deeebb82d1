"""The sampling chain on distributions small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from thermocline.config import SamplingSettings
from thermocline.errors import NumericalError, SamplingError
from thermocline.runtime.sampler import Sampler

NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
SHARES = np.array([0.4, 0.3, 0.2, 0.1])
LOGITS = np.log(SHARES).astype(np.float32)
DRAWS = 4000


def sampler(width: int = 4, n_ctx: int = 64, **changes: Any) -> Sampler:
    return Sampler(SamplingSettings(**{**NEUTRAL, **changes}), width, n_ctx)


def drawn(logits: np.ndarray = LOGITS, **changes: Any) -> np.ndarray:
    """Shares of the tokens over many draws; the history is left empty, so that penalties do not build up."""
    one = sampler(len(logits), **{"repeat_last_n": 0, **changes})
    counts = Counter(one.sample(logits).token for _ in range(DRAWS))
    return np.array([counts[i] / DRAWS for i in range(len(logits))])


def assert_shares(found: np.ndarray, wanted: list[float]) -> None:
    """Five standard deviations of a share of DRAWS draws, at most sqrt(1/4 / DRAWS) each; zeros are exact."""
    np.testing.assert_allclose(found, wanted, atol=5 * math.sqrt(0.25 / DRAWS))
    assert all(f == 0 for f, w in zip(found, wanted, strict=True) if w == 0)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        # After top-k 2 the shares are 4/7 and 3/7: top-p works on these.
        ({"top_k": 2, "top_p": 0.57}, [1, 0, 0, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"min_p": 0.4, "top_p": 0.95}, [4 / 9, 3 / 9, 2 / 9, 0]),
        # Temperature 1/2 squares the shares; it comes last, so min-p does not see it.
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.5, "min_p": 0.4}, [16 / 29, 9 / 29, 4 / 29, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 100.0}, [0.2535, 0.2508, 0.2488, 0.2469]),
        ({"logit_bias": {0: -math.inf}}, [0, 3 / 6, 2 / 6, 1 / 6]),
        ({"logit_bias": {3: math.log(4)}}, [0.4 / 1.3, 0.3 / 1.3, 0.2 / 1.3, 0.4 / 1.3]),
    ],
    ids=str,
)
def test_shares_are_those_worked_out_by_hand(changes: dict[str, Any], wanted: list[float]) -> None:
    assert_shares(drawn(**changes), wanted)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = np.array([0, 2, 1, 2], np.float32)
    assert [sampler(temperature=0.0).sample(logits).token for _ in range(3)] == [1, 1, 1]


def test_top_k_cuts_ties_at_the_lowest_ids() -> None:
    assert_shares(drawn(np.zeros(4, np.float32), top_k=2), [0.5, 0.5, 0, 0])


@pytest.mark.parametrize(
    ("changes", "seen", "wanted"),
    [
        ({"repeat_penalty": 2.0}, [0, 2], [0.5, 1.0, -2.0, -1.0]),
        ({"presence_penalty": 1.5}, [0, 0, 2], [-0.5, 1.0, -2.5, -1.0]),
        ({"frequency_penalty": 0.5}, [0, 0, 2], [0.0, 1.0, -1.5, -1.0]),
        ({"repeat_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0}, [0], [-1.5, 1.0, -1.0, -1.0]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 1}, [0, 1], [1.0, 0.5, -1.0, -1.0]),
        ({"repeat_penalty": 2.0, "repeat_last_n": 0}, [0, 1], [1.0, 1.0, -1.0, -1.0]),
        ({"presence_penalty": 1.0, "repeat_last_n": -1}, [0, 1, 2, 3], [0.0, 0.0, -2.0, -2.0]),
    ],
    ids=str,
)
def test_penalties_change_the_logits(changes: dict[str, Any], seen: list[int], wanted: list[float]) -> None:
    logits = np.array([1, 1, -1, -1], np.float32)
    one = sampler(**changes)
    one.accept(seen)
    one._work[:] = logits
    one._penalize()
    np.testing.assert_allclose(one._work, wanted, rtol=1e-6)


def test_own_tokens_are_penalized_too() -> None:
    one = sampler(temperature=0.0, presence_penalty=1.0)
    logits = np.array([1.0, 0.5, 0.2, -9.0], np.float32)
    assert [one.sample(logits).token for _ in range(3)] == [0, 1, 2]


def test_old_tokens_leave_the_window() -> None:
    one = sampler(temperature=0.0, presence_penalty=5.0, repeat_last_n=2)
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    assert [one.sample(logits).token for _ in range(5)] == [0, 1, 2, 0, 1]


def test_logprobs_are_of_the_unchanged_logits() -> None:
    one = sampler(temperature=0.0, logit_bias={3: 50.0}, logprobs=3)
    sampled = one.sample(LOGITS + 7)
    assert sampled.token == 3
    assert sampled.logprob == pytest.approx(math.log(0.1), rel=1e-5)
    assert [i for i, _ in sampled.top] == [0, 1, 2]
    np.testing.assert_allclose([p for _, p in sampled.top], np.log(SHARES[:3]), rtol=1e-5)


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    assert len(sampler(logprobs=20).sample(LOGITS).top) == 4


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_the_same_seed_draws_the_same_tokens(seed: int) -> None:
    runs = []
    for _ in range(2):
        one = sampler(seed=seed, temperature=1.5)
        runs.append([one.sample(LOGITS).token for _ in range(50)])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


def test_seed_minus_one_draws_a_seed_and_tells_it() -> None:
    one = sampler(seed=-1, temperature=1.5)
    tokens = [one.sample(LOGITS).token for _ in range(20)]
    again = sampler(seed=one.seed, temperature=1.5)
    assert tokens == [again.sample(LOGITS).token for _ in range(20)]
    assert sampler(seed=-1).seed != one.seed


def test_a_drawn_seed_is_one_that_every_reader_of_json_keeps() -> None:
    assert all(float(seed) == seed < 1 << 53 for seed in (sampler(seed=-1).seed for _ in range(64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_finite_is_never_sampled(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(NumericalError, match=r"1 of 4 logits are not finite \(the first is token 2's\)"):
        sampler(temperature=temperature).sample(logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidding_everything_is_refused(temperature: float) -> None:
    one = sampler(temperature=temperature, logit_bias=dict.fromkeys(range(4), -math.inf))
    with pytest.raises(SamplingError, match="forbids every token"):
        one.sample(LOGITS)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(SamplingError, match="token 4; this model has tokens 0 to 3"):
        sampler(logit_bias={4: 1.0})


def test_clients_send_none_for_no_stops_and_no_biases() -> None:
    none: Any = None
    settings = SamplingSettings(stop=none, logit_bias=none)
    assert (settings.stop, settings.logit_bias) == ((), {})
    wrongs: list[Any] = [[1], 3, "a"]
    for wrong in wrongs:
        with pytest.raises(SamplingError, match=r"logit_bias is .*; allowed: numbers by token"):
            SamplingSettings(logit_bias=wrong)


def test_the_logits_stay_as_they_are() -> None:
    logits = LOGITS.copy()
    sampler(logit_bias={0: 5.0}, top_k=2, top_p=0.5).sample(logits)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_over_a_wide_vocabulary_keeps_what_a_full_sort_keeps(spread: float) -> None:
    """With little spread the set is larger than the first look, so that the look has to grow."""
    logits = np.random.default_rng(3).normal(0, spread, 20_000).astype(np.float32)
    one = sampler(len(logits), top_p=0.9)
    one._work[:] = logits
    ids, _ = one._candidates()
    order = np.argsort(-logits, kind="stable")
    shares = np.exp(logits[order].astype(np.float64))
    count = int((shares.cumsum() / shares.sum()).searchsorted(0.9)) + 1
    assert abs(len(ids) - count) <= 1  # the total of the shares is summed in another order
    np.testing.assert_array_equal(ids[: count - 1], order[: count - 1])
