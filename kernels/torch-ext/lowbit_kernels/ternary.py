"""Ternary rows where the output runs along their inputs: lanes are loaded once, and each of their fields is stored.

A field of neighbouring lanes is a run of neighbouring inputs, but neighbouring fields are far apart, so nothing is
gained by walking the inputs in order as :mod:`.natural` does. Rows that do not begin at 16 bytes are read from the 16
bytes that they begin in, see :func:`.layout.even`: a program's lanes lie differently from row to row. Where rows are
summed over, a program takes those that lie alike and stores a share of the sum, of which there are as many as there are
places to begin; a second kernel adds them (:func:`.matmul.add_shares`).
"""

import triton
import triton.language as tl

from .decode import (
    decode_field,
    dequantize,
    group_of,
    lane_tile,
    lanes_before,
    load_lanes,
    load_scale,
    own_lanes,
    row_lanes,
)


@triton.jit
def _field_of(
    word,
    scale,
    field,
    lane,
    lanes,
    scales,
    scale_range,
    levels,
    row,
    inside,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Weights, float32, of one field of lanes, their inputs, and which of those exist; ``scale`` is the row's."""
    k = lanes * field + lane
    here = own_lanes(lane, lanes, EVEN, LAYOUT) & (k < K)
    if LAYOUT.group > 0:
        scale = load_scale(scales, scale_range, row, group_of(k, LAYOUT), inside & here, K, LAYOUT)
    code = decode_field(word, word, word, field, LAYOUT)
    return dequantize(code, scale, LAYOUT.fixed_zero, levels, row, inside, LAYOUT), k, here


@triton.jit
def store_ternary_rows(
    out,
    r,
    weight,
    scales,
    scale_range,
    levels,
    row,
    inside,
    R,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Rows ``row`` (BLOCK_R, 1) of W to rows ``r`` of ``out`` (R, K), NaN for those not ``inside``: BLOCK_L lanes."""
    FIELDS: tl.constexpr = LAYOUT.fields
    start = tl.program_id(1) * BLOCK_L
    lanes = row_lanes(K, EVEN, LAYOUT)
    before = lanes_before(row, K, EVEN, LAYOUT)
    lane = lane_tile(start, 0, before, LAYOUT, BLOCK_L, 1)
    read = inside & (r < R)
    word = load_lanes(weight, row, start, 0, read, K, before, None, EVEN, LAYOUT, BLOCK_L, 1)[0]
    scale = load_scale(scales, scale_range, row, (row * 0).to(tl.int32), read, K, LAYOUT)
    for field in tl.static_range(FIELDS):
        value, k, here = _field_of(
            *(word, scale, field, lane, lanes, scales, scale_range, levels, row, read, K, EVEN, LAYOUT)
        )
        value = tl.where(inside, value, float("nan")).to(out.dtype.element_ty)
        tl.store(out + r * K + k, value, mask=(r < R) & here)


@triton.jit
def store_ternary_gradient(
    out,
    m,
    gradient_row,
    seen,
    weight,
    scales,
    scale_range,
    levels,
    row,
    M,
    N,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Rows ``m`` (BLOCK_M, 1) of a gradient (.., N) times N rows of W from ``row``: BLOCK_L lanes, all their inputs.

    ``out`` is (M, K), or where ``EVEN`` is more than 1 shares of it (EVEN, M, K), float32.
    """
    FIELDS: tl.constexpr = LAYOUT.fields
    EACH: tl.constexpr = EVEN if EVEN > 1 else 1
    share = tl.program_id(2)
    start = tl.program_id(1) * BLOCK_L
    lanes = row_lanes(K, EVEN, LAYOUT)
    before = lanes_before(row + share, K, EVEN, LAYOUT)
    lane = lane_tile(start, 0, before, LAYOUT, BLOCK_L, 1)
    totals = ()
    for _field in tl.static_range(FIELDS):
        totals = totals + (tl.zeros((gradient_row.shape[0], BLOCK_L), tl.float32),)  # noqa: RUF005
    for first in range(share, N, EACH * BLOCK_N):
        n = first + EACH * tl.arange(0, BLOCK_N)
        outputs = tl.load(gradient_row + n[None, :], mask=seen & (n[None, :] < N), other=0)
        n = n[:, None]
        inside = n < N
        n = row + n.to(tl.int64)
        word = load_lanes(weight, n, start, 0, inside, K, before, None, EVEN, LAYOUT, BLOCK_L, 1)[0]
        scale = load_scale(scales, scale_range, n, (n * 0).to(tl.int32), inside, K, LAYOUT)
        added = ()
        for field in tl.static_range(FIELDS):
            value = _field_of(
                *(word, scale, field, lane, lanes, scales, scale_range, levels, n, inside, K, EVEN, LAYOUT)
            )
            total = tl.dot(outputs, value[0].to(outputs.dtype), totals[field], input_precision="ieee")
            added = added + (total,)  # noqa: RUF005
        totals = added
    for field in tl.static_range(FIELDS):
        k = lanes * field + lane
        here = seen & own_lanes(lane, lanes, EVEN, LAYOUT) & (k < K)
        tl.store(out + (share.to(tl.int64) * M + m) * K + k, totals[field].to(out.dtype.element_ty), mask=here)
