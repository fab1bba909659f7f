"""Scales and zero points of one step of the fast NVIDIA kernels, and those of :mod:`.fast` as tiles for its sums.

In groups of 32 a block of 64 inputs has two groups side by side: their scales are loaded together, as wide as the rows
of a step allow, and so are bytes of zero points. A zero point becomes the number that :mod:`.fast_asm` makes of the
same code, by its bits where that is exact.
"""

import triton
import triton.language as tl

from .decode import halves_of_e4m3
from .fast_asm import AND_OR, SELECT, code_position, constraints
from .layout import Layout

BLOCKS = tl.constexpr(4)  # of 64 inputs in a step of kernels that load the groups of a block together
OR_AND = "0xA8"  # lop3: (first | second) & third


@triton.constexpr_function
def groups_of(layout: Layout) -> int:
    """Groups in a block."""
    return 64 // layout.group


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
def _wide_asm(size, other):
    return f"mul.wide.u32 $0, $1, {size}; // {other}"


@triton.jit
def step_offset(step, SIZE: tl.constexpr, OTHER: tl.constexpr = 0):
    """``step * SIZE``, int64, for addresses.

    The compiler, which does not see what it is, adds it to an address that it makes before the loop, by one instruction
    a load; else it carries a pointer for every load from turn to turn, by two to four. Where two tensors have the same
    places, it would add it to a place for both and make two addresses of that, by five: not if ``OTHER`` differs.
    """
    TEXT: tl.constexpr = _wide_asm(SIZE, OTHER)
    size = tl.inline_asm_elementwise(TEXT, "=l,r", [step], dtype=tl.int64, is_pure=True, pack=1)
    return tl.multiple_of(size, SIZE & -SIZE)


@triton.jit
def as_loaded(value, pointer, K):
    """``value`` from a load that reads nothing and has it for ``other``; a number is int32.

    The compiler brings operands of a product into place back to loads only, and knows nothing of what is loaded.
    For what is made before a loop: the load is one instruction, which is never carried out.
    """
    if value.type.is_block():
        place = tl.full(value.shape, 0, tl.int32)
        found = tl.load(pointer.to(tl.pointer_type(value.dtype)) + place, mask=place + K < 0, other=value)
    else:
        found = tl.load(pointer.to(tl.pointer_type(tl.int32)), mask=K < 0, other=value)
    return found


@triton.jit
def computed_once(value):
    """``value``, 32 bits each, which the compiler then brings to where it is wanted.

    Else it brings there what it is computed from, and has every thread compute it that wants it: it takes what is not
    pure for too dear to do twice.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=value.dtype, is_pure=False, pack=1)


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
def _zero_unit(layout, even):
    """Bits that zero points are loaded by: no more than those of a block have.

    In groups of 16 every step begins with a whole 32 or 16 of them; elsewhere that spares too little for its registers.
    """
    size = groups_of(layout) * layout.bits
    if not even or layout.group != 16 or size <= 12:
        return 8
    return 32 if size == 32 else 16


@triton.constexpr_function
def is_apart(layout):
    """Whether pairs are of the first and third group of a block and of the others.

    Of 7 bits these are nearly as far apart as halves of a register.
    """
    return layout.name == "int" and layout.zeros == "int" and (layout.bits, layout.group) == (7, 16)


@triton.constexpr_function
def _zero_start(layout, even):
    """How many bits before the first zero point of a block its loads begin: so many fewer have to be moved."""
    return code_position("subnormal", layout.bits, 0, 8) if even and is_apart(layout) else 0


@triton.constexpr_function
def _zero_turns(layout, even):
    """Bits of the first load of zero points that belong to the block before: all that there can be."""
    size = groups_of(layout) * layout.bits
    return {(block * size - _zero_start(layout, even)) % _zero_unit(layout, even) for block in range(8)}


@triton.constexpr_function
def _zero_parts(layout, even):
    """How many loads the zero points of a block take."""
    size = _zero_start(layout, even) + groups_of(layout) * layout.bits
    return -(-(max(_zero_turns(layout, even)) + size) // _zero_unit(layout, even))


@triton.constexpr_function
def _zero_results(layout):
    """What a text makes of them: a pair of every two groups of a block."""
    return (tl.int32,) * max(groups_of(layout) // 2, 1)


@triton.constexpr_function
def _moved(target, source, left):
    return f"{'shl' if left >= 0 else 'shr'}.b32 {target}, {source}, {abs(left)};"


@triton.constexpr_function
def _zeros_asm(layout, even, lift):
    """Text for :func:`stored_zeros`: loads of a block, then, if any block needs it, how far to turn them."""
    bits, groups, unit, parts = layout.bits, groups_of(layout), _zero_unit(layout, even), _zero_parts(layout, even)
    place, pairs = code_position("subnormal", bits, 0, 8), max(groups // 2, 1)
    mask, turn = (1 << bits) - 1 << place, f"${pairs + parts}"
    lines = [f"mov.b32 z, ${pairs};"]
    joined = [0x5410] if unit == 16 else [0x3240, 0x3410, 0x4210]
    lines += [f"prmt.b32 z, z, ${pairs + 1 + i}, {by};" for i, by in enumerate(joined[: min(parts, 32 // unit) - 1])]
    if parts * unit > 32:
        lines.append(f"shf.r.wrap.b32 z, z, ${pairs + 32 // unit}, {turn};")
    elif len(_zero_turns(layout, even)) > 1:
        lines.append(f"shr.b32 z, z, {turn};")
    if is_apart(layout):
        lines += [_moved("z", "z", place - _zero_start(layout, even)), _moved("t", "z", 16 - 2 * bits)]
        lines.append(f"lop3.b32 z, t, z, 0xFFFF0000, {SELECT};")
        lines += [f"and.b32 $0, z, {mask * 0x10001};", _moved("t", "z", -bits), f"and.b32 $1, t, {mask * 0x10001};"]
        return " ".join(["{ .reg .b32 z, t, u;", *lines, "}"])
    for pair in range(pairs):
        first = place - 2 * pair * bits  # where to move two zero points
        second = 16 + lift + place - (2 * pair + 1) * bits
        both = mask | mask << 16 + lift
        if groups == 1:
            lines += [_moved("t", "z", first), f"and.b32 t, t, {mask};", f"mul.lo.u32 ${pair}, t, 0x10001;"]
        elif bits == 8:
            lines.append(f"prmt.b32 ${pair}, z, 0, {0x4140 + 0x0202 * pair};")
        elif parts * unit <= 16 and 2 * (pair + 1) * bits <= 16 and place == 0:  # neither is in the way of the other
            lines += [_moved("t", "z", first), _moved("u", "z", second)]
            lines.append(f"lop3.b32 ${pair}, t, u, {both}, {OR_AND};")
        else:
            lines += [_moved("t", "z", first), f"and.b32 t, t, {mask};", _moved("u", "z", second)]
            lines.append(f"lop3.b32 ${pair}, u, {mask << 16 + lift}, t, {AND_OR};")
    return " ".join(["{ .reg .b32 z, t, u;", *lines, "}"])


@triton.jit
def stored_zeros(zeros, row, step, K, LAYOUT: tl.constexpr, EVEN: tl.constexpr, LIFT: tl.constexpr):
    """Zero points of the groups of a step of BLOCKS blocks by pairs, as codes, in groups of 16, 32 or 64.

    A tuple of tiles (rows, BLOCKS), int32: of the first two groups of each block, the first in the low half, then of
    the others, but see :func:`is_apart`; a group alone is in both halves. They stand where field 0 has its code in
    :mod:`.fast_asm`, second ones ``LIFT`` bits higher, without other bits. ``EVEN`` says, too, that ``zeros`` is at a
    multiple of four bytes.
    """
    SIZE: tl.constexpr = groups_of(LAYOUT) * LAYOUT.bits
    UNIT: tl.constexpr = _zero_unit(LAYOUT, EVEN)
    RESULTS: tl.constexpr = _zero_results(LAYOUT)
    if UNIT == 32:
        zeros = zeros.to(tl.pointer_type(tl.uint32))
    elif UNIT == 16:
        zeros = zeros.to(tl.pointer_type(tl.uint16))
    size = ((K + LAYOUT.group - 1) // LAYOUT.group * LAYOUT.bits + UNIT - 1) // UNIT
    bit = tl.arange(0, BLOCKS)[None, :] * SIZE
    STEP: tl.constexpr = BLOCKS * SIZE
    if STEP % UNIT != 0:
        bit += step * STEP
    PARTS: tl.constexpr = _zero_parts(LAYOUT, EVEN)
    START: tl.constexpr = _zero_start(LAYOUT, EVEN)
    EARLY: tl.constexpr = 1 if START > 0 else 0  # a load before that of the first zero point
    first = (bit + (EARLY * UNIT - START)) >> UNIT.bit_length() - 1
    if EVEN and STEP % UNIT == 0:
        first = tl.minimum(first, STEP // UNIT - PARTS + EARLY)
    loads = ()
    for part in tl.static_range(PARTS):
        if STEP % UNIT != 0:
            found = tl.load(zeros + row * size + tl.minimum(first + part, size - 1))
        elif EVEN:
            place = tl.maximum(first - 1, 0) if part < EARLY else first + (part - EARLY)
            found = tl.load(zeros + row * size + place + step_offset(step, STEP // UNIT))
        else:
            found = tl.load(zeros + row * size + tl.minimum(first + part + step * (STEP // UNIT), size - 1))
        loads = loads + (found.to(tl.int32),)  # noqa: RUF005
    # Older compilers move weights where this text has loads alone, so it comes even if it is not used.
    loads = loads + (bit + (EARLY * UNIT - START) - first * UNIT,)  # noqa: RUF005
    TEXT: tl.constexpr = _zeros_asm(LAYOUT, EVEN, LIFT)
    COUNT: tl.constexpr = constraints(PARTS + 1, len(RESULTS))
    return tl.inline_asm_elementwise(TEXT, COUNT, loads, dtype=RESULTS, is_pure=True, pack=1)


@triton.jit
def _stored(scales, row, step, K, GROUPS: tl.constexpr, LAYOUT: tl.constexpr, EVEN: tl.constexpr, OTHER: tl.constexpr):
    """Scales of the GROUPS groups of a step, as they are stored, or float zero points: (BLOCK_N, GROUPS)."""
    group = tl.arange(0, GROUPS)[None, :]
    groups = (K + LAYOUT.group - 1) // LAYOUT.group
    if EVEN:
        scale = tl.load(scales + row * tl.multiple_of(groups, GROUPS) + group + step_offset(step, GROUPS, OTHER))
    else:
        group += step * GROUPS
        scale = tl.load(scales + row * groups + group, mask=group < groups, other=0)
    return scale


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
    scale = _stored(scales, row, step, K, GROUPS, LAYOUT, EVEN, 0)
    if LAYOUT.scale == "log8":
        scale = power_scale(scale, exponents)
    else:
        scale = relative_scale(scale, LAYOUT)
    first, second = tl.split(scale.reshape(N, COLUMNS, 2))
    if LAYOUT.zeros == "fixed":
        shift = tl.full((1, 1), -LAYOUT.fixed_zero / UNIT - OFFSET, tl.float32)
        found = (first, second, shift, shift)
    elif LAYOUT.zeros == "float":
        zero = _stored(zeros, row, step, K, GROUPS, LAYOUT, EVEN, 1).to(tl.float32)
        third, fourth = tl.split((zero * (-1.0 / UNIT) - OFFSET).reshape(N, COLUMNS, 2))
        found = (first, second, third, fourth)
    else:
        pairs = computed_once(stored_zeros(zeros, row, step, K, LAYOUT, EVEN, 0)[0])
        found = (first, second, _shift(pairs & 0xFFFF, LAYOUT, FORM), _shift((pairs >> 16) & 0xFFFF, LAYOUT, FORM))
    return found
