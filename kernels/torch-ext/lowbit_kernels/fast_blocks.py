"""Scales and zero points of :mod:`.fast_scaled`: every thread loads those of what it multiplies, and nothing is moved.

A thread of a quad multiplies one block of 64 inputs of some rows of W. A tile with a column for each of four blocks is
shared out in that way by the compiler, only with other rows for each thread; so rows are asked for in the order in
which they come to be right (:func:`own_rows`), and then called by their names (:func:`_in_order`). A tile is loaded
with the groups of a block as a dimension of its own: of one shape with lanes of weights, it would be shared out as
those are.

Two groups side by side make a pair of halves, the first in the low one. Each tile of pairs ends in
:func:`.fast_grid.computed_once`: the compiler looks for what an operand of a product is made of back to a conversion
between layouts, and gives up, and moves weights, where it finds a split tile before one.
"""

import triton
import triton.language as tl

from .fast_asm import code_position, constraints, lift_of, powers
from .fast_grid import BLOCKS, computed_once, groups_of, is_apart, relative_scale, step_offset, stored_zeros
from .fast_scales import pairs_of


@triton.jit
def own_rows(N: tl.constexpr, WARPS: tl.constexpr):
    """Rows 0 to N - 1 in the order in which a tile (N, BLOCKS) has to have them: (N,)."""
    at = tl.arange(0, N)
    return at // (16 * WARPS) * (16 * WARPS) + at // 8 % WARPS * 16 + at // (8 * WARPS) % 2 * 8 + at % 8


@triton.jit
def in_order(tile, WARPS: tl.constexpr):
    """A tile (N, columns) of :func:`own_rows` with rows as they are in W."""
    N: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    tile = tile.reshape(N // (16 * WARPS), 2, WARPS, 8, COLUMNS).permute(0, 2, 1, 3, 4)
    return tile.reshape(N, COLUMNS)


@triton.jit
def _stored(scales, row, step, K, LAYOUT: tl.constexpr, EVEN: tl.constexpr, OTHER: tl.constexpr):
    """Scales of the blocks of a step, as they are stored, or float zero points: (rows, BLOCKS, groups of a block)."""
    GROUPS: tl.constexpr = groups_of(LAYOUT)
    group = tl.arange(0, BLOCKS)[None, :, None] * GROUPS + tl.arange(0, GROUPS)[None, None, :]
    groups = (K + LAYOUT.group - 1) // LAYOUT.group
    row = row[:, :, None]
    if EVEN:
        place = row * tl.multiple_of(groups, BLOCKS * GROUPS) + group
        scale = tl.load(scales + place + step_offset(step, BLOCKS * GROUPS, OTHER))
    else:
        group += step * (BLOCKS * GROUPS)
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0)
    return scale


@triton.jit
def _floor(value):
    """The exponent of float32 numbers, int32."""
    return ((value.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def row_exponent(
    scales,
    scale_range,
    levels,
    row,
    split,
    steps,
    K,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """That of the power of two which brings the greatest scale of what is summed to 2**14 or more: (rows, 1) or one.

    Where levels are 1 or more, so that no product is above what float16 can be, it brings it to less.
    """
    if LAYOUT.scale == "log8":
        most = tl.exp2(tl.load(scale_range) + 254 * tl.load(scale_range + 1))
    else:
        found = tl.zeros((row.shape[0], BLOCKS, groups_of(LAYOUT)), tl.float32)
        for step in tl.range(split, steps, SPLIT):
            stored = _stored(scales, row, step, K, LAYOUT, EVEN, 0)
            found = tl.maximum(found, tl.abs(relative_scale(stored, LAYOUT)))
        most = tl.max(tl.max(found, axis=2), axis=1, keep_dims=True)
    # Two factors of float16 make up to 2**30.
    LEAST: tl.constexpr = -16 if LAYOUT.scale == "float16" or LAYOUT.scale == "e4m3" else -98
    exponent = 14 - tl.maximum(_floor(most), LEAST)
    if LAYOUT.table != "none":
        level = tl.max(tl.abs(tl.load(levels + tl.arange(0, 1 << LAYOUT.bits)).to(tl.float32)))
        exponent -= tl.maximum(_floor(level) + 1, 0)
    return exponent


@triton.jit
def scale_pairs(
    scales,
    by,
    row,
    step,
    K,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Scales of a step times their power of two, for ``row`` in the order of :func:`own_rows`.

    A tuple of tiles (rows, BLOCKS), int32: pairs of the first two groups of each block, then of the others, but see
    :func:`.fast_grid.is_apart`. A group alone is in both halves.
    """
    SCALE: tl.constexpr = LAYOUT.scale  # no text is passed by itself before Triton 3.7
    stored = _stored(scales, row, step, K, LAYOUT, EVEN, 0)
    return _own(pairs_of(stored, by, SCALE, DTYPE, is_apart(LAYOUT), lift_of(LAYOUT, tl.bfloat16 == DTYPE)), WARPS)


@triton.jit
def _own(tiles, WARPS: tl.constexpr):
    found = ()
    for index in tl.static_range(len(tiles)):
        found = found + (computed_once(in_order(tiles[index], WARPS)),)  # noqa: RUF005
    return found


@triton.constexpr_function
def _offset_asm(place, lift):
    """Text: ``2**-12`` of float zero points, and their scales; to ``zero point * scale * 2**(place - 24)``."""
    return f"{{ .reg .b32 t; mov.b32 t, {powers(place - 12, False, lift)}; mul.f16x2 t, $2, t; mul.f16x2 $0, $1, t; }}"


@triton.constexpr_function
def _offsets_asm(place, lift):
    """Text: pairs of float zero points, and of their scales as bfloat16; to what is added to codes times scales.

    Two bfloat16 for each, which together have what one lacks: a pair of the first, and one of the second. A code is
    ``2**(place - 133)`` of a unit.
    """
    lines = [f"mov.b32 c, {0x80000000 | 1 << 16 + place};", f"mov.b32 d, {0x80000000 | 1 << 16 + place + lift};"]
    lines += ["mov.b16 n, 0;", "mov.b32 {a, b}, $2;", "cvt.f32.f16 x, a;", "cvt.f32.f16 y, b;"]
    lines += ["mul.f32 x, x, c;", "mul.f32 y, y, d;"]
    lines += ["mov.b32 {a, b}, $3;", "mov.b32 u, {n, a};", "mov.b32 v, {n, b};"]
    lines += ["mul.f32 p, x, u;", "mul.f32 q, y, v;", "cvt.rn.bf16x2.f32 t, q, p;", "mov.b32 $0, t;"]
    lines += ["mov.b32 {a, b}, t;", "mov.b32 p, {n, a};", "neg.f32 p, p;", "mov.b32 q, {n, b};", "neg.f32 q, q;"]
    lines += ["fma.rn.f32 p, x, u, p;", "fma.rn.f32 q, y, v, q;", "cvt.rn.bf16x2.f32 $1, q, p;"]
    return " ".join(["{ .reg .b16 a, b, n; .reg .b32 c, d, p, q, t, u, v, x, y;", *lines, "}"])


@triton.constexpr_function
def _offset_results(dtype):
    return (tl.int32,) * (1 if dtype == tl.float16 else 2)


@triton.jit
def _float_offsets(
    zeros, own_scales, row, step, K, LAYOUT: tl.constexpr, DTYPE: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr
):
    """What float zero points add to codes times their scales, (rows, BLOCKS): pairs, in bfloat16 then second ones."""
    SCALE: tl.constexpr = "float16"
    PLACE: tl.constexpr = code_position("subnormal", LAYOUT.bits, 0, 8)
    LIFT: tl.constexpr = lift_of(LAYOUT, tl.bfloat16 == DTYPE)
    if tl.float16 == DTYPE:
        by = (tl.full((1, 1, 1), 0x0C000C00, tl.int32),)  # 2**-12, twice
        TEXT: tl.constexpr = _offset_asm(PLACE, LIFT)
    else:
        by = ()
        TEXT: tl.constexpr = _offsets_asm(PLACE, LIFT)
    RESULTS: tl.constexpr = _offset_results(DTYPE)
    COUNT: tl.constexpr = constraints(2, len(RESULTS))
    pairs = pairs_of(_stored(zeros, row, step, K, LAYOUT, EVEN, 1), by, SCALE, tl.float16, False, 0)
    found = ()
    others = ()
    for index in tl.static_range(len(pairs)):
        asked = (in_order(pairs[index], WARPS), own_scales[index])
        pair = tl.inline_asm_elementwise(TEXT, COUNT, asked, dtype=RESULTS, is_pure=True, pack=1)
        found = found + (computed_once(pair[0]),)  # noqa: RUF005
        if len(RESULTS) == 2:
            others = others + (computed_once(pair[1]),)  # noqa: RUF005
    return found + others


@triton.jit
def zero_pairs(
    zeros, own_scales, row, step, K, LAYOUT: tl.constexpr, DTYPE: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr
):
    """Zero points in the same way: as :func:`.fast_grid.stored_zeros`, or :func:`_float_offsets`."""
    if LAYOUT.zeros == "float":
        found = _float_offsets(zeros, own_scales, row, step, K, LAYOUT, DTYPE, WARPS, EVEN)
    else:
        LIFT: tl.constexpr = lift_of(LAYOUT, tl.bfloat16 == DTYPE)
        found = _own(stored_zeros(zeros, row, step, K, LAYOUT, EVEN, LIFT), WARPS)
    return found
