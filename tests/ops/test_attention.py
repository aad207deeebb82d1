import numpy as np
import pytest

from thermocline.files.formats import Q8_0
from thermocline.files.quantize import dequantize, quantize
from thermocline.ops.contract import KVLayer

EPS = 2.0**-24
BATCH = 8
"""Tokens from which a level with AMX splits numbers."""


def make_cache(rng, heads, room, dim, key_type, value_type):
    return KVLayer(
        rng.standard_normal((heads, room, dim)).astype(key_type),
        rng.standard_normal((heads, room, dim)).astype(value_type),
    )


def copy(cache):
    return KVLayer(cache.keys.copy(), cache.values.copy())


def make_tokens(rng, tokens, heads, kv_heads, dim):
    return (
        rng.standard_normal((tokens, heads, dim)).astype(np.float32),
        rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32),
        rng.standard_normal((tokens, kv_heads, dim)).astype(np.float32),
    )


def splits(ops, tokens, cache):
    """Whether such a batch meets keys and values as numbers split in two of BF16."""
    in_floats = np.float32 in (cache.keys.dtype, cache.values.dtype)
    return ops.name == "cpu/amx" and tokens >= BATCH and not in_floats and cache.keys.shape[-1] <= 1024


def bound(ops, q, cache, stop, scale):
    """How far an output may be off.

    A score is off by (dim + 4) eps of the magnitudes it sums, which changes its weight by that factor; weights and the
    sum over n values add (n + 16) eps; an output is a mean of values. Where numbers are split, three products stand for
    one, both factors may lack what is left after two parts, 2^-16 at most, and the product of the second parts is left
    out.
    """
    products, off = (3, 3.03 * 2.0**-16) if splits(ops, len(q), cache) else (1, 0)
    keys, values = np.abs(cache.keys[:, :stop].astype(np.float64)), np.abs(cache.values[:, :stop].astype(np.float64))
    score = scale * np.abs(q.astype(np.float64)).max() * keys.sum(axis=-1).max(initial=0)
    score *= (products * q.shape[-1] + 4) * EPS + off
    return (4 * score + (products * stop + 16) * EPS + off) * values.max(initial=0)


@pytest.mark.parametrize("types", [("f2", "f2"), ("f4", "f4"), ("f2", "f4"), ("f4", "f2")], ids="/".join)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 1), (2, 2, 16), (6, 2, 33), (9, 1, 15), (4, 4, 64)])
def test_attention_agrees_with_reference(ops, reference, rng, fence, types, heads, kv_heads, dim):
    room = 600
    for start, tokens, window in [
        (0, 1, 0),
        (0, 5, 0),
        (255, 2, 0),
        (511, 2, 0),
        (512, 1, 0),
        (300, 9, 40),
        (590, 1, 300),
        (3, 0, 0),
    ]:
        q, k, v = make_tokens(rng, tokens, heads, kv_heads, dim)
        cache = make_cache(rng, kv_heads, room, dim, *types)
        expected_cache = copy(cache)
        out, expected = fence(q.shape), np.empty_like(q)
        ops.attention(q, k, v, cache, start, 0.3, window, out.array)
        reference.attention(q, k, v, expected_cache, start, 0.3, window, expected)
        assert cache.keys.tobytes() == expected_cache.keys.tobytes()
        assert cache.values.tobytes() == expected_cache.values.tobytes()
        if tokens:
            limit = bound(ops, q, cache, start + tokens, 0.3)
            assert np.abs(out.check() - expected).max() <= limit, (start, tokens, window)


def test_a_long_prompt_with_many_heads(ops, reference, rng):
    q, k, v = make_tokens(rng, 70, 12, 3, 32)
    for start, window in [(0, 0), (200, 0), (200, 25), (200, 300)]:
        cache = make_cache(rng, 3, 300, 32, np.float16, np.float16)
        expected_cache, out, expected = copy(cache), np.empty_like(q), np.empty_like(q)
        ops.attention(q, k, v, cache, start, 0.2, window, out)
        reference.attention(q, k, v, expected_cache, start, 0.2, window, expected)
        assert np.abs(out - expected).max() <= bound(ops, q, cache, start + 70, 0.2)


@pytest.mark.parametrize("types", [("f2", "f2"), ("f4", "f2"), ("f2", "f4")], ids="/".join)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 3, 300), (71, 1, 16), (10, 2, 72), (1, 1, 1100)])
def test_prompts_over_several_chunks_of_keys(host, reference, rng, fence, types, heads, kv_heads, dim):
    """What lies in the cache before the window and behind the last token, not a number here, is left alone."""
    for start, tokens, window in [(0, 33, 0), (1000, 97, 0), (1000, 40, 530), (700, 64, 20)]:
        q, k, v = make_tokens(rng, tokens, heads, kv_heads, dim)
        cache = make_cache(rng, kv_heads, start + tokens + 40, dim, *types)
        expected_cache, out, expected = copy(cache), fence(q.shape), np.empty_like(q)
        for array in (cache.keys, cache.values):
            array[:, start + tokens :] = np.nan
            array[:, : max(0, start - window + 1) if window else 0] = np.nan
        host.attention(q, k, v, cache, start, 0.2, window, out.array)
        reference.attention(q, k, v, expected_cache, start, 0.2, window, expected)
        limit = bound(host, q, expected_cache, start + tokens, 0.2)
        assert np.abs(out.check() - expected).max() <= limit, (start, tokens, window)


def test_scores_of_any_size_give_weights(ops, reference, rng):
    """One key outweighs all others beyond what exp can hold, on either side."""
    q, k, v = make_tokens(rng, 1, 2, 1, 16)
    cache = make_cache(rng, 1, 800, 16, np.float32, np.float32)
    cache.keys[0, 100] = q[0, 0] * 50
    cache.keys[0, 600] = q[0, 1] * 50
    expected_cache, out, expected = copy(cache), np.empty_like(q), np.empty_like(q)
    ops.attention(q, k, v, cache, 799, 1.0, 0, out)
    reference.attention(q, k, v, expected_cache, 799, 1.0, 0, expected)
    assert np.isfinite(out).all()
    assert np.abs(out - expected).max() <= bound(ops, q, cache, 800, 1.0)


def cut(ops, q, k, v, cache, window, pieces):
    """The outputs of the tokens, the first at position 600, in batches of these sizes."""
    out, t = np.empty_like(q), 0
    for size in pieces:
        now = slice(t, t + size)
        ops.attention(q[now], k[now], v[now], cache, 600 + t, 0.25, window, out[now])
        t += size
    return out


def hold_together(team, q, k, v, cache, window):
    """Neither threads nor batches make a difference; but levels that split the numbers of 8 tokens and more do so."""
    few, many = [[1] * 40, [3, 7, 7, 4, 5, 2, 7, 5]], [[40], [8, 32], [17, 9, 14]]
    results = [
        [[cut(ops, q, k, v, copy(cache), window, pieces).tobytes() for pieces in way] for way in (few, many)]
        for ops in team
    ]
    for one_by_one, at_once in results:
        assert len(set(one_by_one)) == len(set(at_once)) == 1
        assert splits(team[0], 40, cache) or one_by_one[0] == at_once[0]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("window", [0, 50, 290])
def test_attention_is_the_same_whatever_the_threads_and_the_batch(team, rng, window):
    q, k, v = make_tokens(rng, 40, 6, 2, 40)
    hold_together(team, q, k, v, make_cache(rng, 2, 700, 40, np.float16, np.float16), window)


def test_a_cache_may_be_part_of_a_larger_one(ops, reference, rng):
    whole = make_cache(rng, 5, 40, 8, np.float16, np.float32)
    part = KVLayer(whole.keys[1:4, 8:], whole.values[1:4, 8:])
    q, k, v = make_tokens(rng, 2, 3, 3, 8)
    expected_cache, before = copy(part), copy(whole)
    out, expected = np.empty_like(q), np.empty_like(q)
    ops.attention(q, k, v, part, 10, 0.4, 0, out)
    reference.attention(q, k, v, expected_cache, 10, 0.4, 0, expected)
    assert np.abs(out - expected).max() <= bound(ops, q, part, 12, 0.4)
    assert (part.keys == expected_cache.keys).all()
    assert (part.values == expected_cache.values).all()
    assert (whole.keys[:, :8] == before.keys[:, :8]).all()
    assert (whole.values[4] == before.values[4]).all()


def in_bytes(cache):
    """The cache in Q8_0."""

    def packed(x):
        return quantize(x.reshape(-1, x.shape[-1]).astype(np.float32), Q8_0).reshape(*x.shape[:2], -1)

    return KVLayer(packed(cache.keys), packed(cache.values))


def in_floats(cache, dim):
    return KVLayer(
        *(dequantize(x.reshape(-1, x.shape[-1]), Q8_0, dim).reshape(*x.shape[:2], dim) if x.dtype == np.uint8 else x
          for x in (cache.keys, cache.values))
    )  # fmt: skip


def rounded(q):
    """Queries as they meet keys in Q8_0: 8 bits and a scale for each block of 32."""
    blocks = q.reshape(-1, 32)
    peak = np.abs(blocks).max(axis=1, keepdims=True)
    return (np.rint(blocks * (np.float32(127) / peak)) * (peak / np.float32(127))).reshape(q.shape)


@pytest.mark.parametrize("parts", ["keys", "values", "both"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 32), (6, 2, 96), (9, 1, 160), (4, 4, 128)])
def test_a_cache_in_q8_0_agrees_with_reference(ops, reference, rng, fence, fewer, parts, heads, kv_heads, dim):
    """Rounded keys and values are the same to the bit; but for the queries' rounding, which a GPU and numbers that are
    split leave out, the error is that of floats."""
    cases = [(0, 1, 0), (0, 5, 0), (511, 2, 0), (300, 9, 40), (590, 1, 300), (200, 70, 0)]
    for start, tokens, window in fewer(cases, [(0, 1, 0), (300, 9, 40), (590, 1, 300), (100, 40, 0)]):
        q, k, v = make_tokens(rng, tokens, heads, kv_heads, dim)
        floats = make_cache(rng, kv_heads, 600, dim, np.float16, np.float16)
        packed = in_bytes(floats)
        cache = KVLayer(
            floats.keys if parts == "values" else packed.keys, floats.values if parts == "keys" else packed.values
        )
        expected_cache, out, expected = copy(cache), fence(q.shape), np.empty_like(q)
        ops.attention(q, k, v, cache, start, 0.2, window, out.array)
        whole = parts == "values" or splits(ops, tokens, cache) or not ops.name.startswith("cpu/")
        seen = q if whole else rounded(q)
        reference.attention(seen, k, v, expected_cache, start, 0.2, window, expected)
        assert cache.keys.tobytes() == expected_cache.keys.tobytes()
        assert cache.values.tobytes() == expected_cache.values.tobytes()
        limit = bound(ops, q, in_floats(cache, dim), start + tokens, 0.2)
        assert np.abs(out.check() - expected).max() <= limit, (start, tokens, window)


@pytest.mark.parametrize("window", [0, 290])
def test_a_cache_in_q8_0_gives_the_same_whatever_the_threads_and_the_batch(team, rng, window):
    q, k, v = make_tokens(rng, 40, 6, 2, 64)
    hold_together(team, q, k, v, in_bytes(make_cache(rng, 2, 700, 64, np.float32, np.float32)), window)


@pytest.mark.parametrize("tokens", [1, 2])
def test_keys_and_values_in_q8_0_are_rounded_as_in_a_file(ops, rng, skewed, tokens):
    """Zeros, halves, and blocks whose scale has no reciprocal or is none in float16."""
    k, v = skewed((tokens, 2, 96)), skewed((tokens, 2, 96))
    k[0, 0, :32], k[0, 1, 32:64] = 0, 1e-38
    v[0, 0, :32] = np.arange(32) + 0.5
    v[0, 0, 0], v[0, 1, 32:64] = -127, -1e-44
    q = rng.standard_normal((tokens, 2, 96)).astype(np.float32)
    cache = KVLayer(*(np.zeros((2, 4, 102), np.uint8) for _ in range(2)))
    ops.attention(q, k, v, cache, 1, 1e-3, 0, np.empty_like(q))
    for array, wanted in ((cache.keys, k), (cache.values, v)):
        rows = quantize(wanted.reshape(-1, 96), Q8_0).reshape(tokens, 2, 102)
        assert array[:, 1 : 1 + tokens].tobytes() == rows.swapaxes(0, 1).tobytes()
        assert not array[:, 0].any()
        assert not array[:, 1 + tokens :].any()
