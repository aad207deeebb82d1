"""Formats that only memory has: the same numbers as a file's, and the same bits of all that is computed with them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.ops.conftest import cpu_ops
from thermocline import _native
from thermocline.files.formats import F16, Q4_0, Q4_K, Q8_0, BlockFormat
from thermocline.files.quantize import quantize, to_float
from thermocline.files.weight import Weight
from thermocline.ops.contract import Activation, ActiveSet, FfnKind, NeuronBlock
from thermocline.ops.cpu import APART, ARRANGED, CpuOps

LEVELS = pytest.mark.parametrize("isa", _native.isa_levels())
PAIRS = [*ARRANGED.items(), *APART.items()]
FORMATS = pytest.mark.parametrize(("fmt", "better"), PAIRS, ids=[better.name for _, better in PAIRS])
RELU = FfnKind(Activation.RELU, gated=True)
NEURONS = 77


def random_weight(fmt: BlockFormat, rows: int, columns: int, seed: int = 0) -> Weight:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return Weight("w", fmt, (rows, columns), quantize(values, fmt))


def both(ops: CpuOps, weight: Weight, better: BlockFormat) -> tuple[Any, Any]:
    """The matrix on the file's bytes, and on a copy as memory has it."""
    return ops.place(weight), ops.place(ops.arrange(weight, np.zeros_like(weight.data), better))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@LEVELS
@FORMATS
@pytest.mark.parametrize("rows", [1, 3, 4, 37])
def test_products_have_the_same_bits(isa: str, fmt: BlockFormat, better: BlockFormat, rows: int) -> None:
    for blocks, threads in ((1, 1), (3, 2)):
        ops, columns = cpu_ops(isa, threads), blocks * better.block
        plain, arranged = both(ops, random_weight(fmt, rows, columns), better)
        for tokens in (1, 2, 5, 9, 33):
            outs = [np.zeros((tokens, rows), np.float32) for _ in range(2)]
            for matrix, out in zip((plain, arranged), outs, strict=True):
                ops.linear(normal(tokens, columns), (matrix,), (out,))
            np.testing.assert_array_equal(outs[1], outs[0])
            assert outs[0].any()


@LEVELS
@FORMATS
def test_every_number_is_the_same(isa: str, fmt: BlockFormat, better: BlockFormat) -> None:
    ops, columns = cpu_ops(isa, 1), 2 * better.block
    weight = random_weight(fmt, 9, columns)
    out = np.zeros((9, columns), np.float32)
    ops.embed(both(ops, weight, better)[1], np.arange(9, dtype=np.int32), out)
    np.testing.assert_array_equal(out, to_float(weight))


@LEVELS
@FORMATS
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_neurons_give_the_same_bits(isa: str, fmt: BlockFormat, better: BlockFormat, tokens: int) -> None:
    """Gate, up and down records of all neurons or some, whose down rows are summed in integers."""
    ops, columns = cpu_ops(isa, 2), better.block
    pairs = [both(ops, random_weight(fmt, NEURONS, columns, seed), better) for seed in range(3)]
    some = ActiveSet(np.arange(0, NEURONS, 3, dtype=np.int32))
    x = normal(tokens, columns)
    for active, skip in product((ActiveSet(), some), (False, True)):
        results = []
        for matrices in zip(*pairs, strict=True):
            gate, up, down = matrices
            out, hidden = np.zeros((tokens, columns), np.float32), np.zeros((tokens, NEURONS), np.float32)
            block = NeuronBlock(gate, up, down, True, RELU, NEURONS)
            work = ops.ffn(x, block, active, out, skip_zeros=skip, hidden=hidden)
            results.append((out, hidden, work))
        np.testing.assert_array_equal(results[1][0], results[0][0])
        np.testing.assert_array_equal(results[1][1], results[0][1])
        assert results[1][2] == results[0][2]
        assert results[0][0].any()


@LEVELS
@FORMATS
def test_scores_have_the_same_bits(isa: str, fmt: BlockFormat, better: BlockFormat) -> None:
    ops, columns = cpu_ops(isa, 2), better.block
    first, second = (both(ops, random_weight(fmt, rows, columns, rows), better) for rows in (columns, NEURONS))
    scores = [np.zeros((2, NEURONS), np.float32) for _ in range(2)]
    for fc1, fc2, out in zip(first, second, scores, strict=True):
        ops.predict(normal(2, columns), fc1, fc2, out)
    np.testing.assert_array_equal(scores[1], scores[0])
    assert scores[0].any()


@LEVELS
@FORMATS
def test_a_scale_that_is_not_finite_is_found_wherever_it_lies(isa: str, fmt: BlockFormat, better: BlockFormat) -> None:
    ops, block = cpu_ops(isa, 1), better.block
    weight = random_weight(fmt, 3, 2 * block)
    assert ops.check_finite(both(ops, weight, better)[1]) == -1
    scale = 208 if fmt.name == "Q6_K" else 0
    for at in range(scale, weight.data.shape[1], fmt.block_bytes):
        data = weight.data.copy()
        data[1, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
        assert ops.check_finite(both(ops, Weight("w", fmt, weight.shape, data), better)[1]) == 1


@FORMATS
def test_a_matrix_can_be_arranged_where_it_lies(fmt: BlockFormat, better: BlockFormat) -> None:
    ops, columns = cpu_ops(_native.isa_levels()[-1], 3), 2 * better.block
    weight = random_weight(fmt, 2100, columns)  # enough for several threads
    stored = weight.data.copy()
    copy = ops.arrange(weight, np.zeros_like(stored), better)
    np.testing.assert_array_equal(weight.data, stored)
    assert ops.arrange(weight, weight.data, better).data is weight.data
    np.testing.assert_array_equal(weight.data, copy.data)
    assert (copy.data != stored).any()
    assert copy.format.row_bytes(columns) == fmt.row_bytes(columns)


def test_what_gains_nothing_stays_as_it_is() -> None:
    level = _native.isa_levels()[-1]
    best = cpu_ops(level, 1)
    for fmt, better in ARRANGED.items():
        assert best.arrangement(fmt, 3 * better.block) == (better if level != "baseline" else None)
        assert best.arrangement(fmt, better.block + fmt.block) is None or fmt.block == better.block
        assert cpu_ops("baseline", 1).arrangement(fmt, better.block) is None
    for fmt in (F16, Q8_0):
        assert best.arrangement(fmt, 512) is None


def test_rows_that_lie_apart_have_a_format_of_their_own() -> None:
    """Where rows are fetched to the second cache, and are whole blocks of it."""
    level = _native.isa_levels()[-1]
    first, second = (CpuOps(1, level, fetching) for fetching in ("first", "second"))
    for fmt, better in APART.items():
        other = ARRANGED[fmt] if level != "baseline" else None
        assert second.arrangement(fmt, 3 * better.block, apart=True) == (better if level != "baseline" else None)
        assert second.arrangement(fmt, better.block + ARRANGED[fmt].block, apart=True) == other
        assert second.arrangement(fmt, 4 * better.block, apart=True) == other
        assert second.arrangement(fmt, better.block) == other
        assert first.arrangement(fmt, better.block, apart=True) == other
        assert CpuOps(1, "baseline", "second").arrangement(fmt, better.block, apart=True) is None


def test_what_cannot_be_arranged_is_refused() -> None:
    best, better = cpu_ops(_native.isa_levels()[-1], 1), ARRANGED[Q4_0]
    for fmt, other in ((F16, better), (Q8_0, better), (Q4_0, ARRANGED[Q4_K]), (Q4_0, Q4_0)):
        with pytest.raises(ValueError, match="no format of memory"):
            best.arrange(random_weight(fmt, 2, 512), np.zeros((2, fmt.row_bytes(512)), np.uint8), other)
    with pytest.raises(ValueError, match="whole blocks"):
        best.arrange(random_weight(Q4_0, 2, 480), np.zeros((2, Q4_0.row_bytes(480)), np.uint8), better)
    with pytest.raises(ValueError, match="out"):
        best.arrange(random_weight(Q4_0, 2, 512), np.zeros((1, Q4_0.row_bytes(512)), np.uint8), better)
