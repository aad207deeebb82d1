"""Norms, rotations, and scores turned into a list."""

from __future__ import annotations

import triton
import triton.language as tl

from thermocline.ops.cuda.kernels.registry import kernel

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"


@kernel()
def rms_norm(x, weight, out, columns, eps, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Each row of x (rows, columns) over its root mean square, times weight.

    Squares are summed in float64, and the rest is float32, as many cards compute float64 slowly. WHOLE rows are read
    once.
    """
    row = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        inside = lane < columns
        value = tl.load(x + row + lane, mask=inside, other=0.0)
        by = tl.load(weight + lane, mask=inside, other=0.0)
        wide = value.to(tl.float64)
        scale = (1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / columns + eps)).to(tl.float32)
        tl.store(out + row + lane, value * scale * by, mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, columns, BLOCK):
            col = start + lane
            wide = tl.load(x + row + col, mask=col < columns, other=0.0).to(tl.float64)
            squares += wide * wide
        scale = (1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)).to(tl.float32)
        for start in range(0, columns, BLOCK):
            col = start + lane
            inside = col < columns
            value = tl.load(x + row + col, mask=inside, other=0.0)
            by = tl.load(weight + col, mask=inside, other=0.0)
            tl.store(out + row + col, value * scale * by, mask=inside)


@kernel()
def layer_norm(x, weight, bias, out, columns, eps, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Each row of x (rows, columns), centred, over its deviation, times weight plus bias; sums are in float64."""
    row = tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        inside = lane < columns
        wide = tl.load(x + row + lane, mask=inside, other=0.0).to(tl.float64)
        by = tl.load(weight + lane, mask=inside, other=0.0)
        plus = tl.load(bias + lane, mask=inside, other=0.0)
        off = tl.where(inside, wide - tl.sum(wide, axis=0) / columns, 0.0)
        scale = (1.0 / tl.sqrt(tl.sum(off * off, axis=0) / columns + eps)).to(tl.float32)
        tl.store(out + row + lane, off.to(tl.float32) * scale * by + plus, mask=inside)
    else:
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, columns, BLOCK):
            col = start + lane
            sums += tl.load(x + row + col, mask=col < columns, other=0.0).to(tl.float64)
        mean = tl.sum(sums, axis=0) / columns
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, columns, BLOCK):
            col = start + lane
            off = tl.load(x + row + col, mask=col < columns, other=0.0).to(tl.float64) - mean
            squares += tl.where(col < columns, off * off, 0.0)
        scale = (1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)).to(tl.float32)
        for start in range(0, columns, BLOCK):
            col = start + lane
            inside = col < columns
            off = tl.load(x + row + col, mask=inside, other=0.0).to(tl.float64) - mean
            by = tl.load(weight + col, mask=inside, other=0.0)
            plus = tl.load(bias + col, mask=inside, other=0.0)
            tl.store(out + row + col, off.to(tl.float32) * scale * by + plus, mask=inside)


@triton.jit
def _rotate(
    x, program, table, positions, heads, head_dim, half,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = program * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    there = pair < half
    angles = table + tl.load(positions + token).to(tl.int64) * (2 * half) + pair
    cos = tl.load(angles, mask=there, other=0.0)[None]
    sin = tl.load(angles + half, mask=there, other=0.0)[None]
    start = x + token * heads * head_dim + head[:, None] * head_dim
    if INTERLEAVED:
        first = start + 2 * pair[None]
        second = first + 1
    else:
        first = start + pair[None]
        second = first + half
    ok = (head < heads)[:, None] & there[None]
    a, b = tl.load(first, mask=ok, other=0.0), tl.load(second, mask=ok, other=0.0)
    tl.store(first, a * cos - b * sin, mask=ok)
    tl.store(second, a * sin + b * cos, mask=ok)


@kernel()
def rope(
    x, more, table, positions, heads, more_heads, head_dim, half,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate x (T, heads, head_dim) in place by the table's cosines and sines (n_ctx, 2, half); and `more`, if any."""
    program, last = tl.program_id(1), tl.cdiv(heads, HEADS)
    if program < last:
        _rotate(x, program, table, positions, heads, head_dim, half, INTERLEAVED, HEADS, HALF)
    elif more is not None:
        _rotate(more, program - last, table, positions, more_heads, head_dim, half, INTERLEAVED, HEADS, HALF)


@triton.jit
def _reached(scores, threshold, tokens, n, ids, SINGLE: tl.constexpr, BLOCK: tl.constexpr):
    """1 where a score reaches the threshold for any token, else 0."""
    found = tl.zeros((BLOCK,), tl.int32)
    row = scores
    for _ in range(1 if SINGLE else tokens):
        score = tl.load(row + ids, mask=ids < n, other=float("nan"))
        found |= (score >= threshold).to(tl.int32)
        row += n
    return found


@kernel("tokens")
def select(scores, threshold, tokens, n, out, count, SINGLE: tl.constexpr, BLOCK: tl.constexpr):
    """The ids below n whose score reaches the threshold for any token, ascending, and how many they are.

    A program lists BLOCK neighbours, after counting all before them: n is small against what a second launch costs.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for earlier in range(program):
        found += _reached(scores, threshold, tokens, n, earlier * BLOCK + lane, SINGLE, BLOCK)
    before = tl.sum(found, axis=0)
    ids = program * BLOCK + lane
    wanted = _reached(scores, threshold, tokens, n, ids, SINGLE, BLOCK)
    tl.store(out + before + tl.cumsum(wanted, axis=0) - wanted, ids, mask=wanted > 0)
    if program == tl.num_programs(0) - 1:
        tl.store(count, before + tl.sum(wanted, axis=0))
