"""``x @ W.T + bias`` with a packed ``W``: matrix-vector for up to 4 rows, tiles of ``tl.dot`` for more.

Both walk a row of ``W`` in lane order (:mod:`.decode`): lanes are loaded once, and each of their fields is a tile
of weights whose inputs are picked out of ``x`` to match. Everything is summed in float32.

A small problem has too few output tiles to fill a GPU, so the inputs can be split among programs. Each then writes its
sum into a buffer of its own and a second kernel adds them in order: no atomics, so the result is the same every time.

Matrix-vector multiplies in float32, the weight unrounded; tiles round the weight to the dtype of ``x``, as a float
layer's weight would be.

Fields are taken one after another in straight code, except where that needs more registers than there are: products of
float32, that most targets compute without tensor cores, and more than one row of x with planes of one bit. There the
fields are a loop, as long as something says that the compiler does not know, or it would be none.
"""

import torch
import triton
import triton.language as tl

from .decode import (
    decode_field,
    dequantize,
    group_of,
    input_index,
    lane_tile,
    lanes_before,
    load_grid,
    load_lanes,
    load_last,
    load_scale,
    load_zero,
    outputs_of,
    own_lanes,
    row_lanes,
    starts_group,
)

_ADD_BLOCK = 1024


@triton.jit
def _store(out, bias, split, m, n, value, M, N, SPLIT: tl.constexpr):
    """The result, or this split's share (split, M, N); ``value`` over ``m`` (BLOCK_M, 1) and ``n`` (1, BLOCK_N)."""
    if bias is not None and SPLIT == 1:
        value += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    address = (split * M + m).to(tl.int64) * N + n
    tl.store(out + address, value.to(out.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def _grid(
    scales,
    scale_range,
    zeros,
    row,
    start,
    part,
    field,
    k,
    inside,
    here,
    K,
    LAYOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Scales and zero points of a field: one for a block, or where groups end within a field for each input ``k``."""
    if LAYOUT.group_spans_fields:
        scale, zero = load_grid(
            *(scales, scale_range, zeros, row, start, part, field, inside, K, LAYOUT, BLOCK_L, PARTS)
        )
    else:
        scale = load_scale(scales, scale_range, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
        zero = load_zero(zeros, row, group_of(k, LAYOUT), here & (k < K), K, LAYOUT)
    return scale, zero


@triton.jit
def _add_field(total, value, x_row, k, mask):
    """``total`` plus weights, float32, times their inputs: of three dimensions without a sum over the last one yet."""
    inputs = tl.load(x_row + k, mask=mask, other=0)
    if len(total.shape) == 3:
        total += value[None, :, :] * inputs.to(tl.float32)[:, None, :]
    else:
        total = tl.dot(inputs, tl.trans(value.to(inputs.dtype)), total, input_precision="ieee")
    return total


@triton.jit
def _sum(
    total,
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
    before,
    first,
    lanes,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LOOPED: tl.constexpr,
):
    FIELDS: tl.constexpr = LAYOUT.fields
    PARTS: tl.constexpr = LAYOUT.sum_parts
    stop = lanes
    if LAYOUT.ternary and EVEN > 1:
        stop += before
    for start in range(first, stop, STEP):
        last = load_last(weight, row, start, inside, K, EVEN, LAYOUT, BLOCK_L, PARTS)
        for part in tl.static_range(PARTS):
            lane = lane_tile(start, part, before, LAYOUT, BLOCK_L, PARTS)
            here = own_lanes(lane, lanes, EVEN, LAYOUT) & inside
            one, two, three = load_lanes(
                *(weight, row, start, part, inside, K, before, last[part], EVEN, LAYOUT, BLOCK_L, PARTS)
            )
            place = (scales, scale_range, zeros, row, start, part)
            if LOOPED:
                for field in tl.range(tl.where(K > 0, FIELDS, 0), num_stages=1):
                    k = input_index(lane, field, lanes, LAYOUT)
                    scale, zero = _grid(*place, field, k, inside, here, K, LAYOUT, BLOCK_L, PARTS)
                    code = decode_field(one, two, three, field, LAYOUT)
                    value = dequantize(code, scale, zero, levels, row, inside, LAYOUT)
                    mask = seen & own_lanes(lane, lanes, EVEN, LAYOUT) & (k < K)
                    total = _add_field(total, value, x_row, k, mask)
            else:
                for field in tl.static_range(FIELDS):
                    k = input_index(lane, field, lanes, LAYOUT)
                    if not LAYOUT.group_spans_fields or starts_group(field, LAYOUT):
                        scale, zero = _grid(*place, field, k, inside, here, K, LAYOUT, BLOCK_L, PARTS)
                    code = decode_field(one, two, three, field, LAYOUT)
                    value = dequantize(code, scale, zero, levels, row, inside, LAYOUT)
                    mask = seen & own_lanes(lane, lanes, EVEN, LAYOUT) & (k < K)
                    total = _add_field(total, value, x_row, k, mask)
    return total


@triton.constexpr_function
def _many_registers(rows, layout):
    """Whether straight code takes more registers than there are: with several rows, for codes with a 1-bit plane."""
    return rows > 1 and layout.bits in (1, 3, 5, 7)


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
    before,
    first,
    lanes,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums (BLOCK_M, BLOCK_N) of rows of x times rows of W, over BLOCK_L lanes every STEP from ``first`` to ``lanes``.

    ``x_row`` points at rows of x, (BLOCK_M, 1), of which those ``seen`` exist; ``row`` (BLOCK_N, 1) are rows of W, all
    :func:`.decode.lanes_before` which are ``before``.
    """
    LOOPED: tl.constexpr = _many_registers(x_row.shape[0], LAYOUT)
    total = _sum(
        tl.zeros((x_row.shape[0], row.shape[0], BLOCK_L // LAYOUT.sum_parts), dtype=tl.float32),
        *(x_row, seen, weight, scales, scale_range, zeros, levels, row, inside, K, before, first, lanes),
        *(EVEN, LAYOUT, STEP, BLOCK_L, LOOPED),
    )
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
    before,
    first,
    lanes,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """As :func:`gemv_sum`, by ``tl.dot``."""
    return _sum(
        tl.zeros((x_row.shape[0], row.shape[0]), dtype=tl.float32),
        *(x_row, seen, weight, scales, scale_range, zeros, levels, row, inside, K, before, first, lanes),
        *(EVEN, LAYOUT, STEP, BLOCK_L, x_row.dtype.element_ty == tl.float32),
    )


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
    n = outputs_of(tl.program_id(0), BLOCK_N, EVEN, LAYOUT)
    row = n[:, None].to(tl.int64)
    total = gemv_sum(
        *(x + m * K, m < M, weight, scales, scale_range, zeros, levels, row, row < N, K),
        *(lanes_before(tl.program_id(0), K, EVEN, LAYOUT), split * BLOCK_L, row_lanes(K, EVEN, LAYOUT)),
        *(EVEN, LAYOUT, SPLIT * BLOCK_L, BLOCK_L),
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
    n = outputs_of(tl.program_id(1), BLOCK_N, EVEN, LAYOUT)
    row = n[:, None].to(tl.int64)
    total = gemm_sum(
        *(x + m.to(tl.int64) * K, m < M, weight, scales, scale_range, zeros, levels, row, row < N, K),
        *(lanes_before(tl.program_id(1), K, EVEN, LAYOUT), split * BLOCK_L, row_lanes(K, EVEN, LAYOUT)),
        *(EVEN, LAYOUT, SPLIT * BLOCK_L, BLOCK_L),
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


def add_shares(shares: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """``out`` (M, N) = the sum of ``shares`` (SPLIT, M, N), float32, plus the bias (N,)."""
    split, M, N = shares.shape
    add_kernel[(triton.cdiv(M * N, _ADD_BLOCK),)](shares, bias, out, M, N, SPLIT=split, BLOCK=_ADD_BLOCK)
