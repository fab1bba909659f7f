"""Fast NVIDIA forms of ``x @ W.T``: codes go from memory to tensor cores with little more than one AND for two weights.

What a weight costs in instructions decides at few bits (a load of 16 bytes brings 32 weights of 4 bits), so:

- W is the left operand of ``tl.dot``. Lanes are copied to shared memory in 16-byte pieces, still packed, read back in
  the layout that the tensor core wants, and become values there, by inline assembly on pairs (:mod:`.fast_asm`).
- A tile of lanes is loaded once; each of its fields is a tile of weights, whose inputs are picked out of x to match.
  Planes of a width that is a sum are multiplied one by one, and their sums added with their weight.
- Scales and zero points touch sums, not weights: ``sum((q - z) * s * x) = s * (sum(q * x) - z * sum(x))`` for a group.
  The sum of x comes from the tensor core too, as a product with ones.
- A tile of lanes can reach over several groups. Then a row of x takes a column for each of them, zero outside its
  group, and one product gives the sums of all. With few rows of x those columns would be empty anyway.

Sums are float32; nothing is rounded but, for tables, the level to the dtype of x. Not here: ternary, tables of other
than 2 or 4 bits, groups smaller than a block's lanes, float32 activations; those take the portable kernels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode import group_of, load_scale, load_zero
from .fast_asm import constraints, e2m1_asm, field_asm, repeated, table_asm
from .layout import Layout, name_tensors, parse
from .matmul import _store, add_kernel

FORMS = ("subnormal", "lop3", "magic")


@dataclass(frozen=True)
class FastTiles:
    """Sizes of the tile of one program of :func:`fast_kernel`.

    Args:
        rows: Rows of x.
        outputs: Rows of W.
        blocks: Blocks of 64 inputs a step.
        columns: Columns that a row of x takes: groups in a step, or blocks where groups are smaller.
        window: Bits of a lane that are read from one shift; more shifts or more sums.
        warps: Warps a program.
        stages: Steps in flight.
    """

    rows: int
    outputs: int
    blocks: int
    columns: int
    window: int
    warps: int = 2
    stages: int = 3


@triton.jit
def _byte_table(levels, row, FIRST: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Low and high bytes, int32 each, of levels FIRST to FIRST + 3 as ``DTYPE``: (BLOCK_N, 1), or scalars."""
    low = 0
    high = 0
    for i in tl.static_range(4):
        if LAYOUT.table == "row":
            level = tl.load(levels + row * (1 << LAYOUT.bits) + (FIRST + i))
        else:
            level = tl.load(levels + (FIRST + i))
        number = level.to(tl.float32).to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
        low |= (number & 0xFF) << (8 * i)
        high |= (number >> 8) << (8 * i)
    return low, high


@triton.jit
def _field(
    word, FORM: tl.constexpr, WIDTH: tl.constexpr, POSITION: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr
):
    return tl.inline_asm_elementwise(
        field_asm(FORM, WIDTH, POSITION, SHIFT),
        constraints(1, 1),
        [word],
        dtype=repeated(DTYPE, 1),
        is_pure=True,
        pack=2,
    )[0]


@triton.jit
def _moved(word, FIELD: tl.constexpr):
    return tl.inline_asm_elementwise(e2m1_asm(FIELD), constraints(1, 1), [word], dtype=tl.float16, is_pure=True, pack=2)


@triton.constexpr_function
def _low(planes, index):
    """The bit of the code at which a plane begins."""
    return sum(planes[index + 1 :])


@triton.constexpr_function
def _factor(form, low, position, piece):
    """What a sum of one position has to be multiplied with."""
    if piece:
        return float(2 ** (low + position))
    return {"subnormal": 2.0 ** (24 + low - position), "lop3": 2.0**low, "magic": 2.0 ** (low - position)}[form]


@triton.jit
def _inputs(x_row, seen, first, K, FIELD: tl.constexpr, PLANE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """The inputs (BLOCKS * 4 * PLANE, R) that belong to one field of a plane; ``seen`` says which columns see them."""
    LANES: tl.constexpr = 4 * PLANE
    k = tl.arange(0, BLOCKS * LANES)[:, None]
    place = k // LANES * 64 + k % LANES + LANES * FIELD
    if not EVEN:
        seen = seen & (place + first < K)
    return tl.load(x_row + place, mask=seen, other=0)


@triton.jit
def _seen(column, valid, PLANE: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.arange(0, BLOCKS * 4 * PLANE)[:, None] // (4 * PLANE)
    return (block * COLUMNS // BLOCKS == (column % COLUMNS)[None, :]) & valid


@triton.jit
def _words(start, step, blocks, PLANE: tl.constexpr, BEFORE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr):
    """Lanes (BLOCK_N, BLOCKS * 4 * PLANE) of one step; those behind the end of the row are 0."""
    lane = tl.arange(0, BLOCKS * 4 * PLANE)[None, :]
    pointer = start + blocks * (4 * BEFORE) + step * (BLOCKS * 4 * PLANE) + lane
    if EVEN:
        word = tl.load(pointer)
    else:
        word = tl.load(pointer, mask=step * (BLOCKS * 4 * PLANE) + lane < blocks * (4 * PLANE), other=0)
    return word


@triton.jit
def _tables(levels, row, LAYOUT: tl.constexpr, DTYPE: tl.constexpr):
    """Low bytes of the whole table, then high bytes, four to a number."""
    low0, high0 = _byte_table(levels, row, 0, LAYOUT, DTYPE)
    if LAYOUT.bits == 4:
        low1, high1 = _byte_table(levels, row, 4, LAYOUT, DTYPE)
        low2, high2 = _byte_table(levels, row, 8, LAYOUT, DTYPE)
        low3, high3 = _byte_table(levels, row, 12, LAYOUT, DTYPE)
        tables = (low0, low1, low2, low3, high0, high1, high2, high3)
    else:
        tables = (low0, high0)
    return tables


@triton.jit
def _table_sums(
    sums,
    x_row,
    start,
    step,
    blocks,
    column,
    valid,
    K,
    tables,
    LAYOUT: tl.constexpr,
    MOVED: tl.constexpr,
    AGAIN: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``sums`` (BLOCK_N, R) plus what every (4 / bits)-th field of a step adds to it, from AGAIN."""
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    PLANE: tl.constexpr = LAYOUT.bits
    seen = _seen(column, valid, PLANE, BLOCKS, COLUMNS)
    word = _words(start, step, blocks, PLANE, 0, BLOCKS, EVEN)
    if MOVED:
        values = (_moved(word, 0), _moved(word, 1), _moved(word, 2), _moved(word, 3))
    else:
        values = tl.inline_asm_elementwise(
            table_asm(PLANE, AGAIN),
            constraints(4, 1 + 2 * len(tables)),
            (word,) + tables,  # noqa: RUF005 (Triton has no other way to join tuples)
            dtype=repeated(DTYPE, 4),
            is_pure=True,
            pack=2,
        )
    for nibble in tl.static_range(4):
        if (nibble * (4 // PLANE) + AGAIN) * 4 * PLANE * PARTS // 64 == PART:
            x_field = _inputs(x_row, seen, step * (BLOCKS * 64), K, nibble * (4 // PLANE) + AGAIN, PLANE, BLOCKS, EVEN)
            sums = tl.dot(values[nibble], x_field, sums)
    return sums


@triton.jit
def _plane_sums(
    sums,
    inputs_sum,
    x_row,
    start,
    step,
    blocks,
    column,
    valid,
    K,
    LAYOUT: tl.constexpr,
    INDEX: tl.constexpr,
    FORM: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``sums`` (BLOCK_N, R) plus what one plane adds to it in a step; the first plane also sums the inputs."""
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    PLANE: tl.constexpr = LAYOUT.planes[INDEX]
    LOW: tl.constexpr = _low(LAYOUT.planes, INDEX)
    PIECE: tl.constexpr = 4 if PLANE == 8 and FORM == "magic" else PLANE
    SPLIT_FIELD: tl.constexpr = PIECE < PLANE
    # A field that is read where it stands has to end below the exponent: bit 7 of bfloat16, bit 10 of float16.
    SPAN: tl.constexpr = 8 if SPLIT_FIELD else 4 if FORM == "magic" else PIECE if WINDOW < PIECE else WINDOW
    seen = _seen(column, valid, PLANE, BLOCKS, COLUMNS)
    word = _words(start, step, blocks, PLANE, LAYOUT.bits - LOW - PLANE, BLOCKS, EVEN)
    ones = tl.full((sums.shape[0], BLOCKS * 4 * PLANE), 1.0, DTYPE)
    offset = tl.full((sums.shape[0], BLOCKS * 4 * PLANE), -128.0, DTYPE)
    for position in tl.static_range(0, SPAN, PIECE):
        share = tl.zeros(sums.shape, tl.float32)
        for field in tl.static_range(16 // PLANE):
            if field * 4 * PLANE * PARTS // 64 == PART and (SPLIT_FIELD or PLANE * field % SPAN == position):
                x_field = _inputs(x_row, seen, step * (BLOCKS * 64), K, field, PLANE, BLOCKS, EVEN)
                if SPLIT_FIELD:
                    values = _field(word, FORM, PIECE, 0, PLANE * field + position, DTYPE)
                else:
                    values = _field(word, FORM, PIECE, position, PLANE * field - position, DTYPE)
                share = tl.dot(values, x_field, share)
                if FORM == "magic":
                    share = tl.dot(offset, x_field, share)
                if INDEX == 0 and (position == 0 or not SPLIT_FIELD):
                    inputs_sum = tl.dot(ones, x_field, inputs_sum)
        sums += share * _factor(FORM, LOW, position, SPLIT_FIELD)
    return sums, inputs_sum


@triton.jit
def _spread(value, BLOCK_M: tl.constexpr):
    """A value for each output and column of one row of x, (BLOCK_N, COLUMNS), for all rows: (BLOCK_N, R)."""
    if BLOCK_M > 1 and len(value.shape) == 2 and value.shape[1] > 1:
        value = value[:, None, :].broadcast_to(value.shape[0], BLOCK_M, value.shape[1])
        value = value.reshape(value.shape[0], BLOCK_M * value.shape[2])
    return value


@triton.jit
def fast_kernel(
    x,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    bias,
    out,
    M,
    N,
    K,
    LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT); ``EVEN`` says that whole steps fill K.

    Arguments and ``out`` are those of :func:`.matmul.gemm_kernel`; the sizes those of :class:`FastTiles`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    TABLE: tl.constexpr = LAYOUT.table != "none"
    MOVED: tl.constexpr = LAYOUT.name == "fp4" and FORM != "magic"  # E2M1 without a table
    R: tl.constexpr = BLOCK_M * COLUMNS
    PARTS: tl.constexpr = 64 // LAYOUT.group if LAYOUT.group != 0 and LAYOUT.group < 64 else 1

    column = tl.arange(0, R)
    m = tl.program_id(0) * BLOCK_M + column // COLUMNS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row = tl.minimum(n, N - 1)[:, None].to(tl.int64)
    x_row = x + m[None, :].to(tl.int64) * K + split * (BLOCKS * 64)
    valid = (m < M)[None, :]
    blocks = (K + 63) // 64
    if EVEN:
        blocks = tl.multiple_of(blocks, BLOCKS)
    start = weight + row * (blocks * (4 * LAYOUT.bits))
    tables = _tables(levels, row, LAYOUT, DTYPE) if TABLE and not MOVED else ()

    total = tl.zeros((BLOCK_N, R), tl.float32)
    for step in tl.range(split, tl.cdiv(blocks, BLOCKS), SPLIT, num_stages=STAGES):
        first = step * (BLOCKS * 64)
        for part in tl.static_range(PARTS):
            sums = tl.zeros((BLOCK_N, R), tl.float32)
            inputs_sum = tl.zeros((BLOCK_N, R), tl.float32)
            if TABLE:
                for again in tl.static_range(4 // LAYOUT.bits):
                    sums = _table_sums(
                        *(sums, x_row, start, step, blocks, column, valid, K, tables),
                        *(LAYOUT, MOVED, again, part, PARTS, BLOCKS, COLUMNS, EVEN),
                    )
            else:
                for index in tl.static_range(len(LAYOUT.planes)):
                    sums, inputs_sum = _plane_sums(
                        *(sums, inputs_sum, x_row, start, step, blocks, column, valid, K),
                        *(LAYOUT, index, FORM, part, PARTS, BLOCKS, COLUMNS, WINDOW, EVEN),
                    )
            inside = tl.arange(0, COLUMNS)[None, :] * (BLOCKS // COLUMNS * 64)
            group = group_of(inside + (first + part * (64 // PARTS)), LAYOUT)
            stored = tl.full((1, 1), 1, tl.int1) if EVEN else group < group_of(K - 1, LAYOUT) + 1
            scale = _spread(load_scale(scales, scale_range, row, group, stored, K, LAYOUT), BLOCK_M)
            if MOVED:
                sums = sums * 16384.0
            if TABLE:
                total += sums * scale
            else:
                zero = _spread(load_zero(zeros, row, group, stored, K, LAYOUT), BLOCK_M)
                total += (sums - zero * inputs_sum) * scale
        x_row += SPLIT * (BLOCKS * 64)

    if COLUMNS > 1:
        total = tl.sum(total.reshape(BLOCK_N, BLOCK_M, COLUMNS), axis=2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _store(out, bias, split, m[None, :], n[:, None], total, M, N, SPLIT)


def reads(layout: Layout, form: str) -> bool:
    """Whether :func:`fast_kernel` reads such weights; "magic" is for bfloat16, the other forms for float16."""
    if layout.ternary or form not in FORMS:
        return False
    fits = layout.group == 0 or layout.group >= layout.lanes
    return fits and (layout.table == "none" or layout.bits in (2, 4))


def fast_tiles(M: int, layout: Layout) -> FastTiles:
    """Tiles for M rows of x, chosen by instructions and registers of compiled code; nothing here was timed.

    Two warps, so that Hopper's compiler keeps operands in registers too; as many rows of W as registers hold.
    """
    summed, table, least = len(layout.planes) > 1, layout.table != "none", 4 if 1 in layout.planes else 2
    if M <= 4:
        blocks = 4 if layout.bits == 8 or table else 8
        outputs, window = 32 if summed or table else 64, 8
    else:
        blocks, outputs, window = (least, 32, 4) if least == 4 else (least, 64 if summed or table else 128, 8)
    columns = 1 if layout.group == 0 else blocks if layout.group < 64 else max(1, blocks * 64 // layout.group)
    if M > 4 and columns > 1:
        outputs = 32
    rows = triton.next_power_of_2(M) if M <= 4 else 16
    return FastTiles(max(rows, 8 // columns), outputs, blocks, columns, window, stages=2 if summed else 3)


def fast_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    in_features: int,
    form: str | None = None,
    tiles: FastTiles | None = None,
    split: int = 1,
) -> torch.Tensor:
    """As :func:`lowbit_kernels.linear`, for ``x`` of float16 or bfloat16 and formats that :func:`reads` names.

    Raises:
        ValueError: for a format, dtype or form that has no fast kernel.
    """
    layout, N, K = parse(format), weight.shape[0], in_features
    form = form or ("magic" if x.dtype == torch.bfloat16 else "subnormal")
    if x.dtype not in (torch.float16, torch.bfloat16) or (form == "magic") != (x.dtype == torch.bfloat16):
        raise ValueError(f"no fast kernel for {x.dtype} in the form {form!r}: use the portable one")
    if not reads(layout, form):
        raise ValueError(f"no fast kernel reads {format!r} in the form {form!r}: use the portable one")
    rows = x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tiles = tiles or fast_tiles(M, layout)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    target = torch.empty((split, M, N), dtype=torch.float32, device=x.device) if split > 1 else out
    fast_kernel[(triton.cdiv(M, tiles.rows), triton.cdiv(N, tiles.outputs), split)](
        *(rows, *name_tensors(weight, companions, layout), bias, target, M, N, K),
        LAYOUT=layout,
        FORM=form,
        SPLIT=split,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.outputs,
        BLOCKS=tiles.blocks,
        COLUMNS=tiles.columns,
        WINDOW=tiles.window,
        EVEN=K % (64 * tiles.blocks) == 0,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
    )
    if split > 1:
        add_kernel[(triton.cdiv(M * N, 1024),)](target, bias, out, M, N, SPLIT=split, BLOCK=1024)
    return out.view(*x.shape[:-1], N)
