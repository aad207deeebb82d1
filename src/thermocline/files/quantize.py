"""Float rows to block formats and back, in plain numpy.

Source of the algorithms: the reference quantisers of ggml (ggml-quants.c), which the `gguf` package repeats.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from thermocline.errors import UnsupportedModelError
from thermocline.files.formats import BF16, F16, F32, Q4_0, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0, BlockFormat
from thermocline.files.kquants import FROM_BLOCKS, SCALES, to_q4_k, to_q5_k, to_q6_k
from thermocline.files.rounding import half, reciprocal, round_away
from thermocline.files.weight import Bytes, Weight

Floats = npt.NDArray[np.float32]

_K_QUANTS: Final = {Q4_K: to_q4_k, Q5_K: to_q5_k, Q6_K: to_q6_k}
_CHUNK: Final = 1 << 18
"""Elements quantised at once: the temporaries stay in the cache."""


def quantize(x: Floats, fmt: BlockFormat) -> Bytes:
    """Rows of float32 (rows, columns) in `fmt`: uint8 (rows, row_bytes).

    The bytes are those that ggml's reference writes, but for the K-quants (see `kquants`).

    Blocks whose scale has no reciprocal in float32, where ggml's result is undefined, become zeros.

    Raises:
        UnsupportedModelError: the columns are not whole blocks.
        NumericalError: a value does not fit: NaN or infinite in a block format, or beyond the range of F16.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows, columns = x.shape
    if columns % fmt.block:
        raise UnsupportedModelError(f"rows of {columns} elements: {fmt.name} needs a multiple of {fmt.block}")
    if fmt is F32:
        return x.view(np.uint8)
    pack = {F16: _to_f16, BF16: _to_bf16, Q8_0: _to_q8_0, Q4_0: _to_q4_0, **_K_QUANTS}[fmt]
    blocks = x.reshape(-1, fmt.block)
    packed = np.empty((len(blocks), fmt.block_bytes), np.uint8)
    step = _CHUNK // fmt.block
    for start in range(0, len(blocks), step):
        packed[start : start + step] = pack(blocks[start : start + step])
    return packed.reshape(rows, fmt.row_bytes(columns))


def dequantize(data: Bytes, fmt: BlockFormat, columns: int) -> Floats:
    """Rows of `fmt` (rows, row_bytes) as float32 (rows, columns); of F32, a view on the same bytes."""
    rows = data.shape[0]
    data = np.ascontiguousarray(data)
    if fmt is F32:
        return data.view(np.float32).reshape(rows, columns)
    if fmt is F16:
        return data.view(np.float16).astype(np.float32).reshape(rows, columns)
    if fmt is Q5_0:
        data, fmt = _widen_q5_0(data.reshape(-1, Q5_0.block_bytes)), Q8_0
    if fmt is BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(rows, columns)
    blocks = data.reshape(-1, fmt.block_bytes)
    if fmt in FROM_BLOCKS:
        return FROM_BLOCKS[fmt](blocks).reshape(rows, columns)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if fmt is Q8_0:
        q = blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        q = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    with np.errstate(invalid="ignore"):  # a file may hold scales that are not finite; whoever loads it checks
        return (scale * q).reshape(rows, columns)


def to_float(weight: Weight) -> Floats:
    """A weight as float32 (rows, columns)."""
    return dequantize(weight.data, weight.format, weight.columns)


def widened(weight: Weight) -> Weight:
    """A Q5_0 weight as Q8_0, of the same numbers exactly: scales stay, and 5 bits fit in 8. Others as they are."""
    if weight.format is not Q5_0:
        return weight
    blocks = np.ascontiguousarray(weight.data).reshape(-1, Q5_0.block_bytes)
    return Weight(weight.name, Q8_0, weight.shape, _widen_q5_0(blocks).reshape(weight.rows, -1))


def converted(weight: Weight, fmt: BlockFormat) -> Bytes:
    """The weight's rows in `fmt` (rows, row_bytes), made piece by piece; its own bytes if it has that format.

    Raises as `quantize` does.
    """
    if weight.format is fmt:
        return weight.data
    out = np.empty((weight.rows, fmt.row_bytes(weight.columns)), np.uint8)
    step = max(1, 4 * _CHUNK // max(weight.columns, 1))
    for start in range(0, weight.rows, step):
        piece = dequantize(weight.data[start : start + step], weight.format, weight.columns)
        out[start : start + step] = quantize(piece, fmt)
    return out


def all_finite(weight: Weight) -> bool:
    """Whether every number of the weight is finite; of block formats, every scale is looked at."""
    step = max(1, 4 * _CHUNK // max(weight.columns, 1))
    for start in range(0, weight.rows, step):
        data = weight.data[start : start + step]
        if weight.format.block > 1:
            where = SCALES.get(weight.format, slice(0, 2))
            scales = np.ascontiguousarray(data).reshape(-1, weight.format.block_bytes)[:, where]
            finite = np.isfinite(scales.copy().view(np.float16)).all()
        else:
            finite = np.isfinite(dequantize(data, weight.format, weight.columns)).all()
        if not finite:
            return False
    return True


def from_float(name: str, x: Floats, fmt: BlockFormat) -> Weight:
    """A float matrix (rows, columns) as a resident weight in `fmt`; raises as `quantize` does."""
    return Weight(name, fmt, (x.shape[0], x.shape[1]), quantize(x, fmt))


def _to_f16(x: Floats) -> Bytes:
    return half(x, x, "F16").view(np.uint8)


def _to_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(nan, (bits >> 16) | 64, rounded).astype(np.uint16).view(np.uint8)


def _to_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    stored = half(scale, blocks, "Q8_0", finite=True)
    q = round_away(blocks * reciprocal(scale)).astype(np.int8)
    return np.concatenate([stored.view(np.uint8), q.view(np.uint8)], axis=1)


def _to_q4_0(blocks: Floats) -> Bytes:
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / np.float32(-8)
    stored = half(scale, blocks, "Q4_0", finite=True)
    q = (blocks * reciprocal(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    middle = q.shape[1] // 2
    return np.concatenate([stored.view(np.uint8), q[:, :middle] | (q[:, middle:] << 4)], axis=1)


def _widen_q5_0(blocks: Bytes) -> Bytes:
    """Blocks (n, 22) of a scale, the fifth bits and the low four, as blocks (n, 34) of the scale and signed bytes."""
    low = np.concatenate([blocks[:, 6:] & 15, blocks[:, 6:] >> 4], axis=1)
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    q = (low | (fifth << 4)).view(np.int8) - np.int8(16)
    return np.concatenate([blocks[:, :2], q.view(np.uint8)], axis=1)
