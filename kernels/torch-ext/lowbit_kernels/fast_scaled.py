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
  or more, for codes of 8 bits too, and there is room for all scales; the difference is exact.

What makes this worth it is that scales come to where they are used for less than they save there. A tensor core's
operand gives each quad of threads the same rows of W, and each thread of it every fourth piece of their inputs, which
would make each thread want all groups. The order of inputs is free, though, if x has the same: a step takes four blocks
of 64 inputs, and each thread of a quad has one of them, with one, two or four groups of its own.

A weight is rounded to the dtype of x, as in a float layer of that dtype, and the scale, where it has more bits; in
float16 the zero point times the scale, too.
"""

import triton
import triton.language as tl

from .decode import decode_scale
from .fast_asm import constraints, results, scaled_asm, sides
from .fast_fields import _inputs, all_turns, on_sides, operands, parts
from .fast_grid import power_exponents, power_scale, step_offset, stored_scales, stored_zero, stored_zeros, unit
from .layout import Layout
from .matmul import _store

BLOCKS = tl.constexpr(4)  # of 64 inputs a step, one for each thread of a quad
BRAIN = tl.constexpr(20)  # in bfloat16 scales are multiplied by 2**20, and differences by its inverse: both have room


def in_weights(layout: Layout, form: str) -> bool:
    """Whether :func:`scaled_kernel` reads such weights, in place of the form "subnormal" or, for bfloat16, "magic".

    Larger groups take less where they are in sums.
    """
    scales = layout.scale in ("float16", "bfloat16", "float32", "log8")
    grid = layout.name == "int" and scales and layout.zeros != "float"
    # In groups of 16 next to a plane of one bit, the compiler moves weights between threads, for more than this saves.
    return form != "lop3" and grid and layout.group in ((16, 32, 64) if layout.planes[-1] in (2, 4) else (32, 64))


@triton.constexpr_function
def _made_once(layout):
    """Whether what weights take of zero points is made once and then goes to the threads that want it.

    Else it goes there as bytes. Making it once takes less, but in some formats, and with other versions of Triton in
    more of them, the compiler then makes weights in one place, too, and moves those.
    """
    return layout.bits in (3, 5, 7) and layout.group != 16


@triton.constexpr_function
def _run(layout):
    """Inputs that a thread takes side by side: the compiler goes by the narrowest load that an operand is made of."""
    bytes = layout.scale == "log8" or (layout.zeros == "int" and not _made_once(layout))
    return 4 if bytes else 2


@triton.jit
def _quartered(tile, LANES: tl.constexpr, RUN: tl.constexpr):
    """The lanes (rows, 4 * LANES) of four blocks in the order in which each thread of a quad has those of one block."""
    if RUN == 4:
        tile = tile.reshape(tile.shape[0], 4, LANES // 8, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)
    else:
        tile = tile.reshape(tile.shape[0], 4, LANES // 4, 2, 2).permute(0, 2, 3, 1, 4)
    return tile.reshape(tile.shape[0], 4 * LANES)


@triton.constexpr_function
def _group(layout, field):
    """The group of a block that a field belongs to."""
    return field * (32 if layout.bits == 8 else 16) // layout.group


@triton.constexpr_function
def _pair(layout, field):
    return _group(layout, field) // 2


@triton.constexpr_function
def _texts(layout, field, brain):
    asked = layout.planes, field, _group(layout, field) % 2, layout.zeros != "fixed", brain
    return tuple(scaled_asm(*asked, side) for side in range(sides(layout.planes)))


@triton.jit
def _values(words, grid, FIELD: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    BRAINS: tl.constexpr = BRAIN if tl.bfloat16 == DTYPE else None
    TEXTS: tl.constexpr = _texts(LAYOUT, FIELD, BRAINS)
    return on_sides(words, grid, TEXTS, LAYOUT, DTYPE)


@triton.jit
def _power(exponent):
    """2**exponent, float32, for int32 ones from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(
    scales,
    scale_range,
    row,
    split,
    steps,
    K,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):
    """That of the power of two which brings the greatest scale of what is summed to 2**14 or more: (rows, 1) or one."""
    if LAYOUT.scale == "log8":
        most = tl.exp2(tl.load(scale_range) + 254 * tl.load(scale_range + 1))
    else:
        found = tl.zeros((row.shape[0], BLOCKS * 64 // LAYOUT.group), tl.float32)
        for step in tl.range(split, steps, SPLIT):
            stored = stored_scales(scales, row, step, K, BLOCKS * 64 // LAYOUT.group, LAYOUT, EVEN)
            found = tl.maximum(found, tl.abs(decode_scale(stored, scale_range, LAYOUT)))
        most = tl.max(found, axis=1, keep_dims=True)
    LEAST: tl.constexpr = -16 if LAYOUT.scale == "float16" else -98  # two factors of float16 make up to 2**30
    floor = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return 14 - tl.maximum(floor, LEAST)


@triton.constexpr_function
def _powers_asm(brain):
    """Text for :func:`_powers`; the codes become float16 first, of ``2**-24`` times their value."""
    lines = ["mov.b32 u, 0;", "prmt.b32 p, $1, $2, 0x5410;", "mov.b32 {a, b}, p;"]
    for name, half in (("x", "a"), ("y", "b")):
        lines += [f"cvt.f32.f16 {name}, {half};", f"fma.rn.f32 {name}, {name}, $3, $4;"]
        lines.append(f"ex2.approx.ftz.f32 {name}, {name};")
    lines.append(f"cvt.rn.{'bf16' if brain else 'f16'}x2.f32 x, y, x;")
    lines += ["set.ne.u32.f16x2 p, p, u;", "and.b32 $0, x, p;"]  # code 0 is 0
    return " ".join(["{ .reg .b16 a, b; .reg .b32 p, u, x, y;", *lines, "}"])


@triton.jit
def _powers(first, second, exponents, DTYPE: tl.constexpr):
    """As :func:`.fast_grid.power_scale` of two tiles of codes, as :func:`_halves`."""
    TEXT: tl.constexpr = _powers_asm(tl.bfloat16 == DTYPE)
    asked = (first.to(tl.int32), second.to(tl.int32), exponents[0] * 2.0**24, exponents[1])
    return tl.inline_asm_elementwise(TEXT, constraints(4), asked, dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _rounded_asm(stored, brain):
    """Text for :func:`_rounded` of two scales: registers of them, then of their powers of two."""
    stored = str(stored)
    lines = ["mov.b32 x, $1;", "mov.b32 y, $2;"] if stored == "fp32" else ["mov.b16 z, 0; mov.b32 {a, b}, $1;"]
    for name, half in (("x", "a"), ("y", "b")):
        if stored == "fp16":
            lines.append(f"cvt.f32.f16 {name}, {half};")
        elif stored == "bf16":
            lines.append(f"mov.b32 {name}, {{z, {half}}};")
    first = 3 if stored == "fp32" else 2
    lines += [f"mul.f32 x, x, ${first}; mul.f32 y, y, ${first + 1};"]
    lines.append(f"cvt.rn.{'bf16' if brain else 'f16'}x2.f32 $0, y, x;")
    return " ".join(["{ .reg .b16 a, b, z; .reg .b32 x, y;", *lines, "}"])


@triton.jit
def _rounded(scale, power, DTYPE: tl.constexpr):
    """``scale * power``, float32, as ``DTYPE``. In Triton's terms the compiler would move what is made of it."""
    TEXT: tl.constexpr = _rounded_asm(scale.dtype, tl.bfloat16 == DTYPE)
    COUNT: tl.constexpr = constraints(4 if scale.dtype == tl.float32 else 3)
    return tl.inline_asm_elementwise(TEXT, COUNT, (scale, power), dtype=results(DTYPE), is_pure=True, pack=2)[0]


@triton.jit
def _halves(first, second, DTYPE: tl.constexpr):
    """Two tiles of ``DTYPE`` or float32 as one, int32: the first in the low halves."""
    if first.dtype == tl.float32:
        TEXT: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if tl.float16 == DTYPE else "cvt.rn.bf16x2.f32 $0, $2, $1;"
        pairs = tl.inline_asm_elementwise(TEXT, "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1)
    else:
        pairs = first.to(tl.uint16, bitcast=True).to(tl.int32) | (second.to(tl.uint16, bitcast=True).to(tl.int32) << 16)
    return pairs


@triton.jit
def _by_pairs(tile, GROUPS: tl.constexpr):
    """Tiles (rows, BLOCKS), a tuple, of one (rows, BLOCKS * pairs) of pairs of the GROUPS groups of each block."""
    if GROUPS == 4:
        first, second = tl.split(tile.reshape(tile.shape[0], BLOCKS, 2))
        found = (first, second)
    else:
        found = (tile,)
    return found


@triton.jit
def _scales(scales, exponents, row, step, K, exponent, LAYOUT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Scales of the groups of the blocks of a step, times their power of two: :func:`_by_pairs` of :func:`_halves`."""
    GROUPS: tl.constexpr = 64 // LAYOUT.group
    scale = stored_scales(scales, row, step, K, BLOCKS * GROUPS, LAYOUT, EVEN)
    if LAYOUT.scale == "float16" and tl.float16 == DTYPE:  # whose powers of two end at 2**15
        some = tl.minimum(exponent, 15)
        scale = scale * _power(some).to(tl.float16) * _power(exponent - some).to(tl.float16)
    elif LAYOUT.scale != "log8":
        scale = _rounded(scale, _power(exponent), DTYPE)
    elif GROUPS == 1:
        scale = power_scale(scale, exponents)
    if GROUPS == 1:
        pairs = _halves(scale, scale, DTYPE)
    else:
        first, second = tl.split(scale.reshape(scale.shape[0], BLOCKS * GROUPS // 2, 2))
        if LAYOUT.scale == "log8":
            pairs = _powers(first, second, exponents, DTYPE)
        else:
            pairs = _halves(first, second, DTYPE)
    return _by_pairs(pairs, GROUPS)


@triton.jit
def _zeros(zeros, row, step, K, LAYOUT: tl.constexpr, EVEN: tl.constexpr):
    """Their zero points in the same way."""
    GROUPS: tl.constexpr = 64 // LAYOUT.group
    if GROUPS == 1:
        pairs = stored_zero(zeros, row, step, K, BLOCKS, LAYOUT, _made_once(LAYOUT))
    else:
        pairs = stored_zeros(zeros, row, step, K, LAYOUT, BLOCKS * GROUPS // 2, _made_once(LAYOUT), EVEN)
    return _by_pairs(pairs, GROUPS)


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
    bias,
    out,
    M,
    N,
    K,
    LAYOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT); ``EVEN`` says that whole steps of 256 inputs fill K.

    Arguments and ``out`` are those of :func:`.matmul.gemm_kernel`.
    """
    LANES: tl.constexpr = 32 if LAYOUT.bits == 8 else 16
    SIDES: tl.constexpr = sides(LAYOUT.planes)
    DTYPE: tl.constexpr = x.dtype.element_ty
    RUN: tl.constexpr = _run(LAYOUT)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1)[:, None].to(tl.int64)
    x_row = x + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K
    seen = (m < M)[:, None]
    blocks = (K + 63) // 64
    if EVEN:
        blocks = tl.multiple_of(blocks, 4)
    start = weight + row * (blocks * (4 * LAYOUT.bits))
    steps = tl.cdiv(blocks, 4)
    turns = all_turns(weight, K, LAYOUT, 4)
    if tl.bfloat16 == DTYPE:
        exponent = tl.full((1, 1), BRAIN, tl.int32)
    else:
        exponent = _exponent(scales, scale_range, row, split, steps, K, LAYOUT, SPLIT, EVEN)

    exponents = power_exponents(scale_range, exponent, LAYOUT)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in tl.range(0, tl.cdiv(steps - split, SPLIT), num_stages=STAGES):
        step = split + turn * SPLIT
        words = operands(start, step, blocks, turns, LAYOUT, 4, 1, EVEN)[0]
        found = _for_lanes(_scales(scales, exponents, row, step, K, exponent, LAYOUT, EVEN, DTYPE), LANES // SIDES)
        if LAYOUT.zeros != "fixed":
            shifts = _for_lanes(_zeros(zeros, row, step, K, LAYOUT, EVEN), LANES // SIDES)
        for field in tl.static_range(64 // LANES):
            if LAYOUT.zeros == "fixed":
                grid = (found[_pair(LAYOUT, field)],)
            else:
                grid = (found[_pair(LAYOUT, field)], shifts[_pair(LAYOUT, field)])
            values = _values(words, grid, field, LAYOUT, DTYPE)
            inputs = _inputs(x_row, step_offset(step, 256), seen, step * 256, K, field, LANES, 4, 1, EVEN)
            inputs = parts(inputs, SIDES)
            for side in tl.static_range(SIDES):
                value = _quartered(values[side], LANES // SIDES, RUN)
                total = tl.dot(value, _quartered(inputs[side], LANES // SIDES, RUN).trans(), total)
    if tl.float16 == DTYPE:
        total *= _power(-exponent) * unit("subnormal", LAYOUT, 8)
    _store(out, bias, split, m[None, :], n[:, None], total, M, N, SPLIT)
