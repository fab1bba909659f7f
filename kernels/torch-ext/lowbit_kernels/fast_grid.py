"""Scales and zero points of one step of the fast NVIDIA kernels, and those of :mod:`.fast` as tiles for its sums.

In groups of 32 a block of 64 inputs has two groups side by side: their scales are loaded together, as wide as the rows
of a step allow, and so are bytes of zero points. A zero point becomes the number that :mod:`.fast_asm` makes of the
same code, by its bits where that is exact.
"""

import triton
import triton.language as tl

from .decode import halves_of_e4m3, load_zero
from .fast_asm import AND_OR, code_position, constraints


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
    few = layout.table != "none" and layout.scale in ("float16", "bfloat16", "float32", "log8")
    return columns >= (2 if few else 4) and layout.group == 32 and layout.scale != "none"


@triton.constexpr_function
def has_unit(layout, columns):
    """Whether sums are multiplied by :func:`unit` after the last step, not each group's by its scale."""
    return layout.table != "none" or in_pairs(layout, columns)


@triton.jit
def _shift(code, LAYOUT: tl.constexpr, FORM: tl.constexpr):
    """What has to be added to a value for each unit of its input, float32; ``code`` as in :func:`stored_zeros`."""
    PLACE: tl.constexpr = code_position("subnormal", LAYOUT.bits, 0, 8)
    if FORM == "subnormal":
        value = (-code.to(tl.int16).to(tl.float16, bitcast=True)).to(tl.float32)
    elif FORM == "magic" and LAYOUT.bits == 8:
        value = ((code << 15) | -0x3C800000).to(tl.float32, bitcast=True)  # -256 - code
    elif FORM == "magic":
        MOVED: tl.constexpr = 16 + code_position(FORM, LAYOUT.bits, 0, 8) - PLACE
        value = ((code << MOVED) | -0x3D000000).to(tl.float32, bitcast=True)  # -128 - code * 2**t
    else:
        value = -(code >> PLACE).to(tl.float32)
    return value


@triton.constexpr_function
def _wide_asm(size):
    return f"mul.wide.u32 $0, $1, {size};"


@triton.jit
def step_offset(step, SIZE: tl.constexpr):
    """``step * SIZE``, int64, for addresses.

    The compiler, which does not see what it is, adds it to an address that it makes before the loop, by one instruction
    a load; else it carries a pointer for every load from turn to turn, by two to four.
    """
    TEXT: tl.constexpr = _wide_asm(SIZE)
    size = tl.inline_asm_elementwise(TEXT, "=l,r", [step], dtype=tl.int64, is_pure=True, pack=1)
    return tl.multiple_of(size, SIZE & -SIZE)


@triton.jit
def as_loaded(value, pointer, K):
    """``value``, a tensor, from a load that reads nothing and has it for ``other``.

    The compiler brings operands of a product into place back to loads only.
    """
    place = tl.full(value.shape, 0, tl.int32)
    return tl.load(pointer.to(tl.pointer_type(value.dtype)) + place, mask=place + K < 0, other=value)


@triton.jit
def computed_once(value):
    """``value``, 32 bits each, which the compiler then brings to where it is wanted.

    Else it brings there what it is computed from, and has every thread compute it that wants it: it takes what is not
    pure for too dear to do twice.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=1)


@triton.jit
def stored_scales(scales, row, step, K, GROUPS: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr):
    """Those of the GROUPS groups of a step, as they are stored: (BLOCK_N, GROUPS)."""
    group = tl.arange(0, GROUPS)[None, :]
    groups = (K + LAYOUT.group - 1) // LAYOUT.group
    if EVEN:
        place = scales + row * tl.multiple_of(groups, GROUPS) + group + step_offset(step, GROUPS)
        if LAYOUT.scale == "float32" and LAYOUT.group == 32 and LAYOUT.planes[-1] == 1:
            # By 16 bytes they would be shared out to threads as a plane of one bit is, and weights would be made there.
            place = tl.max_contiguous(place, [1, 2])
        scale = tl.load(place)
    else:
        group += step * GROUPS
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0)
    return scale


@triton.jit
def relative_scale(stored, LAYOUT: tl.constexpr):
    """As :func:`.decode.decode_scale`, but those of e4m3 without their :func:`shared_scale`; not for log8."""
    if LAYOUT.scale == "e4m3":
        scale = halves_of_e4m3(stored).to(tl.float32)
    elif LAYOUT.scale == "e8m0":  # code 0 is half of what code 1 is, a subnormal number
        scale = tl.maximum(stored.to(tl.int32) << 23, 0x00400000).to(tl.float32, bitcast=True)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def shared_scale(scale_range, LAYOUT: tl.constexpr):
    """What all scales of a tensor have to be multiplied with."""
    if LAYOUT.scale == "e4m3":
        scale = tl.load(scale_range) * 256.0
    else:
        scale = 1.0
    return scale


@triton.jit
def power_exponents(scale_range, exponent, LAYOUT: tl.constexpr):
    """What :func:`power_scale` needs for scales of log8 times ``2**exponent`` (int32); nothing for others."""
    if LAYOUT.scale == "log8":
        width = tl.load(scale_range + 1)
        found = (width, tl.load(scale_range) + exponent.to(tl.float32) - width)
    else:
        found = ()
    return found


@triton.jit
def power_scale(code, exponents):
    """As :func:`.decode.decode_scale` of log8, by fewer instructions; ``exponents`` is of :func:`power_exponents`."""
    code = code.to(tl.float32)
    return tl.exp2(code * exponents[0] + exponents[1]) * tl.minimum(code, 1.0)  # code 0 is 0


@triton.constexpr_function
def _bytes_of_two(bits):
    """How many bytes the zero points of two groups side by side lie in, at most."""
    return 3 if bits == 7 else 1 if 8 % bits == 0 else 2


@triton.constexpr_function
def _joined_asm(bits, place, pack):
    """Text that makes the zero points of two groups, as halves, of the bytes that they lie in; less than 8 bits.

    Registers: ``pack`` first bytes, as many second ones, with 7 bits third ones; then ``pack`` of how far to turn them.
    """
    mask, parts, lines = ((1 << bits) - 1) << place, _bytes_of_two(bits), []
    for i in range(pack):
        bytes = [f"${pack + part}" for part in range(parts)]
        if parts == 1:  # a byte alone: times this it is there twice, apart
            lines.append(f"prmt.b32 z, {bytes[0]}, 0, {0x4440 + i};")
            lines += [f"shr.b32 z, z, ${pack + 1 + i};"] if bits < 4 else []
            lines.append(f"mul.lo.u32 z, z, {1 + (1 << 16 - bits)}; and.b32 ${i}, z, {mask * 0x10001};")
            continue
        lines.append(f"prmt.b32 z, {bytes[0]}, {bytes[1]}, {i | 4 + i << 4};")
        lines += [f"prmt.b32 z, z, {bytes[2]}, {0x10 | 4 + i << 8};"] if parts == 3 else []
        lines += [f"shf.r.wrap.b32 z, z, z, ${pack + parts + i};", f"and.b32 t, z, {mask}; shl.b32 z, z, {16 - bits};"]
        lines.append(f"lop3.b32 ${i}, z, {mask << 16}, t, {AND_OR};")
    return " ".join(["{ .reg .b32 z, t;", *lines, "}"])


@triton.jit
def stored_zeros(
    zeros, row, step, K, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr, EVEN: tl.constexpr
):
    """Zero points of the 2 * COLUMNS groups of a step by pairs, (BLOCK_N, COLUMNS): int32, the first in the low half.

    They stand where field 0 has its code in :mod:`.fast_asm`, without other bits. ``ONCE`` as in :func:`computed_once`;
    else the compiler brings bytes to the threads that want them, four to a register.
    """
    BITS: tl.constexpr = LAYOUT.bits
    PLACE: tl.constexpr = code_position("subnormal", BITS, 0, 8)
    PACK: tl.constexpr = 1 if ONCE else 4
    BYTES: tl.constexpr = COLUMNS * BITS // 4
    PARTS: tl.constexpr = _bytes_of_two(BITS)
    size = ((K + LAYOUT.group - 1) // LAYOUT.group * BITS + 7) // 8
    if EVEN and 8 % BITS == 0:
        size = tl.multiple_of(size, BYTES)
    bit = tl.arange(0, COLUMNS)[None, :] * (2 * BITS)
    first_byte = tl.minimum(bit // 8, BYTES - PARTS)
    parts = ()
    for part in tl.static_range(PARTS):
        if BITS == 4 or BITS == 8:
            byte = tl.arange(0, BYTES)[None, :]
        else:
            byte = first_byte + part
        if EVEN:
            found = tl.load(zeros + row * size + byte + step_offset(step, BYTES))
        else:
            found = tl.load(zeros + row * size + step * BYTES + byte, mask=step * BYTES + byte < size, other=0)
        if PACK == 1 or BITS == 8:
            found = found.to(tl.int32)
        parts = parts + (found,)  # noqa: RUF005
    if BITS == 8:
        first, second = tl.split(parts[0].reshape(row.shape[0], COLUMNS, 2))
        pairs = first | (second << 16)
    else:
        TEXT: tl.constexpr = _joined_asm(BITS, PLACE, PACK)
        COUNT: tl.constexpr = constraints(PARTS + PACK, PACK)
        parts = parts + ((bit - 8 * first_byte - PLACE) & 31,)  # noqa: RUF005
        pairs = tl.inline_asm_elementwise(TEXT, COUNT, parts, dtype=tl.int32, is_pure=not ONCE, pack=PACK)
    return pairs


@triton.jit
def stored_zero(zeros, row, step, K, GROUPS: tl.constexpr, LAYOUT: tl.constexpr, ONCE: tl.constexpr):
    """Zero points of the GROUPS groups of a step, (BLOCK_N, GROUPS): as :func:`stored_zeros`, but each alone."""
    BITS: tl.constexpr = LAYOUT.bits
    PLACE: tl.constexpr = code_position("subnormal", BITS, 0, 8)
    size = ((K + LAYOUT.group - 1) // LAYOUT.group * BITS + 7) // 8
    bit = (step * GROUPS + tl.arange(0, GROUPS)[None, :]) * BITS
    found = tl.load(zeros + row * size + tl.minimum(bit // 8, size - 1)).to(tl.int32)
    if 8 % BITS != 0:  # it may begin in one byte and end in the next
        found |= tl.load(zeros + row * size + tl.minimum(bit // 8 + 1, size - 1)).to(tl.int32) << 8
    code = ((found >> (bit & 7)) & ((1 << BITS) - 1)) << PLACE
    if ONCE:
        code = computed_once(code)
    return code


@triton.jit
def pair_grid(
    scales,
    exponents,
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
    scale = stored_scales(scales, row, step, K, GROUPS, LAYOUT, EVEN)
    if LAYOUT.scale == "log8":
        scale = power_scale(scale, exponents)
    else:
        scale = relative_scale(scale, LAYOUT)
    first, second = tl.split(scale.reshape(N, COLUMNS, 2))
    if LAYOUT.zeros == "fixed":
        shift = tl.full((1, 1), -LAYOUT.fixed_zero / UNIT - OFFSET, tl.float32)
        found = (first, second, shift, shift)
    elif LAYOUT.zeros == "float":
        group = step * GROUPS + tl.arange(0, GROUPS)[None, :]
        zero = load_zero(zeros, row, group, group < (K + 31) // 32, K, LAYOUT)
        third, fourth = tl.split((zero * (-1.0 / UNIT) - OFFSET).reshape(N, COLUMNS, 2))
        found = (first, second, third, fourth)
    else:
        pairs = stored_zeros(zeros, row, step, K, LAYOUT, COLUMNS, True, EVEN)
        found = (first, second, _shift(pairs & 0xFFFF, LAYOUT, FORM), _shift((pairs >> 16) & 0xFFFF, LAYOUT, FORM))
    return found
