"""The fast product for several rows of x and small groups: scales and zero points go into the weights, not into sums.

For two rows of x a scale for a sum is less than one for its weights. For 16 rows and a group of 32 it is more: two
instructions for each of 16 sums of 32 weights, where one or two make two weights ``(q - z) * s``; already for three,
whose sums do not fit a tensor core's columns next to those of other groups. So here a field, which read as a
half-precision number is the code times a power of two (:mod:`.fast_asm`), becomes the weight by multiply-adds of pairs,
and all groups go into one sum.

- float16: ``q * s - z * s`` by one. The field is ``q * 2**-24`` or more. A scale must neither be rounded away nor be
  too large when that is taken into it: those of a row are multiplied by a power of two by which the greatest is from
  2**14 up to 2**15, and the sum by its inverse.
- bfloat16: ``(q - z) * s`` by two, since its few bits would leave too little of ``z * s``. The field is ``q * 2**-133``
  or more, for codes of 8 bits too, and there is room for all scales; the difference is exact. Of zero points that are
  floats it is not: there it is ``(q * s - a) - b``, where ``a`` is ``z * s`` rounded and ``b`` what that leaves out.

What makes this worth it is that scales come to where they are used for less than they save there. A tensor core's
operand gives each quad of threads the same rows of W, and each thread of it every fourth piece of their inputs, which
would make each thread want all groups. The order of inputs is free, though, if x has the same: a step takes four blocks
of 64 inputs, and each thread of a quad has one of them, with one, two or four groups of its own (:mod:`.fast_blocks`).

In groups of 16 a field is a group, and a pair of levels out of a table (:func:`.fast_asm.table_asm`) has one of each of
two: there levels are multiplied by their scales, too, and it is done for any number of rows.

A weight is rounded to the dtype of x, as in a float layer of that dtype, and the scale, where it has more bits; in
float16 the zero point times the scale, too.
"""

import triton
import triton.language as tl

from .fast_asm import constraints, lift_of, results, scaled_asm, sides
from .fast_blocks import in_order, own_rows, row_exponent, scale_pairs, zero_pairs
from .fast_fields import (
    _level,
    _paired,
    all_turns,
    level_tables,
    moved_e2m1,
    on_sides,
    operands,
    parts,
)
from .fast_grid import BLOCKS, as_loaded, is_apart, shared_scale, step_offset, unit
from .fast_pairs import pair_table
from .fast_scales import BRAIN, ROOM, brain_exponent, factors, power
from .layout import Layout
from .matmul import _store


def in_weights(layout: Layout, form: str) -> bool:
    """Whether :func:`scaled_kernel` reads such weights, in place of the form "subnormal" or, for bfloat16, "magic".

    Larger groups take less where they are in sums.
    """
    if form == "lop3" or layout.scale == "none":
        return False
    if layout.name == "int":
        return layout.group in (16, 32, 64)
    return layout.group == 16 and layout.bits <= 4 and layout.table == "tensor" and not moved_e2m1(form, layout)


@triton.jit
def _quartered(tile, LANES: tl.constexpr):
    """The lanes (rows, 4 * LANES) of four blocks in the order in which each thread of a quad has those of one block."""
    tile = tile.reshape(tile.shape[0], 4, LANES // 4, 2, 2).permute(0, 2, 3, 1, 4)
    return tile.reshape(tile.shape[0], 4 * LANES)


@triton.constexpr_function
def _sides(layout):
    """How many texts the lanes of a block take: as of :mod:`.fast_asm`, or one for each group of a field."""
    return 2 if layout.bits == 8 and layout.group == 16 else sides(layout.planes)


@triton.constexpr_function
def _group(layout, field, side):
    """The group of a block that a side of a field belongs to."""
    return (field * 32 + side * 16 if layout.bits == 8 else field * 16) // layout.group


@triton.constexpr_function
def _pair(layout, field):
    """In which tile of pairs the group of a field is, and in which half of it that of each side."""
    groups = [_group(layout, field, side) for side in range(_sides(layout))]
    if is_apart(layout):
        return groups[0] % 2, tuple(group // 2 for group in groups)
    return groups[0] // 2, tuple(group % 2 for group in groups)


@triton.constexpr_function
def _texts(layout, field, brain):
    halves, lift = _pair(layout, field)[1], lift_of(layout, brain is not None)
    return tuple(
        scaled_asm(layout.planes, field, half, layout.zeros, brain, side, lift) for side, half in enumerate(halves)
    )


@triton.jit
def _values(words, grid, FIELD: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    BRAINS: tl.constexpr = BRAIN if tl.bfloat16 == DTYPE else None
    TEXTS: tl.constexpr = _texts(LAYOUT, FIELD, BRAINS)
    return on_sides(words, grid, TEXTS, LAYOUT, DTYPE)


@triton.constexpr_function
def _times_asm(brain):
    """A product of bfloat16 is a multiply-add of minus zero: PTX has it alone from sm_90 on."""
    return "{ .reg .b32 u; mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, $1, $2, u; }" if brain else "mul.f16x2 $0, $1, $2;"


@triton.jit
def _times(level, pair, DTYPE: tl.constexpr):
    """Pairs of levels of two fields of a lane times the scales of their groups."""
    TEXT: tl.constexpr = _times_asm(tl.bfloat16 == DTYPE)
    return tl.inline_asm_elementwise(TEXT, constraints(3), (level, pair), dtype=results(DTYPE), is_pure=True, pack=2)[0]


@triton.jit
def _inputs(x_row, offset, seen, first, K, LANES: tl.constexpr, EVEN: tl.constexpr):
    """The inputs (M, 4 * LANES) that belong to each field of a step of four blocks: a tuple, by one load.

    Fields are its first dimension, so that what a thread loads is of one row of x where that can be.
    """
    lane = tl.arange(0, 4 * LANES)[None, None, :]
    k = tl.arange(0, 64 // LANES)[:, None, None] * LANES + lane // LANES * 64 + lane % LANES
    if EVEN:
        x = tl.load(x_row[None, :, :] + k + offset)
    else:
        x = tl.load(x_row[None, :, :] + k + offset, mask=seen[None, :, :] & (k + first < K), other=0)
    x = x.permute(1, 2, 0)
    if LANES == 32:
        found = tl.split(x)
    else:
        even, odd = tl.split(x.reshape(x.shape[0], 64, 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        found = (first, second, third, fourth)
    return found


@triton.jit
def _for_lanes(tiles, LANES: tl.constexpr):
    """A value of each block, (rows, BLOCKS) of each tile, for its lanes."""
    found = ()
    for index in tl.static_range(len(tiles)):
        tile = tiles[index]
        tile = tile[:, :, None].broadcast_to(tile.shape[0], BLOCKS, LANES).reshape(tile.shape[0], BLOCKS * LANES)
        found = found + (tile,)  # noqa: RUF005
    return found


@triton.jit(do_not_specialize=["M"])
def scaled_kernel(
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
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT); ``EVEN`` says that whole steps of 256 inputs fill K.

    Arguments and ``out`` are those of :func:`.matmul.gemm_kernel`.
    """
    LANES: tl.constexpr = 32 if LAYOUT.bits == 8 else 16
    SIDES: tl.constexpr = _sides(LAYOUT)
    DTYPE: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1)[:, None].to(tl.int64)
    own = tl.minimum(tl.program_id(1) * BLOCK_N + own_rows(BLOCK_N, WARPS), N - 1)[:, None].to(tl.int64)
    x_row = x + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K
    seen = (m < M)[:, None]
    blocks = (K + 63) // 64
    if EVEN:
        blocks = tl.multiple_of(blocks, 4)
    start = weight + row * (blocks * (4 * LAYOUT.bits))
    steps = tl.cdiv(blocks, 4)
    turns = all_turns(weight, K, LAYOUT, 4)
    if PAIRS:
        tables = (pair_table(levels, weight, K, LAYOUT, DTYPE),)
    else:
        tables = level_tables(levels, row, LAYOUT, FORM, DTYPE)
    if tl.bfloat16 == DTYPE:
        exponent = tl.full((1, 1), brain_exponent(LAYOUT), tl.int32)
    else:
        exponent = row_exponent(scales, scale_range, levels, own, split, steps, K, LAYOUT, SPLIT, EVEN)

    by = factors(scale_range, exponent, weight, K, LAYOUT, DTYPE)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = as_loaded(split, weight, K)  # a number that is known to be everyone's has to be moved to each address
    for step in tl.range(begin, steps, SPLIT, num_stages=STAGES):
        words = operands(start, step, blocks, turns, LAYOUT, 4, 1, EVEN)[0]
        own_scales = scale_pairs(scales, by, own, step, K, LAYOUT, DTYPE, WARPS, EVEN)
        found = _for_lanes(own_scales, LANES // SIDES)
        offset = step_offset(step, 256)
        inputs = _inputs(x_row, offset, seen, step * 256, K, LANES, EVEN)
        if LAYOUT.table != "none":
            for half in tl.static_range(2):
                for lane in tl.static_range(2):
                    level = _level(words, tables, lane, half, LAYOUT, DTYPE)
                    value = _quartered(_times(level, found[half], DTYPE), 16)
                    paired = _paired(inputs[2 * half], inputs[2 * half + 1], lane)
                    total = tl.dot(value, _quartered(paired, 16).trans(), total)
        else:
            shifts = ()
            if LAYOUT.zeros != "fixed":
                shifts = zero_pairs(zeros, own_scales, own, step, K, LAYOUT, DTYPE, WARPS, EVEN)
                shifts = _for_lanes(shifts, LANES // SIDES)
            for field in tl.static_range(64 // LANES):
                if LAYOUT.zeros == "fixed":
                    grid = (found[_pair(LAYOUT, field)[0]],)
                else:
                    grid = (found[_pair(LAYOUT, field)[0]], shifts[_pair(LAYOUT, field)[0]])
                if len(shifts) > len(found):
                    grid = grid + (shifts[len(found) + _pair(LAYOUT, field)[0]],)  # noqa: RUF005
                values = _values(words, grid, field, LAYOUT, DTYPE)
                given = parts(inputs[field], SIDES, LANES)
                for side in tl.static_range(SIDES):
                    value = _quartered(values[side], LANES // SIDES)
                    total = tl.dot(value, _quartered(given[side], LANES // SIDES).trans(), total)
    if tl.float16 == DTYPE:
        if LAYOUT.scale != "log8":
            exponent = in_order(exponent, WARPS)
        total *= power(-exponent) * unit(FORM, LAYOUT, 8)
    elif LAYOUT.zeros == "float":
        total *= 2.0**ROOM
    total *= shared_scale(scale_range, LAYOUT)
    _store(out, bias, split, m[None, :], n[:, None], total, M, N, SPLIT)
