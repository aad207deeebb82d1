"""Rows of a placed matrix: decoded, or multiplied with a vector.

KIND says how elements lie (`layout.Kind`): 0 floats; 1 Q8_0, the signed bytes of a row and after them the scales;
2 Q4_0, half bytes, of which sixteen bytes hold elements 0 to 15 of a block in their low halves and 16 to 31 in
their high ones, and after them the scales; 3 to 5 blocks of Q4_K, Q5_K and Q6_K as in files (`files.kquants` says how);
6 the bits of BF16.

Kernels get the length of a row in units of ALIGN bytes; strides are those of rows, in elements. Callers pass rows as
int64, so that offsets into matrices are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thermocline.ops.cuda.kernels.registry import kernel

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"


@triton.jit
def strides(data, length, ALIGN: tl.constexpr):
    """Of a matrix's numbers, and of its scales."""
    SIZE: tl.constexpr = data.dtype.element_ty.primitive_bitwidth // 8
    return length * (ALIGN // SIZE), length * (ALIGN // 2)


@triton.jit
def _half_at(data, at, ok):
    """The float16 in two bytes at any address, as float32."""
    low = tl.load(data + at, mask=ok, other=0).to(tl.uint16)
    high = tl.load(data + at + 1, mask=ok, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _part(data, block, part, ok):
    """The whole numbers of a part of 32 elements of Q4_K or Q5_K: its scale, and its minimum."""
    at = part % 4
    first = tl.load(data + block + 4 + at, mask=ok, other=0).to(tl.int32)
    second = tl.load(data + block + 8 + at, mask=ok, other=0).to(tl.int32)
    third = tl.load(data + block + 12 + at, mask=ok, other=0).to(tl.int32)
    scale = tl.where(part < 4, first & 63, (third & 15) | ((first >> 6) << 4))
    least = tl.where(part < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32), least.to(tl.float32)


@triton.jit
def _with_minimum(data, block, part, number, ok):
    """An element of Q4_K or Q5_K: its number scaled, less the minimum of its part."""
    scale, least = _part(data, block, part, ok)
    d, dmin = _half_at(data, block, ok), _half_at(data, block + 2, ok)
    return d * scale * number.to(tl.float32) - dmin * least


@triton.jit
def _q4_k(data, start, col, ok):
    place = col % 256
    part, lane = place // 32, place % 32
    block = start + col // 256 * 144
    byte = tl.load(data + block + 16 + part // 2 * 32 + lane, mask=ok, other=0).to(tl.int32)
    return _with_minimum(data, block, part, (byte >> (part % 2 * 4)) & 15, ok)


@triton.jit
def _q5_k(data, start, col, ok):
    place = col % 256
    part, lane = place // 32, place % 32
    block = start + col // 256 * 176
    byte = tl.load(data + block + 48 + part // 2 * 32 + lane, mask=ok, other=0).to(tl.int32)
    fifth = tl.load(data + block + 16 + lane, mask=ok, other=0).to(tl.int32)
    number = ((byte >> (part % 2 * 4)) & 15) | (((fifth >> part) & 1) << 4)
    return _with_minimum(data, block, part, number, ok)


@triton.jit
def _q6_k(data, start, col, ok):
    place = col % 256
    half, quarter, lane = place // 128, place // 32 % 4, place % 32
    block = start + col // 256 * 210
    byte = tl.load(data + block + half * 64 + quarter % 2 * 32 + lane, mask=ok, other=0).to(tl.int32)
    pair = tl.load(data + block + 128 + half * 32 + lane, mask=ok, other=0).to(tl.int32)
    number = ((byte >> (quarter // 2 * 4)) & 15) | (((pair >> (quarter * 2)) & 3) << 4)
    scale = tl.load(data + block + 192 + place // 16, mask=ok, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    return _half_at(data, block + 208, ok) * scale * (number - 32).to(tl.float32)


@triton.jit
def decode(data, stride, scales, scale_stride, row, col, ok, KIND: tl.constexpr):
    """Elements (`row`, `col`) as float32, 0 where not `ok`."""
    start = row * stride
    if KIND == 0:
        value = tl.load(data + start + col, mask=ok, other=0.0).to(tl.float32)
    elif KIND == 1:
        number = tl.load(data + start + col, mask=ok, other=0).to(tl.float32)
        value = number * tl.load(scales + row * scale_stride + col // 32, mask=ok, other=0.0).to(tl.float32)
    elif KIND == 2:
        byte = tl.load(data + start + col // 32 * 16 + col % 16, mask=ok, other=0).to(tl.int32)
        number = (((byte >> (col % 32 // 16 * 4)) & 15) - 8).to(tl.float32)
        value = number * tl.load(scales + row * scale_stride + col // 32, mask=ok, other=0.0).to(tl.float32)
    elif KIND == 3:
        value = _q4_k(data, start, col, ok)
    elif KIND == 4:
        value = _q5_k(data, start, col, ok)
    elif KIND == 5:
        value = _q6_k(data, start, col, ok)
    else:
        value = (tl.load(data + start + col, mask=ok, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def pairs(data, start, group, lane, ok, KIND: tl.constexpr):
    """Two parts of 32 elements of Q4_K or Q5_K, which share the 32 bytes at `lane` of the row's `group` of 64.

    Of each part its scale, what is taken off its elements, and its numbers, all float32. `start` is
    where the row begins; the numbers' last axis are the lanes.
    """
    SIZE: tl.constexpr = 144 if KIND == 3 else 176
    pair = group % 4
    block = start + group // 4 * SIZE
    at = tl.expand_dims(block + SIZE - 128 + pair * 32, -1) + lane
    cells = tl.expand_dims(ok, -1)
    byte = tl.load(data + at, mask=cells, other=0).to(tl.int32)
    q0, q1 = byte & 15, byte >> 4
    if KIND == 4:
        fifth = tl.load(data + tl.expand_dims(block + 16, -1) + lane, mask=cells, other=0).to(tl.int32)
        bits = fifth >> tl.expand_dims(2 * pair, -1)
        q0, q1 = q0 | ((bits & 1) << 4), q1 | ((bits & 2) << 3)
    scale0, least0 = _part(data, block, 2 * pair, ok)
    scale1, least1 = _part(data, block, 2 * pair + 1, ok)
    d, dmin = _half_at(data, block, ok), _half_at(data, block + 2, ok)
    return d * scale0, dmin * least0, q0.to(tl.float32), d * scale1, dmin * least1, q1.to(tl.float32)


@triton.jit
def _dot_minima(x, data, stride, row, ok, columns, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`dot_rows` of Q4_K and Q5_K."""
    GROUPS: tl.constexpr = BLOCK // 64
    lane = tl.arange(0, 32)
    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, columns, BLOCK):
        group = start // 64 + tl.arange(0, GROUPS)
        inside = ok[:, None] & (group < columns // 64)[None]
        col = group[:, None] * 64 + lane[None]
        v0 = tl.load(x + col, mask=col < columns, other=0.0)
        v1 = tl.load(x + col + 32, mask=col < columns, other=0.0)
        scale0, least0, q0, scale1, least1, q1 = pairs(data, row[:, None] * stride, group[None], lane, inside, KIND)
        sums += scale0 * tl.sum(q0 * v0[None], axis=2) - least0 * tl.sum(v0, axis=1)[None]
        sums += scale1 * tl.sum(q1 * v1[None], axis=2) - least1 * tl.sum(v1, axis=1)[None]
    return tl.sum(sums, axis=1)


@triton.jit
def _six_bits(low, pair, SHIFT: tl.constexpr):
    return ((low | (((pair >> SHIFT) & 3) << 4)) - 32).to(tl.float32)


@triton.jit
def _dot_sixes(x, data, stride, row, ok, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`dot_rows` of Q6_K by groups of 64 elements: sixteen of each quarter of a half block, which share bytes."""
    GROUPS: tl.constexpr = BLOCK // 64
    lane = tl.arange(0, 16)
    sums = tl.zeros((ROWS, GROUPS), tl.float32)
    for start in range(0, columns, BLOCK):
        group = start // 64 + tl.arange(0, GROUPS)
        half, side = group // 2 % 2, group % 2
        inside = ok[:, None] & (group < columns // 64)[None]
        cells = inside[:, :, None]
        col = (group // 2 * 128 + side * 16)[:, None] + lane[None]
        block = row[:, None] * stride + (group // 4 * 210)[None]
        low = block[:, :, None] + (half * 64 + side * 16)[None, :, None] + lane[None, None]
        first = tl.load(data + low, mask=cells, other=0).to(tl.int32)
        second = tl.load(data + low + 32, mask=cells, other=0).to(tl.int32)
        high = block[:, :, None] + (128 + half * 32 + side * 16)[None, :, None] + lane[None, None]
        pair = tl.load(data + high, mask=cells, other=0).to(tl.int32)
        dots = tl.zeros((ROWS, GROUPS), tl.float32)
        for quarter in tl.static_range(4):
            number = _six_bits((first if quarter % 2 == 0 else second) >> (quarter // 2 * 4) & 15, pair, quarter * 2)
            v = tl.load(x + col + quarter * 32, mask=col < columns, other=0.0)
            at = block + (192 + half * 8 + side + quarter * 2)[None]
            scale = tl.load(data + at, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
            dots += scale * tl.sum(number * v[None], axis=2)
        sums += _half_at(data, block + 208, inside) * dots
    return tl.sum(sums, axis=1)


@triton.jit
def dot_rows(
    x, data, stride, scales, scale_stride, row, ok, columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dot products (ROWS) of the matrix's rows `row` with the vector `x`; rows not `ok` read nothing and give 0."""
    if KIND == 3 or KIND == 4:
        result = _dot_minima(x, data, stride, row, ok, columns, KIND, ROWS, BLOCK)
    elif KIND == 5:
        result = _dot_sixes(x, data, stride, row, ok, columns, ROWS, BLOCK)
    else:
        result = _dot_plain(x, data, stride, scales, scale_stride, row, ok, columns, KIND, ROWS, BLOCK)
    return result


@triton.jit
def _dot_plain(
    x, data, stride, scales, scale_stride, row, ok, columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = KIND == 1 or KIND == 2
    WIDTH: tl.constexpr = BLOCK // 32 if SPLIT else BLOCK
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, columns, BLOCK):
        if SPLIT:
            block = start // 32 + tl.arange(0, WIDTH)
            inside = ok[:, None] & (block < columns // 32)[None]
            scale = tl.load(scales + row[:, None] * scale_stride + block[None], mask=inside, other=0.0)
            if KIND == 1:
                col = block[:, None] * 32 + tl.arange(0, 32)[None]
                v = tl.load(x + col, mask=col < columns, other=0.0)
                q = tl.load(data + row[:, None, None] * stride + col[None], mask=inside[:, :, None], other=0)
                dots = tl.sum(q.to(tl.float32) * v[None], axis=2)
            else:
                low = block[:, None] * 32 + tl.arange(0, 16)[None]
                v0 = tl.load(x + low, mask=low < columns, other=0.0)
                v1 = tl.load(x + low + 16, mask=low < columns, other=0.0)
                byte = block[:, None] * 16 + tl.arange(0, 16)[None]
                q = tl.load(data + row[:, None, None] * stride + byte[None], mask=inside[:, :, None], other=0)
                q0, q1 = ((q & 15).to(tl.int32) - 8).to(tl.float32), ((q >> 4).to(tl.int32) - 8).to(tl.float32)
                dots = tl.sum(q0 * v0[None] + q1 * v1[None], axis=2)
            sums += dots * scale.to(tl.float32)
        else:
            col = start + tl.arange(0, BLOCK)
            inside = col < columns
            v = tl.load(x + col, mask=inside, other=0.0)
            w = decode(data, stride, scales, scale_stride, row[:, None], col[None], ok[:, None] & inside[None], KIND)
            sums += w * v[None]
    return tl.sum(sums, axis=1)


@kernel()
def matvec(
    x, matrix, matrix_length, matrix_scales, bias, out, rows, columns,
    MATRIX_KIND: tl.constexpr, MATRIX_ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """out (1, rows) = x (1, columns) times the matrix transposed, plus bias, plus what was there if ADD."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    stride, step = strides(matrix, matrix_length, MATRIX_ALIGN)
    y = dot_rows(x, matrix, stride, matrix_scales, step, row, ok, columns, MATRIX_KIND, ROWS, BLOCK)
    if bias is not None:
        y += tl.load(bias + row, mask=ok, other=0.0)
    at = out + row
    if ADD:
        y += tl.load(at, mask=ok, other=0.0)
    if RELU:
        y = tl.where(y > 0, y, 0.0)
    tl.store(at, y, mask=ok)


@kernel()
def matvec_few(
    x, matrix, matrix_length, matrix_scales, bias, out, rows, columns,
    MATRIX_KIND: tl.constexpr, MATRIX_ALIGN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ADD: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """`matvec` for TOKENS tokens (2 to 4), for all of which a row is read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    stride, step = strides(matrix, matrix_length, MATRIX_ALIGN)
    LANES: tl.constexpr = 2 if TOKENS == 2 else 4
    token = tl.arange(0, LANES)
    y = tl.zeros((LANES, ROWS), tl.float32)
    if MATRIX_KIND >= 3 and MATRIX_KIND <= 5:
        # What is decoded is too much to keep; rows come from the first cache again, 16 bytes at a time.
        for one in tl.static_range(TOKENS):
            dots = dot_rows(
                x + one * columns, matrix, stride, matrix_scales, step, row, ok, columns, MATRIX_KIND, ROWS, BLOCK
            )  # fmt: skip
            y += tl.where((token == one)[:, None], dots[None], 0.0)
    else:
        for start in range(0, columns, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = col < columns
            here = ok[:, None] & inside[None]
            w = decode(matrix, stride, matrix_scales, step, row[:, None], col[None], here, MATRIX_KIND)
            for one in tl.static_range(TOKENS):
                v = tl.load(x + one * columns + col, mask=inside, other=0.0)
                dots = tl.sum(w * v[None], axis=1)
                y += tl.where((token == one)[:, None], dots[None], 0.0)
    if bias is not None:
        y += tl.load(bias + row, mask=ok, other=0.0)[None]
    at = out + token[:, None].to(tl.int64) * rows + row[None]
    there = (token < TOKENS)[:, None] & ok[None]
    if ADD:
        y += tl.load(at, mask=there, other=0.0)
    if RELU:
        y = tl.where(y > 0, y, 0.0)
    tl.store(at, y, mask=there)


@triton.jit
def _product(
    program, x, matrix, length, scales, bias, out, rows, columns,
    KIND: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < rows
    stride, step = strides(matrix, length, ALIGN)
    y = dot_rows(x, matrix, stride, scales, step, row, ok, columns, KIND, ROWS, BLOCK)
    if bias is not None:
        y += tl.load(bias + row, mask=ok, other=0.0)
    tl.store(out + row, y, mask=ok)


@kernel()
def matvec_three(
    x, columns,
    a, a_length, a_scales, a_bias, a_out, a_rows,
    b, b_length, b_scales, b_bias, b_out, b_rows,
    c, c_length, c_scales, c_bias, c_out, c_rows,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, C_KIND: tl.constexpr,
    A_ALIGN: tl.constexpr, B_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr, ROWS: tl.constexpr,
    A_BLOCK: tl.constexpr, B_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
):  # fmt: skip
    """`matvec` of one token with three matrices: programs take the rows of a, then those of b, then those of c."""
    program = tl.program_id(0)
    second = tl.cdiv(a_rows, ROWS)
    third = second + tl.cdiv(b_rows, ROWS)
    if program < second:
        _product(program, x, a, a_length, a_scales, a_bias, a_out, a_rows, columns, A_KIND, A_ALIGN, ROWS, A_BLOCK)
    elif program < third:
        _product(
            program - second, x, b, b_length, b_scales, b_bias, b_out, b_rows, columns,
            B_KIND, B_ALIGN, ROWS, B_BLOCK,
        )  # fmt: skip
    else:
        _product(
            program - third, x, c, c_length, c_scales, c_bias, c_out, c_rows, columns,
            C_KIND, C_ALIGN, ROWS, C_BLOCK,
        )  # fmt: skip


@kernel("first", "count")
def gather_rows(
    matrix, matrix_length, matrix_scales, ids, first, count, columns, out,
    MATRIX_KIND: tl.constexpr, MATRIX_ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (count, columns) float32 = rows `ids` of the matrix, or those from `first` on where `ids` is None."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wanted = place < count
    row = first + place
    if ids is not None:
        row = tl.load(ids + place, mask=wanted, other=0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = wanted[:, None] & (col < columns)[None]
    stride, step = strides(matrix, matrix_length, MATRIX_ALIGN)
    value = decode(matrix, stride, matrix_scales, step, row[:, None], col[None], ok, MATRIX_KIND)
    tl.store(out + place[:, None] * columns + col[None], value, mask=ok)
