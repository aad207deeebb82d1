"""The quantisers against the `gguf` package, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from thermocline.errors import NumericalError, UnsupportedModelError
from thermocline.files.formats import BF16, BY_NAME, F16, F32, GGML_TYPES, Q4_0, Q8_0, BlockFormat, require_readable
from thermocline.files.quantize import dequantize, from_float, quantize, to_float

PACKED = [F16, BF16, Q8_0, Q4_0]


def oracle(x: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    return quants.quantize(x, GGMLQuantizationType[fmt.name]).view(np.uint8).reshape(len(x), -1)


def oracle_back(data: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    raw = data.view(np.float16) if fmt is F16 else data
    with np.errstate(invalid="ignore"):
        return quants.dequantize(raw, GGMLQuantizationType[fmt.name])


def ties(step_in: float, extreme: float) -> np.ndarray:
    """Rows whose values lie exactly between two steps of a scale of 1, fixed by `extreme`."""
    rng = np.random.default_rng(1)
    x = (rng.integers(-2 * abs(extreme), 2 * abs(extreme) + 1, (512, 64)) * step_in).astype(np.float32)
    x[:, ::32] = extreme
    return x


RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((16, 256)).astype(np.float32)
INPUTS = {
    "normal": NORMAL,
    "small": NORMAL * np.float32(1e-3),
    "tiny-scale": NORMAL * np.float32(1e-30),
    "large": NORMAL * np.float32(1e4),
    "zeros": np.zeros((3, 64), np.float32),
    "negative-zeros": -np.zeros((3, 64), np.float32),
    "mixed-zeros": np.where(RNG.random((4, 64)) < 0.5, np.float32(0), -np.float32(0)),
    "one-value": np.eye(32, dtype=np.float32) * -3,
    "equal-extremes": np.tile(np.array([5, -5], np.float32), (2, 32)),
    "ties-q8": ties(0.5, 127),
    "ties-q4": ties(0.5, -8),
    "odd-ties-q4": (RNG.integers(-254, 255, (2048, 32)) / 2).astype(np.float32),
    "f16-largest": np.full((1, 32), 65504, np.float32),
    "f16-ties": (1 + (np.arange(64, dtype=np.float32) * 2 + 1) / 2048).reshape(1, 64),
    "f16-subnormal": (np.arange(64, dtype=np.float32) * np.float32(2**-25)).reshape(1, 64),
    "bf16-ties": np.arange(0x3F800000, 0x3F800000 + 64 * 0x4000, 0x4000, dtype=np.uint32)
    .view(np.float32)
    .reshape(1, 64),
    "integers": np.linspace(-127, 127, 256, dtype=np.float32).reshape(1, 256),
    "more-than-a-chunk": np.resize(NORMAL, (80, 4096)),
}


@pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)
@pytest.mark.parametrize("name", INPUTS)
def test_bytes_are_those_of_the_gguf_package(name: str, fmt: BlockFormat) -> None:
    x = INPUTS[name]
    if fmt is F16 and np.abs(x).max() > 65504:
        pytest.skip("beyond F16")
    packed = quantize(x, fmt)
    np.testing.assert_array_equal(packed, oracle(x, fmt))
    ours, theirs = dequantize(packed, fmt, x.shape[1]), oracle_back(packed, fmt)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)
@settings(max_examples=60, deadline=None)
@given(x=arrays(np.float32, (2, 64), elements=st.floats(-60000, 60000, width=32, allow_subnormal=False)))
def test_any_floats(fmt: BlockFormat, x: np.ndarray) -> None:
    scales = np.abs(x.reshape(-1, 32)).max(axis=1)
    if np.any((scales > 0) & (scales < 1e-34)):
        return  # the reciprocal of the scale overflows: see the next test
    np.testing.assert_array_equal(quantize(x, fmt), oracle(x, fmt))


@pytest.mark.parametrize("fmt", [Q8_0, Q4_0], ids=lambda f: f.name)
def test_scales_without_reciprocal_become_zeros(fmt: BlockFormat) -> None:
    x = np.full((1, 32), 1e-45, np.float32)
    assert not dequantize(quantize(x, fmt), fmt, 32).any()


@pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)
def test_any_bytes_dequantise_as_in_the_gguf_package(fmt: BlockFormat) -> None:
    data = np.random.default_rng(3).integers(0, 256, (64, fmt.row_bytes(64)), dtype=np.uint8)
    ours, theirs = dequantize(data, fmt, 64), oracle_back(data, fmt)
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here, whatever its payload


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("fmt", [Q8_0, Q4_0], ids=lambda f: f.name)
def test_blocks_refuse_what_they_cannot_hold(fmt: BlockFormat, bad: float) -> None:
    x = NORMAL[:2].copy()
    x[1, 77] = bad
    with pytest.raises(NumericalError, match=f"found {np.float32(bad):g}".replace("+", r"\+")):
        quantize(x, fmt)


def test_f16_refuses_overflow_but_keeps_infinities() -> None:
    with pytest.raises(NumericalError, match="70000"):
        quantize(np.array([[1, -70000]], np.float32), F16)
    kept = dequantize(quantize(np.array([[np.inf, -np.inf, np.nan]], np.float32), F16), F16, 3)
    np.testing.assert_array_equal(kept, np.array([[np.inf, -np.inf, np.nan]], np.float32))


def test_bf16_keeps_nan_and_infinity() -> None:
    bits = np.array([[0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000]], np.uint32)
    np.testing.assert_array_equal(quantize(bits.view(np.float32), BF16), oracle(bits.view(np.float32), BF16))


def test_f32_is_the_bytes_themselves() -> None:
    weight = from_float("w", NORMAL, F32)
    np.testing.assert_array_equal(weight.data, NORMAL.view(np.uint8))
    np.testing.assert_array_equal(to_float(weight), NORMAL)


@pytest.mark.parametrize("fmt", [Q8_0, Q4_0], ids=lambda f: f.name)
def test_rows_must_be_whole_blocks(fmt: BlockFormat) -> None:
    with pytest.raises(UnsupportedModelError, match=r"48 elements.*multiple of 32"):
        quantize(np.zeros((2, 48), np.float32), fmt)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_slices_and_few_rows(fmt: BlockFormat, rows: int) -> None:
    weight = from_float("w", NORMAL[: rows + 2], fmt)
    part = weight.slice(1, 1 + rows)
    assert part.data.base is not None
    assert part.nbytes == part.data.size
    np.testing.assert_array_equal(to_float(part), to_float(weight)[1 : 1 + rows])


def test_all_types_have_the_sizes_of_the_gguf_package() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    ours = {number: (f.name, f.block, f.block_bytes) for number, f in GGML_TYPES.items() if number in theirs}
    assert ours == {number: theirs[number] for number in ours}
    assert len(ours) >= 30


def test_formats_that_can_only_be_listed_are_refused_by_name() -> None:
    require_readable(Q8_0, "x")
    with pytest.raises(
        UnsupportedModelError, match="tensor x is stored as Q2_K; readable are F32, F16, Q4_0, Q8_0, BF16, Q4_K"
    ):
        require_readable(GGML_TYPES[10], "x")
