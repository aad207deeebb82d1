"""Batches are predicted as long as that is clearly faster than to look at every neuron's first row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from thermocline.activity.predictor import MOST_TOKENS
from thermocline.files.formats import F16
from thermocline.hardware.machine import Machine, Processor
from thermocline.placement.cost import CostModel, FfnMode
from thermocline.placement.footprint import Footprint
from thermocline.placement.predicting import predicted_up_to
from thermocline.placement.workload import Workload

N_FF, SHARES = 4096, (0.02, 0.12, 0.5, 1.0)
READING = Processor(name="cpu", capacity=1 << 36, bandwidth=40e9, bandwidth_busy=40e9, flops=1e18, launch=0.0)
MULTIPLYING = replace(READING, bandwidth=1e18, flops=1e11)


def model(rank: int = 256, *, gated: bool = True) -> Footprint:
    return Footprint.of_sizes(
        "m", n_layer=len(SHARES), n_embd=1024, n_ff=N_FF, n_vocab=1000, n_head=8, n_head_kv=8, head_dim=128,
        gated=gated, fmt=F16, predictor_rank=rank,
    )  # fmt: skip


def cost(cpu: Processor, footprint: Footprint | None = None, shares: tuple[float, ...] | None = SHARES) -> CostModel:
    heat = None if shares is None else np.broadcast_to(np.array(shares)[:, None], (len(SHARES), N_FF))
    machine = Machine(name="m", cpu=cpu)
    return CostModel(footprint or model(), machine, Workload(), FfnMode.PREDICTED, heat)


@pytest.mark.parametrize("cpu", [READING, MULTIPLYING], ids=["reading", "multiplying"])
def test_a_batch_is_predicted_while_that_is_a_tenth_less_than_exact(cpu: Processor) -> None:
    """Exact has the first matrix and twice the union, predicted the predictor and three times the union."""
    f = model()
    first = N_FF * f.records[0][0]
    for share, most in zip(SHARES, predicted_up_to(cost(cpu)), strict=True):
        union = [1 - (1 - share) ** n for n in range(MOST_TOKENS + 1)]
        worth = [f.predictor[0] + 3 * first * u <= 0.9 * first * (1 + 2 * u) for u in union]
        assert most == 1 or worth[most]
        beyond = most + max(1, most // 4)
        assert beyond > MOST_TOKENS or not worth[beyond]


def test_the_choice_by_hand() -> None:
    """The predictor is 0.3125 of the first matrix: 0.3125 + 3 u <= 0.9 (1 + 2 u) up to a union u of 0.4896, so that
    0.88^n must be 0.5104: 0.88^5 = 0.528, 0.88^6 = 0.464.
    """
    assert predicted_up_to(cost(READING)) == (33, 5, 1, 1)
    assert predicted_up_to(cost(READING, model(rank=1024))) == (1, 1, 1, 1)  # as large as what it would save
    assert predicted_up_to(cost(READING, model(gated=False)))[1] == 5


def test_slow_rows_that_lie_apart_make_it_shorter() -> None:
    apart = [predicted_up_to(cost(replace(READING, sparse=0.5, sparse_batch=share)))[1] for share in (1.0, 0.8, 0.3)]
    assert apart == sorted(apart, reverse=True)
    assert apart[0] == 5 > apart[1] > 1 == apart[2]
    assert predicted_up_to(cost(replace(READING, sparse=0.3))) == predicted_up_to(
        cost(replace(READING, sparse=0.3, sparse_batch=0.3))
    )


def test_single_tokens_are_predicted_where_nothing_is_known() -> None:
    assert predicted_up_to(cost(READING, shares=None)) == (1,) * len(SHARES)


def test_what_follows_from_a_devices_memory_does_not_change_it() -> None:
    """Placement never changes the output, and so not what is predicted."""
    gpu = replace(READING, name="gpu", bandwidth=4e12, bandwidth_busy=4e12)
    plain = cost(READING)
    both = CostModel(
        plain.footprint, replace(plain.machine, gpu=gpu), Workload(), FfnMode.PREDICTED,
        np.broadcast_to(np.array(SHARES)[:, None], (len(SHARES), N_FF)),
    )  # fmt: skip
    assert predicted_up_to(both) == predicted_up_to(plain)
