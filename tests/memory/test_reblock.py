"""Transposing: exact where it can be, its error measured where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from thermocline.errors import NumericalError
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q4_K, Q8_0, BlockFormat
from thermocline.files.quantize import dequantize, from_float, quantize, to_float
from thermocline.files.weight import Weight
from thermocline.memory import reblock
from thermocline.memory.reblock import TILE, Reblocked, store, transpose
from thermocline.model.tensors import record_format
from thermocline.ops.cpu import CpuOps


def matrix(fmt: BlockFormat, rows: int, columns: int) -> Weight:
    values = np.random.default_rng(5).standard_normal((rows, columns), dtype=np.float32)
    return from_float("blk.0.ffn_down.weight", values, fmt)


def transposed(source: Weight, fmt: BlockFormat) -> tuple[np.ndarray, Reblocked]:
    out = np.empty((source.columns, fmt.row_bytes(source.rows)), dtype=np.uint8)
    report = transpose(source, out, fmt)
    return dequantize(out, fmt, source.rows), report


@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, TILE - 1), (32, TILE), (7, TILE + 1), (96, 2 * TILE + 32)])
def test_plain_formats_are_exact(fmt: BlockFormat, shape: tuple[int, int]) -> None:
    source = matrix(fmt, *shape)
    values, report = transposed(source, fmt)
    np.testing.assert_array_equal(values, to_float(source).T)
    assert report == Reblocked("blk.0.ffn_down.weight", fmt.name, 0.0, 0.0, fmt.name, report.rms)
    assert report.rms == pytest.approx(np.sqrt((values.astype(np.float64) ** 2).mean()), rel=1e-5)
    assert report.relative_error == 0


@pytest.mark.parametrize("columns", [32, TILE, TILE + 32])
@pytest.mark.parametrize(("fmt", "levels"), [(Q8_0, 127), (Q4_0, 8)], ids=["Q8_0", "Q4_0"])
def test_block_formats_err_within_a_step_and_say_so(fmt: BlockFormat, levels: int, columns: int) -> None:
    """A block's step is its largest magnitude over the levels, stored with 11 bits.

    Q8_0 rounds to the nearest step. Q4_0 has levels -8 to 7 only, so that the end opposite to the largest
    magnitude is clipped by up to a whole step.
    """
    source = matrix(fmt, 64, columns)
    values, report = transposed(source, fmt)
    error = np.abs(values.astype(np.float64) - to_float(source).T)
    largest = np.abs(to_float(source).T).reshape(columns, -1, 32).max(axis=2, keepdims=True)
    step = largest / levels * (0.5 if fmt is Q8_0 else 1.0) + largest * 2.0**-11
    assert (error.reshape(columns, -1, 32) <= step).all()
    assert report.format == fmt.name
    assert report.max_abs_error == pytest.approx(error.max(), rel=1e-6)
    assert report.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert report.rms_error > 0


def test_rows_that_are_no_whole_blocks_become_f16() -> None:
    source = matrix(Q8_0, 48, 64)
    assert record_format(source) is F16
    assert record_format(matrix(Q8_0, 64, 64)) is Q8_0
    values, report = transposed(source, F16)
    assert report.format == "F16"
    np.testing.assert_allclose(values, to_float(source).T, rtol=2**-11)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused_by_name(poison: float) -> None:
    values = np.ones((32, 2 * TILE), dtype=np.float32)
    values[3, TILE + 1] = poison
    source = from_float("blk.0.ffn_down.weight", values, F32)
    for ops in (None, CpuOps(1)):
        with pytest.raises(NumericalError, match=r"blk\.0\.ffn_down\.weight holds NaN or infinity"):
            transpose(source, np.empty((2 * TILE, 4 * 32), np.uint8), F32, ops=ops)


@pytest.mark.parametrize("fmt", [F32, F16, Q8_0], ids=lambda f: f.name)
def test_neurons_go_to_their_places_and_threads_do_not_show(fmt: BlockFormat) -> None:
    source = matrix(F16, 64, 3 * TILE + 32)
    places = np.random.default_rng(6).permutation(source.columns)
    plain, report = np.empty((source.columns, fmt.row_bytes(64)), np.uint8), None
    moved = np.empty_like(plain)
    report = transpose(source, plain, fmt)
    assert transpose(source, moved, fmt, places, threads=3) == report
    assert (moved[places] == plain).all()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0, Q4_K], ids=lambda f: f.name)
def test_native_ops_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, fmt: BlockFormat, ordered: bool) -> None:
    monkeypatch.setattr(reblock, "NATIVE_TILE", 2 * TILE)
    source = matrix(F16, 256, 5 * TILE + 32)
    places = np.random.default_rng(6).permutation(source.columns) if ordered else None
    slow, fast = (np.empty((source.columns, fmt.row_bytes(256)), np.uint8) for _ in range(2))
    report, native = transpose(source, slow, fmt, places), transpose(source, fast, fmt, places, ops=CpuOps(2))
    np.testing.assert_array_equal(fast, slow)
    for name in ("max_abs_error", "rms_error", "rms"):
        assert getattr(native, name) == pytest.approx(getattr(report, name), rel=1e-5)
    assert (native.source, native.format) == (report.source, report.format)


@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0], ids=lambda f: f.name)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_weight_stored_anew_is_what_the_quantiser_makes(fmt: BlockFormat, threads: int) -> None:
    source = matrix(F32, 2 * TILE + 5, 64)
    out = np.empty((source.rows, fmt.row_bytes(64)), np.uint8)
    report = store(source, out, fmt, threads=threads)
    assert (out == quantize(to_float(source), fmt)).all()
    error = dequantize(out, fmt, 64).astype(np.float64) - to_float(source)
    assert report.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert report.relative_error == pytest.approx(report.rms_error / report.rms)
    assert (report.source, report.format) == ("F32", fmt.name)
