"""Levels by pairs, for the fast NVIDIA kernels: a table of every two levels in shared memory, a column for each lane.

A byte of two codes is the number of a row of 32 equal pairs, and each lane of a warp reads its own column: one
instruction for two weights after the two that make its address, and no two lanes of a warp meet in a bank. In registers
(:func:`.fast_asm.table_asm`) two weights take five. The table has 32 KiB and is made once by each program, before its
loop begins and so in time that nothing hides: the rules take it for more than 4 rows of x, by counting alone.

Shared memory that Triton does not know of is declared in the assembly; the driver adds it to what Triton asks for.
Triton lets a program have more than 48 KiB only if it asks for more than that itself, so both together have to stay
below.
"""

import triton
import triton.language as tl

from .fast_asm import PAIRS, declared
from .fast_fields import moved_e2m1
from .fast_grid import as_loaded
from .fast_scales import TABLE_BYTES
from .layout import Layout

BYTES = 256 * 32 * 4
ROOM = 48 * 1024 - BYTES - 1024  # for steps in flight; 1 KiB is for tiles of scales that change their layout


def has_pairs(layout: Layout, form: str) -> bool:
    """Whether levels of such weights can be looked up here: those of one table, by codes of at most 4 bits."""
    return layout.table == "tensor" and layout.bits <= 4 and not moved_e2m1(form, layout)


def has_room(tiles, layout: Layout) -> bool:
    """Whether the steps in flight of :class:`.fast.FastTiles` fit beside the table."""
    block = 8 * layout.bits * tiles.outputs + 128 * tiles.rows * tiles.columns  # bytes of 64 inputs: codes, and x
    if tiles.scaled:
        size = {"float32": 4, "float16": 2, "bfloat16": 2}.get(layout.scale, 1)
        block += tiles.outputs * (64 // layout.group) * size
    used = TABLE_BYTES if tiles.scaled and layout.scale == "log8" else 0
    return (tiles.stages - 1) * tiles.spans * tiles.blocks * block + used <= ROOM


@triton.constexpr_function
def _declare_asm():
    return declared(PAIRS, BYTES)


@triton.constexpr_function
def _fill_asm():
    return "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $2;"


@triton.constexpr_function
def _column_asm():
    return "bar.sync 0; mov.u32 $0, %laneid; shl.b32 $0, $0, 2;"


@triton.jit
def _bits(levels, code, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of nibbles as ``DTYPE``, in the low half of int32."""
    level = tl.load(levels + code % (1 << LAYOUT.bits))
    return level.to(tl.float32).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def pair_table(levels, weight, K, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Makes the table; returns where in a row of it this lane has its pair: bytes, int32 (1, 1). Once in a kernel."""
    base = tl.inline_asm_elementwise(_declare_asm(), "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
    first = tl.arange(0, 16)[None, :, None]
    second = tl.arange(0, 16)[:, None, None]
    place = ((second * 16 + first) * 8 + tl.arange(0, 8)[None, None, :]) * 16  # of four equal pairs
    pair = _bits(levels, first, LAYOUT, DTYPE) | (_bits(levels, second, LAYOUT, DTYPE) << 16)
    tl.inline_asm_elementwise(_fill_asm(), "=r,r,r", [base + place, pair], dtype=tl.int32, is_pure=False, pack=1)
    column = tl.inline_asm_elementwise(_column_asm(), "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)
    return as_loaded(tl.full((1, 1), 0, tl.int32) + column, weight, K)
