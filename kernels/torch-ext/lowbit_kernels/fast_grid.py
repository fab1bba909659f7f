"""Scales and zero points of one step of the fast NVIDIA kernel, as the tiles that its sums are multiplied with.

In groups of 32 a block of 64 inputs has two groups side by side: their scales are loaded together, as wide as the rows
of a step allow, and so are bytes of zero points. A zero point becomes the number that :mod:`.fast_asm` makes of the
same code, by its bits where that is exact.
"""

import triton
import triton.language as tl

from .decode import decode_scale, load_zero
from .fast_asm import code_position


@triton.constexpr_function
def unit(form, layout, window):
    """What sums of values have to be multiplied with."""
    if layout.table != "none":
        return 2.0**14 if layout.name == "fp4" and form != "magic" else 1.0
    position = code_position(form, layout.bits, 0, window)
    return 2.0 ** {"subnormal": 24 - position, "lop3": 0, "magic": -position}[form]


@triton.constexpr_function
def in_pairs(layout, columns):
    """Whether the groups of a block are loaded together: where a step has many."""
    return columns >= 4 and layout.group == 32 and layout.scale in ("float16", "bfloat16", "float32", "log8")


@triton.constexpr_function
def _columns_in_byte(layout):
    """Pairs of zero points in a byte, 0 where they do not fill it."""
    return {1: 4, 2: 2, 4: 1}.get(layout.bits, 0) if layout.zeros == "int" else 0


@triton.jit
def _shift(code, FORM: tl.constexpr):
    """What has to be subtracted from a value for each unit of its input, float32: of zero points of at most 4 bits."""
    if FORM == "subnormal":
        value = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORM == "magic":
        value = ((code << 16) | 0x43000000).to(tl.float32, bitcast=True)  # 128 + code
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def stored_scales(scales, row, step, K, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Those of the GROUPS groups of 32 of a step, as they are stored, and the groups' numbers: (BLOCK_N, GROUPS)."""
    group = step * GROUPS + tl.arange(0, GROUPS)[None, :]
    groups = (K + 31) // 32
    if EVEN:
        scale = tl.load(scales + row * tl.multiple_of(groups, GROUPS) + group)
    else:
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0)
    return scale, group


@triton.jit
def pair_grid(
    scales,
    scale_range,
    zeros,
    row,
    step,
    K,
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Scales of the first and second group of every block of a step, then shifts: tiles (BLOCK_N, COLUMNS) or less.

    Sums are then in units of :func:`unit`: what they are multiplied with does not change from one group to the next.
    """
    N: tl.constexpr = row.shape[0]
    GROUPS: tl.constexpr = 2 * COLUMNS
    UNIT: tl.constexpr = unit(FORM, LAYOUT, WINDOW)
    OFFSET: tl.constexpr = 0.0 if FORM != "magic" else 256.0 if LAYOUT.bits == 8 else 128.0
    PER: tl.constexpr = _columns_in_byte(LAYOUT)
    scale, group = stored_scales(scales, row, step, K, GROUPS, EVEN)
    groups = (K + 31) // 32
    if EVEN:
        groups = tl.multiple_of(groups, GROUPS)
        stored = tl.full((1, 1), 1, tl.int1)
    else:
        stored = group < groups
    first, second = tl.split(decode_scale(scale, scale_range, LAYOUT).reshape(N, COLUMNS, 2))
    if LAYOUT.zeros == "fixed":
        shift = tl.full((1, 1), LAYOUT.fixed_zero / UNIT + OFFSET, tl.float32)
        found = (first, second, shift, shift)
    elif PER > 0:
        BYTES: tl.constexpr = COLUMNS // PER
        byte = step * BYTES + tl.arange(0, BYTES)[None, :]
        size = (groups * LAYOUT.bits + 7) // 8
        if EVEN:
            size = tl.multiple_of(size, BYTES)
            stream = tl.load(zeros + row * size + byte)
        else:
            stream = tl.load(zeros + row * size + byte, mask=byte < size, other=0)
        stream = stream.to(tl.int32)
        if PER > 1:
            stream = stream[:, :, None] >> (tl.arange(0, PER) * (2 * LAYOUT.bits))[None, None, :]
            stream = stream.reshape(N, COLUMNS)
        MASK: tl.constexpr = (1 << LAYOUT.bits) - 1
        found = (first, second, _shift(stream & MASK, FORM), _shift((stream >> LAYOUT.bits) & MASK, FORM))
    else:
        zero = load_zero(zeros, row, group, stored, K, LAYOUT)
        third, fourth = tl.split((zero * (1.0 / UNIT) + OFFSET).reshape(N, COLUMNS, 2))
        found = (first, second, third, fourth)
    return found
