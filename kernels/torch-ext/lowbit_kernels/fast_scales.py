"""Stored scales of :mod:`.fast_scaled` times a power of two, as pairs of halves: by texts that take a register of them.

In groups of 16 a scale has 16 weights to itself, and every instruction that it takes is 1/16 of one a weight. So none
goes by way of float32 that need not:

- float16 and e4m3 for float16, bfloat16 and e4m3 for bfloat16: times one or two powers of two, pair by pair. A code of
  e4m3 is a half of either dtype, times a power of two, once its bits have been moved; those below the least normal
  number come out right as well.
- e8m0: the exponent of what it becomes, by integers. In float16 it is taken off that of the greatest of the row first,
  so that all codes of a register stay bytes; what is less than ``2**-28`` times the greatest becomes 0.
- log8: one of 256 numbers, which a table in shared memory has, made once by each program before its loop begins. Lanes
  of a warp that ask for different words of one bank wait for each other; but of the exponentials that this spares, one
  a scale, a multiprocessor computes only 16 a clock (CUDA C++ Programming Guide, throughput of native arithmetic).
"""

import triton
import triton.language as tl

from .fast_asm import code_position, constraints, declared, lift_of
from .fast_grid import as_loaded, power_exponents, power_scale

BRAIN = tl.constexpr(20)  # in bfloat16 scales are multiplied by 2**20, and differences by its inverse: both have room
ROOM = tl.constexpr(40)  # with zero points as floats weights are of 2**-40 of their value: so scales can be up to 2**34
TABLE = "lowbit_scales"  # in shared memory: two equal halves for each code of log8
TABLE_BYTES = 256 * 4


@triton.jit
def power(exponent):
    """2**exponent, float32, for int32 ones from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(exponent, DTYPE: tl.constexpr, LIFT: tl.constexpr):
    """``2**exponent`` and ``2**(exponent - LIFT)`` as ``DTYPE``, a pair."""
    low = power(exponent).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    high = power(exponent - LIFT).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    return low | high << 16


@triton.constexpr_function
def _declare_asm():
    return declared(TABLE, TABLE_BYTES)


@triton.jit
def _table(scale_range, exponent, LAYOUT: tl.constexpr, DTYPE: tl.constexpr, LIFT: tl.constexpr):
    """Makes the table of log8 scales times ``2**exponent``, once in a kernel: the upper half ``2**-LIFT`` of the lower.

    Returns nothing but the order of things: 0, int32, for the operands of what reads the table.
    """
    base = tl.inline_asm_elementwise(_declare_asm(), "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
    code = tl.arange(0, 256)[None, :]
    scale = power_scale(code, power_exponents(scale_range, exponent, LAYOUT))
    low = scale.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    high = (scale * 2.0**-LIFT).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    asked = [base + code * 4, low | high << 16]
    FILL: tl.constexpr = "st.shared.b32 [$1], $2; mov.b32 $0, $2;"
    tl.inline_asm_elementwise(FILL, "=r,r,r", asked, dtype=tl.int32, is_pure=False, pack=1)
    WAIT: tl.constexpr = "bar.sync 0; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(WAIT, "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def factors(scale_range, exponent, weight, K, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """What :func:`pairs_of` takes to multiply scales by ``2**exponent``, int32 (rows, 1): a tuple.

    Second ones of a pair by ``2**-lift`` of that (:func:`.fast_asm.lift_of`).
    """
    LIFT: tl.constexpr = lift_of(LAYOUT, tl.bfloat16 == DTYPE)
    if LAYOUT.scale == "log8":
        token = _table(scale_range, exponent, LAYOUT, DTYPE, LIFT)
        found = ()
        for byte in tl.static_range(4):  # four times a byte is a product with this: kept in registers, as if loaded
            found = found + (as_loaded(tl.full((1, 1, 1), 4 << 8 * byte, tl.int32), weight, K) + token,)  # noqa: RUF005
    elif LAYOUT.scale == "e8m0":
        if tl.float16 == DTYPE:  # the code that becomes 2**14
            found = ((141 - exponent)[:, :, None] * 0x01010101,)
        else:
            exponent = exponent[:, :, None]
            found = (exponent * 0x800080 - (LIFT << 23), (255 - exponent) * 0x10001 + (LIFT << 16))
    elif LAYOUT.scale == "float16" and tl.float16 == DTYPE:
        found = _two(exponent, 15, DTYPE, LIFT)  # its powers of two end there
    elif LAYOUT.scale == "e4m3":
        if tl.float16 == DTYPE:
            found = _two(exponent, 15, DTYPE, LIFT)
        else:
            found = _two(exponent + 112, 112, DTYPE, LIFT)
    elif LAYOUT.scale == "bfloat16":
        found = (_halves(exponent, tl.bfloat16, LIFT)[:, :, None],)
    elif LIFT > 0:
        found = (power(exponent)[:, :, None], power(exponent - LIFT)[:, :, None])
    else:
        found = (power(exponent)[:, :, None],)
    return found


@triton.constexpr_function
def brain_exponent(layout):
    """What power of two scales are multiplied by in bfloat16."""
    if layout.table != "none":
        return 0
    return 133 - code_position("subnormal", layout.bits, 0, 8) - ROOM.value if layout.zeros == "float" else BRAIN.value


@triton.jit
def _two(exponent, MOST: tl.constexpr, DTYPE: tl.constexpr, LIFT: tl.constexpr):
    """Two pairs of factors that make ``2**exponent`` and ``2**(exponent - LIFT)``, the first at most ``2**MOST``."""
    some = tl.minimum(exponent, MOST)[:, :, None]
    rest = exponent[:, :, None] - some
    return (_halves(some, DTYPE, LIFT), _halves(rest, DTYPE, 0))


@triton.constexpr_function
def _count(scale, apart):
    """How many scales a text takes: as many as fill a register, or pairs of a block, but two at least."""
    return 4 if apart or scale in ("log8", "e4m3", "e8m0") else 2


@triton.constexpr_function
def _registers(scale, apart):
    """Registers that they are in."""
    return _count(scale, apart) // {"float32": 1, "float16": 2, "bfloat16": 2}.get(scale, 4)


@triton.constexpr_function
def _lookup_lines(scale, brain, lift, first, second, by):
    lines = [f"mov.u32 t, {TABLE};"]
    for name, byte in (("x", first), ("y", second)):  # a sum of products of bytes is four times one of them
        lines += [f"dp4a.u32.u32 {name}, s0, {by[byte]}, o;", f"add.u32 {name}, {name}, t;"]
        lines.append(f"ld.shared.b32 {name}, [{name}];")
    return [*lines, "prmt.b32 x, x, y, 0x7610;"]


@triton.constexpr_function
def _exponent_lines(scale, brain, lift, first, second, by):
    selector = 0x4040 + first + 0x100 * second
    if brain:  # what is too large becomes infinite; code 0, if no power of two is taken into it, 0
        lines = [f"prmt.b32 x, s0, o, {selector};", f"min.f16x2 x, x, {by[1]};"]
        return [*lines, f"mad.lo.u32 x, x, 128, {by[0]};"]
    lines = [f"sub.u32 x, {by[0]}, s0;", f"prmt.b32 x, x, o, {selector};"]
    least = 29 | 29 - lift << 16  # below what becomes 2**14
    return [*lines, f"mov.b32 t, {least};", "min.f16x2 x, x, t;", f"mad.lo.u32 x, x, 0xFFFFFC00, {least << 10};"]


@triton.constexpr_function
def _moved_lines(scale, brain, lift, first, second, by):
    left, mask = (4, 0x87F087F0) if brain else (7, 0xBF80BF80)
    selector = 0x8080 + 0x11 * first + 0x1100 * second  # each byte, then its sign
    return [f"prmt.b32 x, s0, o, {selector};", f"shl.b32 x, x, {left};", f"and.b32 x, x, {mask};", *_times(brain, by)]


@triton.constexpr_function
def _times(brain, by):
    return [f"fma.rn.bf16x2 x, x, {name}, m;" if brain else f"mul.f16x2 x, x, {name};" for name in by]


@triton.constexpr_function
def _brain_lines(scale, brain, lift, first, second, by):
    lines = []
    for name, register in (("x", f"s{first // 2}"), ("y", f"s{second // 2}")):
        lines.append(f"fma.rn.bf16x2 {name}, {register}, {by[0]}, m;")
    if brain:
        return lines + _joined(first, second)
    for name, of in (("x", first), ("y", second)):
        lines += [f"mov.b32 {{a, b}}, {name};", f"mov.b32 {name}, {{n, {'b' if of % 2 else 'a'}}};"]
    return [*lines, "cvt.rn.f16x2.f32 x, y, x;"]


@triton.constexpr_function
def _half_lines(scale, brain, lift, first, second, by):
    lines = [f"mov.b32 x, s{first // 2};", f"mov.b32 y, s{second // 2};", *_joined(first, second)]
    if not brain:
        return lines + _times(False, by)
    lines += ["mov.b32 {a, b}, x;", "cvt.f32.f16 x, a;", "cvt.f32.f16 y, b;"]
    lines += [f"mul.f32 x, x, {by[0]};", f"mul.f32 y, y, {by[-1]};"]
    return [*lines, "cvt.rn.bf16x2.f32 x, y, x;"]


@triton.constexpr_function
def _joined(first, second):
    """Lines that leave in ``x`` two halves of ``x`` and ``y``, by their numbers, if they are not the two of one."""
    selector = 0x5410 + 0x22 * (first % 2) + 0x2200 * (second % 2)
    return [] if first // 2 == second // 2 else [f"prmt.b32 x, x, y, {selector};"]


@triton.constexpr_function
def _single_lines(scale, brain, lift, first, second, by):
    lines = [f"mul.f32 x, s{first}, {by[0]};", f"mul.f32 y, s{second}, {by[-1]};"]
    return [*lines, f"cvt.rn.{'bf16' if brain else 'f16'}x2.f32 x, y, x;"]


@triton.constexpr_function
def _pairs_asm(scale, brain, alone, apart, lift, factors):
    """Text for :func:`pairs_of` with so many factors; a result for each scale.

    Operands: registers of scales, then of each factor one for each scale. Lines of the scale's type leave two scales in
    ``x``; ``s0``, ... are registers of scales.
    """
    count, registers = _count(scale, apart), _registers(scale, apart)
    by = [f"${count + registers + i * count}" for i in range(factors)]
    lines_of = {"log8": _lookup_lines, "e8m0": _exponent_lines, "e4m3": _moved_lines}
    lines_of |= {"float16": _half_lines, "bfloat16": _brain_lines, "float32": _single_lines}
    lines = ["mov.b32 o, 0;", "mov.b16 n, 0;", "mov.b32 m, 0x80008000;"]
    lines += [f"mov.b32 s{i}, ${count + i};" for i in range(registers)]
    for pair in range(count // 2):
        first, second = (pair, pair + 2) if apart else (2 * pair, 2 * pair + 1)
        lines += lines_of[scale](scale, brain, lift, first, second, by)
        for result in (2 * pair, 2 * pair + 1):
            half = 0x1010 + 0x2222 * (result % 2)
            lines.append(f"prmt.b32 ${result}, x, o, {half};" if alone else f"mov.b32 ${result}, x;")
    return " ".join(["{ .reg .b16 a, b, n; .reg .b32 m, o, s0, s1, s2, s3, t, x, y;", *lines, "}"])


@triton.jit
def pairs_of(stored, by, SCALE: tl.constexpr, DTYPE: tl.constexpr, APART: tl.constexpr, LIFT: tl.constexpr):
    """Scales (rows, blocks, groups) times :func:`factors`, as ``DTYPE``, by pairs: a tuple of tiles (rows, blocks).

    int32: the first of two groups in the low half; of the first two groups of a block, then of the others, or if
    ``APART`` of the first and third, then of the others. A group alone is in both halves.
    """
    N: tl.constexpr = stored.shape[0]
    BLOCKS: tl.constexpr = stored.shape[1]
    GROUPS: tl.constexpr = stored.shape[2]
    TEXT: tl.constexpr = _pairs_asm(SCALE, tl.bfloat16 == DTYPE, GROUPS == 1, APART, LIFT, len(by))
    PACK: tl.constexpr = _count(SCALE, APART)
    COUNT: tl.constexpr = constraints(_registers(SCALE, APART) + PACK * len(by), PACK)
    asked = (stored,) + by  # noqa: RUF005 (Triton has no other way to join tuples)
    pairs = tl.inline_asm_elementwise(TEXT, COUNT, asked, dtype=tl.int32, is_pure=True, pack=PACK)
    if GROUPS > 1:  # a pair is there for each of its two
        pairs, _ = tl.split(pairs.reshape(N, BLOCKS, GROUPS // 2, 2))
    if GROUPS == 4:
        found = tl.split(pairs)
    else:
        found = (pairs.reshape(N, BLOCKS),)
    return found
