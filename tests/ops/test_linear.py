import ctypes
import mmap

import numpy as np
import pytest

from thermocline.files.formats import BF16, BY_NAME, F16, F32, Q4_0, Q8_0
from thermocline.files.quantize import quantize, to_float
from thermocline.files.weight import Weight

ROWS = (0, 1, 3, 4, 5, 33)
WIDTHS = {1: (0, 1, 15, 16, 17, 33, 100), 32: (0, 32, 64, 96, 160), 256: (0, 256, 512, 768)}
"""Round a vector's lanes of any level; block formats come in whole blocks, odd numbers of them too."""
TOKENS = (1, 2, 3, 6, 7, 8, 9, 12, 14, 19, 25, 33, 97)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
def test_linear_agrees_with_reference(ops, reference, skewed, weight, fence, linear_bound, fewer, fmt):
    for rows in fewer(ROWS, (0, 1, 5)):
        for width in WIDTHS[fmt.block][:: fewer(1, 2)]:
            w = weight(skewed((rows, width)), fmt)
            for tokens in fewer(TOKENS if rows == 5 else (1, 4), (1, 7)):
                x = skewed((tokens, width))
                out, expected = fence((tokens, rows)), np.zeros((tokens, rows), np.float32)
                ops.linear(x, (ops.place(w),), (out.array,))
                reference.linear(x, (w,), (expected,))
                bound = linear_bound(x, to_float(w), fmt)
                assert (np.abs(out.check() - expected) <= bound).all(), (rows, width, tokens)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_linear_shares_x_among_formats_with_biases_and_sums(
    ops, reference, skewed, weight, fence, linear_bound, tokens
):
    formats = (F32, Q8_0, F16, Q4_0, BF16)
    x = skewed((tokens, 96))
    weights = [weight(skewed((rows, 96)), fmt) for rows, fmt in zip((7, 12, 90, 70, 70), formats, strict=True)]
    biases = (skewed((7,)), None, skewed((90,)), skewed((70,)), skewed((70,)))
    for add in (False, True):
        outs = [fence((tokens, w.rows), fill=0.5) for w in weights]
        expected = [np.full((tokens, w.rows), 0.5, np.float32) for w in weights]
        ops.linear(x, tuple(map(ops.place, weights)), tuple(o.array for o in outs), biases, add=add)
        reference.linear(x, tuple(weights), tuple(expected), biases, add=add)
        for w, out, want, bias in zip(weights, outs, expected, biases, strict=True):
            # Bias and old value are two more float32 sums.
            extra = 3 * 2.0**-24 * (np.abs(want) + (np.abs(bias) if bias is not None else 0) + 0.5)
            assert (np.abs(out.check() - want) <= linear_bound(x, to_float(w), w.format) + extra).all()


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
def test_linear_is_the_same_whatever_the_threads_and_the_batch(team, skewed, weight, company, fmt):
    width = 352 if fmt.block < 256 else 512
    w = weight(skewed((230, width)), fmt, offset=0)
    x = skewed((110, width))
    results = []
    for ops in team:
        matrix = ops.place(w)
        few = company(ops, fmt)
        out, part = np.empty((110, 230), np.float32), np.empty((few, 230), np.float32)
        ops.linear(x, (matrix,), (out,))
        for end in (few, 41, 110):
            ops.linear(x[end - few : end], (matrix,), (part,))
            assert part.tobytes() == out[end - few : end].tobytes()
        results.append(out.tobytes())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("fmt", [f for f in BY_NAME.values() if f.block > 1], ids=lambda f: f.name)
def test_integer_products_are_the_same_at_all_vector_levels(vector_levels, skewed, weight, fmt):
    for width in WIDTHS[fmt.block][1:]:
        for rows in ROWS[1:]:
            w = weight(skewed((rows, width)), fmt)
            for tokens in (1, 2, 3, 7, 8, 13, 38):
                x = skewed((tokens, width))
                outs = np.zeros((len(vector_levels), tokens, rows), np.float32)
                for ops, out in zip(vector_levels, outs, strict=True):
                    ops.linear(x, (ops.place(w),), (out,))
                assert (outs.view(np.uint32) == outs[0].view(np.uint32)).all(), (rows, width, tokens)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
def test_nothing_is_read_past_the_last_row(ops, rng, fewer, fmt):
    page = mmap.PAGESIZE
    width = max(96, fmt.block)
    packed = quantize(rng.standard_normal((3, width)).astype(np.float32), fmt)
    room = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    data = np.frombuffer(room, np.uint8, count=packed.size, offset=page - packed.size).reshape(packed.shape)
    data[...] = packed
    w = Weight("w", fmt, (3, width), data)
    for tokens in fewer((1, 2, 9, 13), (1, 9)):
        x, out = rng.standard_normal((tokens, width)).astype(np.float32), np.empty((tokens, 3), np.float32)
        ops.linear(x, (ops.place(w),), (out,))
        assert np.isfinite(out).all()
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), mmap.PROT_READ) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", [F32, BF16, Q8_0, Q4_0], ids=lambda f: f.name)
def test_what_is_not_finite_does_not_vanish(ops, weight, fmt, bad):
    x = np.ones((2, 64), np.float32)
    x[1, 40] = bad
    out = np.zeros((2, 5), np.float32)
    ops.linear(x, (ops.place(weight(np.ones((5, 64), np.float32), fmt)),), (out,))
    assert np.isfinite(out[0]).all()
    assert not np.isfinite(out[1]).any()
    x, out = np.vstack([x] * 7), np.zeros((14, 5), np.float32)
    ops.linear(x, (ops.place(weight(np.ones((5, 64), np.float32), fmt)),), (out,))
    assert np.isfinite(out[::2]).all()
    assert not np.isfinite(out[1::2]).any()


def test_extreme_steps_do_not_saturate(ops):
    data = np.zeros((1, 34), np.uint8)
    data[0, :2] = np.array([1], np.float16).view(np.uint8)
    data[0, 2:] = 0x80  # -128, which ggml's quantiser never writes but a file may hold
    for sign in (1, -1):
        for tokens in (1, 13):
            x, out = np.full((tokens, 32), 127 * sign, np.float32), np.empty((tokens, 1), np.float32)
            ops.linear(x, (ops.place(Weight("w", Q8_0, (1, 32), data)),), (out,))
            assert (out == -128 * 127 * 32 * sign).all()


@pytest.mark.parametrize("fmt", [f for f in BY_NAME.values() if f.block > 1], ids=lambda f: f.name)
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_the_largest_numbers_of_a_block_do_not_saturate(ops, fmt, byte):
    """Every number of every block is the largest, or the smallest, and all have the same sign."""
    rows, columns = 5, 1024
    blocks = np.full((rows, columns // fmt.block, fmt.block_bytes), byte, np.uint8)
    for at in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(fmt.name, (0,)):
        blocks[..., at : at + 2] = np.array([1], np.float16).view(np.uint8)
    if fmt.name == "Q6_K":
        blocks[..., 192:208] = 127  # the scales of the parts, which have signs
    w = Weight("w", fmt, (rows, columns), blocks.reshape(rows, -1))
    numbers = to_float(w).astype(np.float64)
    assert len(np.unique(numbers)) == 1
    for sign in (1, -1):
        for tokens in (1, 3, 13):
            x, out = np.full((tokens, columns), 127 * sign, np.float32), np.empty((tokens, rows), np.float32)
            ops.linear(x, (ops.place(w),), (out,))
            wanted = x @ numbers.T
            # BF16 rounds numbers that have more than eight bits.
            assert (np.abs(out - wanted) <= 2.0**-8 * np.abs(wanted) + 1e-3).all()
