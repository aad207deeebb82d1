"""What loading asks of the kernels: neuron records from the standard layout, and soundness."""

import numpy as np
import pytest

from thermocline.files.formats import BF16, BY_NAME, F16, F32, Q4_0, Q6_K, Q8_0
from thermocline.files.quantize import dequantize, quantize, to_float
from thermocline.files.weight import Weight
from thermocline.ops.contract import KVLayer

SHAPES = {32: [(32, 32), (96, 160), (64, 64), (160, 288)], 256: [(256, 256), (512, 768)]}
SHAPES[1] = SHAPES[32]
RECORDS = (F32, F16, BF16, Q8_0, Q4_0)
"""What records can be made in."""


@pytest.fixture
def ops(host):
    return host


@pytest.mark.parametrize("fmt", RECORDS, ids=lambda f: f.name)
@pytest.mark.parametrize("source", BY_NAME.values(), ids=lambda f: f.name)
def test_records_are_the_bytes_of_the_python_quantisers(ops, rng, weight, source, fmt):
    for n_embd, n_ff in SHAPES[max(source.block, fmt.block)]:
        values = rng.standard_normal((n_embd, n_ff)).astype(np.float32)
        values[3] *= 100
        values[:, 5] = 0
        down = weight(values, source)
        turned = np.ascontiguousarray(to_float(down).T)
        out = np.zeros((n_ff, fmt.row_bytes(n_embd)), np.uint8)
        worst, rms, size = ops.transpose_requantize(ops.place(down), out, fmt)
        assert out.tobytes() == quantize(turned, fmt).tobytes()
        error = np.abs(dequantize(out, fmt, n_embd).astype(np.float64) - turned)
        assert worst == error.max()
        np.testing.assert_allclose(rms, np.sqrt((error**2).mean()), rtol=1e-12)
        np.testing.assert_allclose(size, np.sqrt((turned.astype(np.float64) ** 2).mean()), rtol=1e-12)
        if source is fmt and fmt.block == 1:
            assert worst == rms == 0


def test_odd_shapes_turn_exactly(ops, skewed, weight):
    for n_embd, n_ff in [(1, 1), (17, 33), (65, 1), (0, 5), (5, 0)]:
        values = skewed((n_embd, n_ff))
        out = np.zeros((n_ff, 4 * n_embd), np.uint8)
        assert ops.transpose_requantize(ops.place(weight(values, F32)), out, F32)[:2] == (0, 0)
        assert out.tobytes() == np.ascontiguousarray(values.T).tobytes()


def test_halves_round_as_numpy_rounds(ops, weight):
    """Ties and subnormals: everything near a boundary of float16."""
    edges = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (edges[:-1] + edges[1:]) / 2
    values = np.concatenate([middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9), [65519.996]])
    values = np.concatenate([values, -values]).astype(np.float32)[None]
    out = np.zeros((values.size, 2), np.uint8)
    ops.transpose_requantize(ops.place(weight(values, F32)), out, F16)
    assert out.tobytes() == values.astype(np.float16).tobytes()


def test_what_overflows_a_half_cache_is_infinite(ops):
    cache = KVLayer(np.zeros((1, 4, 3), np.float16), np.zeros((1, 4, 3), np.float32))
    k = np.array([[[65519.996, 65520, -1e6]]], np.float32)
    ops.attention(k * 0, k, k, cache, 1, 1.0, 0, np.empty_like(k))
    assert cache.keys[0, 1].tolist() == [65504, np.inf, -np.inf]
    assert (cache.values[0, 1] == k[0, 0]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("fmt", [F16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_what_does_not_fit_the_format_is_an_infinite_change(ops, weight, fmt, bad):
    values = np.ones((32, 4), np.float32)
    values[9, 2] = bad
    out = np.zeros((4, fmt.row_bytes(32)), np.uint8)
    assert ops.transpose_requantize(ops.place(weight(values, F32)), out, fmt)[0] == np.inf


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
def test_check_finite_finds_the_first_bad_row(ops, rng, weight, fmt):
    rows, width = 400, max(96, fmt.block)
    sound = weight(rng.standard_normal((rows, width)).astype(np.float32), fmt)
    assert ops.check_finite(ops.place(sound)) == -1
    last = {1: (width - 1) * fmt.block_bytes, 32: 2 * fmt.block_bytes, 256: 208 if fmt is Q6_K else 2}[fmt.block]
    patterns = [np.inf, -np.inf, np.nan]
    for row in (399, 250, 0):
        for pattern in patterns:
            stored = np.frombuffer(np.array(pattern, np.float32 if fmt is F32 else np.float16).tobytes(), np.uint8)
            if fmt.name == "BF16":
                stored = np.frombuffer(np.array(pattern, np.float32).tobytes()[2:], np.uint8)
            sound.data[row, last : last + len(stored)] = stored
            assert ops.check_finite(ops.place(sound)) == row


def test_bytes_of_blocks_are_never_taken_for_infinities(ops):
    for fmt in (Q8_0, Q4_0):
        values = np.full((3, 64), 1, np.float32)
        data = quantize(values, fmt)
        data.reshape(-1, fmt.block_bytes)[:, 2:] = 0x7C
        assert ops.check_finite(ops.place(Weight("w", fmt, (3, 64), data))) == -1


def test_check_finite_of_nothing(ops, weight):
    assert ops.check_finite(ops.place(weight(np.empty((0, 32), np.float32), F32))) == -1


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_an_array_begins_where_a_cache_line_does(ops, dtype):
    for shape in [(3, 5), (1, 1), (700, 1000)]:
        array = ops.array(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert not array.any()
