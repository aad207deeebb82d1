"""The FFN of one token, neuron by neuron: gate and up, the firing ones listed, their down rows summed.

Activations lie by position in the active list. Positions belong to fixed interleaved groups with a partial sum
each; within a group rows are added one after another, ascending, and the groups are added in order. So the sum
depends neither on scheduling nor on whether zeros were skipped, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thermocline.ops.cuda.kernels.registry import kernel
from thermocline.ops.cuda.kernels.rows import decode, dot_rows, pairs, strides

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"


@triton.jit
def _gelu(x):
    """x Φ(x), in float32, as many cards compute float64 slowly; off by 16 roundings of the value at most.

    With z = |x| / sqrt(2) and t = 1 / (1 + z / 2) the complementary error function is t exp(p(t) - z²); p is our own
    fit, good to 7e-8 of the value up to z = 14. Of z² the rounding would be amplified: what 12 bits of x make of it is
    exact, n ln 2 is taken off that in two parts, and powers of 2 are exact again.
    """
    size = tl.minimum(tl.abs(x), 14.0)
    t = 1.0 / (1.0 + size * 0.3535533905932738)
    p = t * 0.167378166 - 0.8013133937
    p = p * t + 1.435525502
    p = p * t - 1.060082571
    p = p * t + 0.2137760513
    p = p * t - 0.1507727775
    p = p * t + 0.08468294926
    p = p * t + 0.3765498644
    p = p * t + 0.9997568581
    p = p * t - 1.265500581
    short = (size.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    square = 0.5 * short * short
    n = tl.floor(square * 1.4426950408889634 + 0.5)
    rest = square - n * 0.693359375 + n * 2.12194440e-4 + 0.5 * (size - short) * (size + short)
    tail = 0.5 * t * tl.exp(p - rest) * tl.exp2(-n)
    part = tl.where(x < 0, tail, 1.0 - tail)
    return tl.where(x > 14, x, tl.where(x < -14, 0.0, x * part))


@triton.jit
def _activate(value, threshold, ACTIVATION: tl.constexpr):
    """ACTIVATION 0 is SiLU, 1 ReLU, 2 ReLU², 3 GELU; the two in the middle give 0 up to the threshold."""
    if ACTIVATION == 0:
        result = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == 3:
        result = _gelu(value)
    else:
        result = tl.where(value > threshold, value, 0.0)
        if ACTIVATION == 2:
            result = result * result
    return result


@kernel("neurons")
def gate_up(
    x, gate, gate_length, gate_scales, up, up_length, up_scales, up_bias,
    places, ids, count, neurons, columns, threshold, h, work,
    GATED: tl.constexpr, BOTH: tl.constexpr, ACTIVATION: tl.constexpr, SKIP: tl.constexpr,
    GATE_KIND: tl.constexpr, UP_KIND: tl.constexpr, GATE_ALIGN: tl.constexpr, UP_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h by position = the neurons' activations. With SKIP, up rows are read only where the gate opened.

    `work` counts gate rows and up rows in its first two places.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    limit = neurons
    if count is not None:
        limit = tl.load(count)
    ok = place < limit
    neuron = place.to(tl.int64)
    if ids is not None:
        neuron = tl.load(ids + place, mask=ok, other=0).to(tl.int64)
    row = neuron
    if places is not None:
        row = tl.load(places + neuron, mask=ok, other=0).to(tl.int64)
    gate_stride, gate_step = strides(gate, gate_length, GATE_ALIGN)
    up_stride, up_step = strides(up, up_length, UP_ALIGN)
    if tl.program_id(0) * ROWS < limit:
        wanted = ok
        g = tl.zeros((ROWS,), tl.float32)
        if GATED:
            g = dot_rows(x, gate, gate_stride, gate_scales, gate_step, row, ok, columns, GATE_KIND, ROWS, BLOCK)
            g = _activate(g, threshold, ACTIVATION)
            if SKIP:
                wanted = ok & (g != 0)
            tl.atomic_add(work, tl.sum(ok.to(tl.int64), axis=0), sem="relaxed")
        rows = tl.sum(wanted.to(tl.int64), axis=0)
        u = tl.zeros((ROWS,), tl.float32)
        if rows > 0:
            u = dot_rows(x, up, up_stride, up_scales, up_step, row, wanted, columns, UP_KIND, ROWS, BLOCK)
            if up_bias is not None:
                u += tl.load(up_bias + neuron, mask=wanted, other=0.0)
            tl.atomic_add(work + 1, rows, sem="relaxed")
        if GATED:
            if BOTH:
                u = _activate(u, threshold, ACTIVATION)
            value = tl.where(g == 0, 0.0, g * u)
        else:
            value = _activate(u, threshold, ACTIVATION)
        tl.store(h + place, value, mask=ok)


@kernel("tokens")
def activate(
    gate, up, computed, tokens, neurons, threshold, opened, touched, work,
    GATED: tl.constexpr, BOTH: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """up (T, neurons) = the neurons' activations, 0 for those not `computed`; where up and gate are their products.

    Marks in `opened` and `touched` (neurons) those whose gate opened, and that fired, for any token; `work` counts the
    fired in its fourth place.
    """
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < neurons
    wanted = inside
    if computed is not None:
        wanted = inside & (tl.load(computed + col, mask=inside, other=0) != 0)
    opens, fires = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    fired = tl.zeros((BLOCK,), tl.int64)
    for step in range(TOKENS):
        token = tl.program_id(1) * TOKENS + step
        here = wanted & (token < tokens)
        at = token.to(tl.int64) * neurons + col
        u = tl.load(up + at, mask=here, other=0.0)
        if GATED:
            first = _activate(tl.load(gate + at, mask=here, other=0.0), threshold, ACTIVATION)
            if BOTH:
                u = _activate(u, threshold, ACTIVATION)
            value = tl.where(first == 0, 0.0, first * u)
        else:
            value = _activate(u, threshold, ACTIVATION)
            first = value
        value = tl.where(here, value, 0.0)
        opens |= (here & (first != 0)).to(tl.int32)
        fires |= (value != 0).to(tl.int32)
        fired += (value != 0).to(tl.int64)
        tl.store(up + at, value, mask=inside & (token < tokens))
    tl.store(opened + col, opens, mask=opens > 0)
    tl.store(touched + col, fires, mask=fires > 0)
    tl.atomic_add(work + 3, tl.sum(fired, axis=0), sem="relaxed")


@kernel("neurons")
def list_groups(
    h, places, ids, count, neurons, room, rows, values, sizes, work,
    SKIP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Group g lists the positions g, g + GROUPS, ... that fired (all of them without SKIP): where their down row lies
    at rows (GROUPS, room), and their activation at values.

    `work` counts down rows and fired neurons in its third and fourth place.
    """
    group = tl.program_id(0)
    limit = neurons
    if count is not None:
        limit = tl.load(count)
    size = 0
    fired = 0
    for start in range(0, room, BLOCK):
        place = (start + tl.arange(0, BLOCK)) * GROUPS + group
        ok = place < limit
        value = tl.load(h + place, mask=ok, other=0.0)
        fires = (value != 0).to(tl.int32)
        wanted = fires if SKIP else ok.to(tl.int32)
        row = place
        if ids is not None:
            row = tl.load(ids + place, mask=wanted > 0, other=0)
        if places is not None:
            row = tl.load(places + row, mask=wanted > 0, other=0)
        at = group * room + size + tl.cumsum(wanted, axis=0) - wanted
        tl.store(rows + at, row, mask=wanted > 0)
        tl.store(values + at, value, mask=wanted > 0)
        size += tl.sum(wanted, axis=0)
        fired += tl.sum(fires, axis=0)
    tl.store(sizes + group, size)
    tl.atomic_add(work + 2, size.to(tl.int64), sem="relaxed")
    tl.atomic_add(work + 3, fired.to(tl.int64), sem="relaxed")


@kernel()
def add_rows(
    down, down_length, down_scales, columns, room, rows, values, sizes, partial,
    DOWN_KIND: tl.constexpr, DOWN_ALIGN: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial (groups, columns) = each group's sum of its values times its down rows, BLOCK columns a program."""
    group = tl.program_id(0)
    size = tl.load(sizes + group)
    first = group * room
    stride, scale_stride = strides(down, down_length, DOWN_ALIGN)
    # WIDTH pieces of SPAN elements; those of Q4_0, Q4_K and Q5_K lie in halves of bytes, the high ones SPAN / 2 later.
    MINIMA: tl.constexpr = DOWN_KIND == 3 or DOWN_KIND == 4
    HALVES: tl.constexpr = MINIMA or DOWN_KIND == 2
    SPAN: tl.constexpr = 64 if MINIMA else (32 if DOWN_KIND == 1 or DOWN_KIND == 2 else BLOCK)
    WIDTH: tl.constexpr = BLOCK // SPAN
    LANES: tl.constexpr = SPAN // 2 if HALVES else SPAN
    piece = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    lane = tl.arange(0, LANES)
    col = piece[:, None] * SPAN + lane[None]
    inside = col < columns
    acc = tl.zeros((WIDTH, LANES), tl.float32)
    high = tl.zeros((WIDTH, LANES), tl.float32)
    for start in range(0, size, AHEAD):
        # Unrolled, so that AHEAD rows are on their way at once while they are added one after another.
        for step in tl.static_range(AHEAD):
            there = start + step < size
            row = tl.load(rows + first + start + step, mask=there, other=0).to(tl.int64)
            value = tl.load(values + first + start + step, mask=there, other=0.0)
            known = there & (piece < columns // SPAN)
            if MINIMA:
                scale0, least0, q0, scale1, least1, q1 = pairs(down, row * stride, piece, lane, known, DOWN_KIND)
                acc += value * (scale0[:, None] * q0 - least0[:, None])
                high += value * (scale1[:, None] * q1 - least1[:, None])
            elif DOWN_KIND == 1 or DOWN_KIND == 2:
                scale = tl.load(down_scales + row * scale_stride + piece, mask=known, other=0.0)
                factor = (value * scale.to(tl.float32))[:, None]
                if DOWN_KIND == 1:
                    q = tl.load(down + row * stride + col, mask=inside & there, other=0)
                    acc += factor * q.to(tl.float32)
                else:
                    byte = piece[:, None] * 16 + lane[None]
                    q = tl.load(down + row * stride + byte, mask=inside & there, other=0).to(tl.int32)
                    acc += factor * ((q & 15) - 8).to(tl.float32)
                    high += factor * ((q >> 4) - 8).to(tl.float32)
            else:
                w = decode(down, stride, down_scales, scale_stride, row, col, inside & there, DOWN_KIND)
                acc += value * w
    at = partial + group.to(tl.int64) * columns + col
    tl.store(at, acc, mask=inside)
    if HALVES:
        tl.store(at + LANES, high, mask=inside)


@kernel()
def add_groups(partial, out, columns, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """out (columns) += the groups' sums, in the order of the groups."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = col < columns
    total = tl.load(partial + col, mask=inside, other=0.0)
    for group in tl.static_range(1, GROUPS):  # unrolled, so that many loads are on their way at once
        total += tl.load(partial + group * columns + col, mask=inside, other=0.0)
    tl.store(out + col, tl.load(out + col, mask=inside, other=0.0) + total, mask=inside)
