"""``x @ W.T + bias`` with a packed ``W``: matrix-vector for up to 4 rows, tiles of ``tl.dot`` for more.

Both walk a row of ``W`` in lane order (:mod:`.decode`): lanes are loaded once, and each of their fields is a tile
of weights whose inputs are picked out of ``x`` to match. Everything is summed in float32.

A small problem has too few output tiles to fill a GPU, so the inputs can be split among programs. Each then writes its
sum into a buffer of its own and a second kernel adds them in order: no atomics, so the result is the same every time.

Matrix-vector multiplies in float32, the weight unrounded; tiles round the weight to the dtype of ``x``, as a float
layer's weight would be.
"""

import triton
import triton.language as tl

from .decode import (
    decode_field,
    dequantize,
    group_of,
    input_index,
    lane_tile,
    load_grid,
    load_lanes,
    load_last,
    load_scale,
    load_zero,
    row_lanes,
    starts_group,
)


@triton.jit
def _store(out, bias, split, m, n, value, M, N, SPLIT: tl.constexpr):
    """The result, or this split's share (split, M, N); ``value`` over ``m`` (BLOCK_M, 1) and ``n`` (1, BLOCK_N)."""
    if bias is not None and SPLIT == 1:
        value += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    address = (split * M + m).to(tl.int64) * N + n
    tl.store(out + address, value.to(out.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def gemv_sum(
    x_row,
    seen,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    row,
    inside,
    K,
    first,
    lanes,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums (BLOCK_M, BLOCK_N) of rows of x times rows of W, over BLOCK_L lanes every STEP from ``first`` to ``lanes``.

    ``x_row`` points at rows of x, (BLOCK_M, 1), of which those ``seen`` exist; ``row`` (BLOCK_N, 1) are rows of W.
    """
    FIELDS: tl.constexpr = LAYOUT.fields
    PARTS: tl.constexpr = LAYOUT.sum_parts
    total = tl.zeros((x_row.shape[0], row.shape[0], BLOCK_L // PARTS), dtype=tl.float32)
    for start in range(first, lanes, STEP):
        last = load_last(weight, row, start, inside, K, EVEN, LAYOUT, BLOCK_L, PARTS)
        for part in tl.static_range(PARTS):
            lane = lane_tile(start, part, LAYOUT, BLOCK_L, PARTS)
            here = (lane < lanes) & inside
            one, two, three = load_lanes(
                *(weight, row, start, part, inside, K, last[part], EVEN, LAYOUT, BLOCK_L, PARTS)
            )
            for field in tl.static_range(FIELDS):
                k = input_index(lane, field, K, LAYOUT)
                if LAYOUT.group_spans_fields:
                    if starts_group(field, LAYOUT):
                        scale, zero = load_grid(
                            *(scales, scale_range, zeros, row, start, part, field, inside, K, LAYOUT, BLOCK_L, PARTS)
                        )
                else:
                    scale = load_scale(scales, scale_range, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
                    zero = load_zero(zeros, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
                code = decode_field(one, two, three, field, LAYOUT)
                value = dequantize(code, scale, zero, levels, row, inside, LAYOUT)
                inputs = tl.load(x_row + k, mask=seen & (lane < lanes) & (k < K), other=0).to(tl.float32)
                total += value[None, :, :] * inputs[:, None, :]
    return tl.sum(total, axis=2)


@triton.jit
def gemm_sum(
    x_row,
    seen,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    row,
    inside,
    K,
    first,
    lanes,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """As :func:`gemv_sum`, by ``tl.dot``."""
    FIELDS: tl.constexpr = LAYOUT.fields
    PARTS: tl.constexpr = LAYOUT.sum_parts
    total = tl.zeros((x_row.shape[0], row.shape[0]), dtype=tl.float32)
    for start in range(first, lanes, STEP):
        last = load_last(weight, row, start, inside, K, EVEN, LAYOUT, BLOCK_L, PARTS)
        for part in tl.static_range(PARTS):
            lane = lane_tile(start, part, LAYOUT, BLOCK_L, PARTS)
            here = (lane < lanes) & inside
            one, two, three = load_lanes(
                *(weight, row, start, part, inside, K, last[part], EVEN, LAYOUT, BLOCK_L, PARTS)
            )
            for field in tl.static_range(FIELDS):
                k = input_index(lane, field, K, LAYOUT)
                if LAYOUT.group_spans_fields:
                    if starts_group(field, LAYOUT):
                        scale, zero = load_grid(
                            *(scales, scale_range, zeros, row, start, part, field, inside, K, LAYOUT, BLOCK_L, PARTS)
                        )
                else:
                    scale = load_scale(scales, scale_range, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
                    zero = load_zero(zeros, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
                code = decode_field(one, two, three, field, LAYOUT)
                value = dequantize(code, scale, zero, levels, row, inside, LAYOUT)
                inputs = tl.load(x_row + k, mask=seen & (lane < lanes) & (k < K), other=0)
                total = tl.dot(inputs, tl.trans(value.to(inputs.dtype)), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    bias,
    out,
    M,
    N,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N), SPLIT); all ``M <= BLOCK_M`` rows at once, BLOCK_N rows of W, BLOCK_L lanes a step."""
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None].to(tl.int64)
    total = gemv_sum(
        *(x + m * K, m < M, weight, scales, scale_range, zeros, levels, row, row < N, K),
        *(split * BLOCK_L, row_lanes(K, EVEN, LAYOUT), EVEN, LAYOUT, SPLIT * BLOCK_L, BLOCK_L),
    )
    _store(out, bias, split, m, n[None, :], total, M, N, SPLIT)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    bias,
    out,
    M,
    N,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT); programs that share weights run side by side."""
    split = tl.program_id(2)
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n[:, None].to(tl.int64)
    total = gemm_sum(
        *(x + m.to(tl.int64) * K, m < M, weight, scales, scale_range, zeros, levels, row, row < N, K),
        *(split * BLOCK_L, row_lanes(K, EVEN, LAYOUT), EVEN, LAYOUT, SPLIT * BLOCK_L, BLOCK_L),
    )
    _store(out, bias, split, m, n[None, :], total, M, N, SPLIT)


@triton.jit(do_not_specialize=["M"])
def add_kernel(shares, bias, out, M, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds ``shares`` (SPLIT, M, N), float32, and the bias (N,) into ``out`` (M, N), in the order of the splits."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = M.to(tl.int64) * N
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLIT):
        total += tl.load(shares + split * size + place, mask=place < size, other=0)
    if bias is not None:
        total += tl.load(bias + place % N, mask=place < size, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)
