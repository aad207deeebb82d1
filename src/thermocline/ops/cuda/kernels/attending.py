"""Attention of one token over a cache, split over the context: each part by itself, then all parts together.

Source of the split: Flash-Decoding (Dao et al., 2023). A part keeps the largest score, the sum of the weights and
the weighted sum of values; the parts are combined in order.
"""

from __future__ import annotations

import triton.language as tl

from thermocline.ops.cuda.kernels.registry import kernel

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"


@kernel
def store_kv(
    k, v, keys, values, position, tokens, kv_heads, head_dim,
    key_head, key_row, value_head, value_row, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write k and v (T, kv_heads, head_dim) into the caches from `position` on."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)
    dim = tl.arange(0, DIM)[None]
    ok = (head < kv_heads) & (dim < head_dim)
    at = token * kv_heads * head_dim + head * head_dim + dim
    row = tl.load(position).to(tl.int64) + token
    key, value = tl.load(k + at, mask=ok, other=0.0), tl.load(v + at, mask=ok, other=0.0)
    tl.store(keys + head * key_head + row * key_row + dim, key.to(keys.dtype.element_ty), mask=ok)
    tl.store(values + head * value_head + row * value_row + dim, value.to(values.dtype.element_ty), mask=ok)


@kernel
def attend(
    q, k, v, keys, values, position, scale, window, parts, group, head_dim,
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
        at = tl.arange(0, DIM)
        own = kv_head * head_dim + at
        key, value = tl.load(k + own, mask=at < head_dim, other=0.0), tl.load(v + own, mask=at < head_dim, other=0.0)
        there = keys + kv_head * key_head + last * key_row + at
        tl.store(there, key.to(keys.dtype.element_ty), mask=at < head_dim)
        there = values + kv_head * value_head + last * value_row + at
        tl.store(there, value.to(values.dtype.element_ty), mask=at < head_dim)
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
            cells = seen[:, None] & (dim < head_dim)[None]
            row = at.to(tl.int64)[:, None]
            cached = tl.load(keys + kv_head * key_head + row * key_row + dim[None], mask=cells, other=0.0)
            score = tl.sum(query[:, None, :] * cached.to(tl.float32)[None], axis=2)
            score = tl.where(seen[None], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp(score - base[:, None])
            fade = tl.exp(peak - base)
            cached = tl.load(values + kv_head * value_head + row * value_row + dim[None], mask=cells, other=0.0)
            acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * cached.to(tl.float32)[None], axis=1)
            total = total * fade + tl.sum(weight, axis=1)
            peak = higher
    if begin <= last:  # nobody reads what comes after
        place = head * parts + part
        tl.store(peaks + place, peak, mask=member < group)
        tl.store(sums + place, total, mask=member < group)
        tl.store(partial + place[:, None] * head_dim + dim[None], acc, mask=queries)


@kernel
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
