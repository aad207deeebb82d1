"""Float rows to block formats and back, in plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from thermocline.files.formats import BF16, F16, F32, Q4_0, Q8_0, BlockFormat
from thermocline.files.weight import Bytes, Weight

Floats = npt.NDArray[np.float32]


def quantize(x: Floats, fmt: BlockFormat) -> Bytes:
    """Rows of float32 (rows, columns) in `fmt`: uint8 (rows, row_bytes), the bytes ggml's reference writes."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows = x.shape[0]
    if fmt is F32:
        return x.view(np.uint8)
    if fmt is F16:
        return x.astype(np.float16).view(np.uint8)
    if fmt is BF16:
        return _to_bf16(x).view(np.uint8)
    blocks = x.reshape(-1, fmt.block)
    packed = {Q8_0: _to_q8_0, Q4_0: _to_q4_0}[fmt](blocks)
    return packed.reshape(rows, -1)


def dequantize(data: Bytes, fmt: BlockFormat, columns: int) -> Floats:
    """Rows of `fmt` (rows, row_bytes) as float32 (rows, columns)."""
    rows = data.shape[0]
    data = np.ascontiguousarray(data)
    if fmt is F32:
        return data.view(np.float32).reshape(rows, columns)
    if fmt is F16:
        return data.view(np.float16).astype(np.float32).reshape(rows, columns)
    if fmt is BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(rows, columns)
    blocks = data.reshape(-1, fmt.block_bytes)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if fmt is Q8_0:
        return (scale * blocks[:, 2:].view(np.int8).astype(np.float32)).reshape(rows, columns)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return (scale * (nibbles.astype(np.float32) - 8)).reshape(rows, columns)


def to_float(weight: Weight) -> Floats:
    """A weight as float32 (rows, columns)."""
    return dequantize(weight.data, weight.format, weight.columns)


def from_float(name: str, x: Floats, fmt: BlockFormat) -> Weight:
    """A float matrix (rows, columns) as a resident weight in `fmt`."""
    return Weight(name, fmt, (x.shape[0], x.shape[1]), quantize(x, fmt))


def _to_bf16(x: Floats) -> npt.NDArray[np.uint16]:
    bits = x.view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(nan, (bits >> 16) | 64, rounded).astype(np.uint16)


def _to_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    q = _round_away(blocks * inverse).astype(np.int8)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=1)


def _to_q4_0(blocks: Floats) -> Bytes:
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    q = np.trunc(blocks.astype(np.float64) * inverse.astype(np.float64) + 8.5)
    q = q.astype(np.uint8).clip(0, 15)
    half = q.shape[1] // 2
    return np.concatenate([scale.astype(np.float16).view(np.uint8), q[:, :half] | (q[:, half:] << 4)], axis=1)


def _round_away(x: Floats) -> Floats:
    """Round half away from zero, as C's roundf does and numpy's rint does not."""
    whole = np.floor(np.abs(x))
    rounded: Floats = np.copysign(whole + np.floor(2 * (np.abs(x) - whole)), x)
    return rounded
