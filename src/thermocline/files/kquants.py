"""The K-quants: blocks of 256 elements whose parts of 32 or 16 have small scales of their own.

Source of the formats: ggml-quants.h of ggml. A Q4_K or Q5_K block is d, dmin, eight 6-bit scales and minima packed
into 12 bytes, and the numbers: x = d * scale * q - dmin * min. A Q6_K block is the numbers, sixteen signed 8-bit
scales and d: x = d * scale * (q - 32). The quantisers are our own: per part a few candidate scales are refitted
by least squares and the best is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from thermocline.files.formats import Q4_K, Q5_K, Q6_K, BlockFormat
from thermocline.files.rounding import Floats, half, reciprocal, require_finite
from thermocline.files.weight import Bytes

SCALES: Final[dict[BlockFormat, slice]] = {Q4_K: slice(0, 4), Q5_K: slice(0, 4), Q6_K: slice(208, 210)}
"""Where the float16 scales of a block lie, of the formats that do not begin with their only one."""

_TRIES: Final = (-1.0, -0.4, 0.0, 0.5)
"""Candidate scales use so many steps more than the range asks for."""


def _from_q4_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 16:].reshape(-1, 4, 1, 32)
    return _with_minima(blocks, np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32))


def _from_q5_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 48:].reshape(-1, 4, 1, 32)
    low = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _with_minima(blocks, low | fifth << 4)


def _with_minima(blocks: Bytes, q: Any) -> Floats:
    """Scales and minima applied to the numbers (blocks, 8, 32)."""
    d, dmin = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(np.float32).T
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1).astype(np.float32)
    least = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        x: Floats = (d[:, None] * scale)[:, :, None] * q.astype(np.float32) - (dmin[:, None] * least)[:, :, None]
    return x.reshape(-1, 256)


def _from_q6_k(blocks: Bytes) -> Floats:
    packed, pairs = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low: Any = np.concatenate([packed & 15, packed >> 4], axis=2)
    high = pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = blocks[:, 192:208].view(np.int8).astype(np.float32)
    d = np.ascontiguousarray(blocks[:, 208:]).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        x: Floats = (d * scale)[:, :, None] * q
    return x.reshape(-1, 256)


FROM_BLOCKS: Final[dict[BlockFormat, Callable[[Bytes], Floats]]] = {
    Q4_K: _from_q4_k,
    Q5_K: _from_q5_k,
    Q6_K: _from_q6_k,
}
"""Blocks (n, block_bytes) to float32 (n, 256)."""


def to_q4_k(x: Floats) -> Bytes:
    """Blocks (n, 256) as Q4_K."""
    head, q = _fit_with_minima(x, 15, "Q4_K")
    return _joined(head, _nibbles(q))


def to_q5_k(x: Floats) -> Bytes:
    """Blocks (n, 256) as Q5_K."""
    head, q = _fit_with_minima(x, 31, "Q5_K")
    fifth = np.packbits(q >> 4, axis=1, bitorder="little").reshape(-1, 32)
    return _joined(head, fifth, _nibbles(q & 15))


def to_q6_k(x: Floats) -> Bytes:
    """Blocks (n, 256) as Q6_K."""
    require_finite(x, "Q6_K")
    parts = x.reshape(-1, 16, 16)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(axis=2, keepdims=True), axis=2)
    best, least = np.zeros_like(extreme), np.full_like(extreme, np.inf)
    for more in _TRIES:
        q = _rounded(parts * reciprocal(extreme / np.float32(-32 - more)), -32, 31)
        scale = (parts * q).sum(axis=2, keepdims=True) * reciprocal((q * q).sum(axis=2, keepdims=True))
        best, least = _better(best, least, scale, ((scale * q - parts) ** 2).sum(axis=2, keepdims=True))
    widest = np.take_along_axis(best, np.abs(best).argmax(axis=1, keepdims=True), axis=1)
    d = half(widest[:, :, 0] / np.float32(-128), x, "Q6_K", finite=True)
    wide = d.astype(np.float32)[:, :, None]
    steps = _rounded(best * reciprocal(wide), -128, 127)
    numbers: Any = (_rounded(parts * reciprocal(wide * steps), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = numbers & 15, numbers >> 4
    return _joined(
        (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128),
        (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64),
        steps[:, :, 0].astype(np.int8).view(np.uint8),
        d.view(np.uint8),
    )


def _fit_with_minima(x: Floats, most: int, name: str) -> tuple[Bytes, Any]:
    """The 16 bytes of scales that lead a block, and its numbers 0 to `most` (blocks, 8, 32)."""
    require_finite(x, name)
    parts = x.reshape(-1, 8, 32)
    low = np.minimum(parts.min(axis=2, keepdims=True), 0)
    width = parts.max(axis=2, keepdims=True) - low
    scale, floor, error = np.zeros_like(low), low, np.full_like(low, np.inf)
    for more in _TRIES:
        q = _rounded((parts - low) * reciprocal(width / np.float32(most + more)), 0, most)
        # Least squares for parts = slope * q + offset, with no offset above zero.
        mean_q, mean = q.mean(axis=2, keepdims=True), parts.mean(axis=2, keepdims=True)
        spread = ((q - mean_q) ** 2).sum(axis=2, keepdims=True)
        slope = np.maximum(((q - mean_q) * (parts - mean)).sum(axis=2, keepdims=True) * reciprocal(spread), 0)
        offset = np.minimum(mean - slope * mean_q, 0)
        off = ((slope * q + offset - parts) ** 2).sum(axis=2, keepdims=True)
        floor = np.where(off < error, offset, floor)
        scale, error = _better(scale, error, slope, off)
    d = half(scale[:, :, 0].max(axis=1, keepdims=True) / np.float32(63), x, name, finite=True)
    dmin = half(-floor[:, :, 0].min(axis=1, keepdims=True) / np.float32(63), x, name, finite=True)
    wide, wide_min = (v.astype(np.float32)[:, :, None] for v in (d, dmin))
    steps = _rounded(scale * reciprocal(wide), 0, 63)
    least = _rounded(-floor * reciprocal(wide_min), 0, 63)
    numbers = _rounded((parts + wide_min * least) * reciprocal(wide * steps), 0, most).astype(np.uint8)
    s: Any
    m: Any
    s, m = steps[:, :, 0].astype(np.uint8), least[:, :, 0].astype(np.uint8)
    packed = (s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | m[:, 4:] << 4)
    return _joined(d.view(np.uint8), dmin.view(np.uint8), *packed), numbers


def _better(best: Floats, least: Floats, scale: Floats, error: Floats) -> tuple[Floats, Floats]:
    return np.where(error < least, scale, best), np.minimum(error, least)


def _rounded(x: Floats, low: int, high: int) -> Floats:
    rounded: Floats = np.rint(x).clip(low, high)
    return rounded


def _nibbles(q: Any) -> Bytes:
    """Numbers (blocks, 8, 32) of four bits: each even part in the low halves of bytes, the odd one in the high."""
    pairs = q.reshape(-1, 4, 2, 32)
    packed: Bytes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return packed


def _joined(*pieces: Any) -> Bytes:
    joined: Bytes = np.concatenate(pieces, axis=1)
    return joined
