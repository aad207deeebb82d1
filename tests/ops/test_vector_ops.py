import numpy as np
import pytest

from thermocline.files.formats import BY_NAME

EPS = 2.0**-24
WIDTHS = (1, 7, 8, 9, 15, 16, 17, 33, 128, 1000)


@pytest.mark.parametrize("fmt", BY_NAME.values(), ids=lambda f: f.name)
def test_embed_is_exact(ops, reference, skewed, weight, fence, fmt):
    for width in (fmt.block, 3 * fmt.block) if fmt.block > 1 else (1, 15, 16, 17, 40):
        table = weight(skewed((50, width)), fmt)
        for tokens in ([], [49], [0, 7, 7, 3], [*range(50), *range(50)]):
            ids = np.array(tokens, np.int32)
            out, expected = fence((len(ids), width)), np.empty((len(ids), width), np.float32)
            ops.embed(ops.place(table), ids, out.array)
            reference.embed(table, ids, expected)
            assert out.check().tobytes() == expected.tobytes()


@pytest.mark.parametrize("lead", [(0,), (1,), (70,), (3, 5), ()], ids=str)
def test_rms_norm_agrees_with_reference(ops, reference, skewed, fence, lead):
    for width in WIDTHS:
        x, weight = skewed((*lead, width)), skewed((width,))
        out, expected = fence((*lead, width)), np.empty((*lead, width), np.float32)
        ops.rms_norm(x, weight, 1e-5, out.array)
        reference.rms_norm(x, weight, 1e-5, expected)
        # The scale is computed in float64; its product with x, that with the weight and the reference round once each.
        assert (np.abs(out.check() - expected) <= 4 * EPS * np.abs(expected) + 2.0**-126).all()
        ops.rms_norm(x, weight, 1e-5, x)
        assert x.tobytes() == out.array.tobytes()


def test_rms_norm_of_huge_values_does_not_overflow(ops):
    x, out = np.full((1, 64), 1e30, np.float32), np.empty((1, 64), np.float32)
    ops.rms_norm(x, np.ones(64, np.float32), 1e-5, out)
    np.testing.assert_allclose(out, 1, rtol=4 * EPS)


@pytest.mark.parametrize("lead", [(0,), (1,), (70,), (3, 5), ()], ids=str)
def test_layer_norm_agrees_with_reference(ops, reference, skewed, fence, lead):
    for width in WIDTHS:
        x, weight, bias = skewed((*lead, width)), skewed((width,)), skewed((width,))
        out, expected = fence((*lead, width)), np.empty((*lead, width), np.float32)
        ops.layer_norm(x, weight, bias, 1e-5, out.array)
        reference.layer_norm(x, weight, bias, 1e-5, expected)
        # Mean and scale are computed in float64; the centred value, its product with the weight and the sum round once
        # each. Normed values are at most the root of the width.
        reach = np.sqrt(width) * np.abs(weight) + np.abs(bias)
        assert (np.abs(out.check() - expected) <= 4 * EPS * reach + 2.0**-126).all()
        ops.layer_norm(x, weight, bias, 1e-5, x)
        assert x.tobytes() == out.array.tobytes()


def test_layer_norm_keeps_its_digits_far_from_zero(ops):
    """Values of one unit around 2^20: a variance from the mean of squares in float32 would be lost."""
    x, out = np.float32(1 << 20) + np.tile(np.float32([-1, 1]), (1, 32)), np.empty((1, 64), np.float32)
    ops.layer_norm(x, np.ones(64, np.float32), np.zeros(64, np.float32), 1e-12, out)
    np.testing.assert_allclose(out, np.tile([-1, 1], (1, 32)), rtol=4 * EPS)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_add_is_that_of_float32(ops, reference, skewed, rows):
    x = skewed((rows, 17))
    for y in (skewed((17,)), skewed((rows, 17))):
        ours, expected = x.copy(), x.copy()
        ops.add(ours, y)
        reference.add(expected, y)
        assert ours.tobytes() == expected.tobytes() == (x + y).tobytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim", "half"), [(1, 2, 1), (3, 8, 4), (2, 9, 3), (5, 34, 17), (2, 80, 40), (4, 6, 0)]
)
def test_rope_agrees_with_reference(ops, reference, rng, fence, heads, dim, half, interleaved):
    angle = rng.uniform(0, 7, (20, half))
    table = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    for tokens in (0, 1, 3, 40):
        x, y = (rng.standard_normal((tokens, n, dim)).astype(np.float32) for n in (heads, heads + 4))
        positions = rng.integers(0, 20, tokens).astype(np.int32)
        outs = [fence(x.shape), fence(y.shape)]
        for many in (1, 2):
            given, expected = (x, y)[:many], tuple(array.copy() for array in (x, y)[:many])
            for out, array in zip(outs, given, strict=False):
                out.array[...] = array
            ops.rope(tuple(out.array for out in outs[:many]), table, positions, interleaved=interleaved)
            reference.rope(expected, table, positions, interleaved=interleaved)
            # Two products and a sum, each rounded; |cos| + |sin| is at most the root of 2, elements at most |x|.
            for out, array, wanted in zip(outs, given, expected, strict=False):
                assert (np.abs(out.check() - wanted) <= 4 * EPS * np.abs(array).max(initial=0)).all()
                assert out.array[..., 2 * half :].tobytes() == array[..., 2 * half :].tobytes()
