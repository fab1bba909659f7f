"""Weights in the order of their inputs: a tile of lanes is spread over a dimension of fields, see :mod:`.decode`.

For kernels whose output runs along the inputs; ternary rows have no blocks and go by :mod:`.ternary`. A block's scales
and zero points are loaded once for each run of inputs that shares them.
"""

import triton
import triton.language as tl

from .decode import decode_field, dequantize, group_of, load_lanes, load_scale, load_zero


@triton.jit
def _over_fields(word, BLOCKS: tl.constexpr, LAYOUT: tl.constexpr):
    """Lanes (BLOCK_N, BLOCKS * lanes), as often as they have fields: (BLOCK_N, BLOCKS, fields, lanes)."""
    word = word.reshape(word.shape[0], BLOCKS, 1, LAYOUT.lanes)
    return word.broadcast_to(word.shape[0], BLOCKS, 16 // LAYOUT.planes[0], LAYOUT.lanes)


@triton.jit
def _over_runs(value, FIELDS: tl.constexpr):
    """A value of every group (BLOCK_N, BLOCKS, groups, 1) of a block, for all fields: (BLOCK_N, BLOCKS, FIELDS, 1)."""
    TIMES: tl.constexpr = FIELDS // value.shape[2]
    value = value.broadcast_to(value.shape[0], value.shape[1], value.shape[2], TIMES)
    return value.reshape(value.shape[0], value.shape[1], FIELDS, 1)


@triton.jit
def values_of(
    one,
    two,
    three,
    scales,
    scale_range,
    zeros,
    levels,
    row,
    inside,
    first,
    K,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights (BLOCK_N, BLOCK_K) of whole blocks from input ``first``, from lanes that :func:`load_lanes` loaded."""
    BLOCKS: tl.constexpr = BLOCK_K // 64
    LANES: tl.constexpr = LAYOUT.lanes
    row = row[:, :, None, None]
    inside = inside[:, :, None, None]
    block = first + 64 * tl.arange(0, BLOCKS)[None, :, None, None]
    field = tl.arange(0, 16 // LAYOUT.planes[0])[None, None, :, None]
    k = block + field * LANES + tl.arange(0, LANES)[None, None, None, :]
    # The first input of every run that shares a group, as few as the group allows.
    if LAYOUT.group == 0 or LAYOUT.group >= 64:
        start = block
    elif LAYOUT.group > LANES:
        start = block + LAYOUT.group * tl.arange(0, 64 // LAYOUT.group)[None, None, :, None]
    elif LAYOUT.group == LANES:
        start = block + field * LANES
    else:
        start = k
    group = group_of(start, LAYOUT)
    scale = load_scale(scales, scale_range, row, group, inside & (start < K), K, LAYOUT)
    zero = load_zero(zeros, row, group, inside & (start < K), K, LAYOUT)
    if LAYOUT.group > LANES and LAYOUT.group < 64:
        if LAYOUT.scale != "none":
            scale = _over_runs(scale, 16 // LAYOUT.planes[0])
        if LAYOUT.zeros != "fixed":
            zero = _over_runs(zero, 16 // LAYOUT.planes[0])
    if len(LAYOUT.planes) > 1:
        two = _over_fields(two, BLOCKS, LAYOUT)
        three = _over_fields(three, BLOCKS, LAYOUT)
    code = decode_field(_over_fields(one, BLOCKS, LAYOUT), two, three, field, LAYOUT)
    value = dequantize(code, scale, zero, levels, row, inside, LAYOUT)
    value = tl.where(inside & (k < K), value, 0.0).to(DTYPE).reshape(row.shape[0], BLOCKS * 64)
    return value


@triton.jit
def load_values(
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    row,
    inside,
    first,
    K,
    DTYPE: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights (BLOCK_N, BLOCK_K) from input ``first``, in ``DTYPE``; 0 behind K and in rows that are not ``inside``.

    ``row`` and ``inside`` are (BLOCK_N, 1); ``first`` and BLOCK_K are multiples of 64.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 64
    LANES: tl.constexpr = LAYOUT.lanes
    one, two, three = load_lanes(
        *(weight, row, first // 64 * LANES, 0, inside, K, 0, None, EVEN, LAYOUT, BLOCKS * LANES, 1)
    )
    return values_of(
        *(one, two, three, scales, scale_range, zeros, levels, row, inside, first, K, DTYPE, LAYOUT, BLOCK_K)
    )
