"""Attention of one token over a cache, split over the context: each part by itself, then all parts together.

Source of the split: Flash-Decoding (Dao et al., 2023). A part keeps the largest score, the sum of the weights and
the weighted sum of values; the parts are combined in order.

A cache is floats, or the signed bytes of Q8_0 with the scales of their blocks apart (`layout.cached`): the scales of
the row that begins at an element are those from a thirty-second of its number on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thermocline.ops.cuda.kernels.registry import kernel

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"


@triton.jit
def write_rows(cache, scales, at, ok, value, head_dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write `value` (ROWS, DIM) float32 as the cache's rows from the elements `at` (ROWS) on, where `ok` (ROWS).

    What Q8_0 makes of a block of 32 is what `files.quantize` makes of it, to the bit.
    """
    dim = tl.arange(0, DIM)
    cells = ok[:, None] & (dim < head_dim)[None]
    if scales is None:
        tl.store(cache + at[:, None] + dim[None], value.to(cache.dtype.element_ty), mask=cells)
    else:
        size = tl.reshape(tl.abs(value), (ROWS, DIM // 32, 32))
        scale = tl.div_rn(tl.max(size, axis=2), 127.0)
        finite = scale > 2.938735877055719e-39  # 2^-128, whose reciprocal is beyond float32
        inverse = tl.where(finite, tl.div_rn(1.0, tl.where(finite, scale, 1.0)), 0.0)
        size *= inverse[:, :, None]
        whole = tl.floor(size)
        number = tl.reshape(tl.where(size >= whole + 0.5, whole + 1.0, whole), (ROWS, DIM))
        tl.store(cache + at[:, None] + dim[None], tl.where(value < 0, -number, number).to(tl.int8), mask=cells)
        block = tl.arange(0, DIM // 32)
        there = scales + (at // 32)[:, None] + block[None]
        tl.store(there, scale.to(tl.float16), mask=ok[:, None] & (block * 32 < head_dim)[None])


@triton.jit
def load_rows(cache, scales, at, ok, head_dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The cache's rows (ROWS, DIM) from the elements `at` (ROWS) on as they lie, 0 where not `ok` (ROWS), and their
    scales, if any.
    """
    dim = tl.arange(0, DIM)
    number = tl.load(cache + at[:, None] + dim[None], mask=ok[:, None] & (dim < head_dim)[None], other=0.0)
    scale = number
    if scales is not None:
        block = tl.arange(0, DIM // 32)
        there = scales + (at // 32)[:, None] + block[None]
        scale = tl.load(there, mask=ok[:, None] & (block * 32 < head_dim)[None], other=0.0)
    return number, scale


@triton.jit
def floats(number, scale, scales, ROWS: tl.constexpr, DIM: tl.constexpr):
    """What `load_rows` loaded, as float32."""
    value = number.to(tl.float32)
    if scales is not None:
        parts = tl.reshape(value, (ROWS, DIM // 32, 32)) * scale.to(tl.float32)[:, :, None]
        value = tl.reshape(parts, (ROWS, DIM))
    return value


@kernel()
def store_kv(
    k, v, keys, key_scales, values, value_scales, position, kv_heads, head_dim,
    key_head, key_row, value_head, value_row, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write k and v (T, kv_heads, head_dim) into the caches from `position` on."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)
    dim = tl.arange(0, DIM)
    ok = head < kv_heads
    cells = ok[:, None] & (dim < head_dim)[None]
    at = token * kv_heads * head_dim + head[:, None] * head_dim + dim[None]
    row = tl.load(position).to(tl.int64) + token
    key, value = tl.load(k + at, mask=cells, other=0.0), tl.load(v + at, mask=cells, other=0.0)
    write_rows(keys, key_scales, head * key_head + row * key_row, ok, key, head_dim, HEADS, DIM)
    write_rows(values, value_scales, head * value_head + row * value_row, ok, value, head_dim, HEADS, DIM)


@kernel("parts")
def attend(
    q, k, v, keys, key_scales, values, value_scales, position, scale, window, parts, group, head_dim,
    key_head, key_row, value_head, value_row, partial, peaks, sums,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One part of PART positions for the `group` query heads of a cached head.

    The last part's program first writes the token's own key and value, k and v (kv_heads, head_dim), into the cache.
    q is (n_head, head_dim); partial (n_head, parts, head_dim), peaks and sums (n_head, parts).
    """
    kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.load(position).to(tl.int64)
    if part == last // PART:
        at = tl.arange(0, DIM)[None]
        own = kv_head * head_dim + at
        here, only = last + tl.arange(0, 1), tl.arange(0, 1) == 0
        key, value = tl.load(k + own, mask=at < head_dim, other=0.0), tl.load(v + own, mask=at < head_dim, other=0.0)
        write_rows(keys, key_scales, kv_head * key_head + here * key_row, only, key, head_dim, 1, DIM)
        write_rows(values, value_scales, kv_head * value_head + here * value_row, only, value, head_dim, 1, DIM)
        tl.debug_barrier()  # other threads of this program read what was written
    first = last * 0
    if window > 0:
        first = tl.maximum(last - window + 1, 0)
    begin, end = part * PART, tl.minimum(part * PART + PART, last + 1)
    member, dim = tl.arange(0, GROUP), tl.arange(0, DIM)
    head = kv_head * group + member
    queries = (member < group)[:, None] & (dim < head_dim)[None]
    query = tl.load(q + head[:, None] * head_dim + dim[None], mask=queries, other=0.0) * scale
    peak = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, DIM), tl.float32)
    if end > first:
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            seen = (at >= first) & (at < end)
            row = at.to(tl.int64)
            key_at, value_at = kv_head * key_head + row * key_row, kv_head * value_head + row * value_row
            # All loads come first, so that they are on their way together.
            k_numbers, k_scale = load_rows(keys, key_scales, key_at, seen, head_dim, BLOCK, DIM)
            v_numbers, v_scale = load_rows(values, value_scales, value_at, seen, head_dim, BLOCK, DIM)
            cached = floats(k_numbers, k_scale, key_scales, BLOCK, DIM)
            score = tl.sum(query[:, None, :] * cached[None], axis=2)
            score = tl.where(seen[None], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(score - base[:, None])
            fade = tl.exp(peak - base)
            cached = floats(v_numbers, v_scale, value_scales, BLOCK, DIM)
            acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * cached[None], axis=1)
            total = total * fade + tl.sum(weight, axis=1)
            peak = higher
    if begin <= last:  # nobody reads what comes after
        place = head * parts + part
        tl.store(peaks + place, peak, mask=member < group)
        tl.store(sums + place, total, mask=member < group)
        tl.store(partial + place[:, None] * head_dim + dim[None], acc, mask=queries)


@kernel("parts")
def combine(
    partial, peaks, sums, out, position, parts, head_dim,
    PART: tl.constexpr, MANY: tl.constexpr, STEP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """out (n_head, head_dim) = the parts of each head together, of which there are MANY at most: STEP at a time."""
    head = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    used = tl.load(position).to(tl.int64) // PART + 1
    lane = tl.arange(0, MANY)
    every = tl.load(peaks + head * parts + lane, mask=lane < used, other=float("-inf"))
    peak = tl.max(every, axis=0)
    shares = tl.exp(every - peak) * tl.load(sums + head * parts + lane, mask=lane < used, other=0.0)
    acc = tl.zeros((DIM,), tl.float32)
    for start in range(0, used, STEP):
        some = start + tl.arange(0, STEP)
        at = head * parts + some
        weight = tl.exp(tl.load(peaks + at, mask=some < used, other=float("-inf")) - peak)
        cells = (some < used)[:, None] & (dim < head_dim)[None]
        tile = tl.load(partial + at[:, None] * head_dim + dim[None], mask=cells, other=0.0)
        acc += tl.sum(weight[:, None] * tile, axis=0)
    tl.store(out + head * head_dim + dim, acc / tl.sum(shares, axis=0), mask=dim < head_dim)
