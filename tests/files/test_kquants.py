"""The K-quants against the `gguf` package, which reads but does not write them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from thermocline.errors import NumericalError
from thermocline.files.formats import Q4_0, Q4_K, Q5_K, Q6_K, Q8_0, BlockFormat
from thermocline.files.kquants import SCALES
from thermocline.files.quantize import all_finite, converted, dequantize, from_float, quantize, to_float
from thermocline.files.weight import Weight

K_QUANTS = [Q4_K, Q5_K, Q6_K]


def any_bytes(rng: np.random.Generator, fmt: BlockFormat, blocks: int) -> np.ndarray:
    """Blocks of any bits with scales that are finite: every number, small scale and minimum occurs."""
    data = rng.integers(0, 256, (blocks, fmt.block_bytes), np.uint8)
    where = SCALES[fmt]
    scales = rng.standard_normal((blocks, (where.stop - where.start) // 2)).astype(np.float16)
    data[:, where] = scales.view(np.uint8)
    return data


@pytest.mark.parametrize("fmt", K_QUANTS, ids=lambda f: f.name)
def test_any_bytes_mean_what_the_gguf_package_reads(fmt: BlockFormat) -> None:
    data = any_bytes(np.random.default_rng(1), fmt, 300).reshape(100, -1)
    theirs = quants.dequantize(data, GGMLQuantizationType[fmt.name])
    assert dequantize(data, fmt, 768).tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("fmt", "finer"), [(Q4_K, Q4_0), (Q5_K, Q4_K), (Q6_K, Q5_K)], ids=lambda f: f.name)
def test_the_quantisers_beat_the_next_coarser_format(fmt: BlockFormat, finer: BlockFormat) -> None:
    rng = np.random.default_rng(2)
    for x in (rng.standard_normal((20, 512)), rng.standard_normal((20, 512)) ** 3, rng.random((20, 512)) + 3):
        x = x.astype(np.float32)
        ours, other = (np.square(to_float(from_float("w", x, f)) - x).mean() for f in (fmt, finer))
        assert ours < 0.85 * other


@pytest.mark.parametrize("fmt", K_QUANTS, ids=lambda f: f.name)
def test_numbers_that_the_format_holds_survive(fmt: BlockFormat) -> None:
    """Multiples of a small scale, from one end of the range to the other."""
    low, high = {"Q4_K": (0, 15), "Q5_K": (0, 31), "Q6_K": (-32, 31)}[fmt.name]
    q = np.random.default_rng(3).integers(low, high + 1, (4, 16, 16))
    q[:, :, 0], q[:, :, 1] = low, high
    x = (q * 2.0**-5).astype(np.float32).reshape(4, 256)
    np.testing.assert_allclose(to_float(from_float("w", x, fmt)), x, atol=2e-3)


@pytest.mark.parametrize("fmt", K_QUANTS, ids=lambda f: f.name)
def test_odd_blocks(fmt: BlockFormat) -> None:
    assert not to_float(from_float("w", np.zeros((2, 256), np.float32), fmt)).any()
    tiny = np.full((1, 256), 1e-42, np.float32)
    assert np.abs(to_float(from_float("w", tiny, fmt))).max() < 1e-30
    one = np.full((1, 256), -2.5, np.float32)
    np.testing.assert_allclose(to_float(from_float("w", one, fmt)), one, rtol=0.01)
    for bad in (np.nan, np.inf, 1e9):
        x = np.ones((1, 256), np.float32)
        x[0, 77] = bad
        with np.errstate(invalid="ignore"), pytest.raises(NumericalError, match=f"which {fmt.name} cannot store"):
            quantize(x, fmt)


@pytest.mark.parametrize("fmt", K_QUANTS, ids=lambda f: f.name)
def test_every_scale_is_looked_at(fmt: BlockFormat) -> None:
    data = any_bytes(np.random.default_rng(4), fmt, 6)
    assert all_finite(Weight("w", fmt, (6, 256), data))
    for at in range(SCALES[fmt].start, SCALES[fmt].stop, 2):
        broken = data.copy()
        broken[4, at : at + 2] = np.array([np.inf], np.float16).view(np.uint8)
        assert not all_finite(Weight("w", fmt, (6, 256), broken))


def test_conversion_to_q8_0_goes_through_floats() -> None:
    weight = from_float("w", np.random.default_rng(5).standard_normal((3, 512)).astype(np.float32), Q6_K)
    assert converted(weight, Q8_0).tobytes() == quantize(to_float(weight), Q8_0).tobytes()
