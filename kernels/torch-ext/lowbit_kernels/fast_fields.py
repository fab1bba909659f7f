"""Device functions of the fast NVIDIA kernel: from packed lanes of one step to what the step adds to the sums.

What they do, and why so, is told in :mod:`.fast`; tensors are named there too. A step is ``BLOCKS`` blocks of 64
inputs; ``R`` columns hold the rows of x, each as often as ``COLUMNS`` says.
"""

import triton
import triton.language as tl

from .decode import group_of, load_zero
from .fast_asm import (
    constraints,
    e2m1_asm,
    first_turn,
    is_turned,
    operand_registers,
    pair_asm,
    paired_asm,
    results,
    sides,
    table_asm,
    table_registers,
    value_asm,
)
from .fast_grid import (
    as_loaded,
    computed_once,
    has_unit,
    in_pairs,
    pair_grid,
    power_scale,
    relative_scale,
    step_offset,
    unit,
)


@triton.constexpr_function
def moved_e2m1(form, layout):
    """Whether levels are made by moving bits, without a table."""
    return layout.name == "fp4" and form != "magic"


@triton.jit
def _byte_table(levels, row, FIRST: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Low and high bytes, int32 each, of levels FIRST to FIRST + 3 as ``DTYPE``: (BLOCK_N, 1), or scalars."""
    low = 0
    high = 0
    for i in tl.static_range(4):
        if LAYOUT.table == "row":
            level = tl.load(levels + row * (1 << LAYOUT.bits) + (FIRST + i) % (1 << LAYOUT.bits))
        else:
            level = tl.load(levels + tl.full((1, 1), (FIRST + i) % (1 << LAYOUT.bits), tl.int32))
        number = level.to(tl.float32).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        low |= (number & 0xFF) << (8 * i)
        high |= (number >> 8) << (8 * i)
    return low, high


@triton.constexpr_function
def _below(planes, index):
    """Bits of a code in the planes before one."""
    return sum(planes[:index])


@triton.jit
def _inputs(
    x_row,
    offset,
    seen,
    first,
    K,
    FIELD: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The inputs (R, BLOCKS * LANES) that belong to one field of the step at ``x_row + offset``.

    ``seen`` says which columns see them, ``first`` is the step's first input.
    """
    k = tl.arange(0, BLOCKS * LANES)[None, :]
    place = k // LANES * 64 + k % LANES + LANES * FIELD
    if not EVEN:
        seen = seen & (place + first < K)
    if EVEN and COLUMNS == 1:
        inputs = tl.load(x_row + place + offset)
    else:
        inputs = tl.load(x_row + place + offset, mask=seen, other=0)
    return inputs


@triton.jit
def seen_inputs(column, LANES: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.arange(0, BLOCKS * LANES)[None, :] // LANES
    return block * COLUMNS // BLOCKS == (column % COLUMNS)[:, None]


@triton.jit
def _words(start, step, blocks, LAYOUT: tl.constexpr, INDEX: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """Lanes (BLOCK_N, BLOCKS * LANES) of a plane in a step; those of a small plane as often as they have fields for.

    Where lanes have two sides, they are there for one. Lanes behind the end of the row are 0.
    """
    PLANE: tl.constexpr = LAYOUT.planes[INDEX]
    SIDE: tl.constexpr = 16 // sides(LAYOUT.planes)
    lane = tl.arange(0, BLOCKS * 4 * PLANE)[None, :]
    pointer = start + blocks * (4 * _below(LAYOUT.planes, INDEX)) + lane + step_offset(step, BLOCKS * 4 * PLANE)
    if EVEN:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=step * (BLOCKS * 4 * PLANE) + lane < blocks * (4 * PLANE), other=0)
    if PLANE < 4:
        word = word.reshape(word.shape[0], BLOCKS, 1, 4 * PLANE)
        word = word.broadcast_to(word.shape[0], BLOCKS, SIDE // (4 * PLANE), 4 * PLANE)
        word = word.reshape(word.shape[0], BLOCKS * SIDE)
    return word


@triton.jit
def _turns(weight, K, BELOW: tl.constexpr, LAYOUT: tl.constexpr, INDEX: tl.constexpr, BLOCKS: tl.constexpr):
    """How far a spread lane of a small plane is turned to the right, int32 (1, BLOCKS * 16), or of one side."""
    PLANE: tl.constexpr = LAYOUT.planes[INDEX]
    SIDE: tl.constexpr = 16 // sides(LAYOUT.planes)
    lane = tl.arange(0, SIDE)[None, :]
    turn = lane // (4 * PLANE) * PLANE + BELOW
    turn = as_loaded(turn.to(tl.int16), weight, K).to(tl.int32)
    return turn.reshape(1, 1, SIDE).broadcast_to(1, BLOCKS, SIDE).reshape(1, BLOCKS * SIDE)


@triton.jit
def all_turns(weight, K, LAYOUT: tl.constexpr, BLOCKS: tl.constexpr):
    turns = ()
    for index in tl.static_range(len(LAYOUT.planes)):
        if is_turned(LAYOUT.planes, index):
            turns = turns + (_turns(weight, K, first_turn(LAYOUT.planes, index), LAYOUT, index, BLOCKS),)  # noqa: RUF005
    return turns


@triton.jit
def operands(
    start, step, blocks, turns, LAYOUT: tl.constexpr, BLOCKS: tl.constexpr, SPANS: tl.constexpr, EVEN: tl.constexpr
):
    """What the texts of :mod:`.fast_asm` take: the lanes of all planes, then how far those of small ones are turned.

    A tuple of them for each of one or two ``SPANS``. Lanes of two that are less than 16 bytes each are loaded together.
    Where lanes have two sides, :func:`on_sides` takes them apart.
    """
    words = ()
    others = ()
    for index in tl.static_range(len(LAYOUT.planes)):
        if SPANS == 2 and LAYOUT.planes[index] * BLOCKS < 2:
            word = _words(start, step, blocks, LAYOUT, index, 2 * BLOCKS, EVEN)
            word, other = tl.split(word.reshape(word.shape[0], 2, word.shape[1] // 2).permute(0, 2, 1))
            others = others + (other,)  # noqa: RUF005
        else:
            word = _words(start, step * SPANS, blocks, LAYOUT, index, BLOCKS, EVEN)
            if SPANS == 2:
                other = _words(start, step * 2 + 1, blocks, LAYOUT, index, BLOCKS, EVEN)
                others = others + (other,)  # noqa: RUF005
        words = words + (word,)  # noqa: RUF005
    if SPANS == 2:
        found = (words + turns, others + turns)
    else:
        found = (words + turns,)
    return found


@triton.jit
def level_tables(levels, row, LAYOUT: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """Low bytes of the whole table, then high bytes, four to a number; nothing where there is none."""
    if LAYOUT.table == "none" or moved_e2m1(FORM, LAYOUT):
        tables = ()
    elif table_registers(LAYOUT.bits, LAYOUT.name == "fp4") == 4:
        low0, high0 = _byte_table(levels, row, 0, LAYOUT, DTYPE)
        low1, high1 = _byte_table(levels, row, 4, LAYOUT, DTYPE)
        low2, high2 = _byte_table(levels, row, 8, LAYOUT, DTYPE)
        low3, high3 = _byte_table(levels, row, 12, LAYOUT, DTYPE)
        tables = (low0, low1, low2, low3, high0, high1, high2, high3)
    elif table_registers(LAYOUT.bits, LAYOUT.name == "fp4") == 2:
        low0, high0 = _byte_table(levels, row, 0, LAYOUT, DTYPE)
        low1, high1 = _byte_table(levels, row, 4, LAYOUT, DTYPE)
        tables = (low0, low1, high0, high1)
    else:
        tables = _byte_table(levels, row, 0, LAYOUT, DTYPE)
    return tables


@triton.jit
def _level(words, tables, LANE: tl.constexpr, HALF: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    if len(tables) == 1:
        TEXT: tl.constexpr = pair_asm(LAYOUT.planes, LANE, HALF)
    else:
        TEXT: tl.constexpr = table_asm(LAYOUT.planes, LANE, HALF, LAYOUT.name == "fp4")
    COUNT: tl.constexpr = constraints(operand_registers(LAYOUT.planes) + 2 * len(tables))
    return tl.inline_asm_elementwise(TEXT, COUNT, words + tables, dtype=results(DTYPE), is_pure=True, pack=2)[0]


@triton.jit
def parts(tile, PARTS: tl.constexpr, LANES: tl.constexpr):
    """What (rows, BLOCKS * LANES) has of each side of the lanes, one or two: a tuple of tiles."""
    if PARTS == 1:
        found = (tile,)
    else:
        HALF: tl.constexpr = tile.shape[1] // 2
        first, second = tl.split(tile.reshape(tile.shape[0], HALF * 2 // LANES, 2, LANES // 2).permute(0, 1, 3, 2))
        found = (first.reshape(tile.shape[0], HALF), second.reshape(tile.shape[0], HALF))
    return found


@triton.jit
def on_sides(words, more, TEXTS: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """What the text of each side makes of its part of :func:`operands` and of ``more``: a tuple of values."""
    COUNT: tl.constexpr = constraints(operand_registers(LAYOUT.planes) + 2 * len(more))
    lanes = parts(words[0], len(TEXTS), 32 if LAYOUT.bits == 8 else 16)
    values = ()
    for side in tl.static_range(len(TEXTS)):
        asked = (lanes[side],) + words[1:] + more  # noqa: RUF005
        value = tl.inline_asm_elementwise(TEXTS[side], COUNT, asked, dtype=results(DTYPE), is_pure=True, pack=2)
        values = values + (value[0],)  # noqa: RUF005
    return values


@triton.constexpr_function
def _value_texts(form, planes, field, window, piece):
    return tuple(value_asm(form, planes, field, window, piece, side) for side in range(sides(planes)))


@triton.jit
def _value(
    words,
    FORM: tl.constexpr,
    FIELD: tl.constexpr,
    WINDOW: tl.constexpr,
    PIECE: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    TEXTS: tl.constexpr = _value_texts(FORM, LAYOUT.planes, FIELD, WINDOW, PIECE)
    values = on_sides(words, (), TEXTS, LAYOUT, DTYPE)
    if len(TEXTS) == 1:
        value = values[0]
    else:
        N: tl.constexpr = values[0].shape[0]
        BLOCKS: tl.constexpr = values[0].shape[1] // 8
        value = tl.join(values[0], values[1]).reshape(N, BLOCKS, 8, 2).permute(0, 1, 3, 2).reshape(N, BLOCKS * 16)
    return value


@triton.jit
def _paired(first, second, LANE: tl.constexpr):
    return tl.inline_asm_elementwise(
        paired_asm(LANE), constraints(2), (first, second), dtype=first.dtype, is_pure=True, pack=2
    )


@triton.jit
def _moved(word, FIELD: tl.constexpr):
    return tl.inline_asm_elementwise(e2m1_asm(FIELD), constraints(1), [word], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _table_sums(
    sums,
    words,
    x_row,
    x_offset,
    seen,
    first,
    K,
    tables,
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``sums`` (BLOCK_N, R) plus what the fields of one part of a step add to it, for weights that are levels."""
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    if moved_e2m1(FORM, LAYOUT):
        for field in tl.static_range(4):
            if field * PARTS // 4 == PART:
                x_field = _inputs(x_row, x_offset, seen, first, K, field, 16, BLOCKS, COLUMNS, EVEN)
                sums = tl.dot(_moved(words[0], field), x_field.trans(), sums)
    else:
        for lane in tl.static_range(2):
            for half in tl.static_range(2):
                if half * PARTS // 2 == PART:
                    x_even = _inputs(x_row, x_offset, seen, first, K, 2 * half, 16, BLOCKS, COLUMNS, EVEN)
                    x_odd = _inputs(x_row, x_offset, seen, first, K, 2 * half + 1, 16, BLOCKS, COLUMNS, EVEN)
                    level = _level(words, tables, lane, half, LAYOUT, DTYPE)
                    sums = tl.dot(level, _paired(x_even, x_odd, lane).trans(), sums)
    return sums


@triton.jit
def _plane_sums(
    sums,
    inputs_sum,
    words,
    x_row,
    x_offset,
    seen,
    first,
    K,
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``sums`` (BLOCK_N, R) plus what the fields of one part of a step add; ``inputs_sum`` plus their inputs."""
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    LANES: tl.constexpr = 32 if LAYOUT.bits == 8 else 16
    ones = tl.full((inputs_sum.shape[0], BLOCKS * LANES), 1.0, DTYPE)
    SPAN: tl.constexpr = WINDOW if LAYOUT.bits <= 4 and FORM != "magic" else 4
    for position in tl.static_range(0, SPAN, 4):
        share = sums if position == 0 or FORM == "lop3" else tl.zeros(sums.shape, tl.float32)
        for field in tl.static_range(64 // LANES):
            if field * LANES * PARTS // 64 == PART and 4 * field % SPAN == position:
                x_field = _inputs(x_row, x_offset, seen, first, K, field, LANES, BLOCKS, COLUMNS, EVEN).trans()
                for piece in tl.static_range(2 if LAYOUT.bits == 8 and FORM == "magic" else 1):
                    share = tl.dot(_value(words, FORM, field, SPAN, piece, LAYOUT, DTYPE), x_field, share)
                inputs_sum = tl.dot(ones, x_field, inputs_sum)
        if position == 0 or FORM == "lop3":
            sums = share
        else:
            sums += share * 2.0**-position
    return sums, inputs_sum


@triton.jit
def _spread(value, BLOCK_M: tl.constexpr):
    """A value for each output and column of one row of x, (BLOCK_N, COLUMNS), for all rows: (BLOCK_N, R)."""
    if BLOCK_M > 1 and len(value.shape) == 2 and value.shape[1] > 1:
        value = value[:, None, :].broadcast_to(value.shape[0], BLOCK_M, value.shape[1])
        value = value.reshape(value.shape[0], BLOCK_M * value.shape[2])
    return value


@triton.jit
def with_step(
    total,
    words,
    row,
    tables,
    x_row,
    x_offset,
    seen,
    scales,
    exponents,
    zeros,
    step,
    K,
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS_OF_ONES: tl.constexpr,
):
    """``total`` (rows of a strip, R) plus what one step adds to it."""
    N: tl.constexpr = total.shape[0]
    R: tl.constexpr = total.shape[1]
    PARTS: tl.constexpr = 64 // LAYOUT.group if LAYOUT.group != 0 and LAYOUT.group < 64 else 1
    UNIT: tl.constexpr = unit(FORM, LAYOUT, WINDOW)
    ONE: tl.constexpr = 1.0 if has_unit(LAYOUT, COLUMNS) else UNIT
    PAIRS: tl.constexpr = in_pairs(LAYOUT, COLUMNS)
    OFFSET: tl.constexpr = 0.0 if FORM != "magic" else 256.0 if LAYOUT.bits == 8 else 128.0
    first = step * (BLOCKS * 64)
    if PAIRS:
        grid = pair_grid(scales, exponents, zeros, row, step, K, LAYOUT, FORM, WINDOW, COLUMNS, EVEN)
    for part in tl.static_range(PARTS):
        sums = total if LAYOUT.scale == "none" else tl.zeros((N, R), tl.float32)
        column = tl.arange(0, COLUMNS)[None, :]
        if LAYOUT.group == BLOCKS * 64 // COLUMNS // PARTS:
            group = (step * COLUMNS + column) * PARTS + part
        else:
            group = group_of(first + column * (BLOCKS // COLUMNS * 64) + part * (64 // PARTS), LAYOUT)
        stored = tl.full((1, 1), 1, tl.int1) if EVEN else group < group_of(K - 1, LAYOUT) + 1
        if LAYOUT.scale == "none":
            scale = 1.0
        elif PAIRS:
            scale = grid[part]
        else:
            scale = tl.load(scales + row * (group_of(K - 1, LAYOUT) + 1) + group, mask=stored, other=0)
            if LAYOUT.scale == "log8":
                scale = power_scale(scale, exponents)
            else:
                scale = relative_scale(scale, LAYOUT)
            scale = computed_once(scale * ONE)
        if LAYOUT.table != "none":
            sums = _table_sums(
                *(sums, words, x_row, x_offset, seen, first, K, tables),
                *(LAYOUT, FORM, part, PARTS, BLOCKS, COLUMNS, EVEN),
            )
            total = sums if LAYOUT.scale == "none" else total + sums * _spread(scale, BLOCK_M)
        else:
            inputs_sum = tl.zeros((ROWS_OF_ONES, R), tl.float32)
            sums, inputs_sum = _plane_sums(
                *(sums, inputs_sum, words, x_row, x_offset, seen, first, K),
                *(LAYOUT, FORM, part, PARTS, BLOCKS, COLUMNS, WINDOW, EVEN),
            )
            if PAIRS:
                shift = grid[2 + part]
            else:
                shift = load_zero(zeros, row, group, stored, K, LAYOUT) * (-1.0 / UNIT) - OFFSET
            shift = _spread(shift, BLOCK_M)
            inputs_sum = inputs_sum.reshape(1, ROWS_OF_ONES, R)
            inputs_sum = inputs_sum.broadcast_to(N // ROWS_OF_ONES, ROWS_OF_ONES, R).reshape(N, R)
            total += (sums + shift * inputs_sum) * _spread(scale, BLOCK_M)
    return total
