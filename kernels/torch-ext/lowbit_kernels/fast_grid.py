"""Scales and zero points of one step of the fast NVIDIA kernel, as the tiles that its sums are multiplied with.

In groups of 32 a block of 64 inputs has two groups side by side: their scales are loaded together, as wide as the rows
of a step allow, and so are bytes of zero points. A zero point becomes the number that :mod:`.fast_asm` makes of the
same code, by its bits where that is exact.
"""

import triton
import triton.language as tl

from .decode import load_zero
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


@triton.jit
def _shift(code, LAYOUT: tl.constexpr, FORM: tl.constexpr):
    """What has to be subtracted from a value for each unit of its input, float32; ``code`` as in stored_zeros."""
    PLACE: tl.constexpr = code_position("subnormal", LAYOUT.bits, 0, 8)
    if FORM == "subnormal":
        value = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORM == "magic" and LAYOUT.bits == 8:
        value = ((code << 15) | 0x43800000).to(tl.float32, bitcast=True)  # 256 + code
    elif FORM == "magic":
        MOVED: tl.constexpr = 16 + code_position(FORM, LAYOUT.bits, 0, 8) - PLACE
        value = ((code << MOVED) | 0x43000000).to(tl.float32, bitcast=True)  # 128 + code * 2**t
    else:
        value = (code >> PLACE).to(tl.float32)
    return value


@triton.jit
def turned(step, SIZE: tl.constexpr):
    """``step * SIZE``, int64, of which the compiler does not know how it grows."""
    hidden = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [step], dtype=tl.int32, is_pure=True, pack=1)
    return hidden.to(tl.int64) * SIZE


@triton.jit
def stored_scales(scales, row, step, K, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """Those of the GROUPS groups of 32 of a step, as they are stored, and the groups' numbers: (BLOCK_N, GROUPS)."""
    first = tl.arange(0, GROUPS)[None, :]
    group = step * GROUPS + first
    groups = (K + 31) // 32
    if EVEN:
        scale = tl.load(scales + row * tl.multiple_of(groups, GROUPS) + first + turned(step, GROUPS))
    else:
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0)
    return scale, group


@triton.jit
def power_scale(code, scale_range, exponent):
    """As :func:`.decode.decode_scale` of log8, times ``2**exponent`` (int32), by fewer instructions; float32."""
    width = tl.load(scale_range + 1)
    code = code.to(tl.float32)
    power = tl.exp2(code * width + (tl.load(scale_range) + exponent.to(tl.float32) - width))
    return power * tl.minimum(code, 1.0)  # code 0 is 0


@triton.jit
def stored_zeros(zeros, row, step, K, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Zero points of the first and second group of the COLUMNS blocks of a step: (BLOCK_N, COLUMNS) each, int32.

    They stand where field 0 has its code in :mod:`.fast_asm`, without other bits.
    """
    BITS: tl.constexpr = LAYOUT.bits
    PLACE: tl.constexpr = code_position("subnormal", BITS, 0, 8)
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    size = ((K + 31) // 32 * BITS + 7) // 8
    if BITS == 8:
        first_byte = tl.arange(0, 2 * COLUMNS)[None, :]
        if EVEN:
            found = tl.load(zeros + row * tl.multiple_of(size, 2 * COLUMNS) + first_byte + turned(step, 2 * COLUMNS))
        else:
            byte = step * (2 * COLUMNS) + first_byte
            found = tl.load(zeros + row * size + byte, mask=byte < size, other=0)
        first, second = tl.split(found.to(tl.int32).reshape(found.shape[0], COLUMNS, 2))
    else:  # those of a block lie in one byte or two, with 7 bits in three, of those that a step has
        STEP: tl.constexpr = COLUMNS * BITS // 4
        PARTS: tl.constexpr = 3 if BITS == 7 else 1 if 8 % BITS == 0 else 2
        bit = tl.arange(0, COLUMNS)[None, :] * (2 * BITS)
        stream = tl.zeros((1, 1), tl.int32)
        for part in tl.static_range(PARTS):
            first_byte = tl.minimum(bit // 8 + part, STEP - 1)
            if EVEN:
                if BITS == 4:
                    found = tl.load(
                        zeros
                        + row * tl.multiple_of(size, COLUMNS)
                        + tl.arange(0, COLUMNS)[None, :]
                        + turned(step, STEP)
                    )
                else:
                    found = tl.load(zeros + row * size + first_byte + turned(step, STEP))
            else:
                byte = step * STEP + first_byte
                found = tl.load(zeros + row * size + byte, mask=byte < size, other=0)
            stream += found.to(tl.int32) << (8 * part + 8)
        stream = stream >> (bit % 8 + (8 - PLACE))
        first, second = stream & MASK, (stream >> BITS) & MASK
    return first, second


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
    scale, group = stored_scales(scales, row, step, K, GROUPS, EVEN)
    groups = (K + 31) // 32
    if EVEN:
        groups = tl.multiple_of(groups, GROUPS)
        stored = tl.full((1, 1), 1, tl.int1)
    else:
        stored = group < groups
    if LAYOUT.scale == "log8":
        scale = power_scale(scale, scale_range, tl.full((1, 1), 0, tl.int32))
    else:
        scale = scale.to(tl.float32)
    first, second = tl.split(scale.reshape(N, COLUMNS, 2))
    if LAYOUT.zeros == "fixed":
        shift = tl.full((1, 1), LAYOUT.fixed_zero / UNIT + OFFSET, tl.float32)
        found = (first, second, shift, shift)
    elif LAYOUT.zeros == "float":
        zero = load_zero(zeros, row, group, stored, K, LAYOUT)
        third, fourth = tl.split((zero * (1.0 / UNIT) + OFFSET).reshape(N, COLUMNS, 2))
        found = (first, second, third, fourth)
    else:
        third, fourth = stored_zeros(zeros, row, step, K, LAYOUT, COLUMNS, EVEN)
        found = (first, second, _shift(third, LAYOUT, FORM), _shift(fourth, LAYOUT, FORM))
    return found
