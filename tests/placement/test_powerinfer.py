"""PowerInfer's allocation and index."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import PlanError, UsageError
from thermocline.files.formats import F16
from thermocline.hardware.catalogue import machine
from thermocline.hardware.machine import Tier
from thermocline.placement.cost import FfnMode
from thermocline.placement.footprint import Footprint
from thermocline.placement.powerinfer import BLOCK, allocate, from_gpu_index, neuron_capacity, to_gpu_index
from thermocline.placement.problem import Problem
from thermocline.placement.solver import solve
from thermocline.placement.workload import Workload

GIB = 1 << 30


def footprint(n_embd: int, n_ff: int, *, gated: bool) -> Footprint:
    return Footprint.of_sizes(
        "m", n_layer=4, n_embd=n_embd, n_ff=n_ff, n_vocab=1000, n_head=8, n_head_kv=8, head_dim=n_embd // 8,
        gated=gated, fmt=F16, predictor_rank=256,
    )  # fmt: skip


def problem(*, rng_seed: int = 0) -> Problem:
    p = -np.sort(-np.random.default_rng(rng_seed).beta(0.3, 2, (4, 11008)), axis=1)
    work = Workload(context=512, prompt=32, output=64)
    return Problem(footprint(4096, 11008, gated=True), machine("rtx-3060+i5-12400"), work, FfnMode.PREDICTED, p)


@pytest.mark.parametrize(
    ("n_embd", "n_ff", "gated", "error"),
    [  # true bytes per neuron over the formula's: computed from the sizes, as published in analyses of the code
        (4096, 11008, True, 0.008), (5120, 13824, True, 0.0125), (8192, 32768, False, 0.0), (8192, 28672, True, 0.3125),
        (4096, 14336, True, 0.3125),
    ],
)  # fmt: skip
def test_the_formula_wastes_what_is_known(n_embd: int, n_ff: int, gated: bool, error: float) -> None:
    f = footprint(n_embd, n_ff, gated=gated)
    neurons = neuron_capacity(f, 100 * GIB)
    assert 100 * GIB / neurons / sum(f.records[0]) - 1 == pytest.approx(error, abs=1e-3)


def test_allocation_goes_in_order_and_stops_at_the_first_misfit() -> None:
    asked = problem()
    f = asked.footprint
    attention, predictors = sum(f.attention), sum(f.predictor)
    third = allocate(asked, f.attention[0] * 3 + 5)
    assert third.attention == (True, True, True, False)
    assert not any(third.predictor)
    assert not third.head
    assert third.hot == (0, 0, 0, 0)
    bare = allocate(asked, attention + predictors + f.head)
    assert bare.complete
    assert not bare.values
    assert sum(bare.hot) == 0
    cache = 4 * f.kv_layer(512)
    whole = allocate(asked, attention + predictors + f.head + cache + 1000 * 3 * 8192 * 5)
    assert whole.values
    assert whole.keys
    assert whole.capacity == int(1000 * 5 * 3 * 8192 // (11008 * 2 * 4.5)) * 4
    assert sum(whole.hot) == whole.capacity // BLOCK * BLOCK > 0
    assert whole.fitting == 5000


def test_blocks_are_the_hottest_of_all_layers() -> None:
    asked = problem()
    assert asked.temperatures is not None
    skewed = asked.temperatures.copy()
    skewed[2] = 0.99
    hot = allocate(replace(asked, temperatures=skewed), 3 * GIB).hot
    assert hot[2] == 11008
    everything = allocate(asked, 100 * GIB)
    assert everything.hot == (11008,) * 4


def test_ours_is_not_slower() -> None:
    asked = problem()
    budget = sum(asked.footprint.attention) + sum(asked.footprint.predictor) + GIB
    theirs = allocate(asked, budget).placement(asked.cluster, 11008)
    room = sum(d.nbytes for d in asked.demands(theirs) if d.tier is Tier.VRAM)
    ours = solve(replace(asked, budgets={Tier.VRAM: room}))
    assert ours.objective <= asked.seconds(theirs) * (1 + 1e-9)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="counts"):
        allocate(replace(problem(), temperatures=None), GIB)
    with pytest.raises(UsageError, match="divide"):
        allocate(problem(), GIB).placement(100, 11008)


@given(st.integers(1, 600), st.randoms(use_true_random=False), st.floats(0, 1), st.booleans())
def test_index_round_trip(n: int, random, share: float, ranked: bool) -> None:
    order = list(range(n))
    random.shuffle(order)
    depth = round(share * n)
    mask, bucket = to_gpu_index(order, depth)
    assert mask.sum() == depth
    assert bucket.size in (0, depth)
    again, found = from_gpu_index(mask, bucket, order if ranked else None)
    assert found == depth
    assert set(again[:depth]) == set(order[:depth])
    if ranked:
        assert again.tolist() == order
    assert np.array_equal(to_gpu_index(again, found)[0], mask)


@pytest.mark.parametrize(
    ("mask", "bucket"),
    [
        ([0, 2, 1], [1, 2]), ([0.0, 1.0], [1]), ([], []), ([[0, 1]], [1]), ([0, 1, 1], [1]), ([0, 1, 1], [2, 1]),
        ([0, 1, 0], [0]), ([0, 1, 0], []), ([0, 0, 0], [1]), ([0, 1, 1], [1, 2, 2]), ([0, -1, 1], [2]),
    ],
)  # fmt: skip
def test_impossible_indices_are_refused(mask: list, bucket: list) -> None:
    with pytest.raises(PlanError, match="gpu_"):
        from_gpu_index(np.array(mask), np.array(bucket, np.int32))


@pytest.mark.parametrize(
    ("order", "depth"), [([0, 0], 1), ([1, 2], 1), ([0, 1], 3), ([0, 1], -1), ([0.5, 1.0], 1), ([[0]], 0)]
)
def test_impossible_orders_are_refused(order: list, depth: int) -> None:
    with pytest.raises(UsageError):
        to_gpu_index(order, depth)


def test_an_order_of_other_neurons_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit"):
        from_gpu_index(np.array([0, 1, 0]), np.array([1]), order=[1, 0])
