"""The fast product for several rows of x and groups of 32: scales and zero points go into the weights, not into sums.

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
of 64 inputs, and each thread of a quad has one of them, with two groups of its own.

A weight is rounded to the dtype of x, as in a float layer of that dtype, and the scale, where it has more bits; in
float16 the zero point times the scale, too.
"""

import triton
import triton.language as tl

from .decode import decode_scale
from .fast_asm import constraints, operand_registers, results, scaled_asm
from .fast_fields import _inputs, _operands, all_turns
from .fast_grid import power_exponents, power_scale, step_offset, stored_scales, stored_zeros, unit
from .layout import Layout
from .matmul import _store

BLOCKS = 4  # of 64 inputs a step, one for each thread of a quad
BRAIN = tl.constexpr(20)  # in bfloat16 scales are multiplied by 2**20, and differences by its inverse: both have room


def in_weights(layout: Layout, form: str) -> bool:
    """Whether :func:`scaled_kernel` reads such weights, in place of the form "subnormal" or, for bfloat16, "magic"."""
    scales = layout.scale in ("float16", "bfloat16", "float32", "log8")
    return form != "lop3" and layout.name == "int" and layout.group == 32 and scales and layout.zeros != "float"


@triton.constexpr_function
def _run(layout):
    """Inputs that a thread takes side by side: the compiler goes by the narrowest load that an operand is made of."""
    return 4 if layout.zeros == "int" or layout.scale == "log8" else 2


@triton.jit
def _quartered(tile, LANES: tl.constexpr, RUN: tl.constexpr):
    """The lanes (rows, 4 * LANES) of four blocks in the order in which each thread of a quad has those of one block."""
    if RUN == 4:
        tile = tile.reshape(tile.shape[0], 4, LANES // 8, 2, 2, 2).permute(0, 2, 4, 1, 3, 5)
    else:
        tile = tile.reshape(tile.shape[0], 4, LANES // 4, 2, 2).permute(0, 2, 3, 1, 4)
    return tile.reshape(tile.shape[0], 4 * LANES)


@triton.jit
def _for_lanes(value, LANES: tl.constexpr, RUN: tl.constexpr):
    """A value of each block (rows, 4) for its lanes in the order of :func:`_quartered`."""
    value = value[:, None, :, None]
    return value.broadcast_to(value.shape[0], LANES // RUN, 4, RUN).reshape(value.shape[0], 4 * LANES)


@triton.jit
def _value(operands, grid, FIELD: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    LANES: tl.constexpr = 32 if LAYOUT.bits == 8 else 16
    BRAINS: tl.constexpr = BRAIN if tl.bfloat16 == DTYPE else None
    TEXT: tl.constexpr = scaled_asm(LAYOUT.planes, FIELD, FIELD * LANES // 32, LAYOUT.zeros != "fixed", BRAINS)
    COUNT: tl.constexpr = constraints(operand_registers(LAYOUT.planes) + 2 * len(grid))
    return tl.inline_asm_elementwise(TEXT, COUNT, operands + grid, dtype=results(DTYPE), is_pure=True, pack=2)[0]


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
        found = tl.zeros((row.shape[0], 8), tl.float32)
        for step in tl.range(split, steps, SPLIT):
            stored = stored_scales(scales, row, step, K, 8, EVEN)
            found = tl.maximum(found, tl.abs(decode_scale(stored, scale_range, LAYOUT)))
        most = tl.max(found, axis=1, keep_dims=True)
    LEAST: tl.constexpr = -16 if LAYOUT.scale == "float16" else -98  # two factors of float16 make up to 2**30
    floor = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return 14 - tl.maximum(floor, LEAST)


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
def _scales(scales, exponents, row, step, K, exponent, LAYOUT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """Scales of both groups of the blocks of a step, times their power of two: (rows, 4) of :func:`_halves`."""
    scale = stored_scales(scales, row, step, K, 8, EVEN)
    if LAYOUT.scale == "log8":
        scale = power_scale(scale, exponents)
    elif LAYOUT.scale == "float16" and tl.float16 == DTYPE:  # whose powers of two end at 2**15
        some = tl.minimum(exponent, 15)
        scale = scale * _power(some).to(tl.float16) * _power(exponent - some).to(tl.float16)
    else:
        scale = scale.to(tl.float32) * _power(exponent)
    first, second = tl.split(scale.reshape(scale.shape[0], 4, 2))
    return _halves(first, second, DTYPE)


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
    RUN: tl.constexpr = _run(LAYOUT)
    DTYPE: tl.constexpr = x.dtype.element_ty
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
        words = _operands(start, step, blocks, turns, LAYOUT, 4, EVEN)
        operands = ()
        for index in tl.static_range(len(words)):
            operands = operands + (_quartered(words[index], LANES, RUN),)  # noqa: RUF005
        found = _scales(scales, exponents, row, step, K, exponent, LAYOUT, EVEN, DTYPE)
        grid = (_for_lanes(found, LANES, RUN),)
        if LAYOUT.zeros != "fixed":
            grid = grid + (_for_lanes(stored_zeros(zeros, row, step, K, LAYOUT, 4, 4, EVEN), LANES, RUN),)  # noqa: RUF005
        for field in tl.static_range(64 // LANES):
            value = _value(operands, grid, field, LAYOUT, DTYPE)
            inputs = _inputs(x_row, step_offset(step, 256), seen, step * 256, K, field, LANES, 4, 1, EVEN)
            total = tl.dot(value, _quartered(inputs, LANES, RUN).trans(), total)
    if tl.float16 == DTYPE:
        total *= _power(-exponent) * unit("subnormal", LAYOUT, 8)
    _store(out, bias, split, m[None, :], n[:, None], total, M, N, SPLIT)
