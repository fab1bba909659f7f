"""PTX that turns packed lanes into pairs of half-precision values.

Two lanes are one 32-bit register, so every instruction below makes two values. Planes of less than four bits come
spread: a lane of theirs is there for each of the lanes of a plane of four bits that it has fields for, and is shifted
first so that those fields stand where the nibbles of a lane of four bits do. Then planes are joined by bit selects:
codes of at most 4 bits in nibbles, those of 5 to 7 bits in bytes, the even fields in one word and the odd in another.
Of 7 bits, which have two small planes, the 16 lanes of a block are two sides of 8, each with texts of its own: they
know where in the plane of two bits their own bits are. The forms of an integer code:

- ``subnormal`` (float16): the field alone, which read as a float16 is exactly ``code * 2**(t - 24)`` where it stands
  ``t`` bits up: one AND for two weights. It needs tensor cores that keep subnormals, as documented for float16.
- ``lop3`` (float16): the field under an exponent that gives it the unit 1, and what the exponent adds subtracted again.
- ``magic`` (bfloat16): the field under the exponent of 128, exactly ``128 + code * 2**t`` while it ends below bit 7;
  8 bits come as two values, 7 bits and the highest, whose sum is 256 more than the code. The kernel takes the offset
  off the sum.

Tables are looked up four codes at a time by byte permutes of their low and high bytes, or two at a time in a table of
pairs (:mod:`.fast_pairs`). That makes pairs of two fields of the same lane, so inputs are paired in that way too. E2M1
in float16 is moved to where it means ``level * 2**-14``.

Every function is a ``triton.constexpr_function``: kernels call them with constants, and Triton's cache sees their text.
The compiler finds what several texts share.
"""

import triton

SELECT = "0xE4"  # lop3: bits of the first operand where the third has ones, of the second elsewhere
AND_OR = "0xEA"  # lop3: (first & second) | third
PAIRS = "lowbit_pairs"  # the table in shared memory


@triton.constexpr_function
def constraints(inputs, outputs=1):
    """Operand constraints of a text: all operands are 32-bit registers."""
    return ",".join(["=r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def results(dtype):
    """The types of the one result of a text."""
    return (dtype,)


@triton.constexpr_function
def declared(name, size):
    """Text that declares so many bytes of shared memory, which Triton does not know of, and returns where they are."""
    return f".shared .align 16 .b8 {name}[{size}]; mov.u32 $0, {name};"


@triton.constexpr_function
def sides(planes):
    """How many texts the lanes of a block take."""
    return 2 if planes == (4, 2, 1) else 1


@triton.constexpr_function
def is_turned(planes, index):
    """Whether the lanes of a plane are turned by a number that comes with them."""
    return planes[index] < (4 if sides(planes) == 1 else 2)


@triton.constexpr_function
def operand_registers(planes):
    """Registers of the lanes of all planes and of two shifts for each that is turned."""
    return len(planes) + 2 * sum(is_turned(planes, i) for i in range(len(planes)))


@triton.constexpr_function
def first_turn(planes, index):
    """How far lane 0 of a small plane is turned to the right: to where the texts want its bits.

    Codes of 5 and 6 bits want those of a field at the upper end of the nibble before the field's own; codes of 7 bits
    want the bit of the last plane below the two of the one before.
    """
    return planes[index] if sum(planes) > 4 else -1 % 32 if planes[index:] == (2, 1) else 0


@triton.constexpr_function
def _turned(planes):
    """Lines that turn the lanes of small planes: ``w<bits>`` is the lane of each plane."""
    lines, turn = [], len(planes) + 1
    for i, plane in enumerate(planes):
        if is_turned(planes, i):
            lines.append(f"shf.r.wrap.b32 w{plane}, ${i + 1}, ${i + 1}, ${turn};")
            turn += 2
        else:
            lines.append(f"mov.b32 w{plane}, ${i + 1};")
    return lines


@triton.constexpr_function
def _nibbles(planes):
    """Lines that leave codes of at most 4 bits at the nibbles in ``w``, with other bits above them."""
    lines = _turned(planes)
    if len(planes) == 1:
        return [*lines, f"mov.b32 w, w{planes[0]};"]
    return [*lines, f"lop3.b32 w, w2, w1, 0x66666666, {SELECT};"]


@triton.constexpr_function
def _bytes(planes, odd, base, side):
    """Lines that leave codes of 5 to 7 bits ``base`` bits up in bytes of ``w`` without other bits: even fields, or odd.

    The bits of small planes are joined for all fields first, in ``t``, each in the nibble before its field's own: odd
    fields make bytes with them where they are, even ones when turned.
    """
    lines, small = _turned(planes), sum(planes) - 4
    place = 4 - small
    if sides(planes) == 2:  # of a nibble of ``w2`` one side has the lower two bits, the other the upper two
        lines.append("and.b32 w1, w1, 0xAAAAAAAA;")
        lines.append(f"lop3.b32 t, w2, w1, {0xCCCCCCCC if side else 0x33333333}, {SELECT};")
        lines.append(f"shf.r.wrap.b32 t, t, t, {2 + 2 * side};")
    else:
        lines.append(f"and.b32 t, w{small}, {((1 << small) - 1 << place) * 0x11111111};")
    lines.append(f"lop3.b32 w, w4, t, {0xF0F0F0F0 if odd else 0x0F0F0F0F}, {SELECT};")
    left = base - place + (0 if odd else 4)
    if left:
        lines.append(f"shf.l.wrap.b32 w, w, w, {left % 32};")
    return lines


@triton.constexpr_function
def code_position(form, bits, field, window):
    """How many bits up :func:`value_asm` leaves a code."""
    if bits == 8:
        return 0
    if bits > 4:
        return (7 if form == "magic" else 8) - bits  # at the upper end of what a byte may have
    return 4 * field % window


@triton.constexpr_function
def value_asm(form, planes, field, window, piece, side=0):
    """Text for one of the four fields of a lane of 16 (8 bits: one of the two) as a value; ``piece`` 1 is bit 7."""
    bits = sum(planes)
    position = code_position(form, bits, field, window)
    magic = {"subnormal": 0, "lop3": 0x6400 - (position << 10), "magic": 0x4300}[form] * 0x10001
    if bits == 8 and form == "magic":
        mask = (0x80 if piece else 0x7F) * 0x10001
        lines = [f"shr.b32 w, $1, {8 * field};", f"lop3.b32 w, w, {mask}, {magic}, {AND_OR};"]
    elif bits > 4:
        lines = ["mov.b32 w, $1;"] if bits == 8 else _bytes(planes, field % 2, position, side)
        byte = field if bits == 8 else field // 2
        lines.append(f"prmt.b32 w, w, {(magic >> 24) * 0x1010101}, {0x4240 + 0x0101 * byte};")
    else:
        right, mask = 4 * field - position, (2**bits - 1 << position) * 0x10001
        lines = [*_nibbles(planes), *([f"shr.b32 w, w, {right};"] if right else [])]
        lines.append(f"lop3.b32 w, w, {mask}, {magic}, {AND_OR};" if magic else f"and.b32 w, w, {mask};")
    if form == "lop3":
        lines += [f"mov.b32 t, {magic};", "sub.f16x2 w, w, t;"]
    return " ".join(["{ .reg .b32 w, t, w1, w2, w4;", *lines, "mov.b32 $0, w; }"])


@triton.constexpr_function
def _half(target, source, half):
    """Lines that repeat one half of a register in both; the assembler makes it a modifier of what reads them."""
    return [f"mov.b32 {{a, b}}, {source};", f"mov.b32 {target}, {{{'b' if half else 'a'}, {'b' if half else 'a'}}};"]


@triton.constexpr_function
def powers(exponent, brain, lift=0):
    """Halves of ``2**exponent`` and ``2**(exponent + lift)``: bfloat16 if ``brain``, else float16."""
    low, high = (of + 127 << 7 if brain else of + 15 << 10 for of in (exponent, exponent + lift))
    return low | high << 16


@triton.constexpr_function
def lift_of(layout, brain):
    """By how many bits the second codes of pairs of groups stand higher, where those of a group all stand alike.

    Their scales are as much smaller then. Not where each code is brought to one unit first, before its scale.
    """
    alike = layout.name == "int" and layout.bits <= 4 and layout.group == 16
    return 4 if alike and (not brain or layout.zeros == "float") else 0


@triton.constexpr_function
def _subnormal_lines(first, start, place, zeros, middle, half, lift):
    """Lines of :func:`scaled_asm` for float16: one multiply-add. Scales are in register ``first``."""
    scale = f"${first}"
    if zeros == "float":
        lines = [f"mov.b32 z, ${first + 2};"]
    elif zeros == "int":
        lines = [f"mul.f16x2 z, ${first + 2}, {scale};"]
    else:  # 2**-24 of a unit, and half of it in 1 bit, is less than a float16 can be: in two steps
        lines = [f"mov.b32 t, {powers(-12, False)};", f"mul.f16x2 z, {scale}, t;"]
        lines += [f"mov.b32 t, {powers(middle + start - 12, False, lift)};", "mul.f16x2 z, z, t;"]
    lines += [*_half("z", "z", half), "neg.f16x2 z, z;"]
    if place != start + half * lift:
        lines += [f"mov.b32 t, {powers(start - place, False)};", f"mul.f16x2 s, {scale}, t;"]
        scale = "s"
    return [*lines, *_half("s", scale, half), "fma.rn.f16x2 $0, w, s, z;"]


@triton.constexpr_function
def _brain_lines(first, start, place, zeros, middle, half, lift, brain):
    """Lines of :func:`scaled_asm` for bfloat16: two multiply-adds. Scales are in register ``first``."""
    scale, lines = f"${first}", ["mov.b32 u, 0x80008000;"]  # minus zero, for products: PTX has them from sm_90 on
    if zeros == "float":
        if place != start + half * lift:
            lines += [f"mov.b32 t, {powers(start - place, True)};", f"fma.rn.bf16x2 s, {scale}, t, u;"]
            scale = "s"
        lines += [*_half("s", scale, half), *_half("z", f"${first + 2}", half), "fma.rn.bf16x2 w, w, s, z;"]
        lines += [*_half("z", f"${first + 4}", half), f"mov.b32 t, {powers(0, True)};"]
        return [*lines, "fma.rn.bf16x2 $0, w, t, z;"]
    if zeros == "int":
        lines += [f"mov.b32 t, {powers(133 - brain - start, True) | 0x80008000};"]
        lines += [f"fma.rn.bf16x2 z, ${first + 2}, t, u;", *_half("z", "z", half)]
    else:
        lines.append(f"mov.b32 z, {powers(middle - brain, True) | 0x80008000};")
    lines += [f"mov.b32 t, {powers(133 - brain - place, True)};", "fma.rn.bf16x2 w, w, t, z;"]
    return [*lines, *_half("s", scale, half), "fma.rn.bf16x2 $0, w, s, u;"]


@triton.constexpr_function
def scaled_asm(planes, field, half, zeros, brain, side, lift):
    """Text for a field as a weight, ``(code - zero point) * scale``, of one of two groups: ``half`` 0 or 1.

    One more register has the scales of both, and if ``zeros`` is "int" another their zero points, as codes that stand
    where field 0 does, or higher by ``lift`` bits (:func:`lift_of`); if "float", what is added to a code times its
    scale: float16, or two bfloat16 in a register each. If "fixed" there is none, and they are half of what a code can
    be. A pair of lanes has these registers twice.
    float16: the code as in the form ``subnormal``, times the scale, less the zero point times the scale. bfloat16: the
    code times ``2**-brain``, by the power of two that its place asks for, less the zero point in that unit, times the
    scale; with zero points as floats, times the scale, and both numbers added.
    """
    bits, first = sum(planes), 1 + operand_registers(planes)
    middle = bits - 1 if bits > 1 else -1  # half of what a code can be, as a power of two
    start, place = (code_position("subnormal", bits, at, 8) for at in (0, field))
    if brain is None:
        lines = _subnormal_lines(first, start, place, zeros, middle, half, lift)
    else:
        lines = _brain_lines(first, start, place, zeros, middle, half, lift, brain)
    text = value_asm("subnormal", planes, field, 8, 0, side)
    return text.replace("mov.b32 $0, w;", " ".join(lines)).replace(
        ".reg .b32 w,", ".reg .b16 a, b; .reg .b32 u, s, z, w,"
    )


@triton.constexpr_function
def e2m1_asm(field):
    """Text for an E2M1 code of a lane of four as float16; one word in. First bytes hold two fields' high halves."""
    lines = ["mov.b32 a, $1;" if field % 2 else "shl.b32 a, $1, 4;", "shr.b32 b, a, 3;", "and.b32 b, b, 0x0E0E0E0E;"]
    lines.append(f"lop3.b32 a, a, 0x80808080, b, {AND_OR};")
    return " ".join(["{ .reg .b32 a, b;", *lines, f"prmt.b32 $0, a, 0, {'0x3414' if field // 2 else '0x2404'}; }}"])


@triton.constexpr_function
def table_registers(bits, mirrored):
    """Registers of low bytes of a table; as many hold its high bytes."""
    return 2 ** max(bits - mirrored - 2, 0)


@triton.constexpr_function
def table_asm(planes, lane, half, mirrored):
    """Text for two fields of one lane, 0 and 1 or (``half`` 1) 2 and 3, as levels of a table of at most 16.

    Inputs: as for :func:`value_asm`, then registers of four low bytes of the table, then of high bytes, each twice. A
    mirrored table of 16 has only the first eight; the highest bit of a code is the sign.
    """
    bits = sum(planes)
    registers = table_registers(bits, mirrored)
    first = 1 + operand_registers(planes)
    low, high = ([f"${first + 2 * (start + i)}" for i in range(registers)] for start in (0, registers))
    lines = [*_nibbles(planes), f"and.b32 i, w, {0x77777777 if bits > 2 else 0x11111111 * (2**bits - 1)};"]
    if registers == 4:
        lines += ["shr.b32 c, w, 1;", f"lop3.b32 c, c, 0x44444444, 0x32103210, {AND_OR};"]
    if lane:
        lines += ["shr.b32 i, i, 16;"] + ["shr.b32 c, c, 16;"] * (registers == 4)
    for table, name in ((low, "l"), (high, "h")):
        lines.append(f"prmt.b32 {name}, {table[0]}, {table[min(1, registers - 1)]}, i;")
        if registers == 4:
            lines += [f"prmt.b32 u, {table[2]}, {table[3]}, i;", f"prmt.b32 {name}, {name}, u, c;"]
    if mirrored:
        lines += ["shl.b32 c, w, 4;", f"prmt.b32 c, c, w, {'0x7362' if lane else '0x5140'};"]
        lines.append(f"lop3.b32 h, c, 0x80808080, h, {AND_OR};")
    lines.append(f"prmt.b32 $0, l, h, {'0x7362' if half else '0x5140'};")
    return " ".join(["{ .reg .b32 w, w1, w2, w4, i, c, u, l, h;", *lines, "}"])


@triton.constexpr_function
def pair_asm(planes, lane, half):
    """Text for two fields of one lane, 0 and 1 or (``half`` 1) 2 and 3, as levels; codes of at most 4 bits.

    Inputs: as for :func:`value_asm`, then what :func:`.fast_pairs.pair_table` returns.
    """
    from_bit = 16 * lane + 8 * half
    turn = f"shr.b32 w, w, {from_bit - 7};" if from_bit > 7 else f"shl.b32 w, w, {7 - from_bit};"
    column = 1 + operand_registers(planes)
    mask = (2 ** sum(planes) - 1) * 0x11 << 7
    lines = [*_nibbles(planes), turn, f"lop3.b32 w, w, {mask}, ${column}, {AND_OR};"]
    lines += [f"mov.u32 t, {PAIRS};", "add.u32 w, w, t;", "ld.shared.b32 $0, [w];"]
    return " ".join(["{ .reg .b32 w, t, w1, w2, w4;", *lines, "}"])


@triton.constexpr_function
def paired_asm(lane):
    """Text for the inputs that belong to :func:`table_asm`: of two fields, those of the first or second lane."""
    return f"prmt.b32 $0, $1, $2, {'0x7632' if lane else '0x5410'};"
