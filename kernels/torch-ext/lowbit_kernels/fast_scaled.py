"""The fast product for many rows of x and groups of 32: scales and zero points go into the weights, not into sums.

With few rows of x a scale for a sum is less than one for its weights. With 16 rows and a group of 32 it is more: two
instructions for each of 16 sums of 32 weights, where one or two make two weights ``(q - z) * s``. So here a field,
which read as a half-precision number is the code times a power of two (:mod:`.fast_asm`), becomes the weight by
multiply-adds of pairs, and all groups go into one sum.

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
from .fast_asm import code_position, constraints, operand_registers, results, scaled_asm
from .fast_fields import _inputs, _operands, all_turns
from .fast_grid import power_scale, stored_scales, stored_zeros, turned, unit
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


@triton.constexpr_function
def _moved(layout, field):
    """What a scale is multiplied with for a field that stands further up than the first one."""
    return 2.0 ** (code_position("subnormal", layout.bits, 0, 8) - code_position("subnormal", layout.bits, field, 8))


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
def _value(operands, scale, shift, FIELD: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    BRAINS: tl.constexpr = BRAIN if tl.bfloat16 == DTYPE else None
    TEXT: tl.constexpr = scaled_asm(LAYOUT.planes, FIELD, BRAINS, LAYOUT.zeros != "fixed")
    COUNT: tl.constexpr = constraints(operand_registers(LAYOUT.planes) + 2)
    operands = operands + (scale, shift)  # noqa: RUF005 (Triton has no other way to join tuples)
    return tl.inline_asm_elementwise(TEXT, COUNT, operands, dtype=results(DTYPE), is_pure=True, pack=2)[0]


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
            stored, _ = stored_scales(scales, row, step, K, 8, EVEN)
            found = tl.maximum(found, tl.abs(decode_scale(stored, scale_range, LAYOUT)))
        most = tl.max(found, axis=1, keep_dims=True)
    LEAST: tl.constexpr = -16 if LAYOUT.scale == "float16" else -98  # two factors of float16 make up to 2**30
    floor = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    return 14 - tl.maximum(floor, LEAST)


@triton.jit
def _pair(tile):
    """The first and second group of each block, (rows, 4) each, of a tile (rows, 8)."""
    return tl.split(tile.reshape(tile.shape[0], 4, 2))


@triton.jit
def _scale_pair(
    scales, scale_range, row, step, K, exponent, LAYOUT: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr
):
    """Scales of both groups of the blocks of a step, times their power of two, (rows, 4) each."""
    scale, _ = stored_scales(scales, row, step, K, 8, EVEN)
    if LAYOUT.scale == "log8":
        scale = power_scale(scale, scale_range, exponent)
    elif LAYOUT.scale == "float16" and tl.float16 == DTYPE:  # whose powers of two end at 2**15
        some = tl.minimum(exponent, 15)
        scale = scale * _power(some).to(tl.float16) * _power(exponent - some).to(tl.float16)
    else:
        scale = scale.to(tl.float32) * _power(exponent)
    return _pair(scale.to(DTYPE))


@triton.jit
def _zero_pair(zeros, row, step, K, LAYOUT: tl.constexpr, EVEN: tl.constexpr):
    """Zero points of both groups of the blocks of a step, (rows, 4) each: float16 of bits where field 0 has its own."""
    first, second = stored_zeros(zeros, row, step, K, LAYOUT, 4, EVEN)
    return first.to(tl.int16).to(tl.float16, bitcast=True), second.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _shift(scale, zero, LAYOUT: tl.constexpr):
    """What :func:`.fast_asm.scaled_asm` takes besides ``scale``; ``zero`` is of :func:`_zero_pair` if it is stored."""
    if scale.dtype == tl.bfloat16:
        if LAYOUT.zeros == "fixed":
            shift = tl.full(scale.shape, -LAYOUT.fixed_zero * 2.0**-BRAIN, tl.bfloat16)
        else:
            shift = zero  # its bits
    elif LAYOUT.zeros == "fixed":
        # 2**-24 of a unit, and half of it in 1 bit, is less than a float16 can be: in two steps.
        shift = scale * 2.0**-12 * -(LAYOUT.fixed_zero * 4096.0 / unit("subnormal", LAYOUT, 8))
    else:
        shift = -zero * scale
    return shift


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

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for turn in tl.range(0, tl.cdiv(steps - split, SPLIT), num_stages=STAGES):
        step = split + turn * SPLIT
        words = _operands(start, step, blocks, turns, LAYOUT, 4, EVEN)
        operands = ()
        for index in tl.static_range(len(words)):
            operands = operands + (_quartered(words[index], LANES, RUN),)  # noqa: RUF005
        found = _scale_pair(scales, scale_range, row, step, K, exponent, LAYOUT, EVEN, DTYPE)
        zeros_found = found
        if LAYOUT.zeros != "fixed":
            zeros_found = _zero_pair(zeros, row, step, K, LAYOUT, EVEN)
        for field in tl.static_range(64 // LANES):
            scale = _for_lanes(found[field * LANES // 32], LANES, RUN)
            shift = _shift(scale, _for_lanes(zeros_found[field * LANES // 32], LANES, RUN), LAYOUT)
            if tl.float16 == DTYPE:
                scale *= _moved(LAYOUT, field)
            value = _value(operands, scale, shift, field, LAYOUT, DTYPE)
            inputs = _inputs(x_row + turned(step, 256), seen, step * 256, K, field, LANES, 4, 1, EVEN)
            total = tl.dot(value, _quartered(inputs, LANES, RUN).trans(), total)
    if tl.float16 == DTYPE:
        total *= _power(-exponent) * unit("subnormal", LAYOUT, 8)
    _store(out, bias, split, m[None, :], n[:, None], total, M, N, SPLIT)
