"""Runs the PTX of ``tl.inline_asm_elementwise`` in Triton's interpreter, which has none.

Only what the fast kernels write is understood: 32-bit integer moves, products, shifts of one register or two, logic,
byte permutes, arithmetic of pairs of halves and rounding to them, their parts, powers of two, one instruction after
another, without branches; and arrays in shared memory, which a barrier does nothing to. Anything else raises. Each
instruction is applied to whole arrays of registers; to all of them a thread is the same lane of its warp, another one
each time that it is asked. It accepts operands that an assembler refuses, so compile as well.

Tensors are packed as Triton packs them: ``pack`` elements an instance, those of less than 32 bits several to a
register, wider ones a register each.
"""

import functools
import itertools
import re
from typing import ClassVar

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

from .interpreter import round_to_bfloat16, widen

_STATEMENT = re.compile(r"([a-z][\w.]*)\s+([^;]*)")
_SHARED = re.compile(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];")
_OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")


def _permute(a, b, selector):
    """``prmt.b32`` in its default mode, with the replicated sign where bit 3 of a selector is set."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(both)
    for i in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        result |= np.where(choice >> np.uint64(3), sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def _logic(a, b, c, table):
    """``lop3.b32``: bit ``4a + 2b + c`` of the table, for every bit."""
    result = np.zeros(np.broadcast(a, b, c).shape, dtype=np.uint32)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _subtract_halves(a, b):
    shape = np.broadcast(a, b).shape
    a, b = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float16) for v in (a, b))
    return (a - b).view(np.uint32)


def _multiply_halves(a, b):
    """``mul.f16x2``: float32 holds the product of two float16, and is rounded once."""
    shape = np.broadcast(a, b).shape
    a, b = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float16).astype(np.float32) for v in (a, b))
    return (a * b).astype(np.float16).view(np.uint32)


def _least_halves(a, b):
    """``min.f16x2``, which gives the other of a number and a NaN."""
    shape = np.broadcast(a, b).shape
    a, b = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float16) for v in (a, b))
    return np.fmin(a, b).view(np.uint32)


def _round_pair(rounded):
    """``cvt.rn.*x2.f32``: two float32, the upper half first, rounded to halves of a register."""

    def both(high, low):
        high, low = (rounded(np.ascontiguousarray(v).view(np.float32)).view(np.uint16) for v in (high, low))
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    return both


def _multiply_add(a, b, c):
    """``fma.rn.f32``: float64 holds the product of two float32, and is rounded once more, by far less."""
    shape = np.broadcast(a, b, c).shape
    a, b, c = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float32).astype(np.float64) for v in (a, b, c))
    return (a * b + c).astype(np.float32).view(np.uint32)


def _multiply_add_halves(a, b, c):
    """``fma.rn.f16x2``: float64 holds the product of two float16, and is rounded once more, by far less."""
    shape = np.broadcast(a, b, c).shape
    a, b, c = (np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.float16).astype(np.float64) for v in (a, b, c))
    return (a * b + c).astype(np.float16).view(np.uint32)


def _multiply_add_brains(a, b, c):
    """``fma.rn.bf16x2``: float64 holds the product of two bfloat16; rounded to float32 and from there."""
    shape = np.broadcast(a, b, c).shape
    a, b, c = (
        widen(np.ascontiguousarray(np.broadcast_to(v, shape)).view(np.uint16)).astype(np.float64) for v in (a, b, c)
    )
    return round_to_bfloat16((a * b + c).astype(np.float32)).view(np.uint32)


def _sum_of_products(a, b, c):
    """``dp4a.u32.u32``: products of bytes, added."""
    shifts = [np.uint32(8 * i) for i in range(4)]
    total = c.astype(np.uint64) + sum(((a >> s) & 255).astype(np.uint64) * ((b >> s) & 255) for s in shifts)
    return total.astype(np.uint32)


def _shift(function):
    return lambda a, n: np.where(n > 31, np.uint32(0), function(a, np.minimum(n, 31))).astype(np.uint32)


def _funnel(left):
    """``shf.wrap.b32``: two registers side by side, moved; of the right shift the lower one, of the left the upper."""

    def moved(low, high, n):
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        n = (n & np.uint32(31)).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return moved


class _Memory:
    """The arrays in shared memory, by name: not at 0, none next to another, and NaN until something is stored."""

    arrays: ClassVar[dict[str, tuple[int, np.ndarray]]] = {}
    lanes = itertools.cycle(range(32))

    @classmethod
    def declare(cls, name: str, size: int) -> None:
        begin = cls.arrays[name][0] if name in cls.arrays else 1024 + (len(cls.arrays) << 20)
        cls.arrays[name] = (begin, np.full(size // 4, 0xFFFFFFFF, dtype=np.uint32))

    @classmethod
    def places(cls, address: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
        """An array, and where in it ``address`` is: an access of so many words, inside and aligned."""
        address = address.astype(np.int64)
        begin, array = max((a for a in cls.arrays.values() if a[0] <= address.min()), key=lambda a: a[0])
        offset = address - begin
        if (offset % (4 * words)).any() or offset.max() > 4 * (len(array) - words):
            raise IndexError(f"inline assembly: shared memory at {offset.min()} to {offset.max()} of {4 * len(array)}")
        return array, offset // 4

    @classmethod
    def load(cls, address: np.ndarray) -> np.ndarray:
        array, place = cls.places(address, 1)
        return array[place]

    @classmethod
    def store(cls, address: np.ndarray, values: list[np.ndarray]) -> None:
        array, place = cls.places(address, len(values))
        for i, value in enumerate(values):
            array[place + i] = value


INSTRUCTIONS = {
    "mov.b16": lambda a: a,
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "sub.u32": lambda a, b: (a.astype(np.int64) - b).astype(np.uint32),
    "mad.lo.u32": lambda a, b, c: (a.astype(np.uint64) * b + c).astype(np.uint32),
    "add.u32": lambda a, b: (a.astype(np.uint64) + b).astype(np.uint32),
    "mul.lo.u32": lambda a, b: (a.astype(np.uint64) * b).astype(np.uint32),
    "mul.wide.u32": lambda a, b: a.astype(np.uint64) * b,
    "dp4a.u32.u32": _sum_of_products,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.b32": _shift(np.right_shift),
    "shr.u32": _shift(np.right_shift),
    "shl.b32": _shift(np.left_shift),
    "shf.l.wrap.b32": _funnel(left=True),
    "shf.r.wrap.b32": _funnel(left=False),
    "lop3.b32": _logic,
    "prmt.b32": _permute,
    "sub.f16x2": _subtract_halves,
    "mul.f16x2": _multiply_halves,
    "min.f16x2": _least_halves,
    "neg.f16x2": lambda a: a ^ np.uint32(0x80008000),
    "neg.f32": lambda a: a ^ np.uint32(0x80000000),
    "cvt.rn.f16x2.f32": _round_pair(lambda v: v.astype(np.float16)),
    "cvt.rn.bf16x2.f32": _round_pair(round_to_bfloat16),
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32),
    "mul.f32": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
    "fma.rn.f32": _multiply_add,
    "fma.rn.f16x2": _multiply_add_halves,
    "fma.rn.bf16x2": _multiply_add_brains,
}


def run(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The output registers, uint32 (n,), of ``text`` for input registers, uint32 (n,).

    Raises:
        NotImplementedError: for an instruction that is not known here.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for name, size in _SHARED.findall(text):
        _Memory.declare(name, int(size))
    registers |= {name: np.array([begin], dtype=np.uint32) for name, (begin, _) in _Memory.arrays.items()}

    def read(name: str) -> np.ndarray:
        if name == "%laneid":
            return np.array([next(_Memory.lanes)], dtype=np.uint32)
        return registers[name] if name in registers else np.array([int(name, 0) & 0xFFFFFFFF], dtype=np.uint32)

    for opcode, rest in _STATEMENT.findall(re.sub(r"(?<!\w)\.(?:reg|shared)[^;]*;|^\s*\{|\}\s*$", "", text)):
        if opcode == "bar.sync":
            continue
        if opcode in ("ld.shared.b32", "st.shared.b32", "st.shared.v4.b32"):
            target, address = _OPERAND.findall(rest)[:: 1 if opcode.startswith("ld") else -1]
            place = read(address.strip("[]"))
            if opcode.startswith("ld"):
                registers[target] = _Memory.load(place)
            else:
                _Memory.store(place, [read(name.strip()) for name in target.strip("{}").split(",")])
            continue
        if opcode not in INSTRUCTIONS:
            raise NotImplementedError(f"inline assembly: {opcode} in {text!r}")
        target, *operands = _OPERAND.findall(rest)
        if target.startswith("{"):  # a register to its halves
            low, high = (part.strip() for part in target[1:-1].split(","))
            value = read(operands[0])
            registers[low], registers[high] = value & np.uint32(0xFFFF), value >> np.uint32(16)
        elif operands[0].startswith("{"):  # and back
            low, high = (read(part.strip()) for part in operands[0][1:-1].split(","))
            registers[target] = low | high << np.uint32(16)
        else:
            registers[target] = INSTRUCTIONS[opcode](*(read(name) for name in operands))
    count = len(inputs[0])
    return [np.ascontiguousarray(np.broadcast_to(registers[f"${i}"], count)) for i in range(outputs)]


def _registers(data: np.ndarray, pack: int) -> list[np.ndarray]:
    flat = np.ascontiguousarray(data).reshape(-1)
    if flat.dtype.itemsize > 4 or flat.dtype.itemsize * pack % 4:
        raise NotImplementedError(f"inline assembly: {pack} elements of {flat.dtype} to an instance")
    return list(flat.view(np.uint32).reshape(-1, flat.dtype.itemsize * pack // 4).T.copy())


def _create_inline_asm(self, text, constraints, values, types, pure, pack):
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    inputs = [r for value in values for r in _registers(np.broadcast_to(value.data, shape), pack)]
    dtypes = [_get_np_dtype(type.scalar) for type in types]
    sizes = [np.dtype(dtype).itemsize * pack for dtype in dtypes]
    if any(size % 4 for size in sizes):
        raise NotImplementedError(f"inline assembly: {pack} results of {dtypes} to an instance")
    counts = [1 if pack == 1 else size // 4 for size in sizes]  # a register alone may have 64 bits
    results, handles = run(text, inputs, sum(counts)), []
    for count, dtype, type in zip(counts, dtypes, types, strict=True):
        registers, results = results[:count], results[count:]
        handles.append(TensorHandle(np.stack(registers, axis=1).reshape(-1).view(dtype).reshape(shape), type.scalar))
    return _Results(handles)


class _Results:
    def __init__(self, handles):
        self.handles = handles

    def get_result(self, index):
        return self.handles[index]


@functools.cache
def emulate_inline_asm() -> None:
    """Gives the interpreter inline assembly; once a process."""
    InterpreterBuilder.create_inline_asm = _create_inline_asm
