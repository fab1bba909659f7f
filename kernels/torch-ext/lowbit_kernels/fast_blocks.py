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

from .fast_asm import AND_OR, code_position, constraints
from .fast_grid import (
    BLOCKS,
    computed_once,
    groups_of,
    power_exponents,
    relative_scale,
    step_offset,
    stored_zeros,
)

BRAIN = tl.constexpr(20)  # in bfloat16 scales are multiplied by 2**20, and differences by its inverse: both have room


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
def power(exponent):
    """2**exponent, float32, for int32 ones from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _stored(scales, row, step, K, LAYOUT: tl.constexpr, EVEN: tl.constexpr):
    """Scales of the blocks of a step, as they are stored: (rows, BLOCKS, groups of a block)."""
    GROUPS: tl.constexpr = groups_of(LAYOUT)
    group = tl.arange(0, BLOCKS)[None, :, None] * GROUPS + tl.arange(0, GROUPS)[None, None, :]
    groups = (K + LAYOUT.group - 1) // LAYOUT.group
    row = row[:, :, None]
    if EVEN:
        place = row * tl.multiple_of(groups, BLOCKS * GROUPS) + group
        scale = tl.load(scales + place + step_offset(step, BLOCKS * GROUPS))
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
            stored = _stored(scales, row, step, K, LAYOUT, EVEN)
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
def factors(scale_range, exponent, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """What :func:`_pairs` takes to multiply scales by ``2**exponent``."""
    if LAYOUT.scale == "log8":
        width, least = power_exponents(scale_range, exponent, LAYOUT)
        found = (width * 2.0**24, least)
    elif (LAYOUT.scale == "float16" or LAYOUT.scale == "e4m3") and tl.float16 == DTYPE:
        # Its powers of two end at 2**15.
        some = tl.minimum(exponent, 15)[:, :, None]
        rest = exponent[:, :, None] - some
        found = (_halves(power(some).to(tl.float16)), _halves(power(rest).to(tl.float16)))
    else:
        found = (power(exponent)[:, :, None],)
    return found


@triton.jit
def _halves(value):
    """A float16 in both halves of an int32."""
    return value.to(tl.uint16, bitcast=True).to(tl.int32) * 0x10001


@triton.constexpr_function
def _count(scale):
    """How many scales a text takes: as many as fill a register, but two at least."""
    return 4 if scale in ("log8", "e4m3") else 2


@triton.constexpr_function
def _registers(scale):
    """Registers that they are in; those of e8m0 come as float32."""
    return 2 if scale in ("float32", "e8m0") else 1


@triton.constexpr_function
def _pairs_asm(scale, brain, alone, by):
    """Text for :func:`_pairs` with ``by`` factors; a result for each scale.

    Operands: registers of scales, then of each factor one for each scale.
    """
    count, rounded = _count(scale), f"cvt.rn.{'bf16' if brain else 'f16'}x2.f32 x, y, x;"
    first = count + _registers(scale)
    lines = ["mov.b32 o, 0;", "mov.b16 n, 0;"]
    for pair in range(count // 2):
        if scale == "log8":  # codes become float16 first, of 2**-24 times their value
            lines += [f"prmt.b32 p, ${count}, o, {0x4140 + 0x0202 * pair};", "mov.b32 {a, b}, p;"]
            for name, half in (("x", "a"), ("y", "b")):
                lines.append(f"cvt.f32.f16 {name}, {half};")
                lines.append(f"fma.rn.f32 {name}, {name}, ${first}, ${first + count};")
                lines.append(f"ex2.approx.ftz.f32 {name}, {name};")
            lines += [rounded, "set.ne.u32.f16x2 p, p, o;", "and.b32 x, x, p;"]  # code 0 is 0
        else:
            if scale == "e4m3":  # as float16 of 2**-8 times their value: bits, moved
                lines += [f"prmt.b32 x, ${count}, o, {0x1404 + 0x2020 * pair};", "shr.b32 p, x, 1;"]
                lines += ["and.b32 p, p, 0x3F803F80;", f"lop3.b32 p, x, 0x80008000, p, {AND_OR};"]
            else:
                lines.append(f"mov.b32 p, ${count};")
            if scale in ("float16", "e4m3") and not brain:
                lines.append("mov.b32 x, p;")
                lines += [f"mul.f16x2 x, x, ${first + i * count};" for i in range(by)]
            else:
                lines.append("mov.b32 {a, b}, p;")
                for name, half, register in (("x", "a", "p"), ("y", "b", f"${count + 1}")):
                    if _registers(scale) == 2:
                        lines.append(f"mov.b32 {name}, {register};")
                    elif scale == "bfloat16":
                        lines.append(f"mov.b32 {name}, {{n, {half}}};")
                    else:
                        lines.append(f"cvt.f32.f16 {name}, {half};")
                    lines.append(f"mul.f32 {name}, {name}, ${first};")
                lines.append(rounded)
        if alone:
            lines += [f"prmt.b32 ${2 * pair}, x, o, 0x1010;", f"prmt.b32 ${2 * pair + 1}, x, o, 0x3232;"]
        else:
            lines += [f"mov.b32 ${2 * pair}, x;", f"mov.b32 ${2 * pair + 1}, x;"]
    return " ".join(["{ .reg .b16 a, b, n; .reg .b32 o, p, x, y;", *lines, "}"])


@triton.jit
def _pairs(stored, by, SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """Scales (rows, BLOCKS, groups) times factors, as ``DTYPE``, by pairs: a tuple of tiles (rows, BLOCKS), int32."""
    N: tl.constexpr = stored.shape[0]
    GROUPS: tl.constexpr = stored.shape[2]
    TEXT: tl.constexpr = _pairs_asm(SCALE, tl.bfloat16 == DTYPE, GROUPS == 1, len(by))
    PACK: tl.constexpr = _count(SCALE)
    COUNT: tl.constexpr = constraints(_registers(SCALE) + PACK * len(by), PACK)
    asked = (stored,) + by  # noqa: RUF005 (Triton has no other way to join tuples)
    pairs = tl.inline_asm_elementwise(TEXT, COUNT, asked, dtype=tl.int32, is_pure=True, pack=PACK)
    if GROUPS > 1:  # a pair is there for each of its two
        pairs, _ = tl.split(pairs.reshape(N, BLOCKS, GROUPS // 2, 2))
    if GROUPS == 4:
        found = tl.split(pairs)
    else:
        found = (pairs.reshape(N, BLOCKS),)
    return found


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

    A tuple of tiles (rows, BLOCKS), int32: pairs of the first two groups of each block, then of the others. A group
    alone is in both halves.
    """
    stored = _stored(scales, row, step, K, LAYOUT, EVEN)
    if LAYOUT.scale == "e8m0":
        stored = relative_scale(stored, LAYOUT)
    SCALE: tl.constexpr = LAYOUT.scale  # no text is passed by itself before Triton 3.7
    return _own(_pairs(stored, by, SCALE, DTYPE), WARPS)


@triton.jit
def _own(tiles, WARPS: tl.constexpr):
    found = ()
    for index in tl.static_range(len(tiles)):
        found = found + (computed_once(in_order(tiles[index], WARPS)),)  # noqa: RUF005
    return found


@triton.constexpr_function
def _offset_asm(place):
    """Text: ``2**-12`` of float zero points, and their scales; to ``zero point * scale * 2**(place - 24)``.

    In an order in which the greatest zero point of float16 can be times the greatest scale.
    """
    first, last = (exponent + 15 << 10 for exponent in (-4, place - 8))
    lines = [f"mov.b32 t, {first * 0x10001};", "mul.f16x2 t, $2, t;", "mul.f16x2 t, $1, t;"]
    return " ".join(["{ .reg .b32 t, u;", *lines, f"mov.b32 u, {last * 0x10001};", "mul.f16x2 $0, t, u; }"])


@triton.jit
def zero_pairs(zeros, own_scales, row, step, K, LAYOUT: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr):
    """Zero points in the same way: as :func:`.fast_grid.stored_zeros`, float ones times their scales."""
    if LAYOUT.zeros == "float":
        TEXT: tl.constexpr = _offset_asm(code_position("subnormal", LAYOUT.bits, 0, 8))
        by = (tl.full((1, 1, 1), 0x0C000C00, tl.int32),)  # 2**-12, twice
        SCALE: tl.constexpr = "float16"
        pairs = _pairs(_stored(zeros, row, step, K, LAYOUT, EVEN), by, SCALE, tl.float16)
        found = ()
        for index in tl.static_range(len(pairs)):
            asked = (in_order(pairs[index], WARPS), own_scales[index])
            pair = tl.inline_asm_elementwise(TEXT, constraints(2), asked, dtype=tl.int32, is_pure=True, pack=1)
            found = found + (computed_once(pair),)  # noqa: RUF005
    else:
        found = _own(stored_zeros(zeros, row, step, K, LAYOUT, EVEN), WARPS)
    return found
