"""PTX that turns packed lanes into pairs of half-precision values.

Two lanes are one 32-bit register, so every instruction below makes two values. The forms of an integer code:

- ``subnormal`` (float16): the field alone, which read as a float16 is exactly ``code * 2**(t - 24)`` where it stands
  ``t`` bits up: one AND for two weights. It needs tensor cores that keep subnormals, as documented for float16.
- ``lop3`` (float16): the field under an exponent that gives it the unit 1, and what the exponent adds subtracted again.
- ``magic`` (bfloat16): the field under the exponent of 128, exactly ``128 + code * 2**t`` while it ends below bit 7;
  wider fields come in pieces. The kernel takes the 128 off the sum.

Tables are looked up four codes at a time by byte permutes of their low and high bytes. E2M1 in float16 is moved to
where it means ``level * 2**-14``.

Every function is a ``triton.constexpr_function``: kernels call them with constants, and Triton's cache sees their text.
"""

import triton


@triton.constexpr_function
def constraints(outputs, inputs):
    """Operand constraints of a text: all operands are 32-bit registers."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def repeated(dtype, count):
    """The types of ``count`` results."""
    return (dtype,) * count


@triton.constexpr_function
def field_asm(form, width, position, shift):
    """Text for the field of ``width`` bits that is ``position`` bits up after a shift to the right; one word in."""
    mask = (((1 << width) - 1) << position) * 0x10001
    magic = {"subnormal": 0, "lop3": 0x6400 - (position << 10), "magic": 0x4300}[form] * 0x10001
    if width == 8:
        # Byte 0 or 1 of both lanes, below the high byte of the magic number.
        lines = [f"prmt.b32 a, $1, {(magic >> 24) * 0x1010101}, {0x4240 + 0x0101 * (shift // 8)};"]
    else:
        lines = [f"shr.b32 a, $1, {shift};"] if shift else ["mov.b32 a, $1;"]
        lines.append(f"lop3.b32 a, a, {mask}, {magic}, 0xEA;" if magic else f"and.b32 a, a, {mask};")
    if form == "lop3":
        lines += [f"mov.b32 b, {magic};", "sub.f16x2 a, a, b;"]
    return " ".join(["{ .reg .b32 a, b;", *lines, "mov.b32 $0, a; }"])


@triton.constexpr_function
def e2m1_asm(field):
    """Text for an E2M1 code of a lane of four as float16; one word in."""
    lines = []
    for name, right, mask in (("a", 4 * field - 12, 0x80008000), ("b", 4 * field - 9, 0x0E000E00)):
        lines.append(f"shr.b32 {name}, $1, {right};" if right >= 0 else f"shl.b32 {name}, $1, {-right};")
        lines.append(f"and.b32 {name}, {name}, {mask};")
    return " ".join(["{ .reg .b32 a, b;", *lines, "or.b32 $0, a, b; }"])


@triton.constexpr_function
def table_asm(width, part):
    """Text for the levels of four fields of a lane: nibble ``i`` of the word moved down by ``part * width`` bits.

    Inputs: the word, then four (2 bits: one) registers of low bytes of the table and as many of high bytes, each twice.
    """
    registers = 4 if width == 4 else 1
    low, high = ([f"${5 + 2 * (first + i)}" for i in range(registers)] for first in (0, registers))
    lines = []
    if width == 4:
        lines += ["and.b32 i, $4, 0x77777777;", "shr.b32 c, $4, 1;", "lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;"]
    else:
        lines += [f"shr.b32 i, $4, {part * width};", "and.b32 i, i, 0x33333333;"]
    for lane in (0, 1):
        for table, name in ((low, f"l{lane}"), (high, f"h{lane}")):
            lines.append(f"prmt.b32 {name}, {table[0]}, {table[min(1, registers - 1)]}, i;")
            if width == 4:
                lines += [f"prmt.b32 u, {table[2]}, {table[3]}, i;", f"prmt.b32 {name}, {name}, u, c;"]
        # Fields 0 and 1, then 2 and 3, of this lane as whole numbers.
        lines += [f"prmt.b32 p{lane}, l{lane}, h{lane}, 0x5140;", f"prmt.b32 q{lane}, l{lane}, h{lane}, 0x7362;"]
        lines += ["shr.b32 i, i, 16;", "shr.b32 c, c, 16;"] if lane == 0 and width == 4 else []
        lines += ["shr.b32 i, i, 16;"] if lane == 0 and width != 4 else []
    for field, (pair, selector) in enumerate((("p", "0x5410"), ("p", "0x7632"), ("q", "0x5410"), ("q", "0x7632"))):
        lines.append(f"prmt.b32 ${field}, {pair}0, {pair}1, {selector};")
    return " ".join(["{ .reg .b32 i, c, u, l<2>, h<2>, p<2>, q<2>;", *lines, "}"])
