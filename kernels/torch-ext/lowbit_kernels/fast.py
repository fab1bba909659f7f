"""Fast NVIDIA forms of ``x @ W.T``: codes go from memory to tensor cores with about one instruction for a weight.

What a weight costs in instructions decides at few bits (a load of 16 bytes brings 32 weights of 4 bits), so:

- W is the left operand of ``tl.dot``. Lanes are copied to shared memory in 16-byte pieces, still packed, read back in
  the layout that the tensor core wants, and become values there, by inline assembly on pairs (:mod:`.fast_asm`).
- A tile of lanes is loaded once; each of its fields is a tile of weights, whose inputs are picked out of x to match.
- All widths but 8 bits are walked by the 16 lanes of a plane of four bits, whose field ``j`` of lane ``l`` is value
  ``16 * j + l``. A smaller plane has the bits of these four values in one lane too, as far apart: lane ``l % (4 * p)``,
  shifted by ``l // (4 * p)`` fields. So planes are joined to codes before the product, and there is one product.
- Scales and zero points touch sums, not weights: ``sum((q - z) * s * x) = s * (sum(q * x) - z * sum(x))`` for a group.
  The sum of x comes from the tensor core too, as a product with ones of as few rows as tensor cores take, one for all
  rows of W. What the form of a code multiplies or adds goes into ``s`` and ``z`` of the group.
- A tile of lanes can reach over several groups. Then a row of x takes a column for each of them, zero outside its
  group, and one product gives the sums of all. With few rows of x those columns would be empty anyway.
- From three rows of x on, and in groups of 16 for any number, scales and zero points of small groups go into weights
  after all: :mod:`.fast_scaled`. With zero points as floats, in bfloat16, codes of up to 4 bits take two rows more.

Sums are float32; but for that nothing is rounded except, for tables, the level to the dtype of x. Not here: ternary,
tables of more than 4 bits and float32 activations; those take the portable kernels.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from .fast_fields import all_turns, level_tables, moved_e2m1, operands, seen_inputs, with_step
from .fast_grid import BLOCKS, has_unit, power_exponents, shared_scale, step_offset, unit
from .fast_pairs import has_pairs, has_room, pair_table
from .fast_scaled import in_weights, scaled_kernel
from .layout import Layout, name_tensors, on_device, parse
from .matmul import _store, add_shares

FORMS = ("subnormal", "lop3", "magic")
# Said to the assembler, which else saves registers for occupancy and spills a few: as many as a thread can have.
REGISTERS = 255


@dataclass(frozen=True)
class FastTiles:
    """Sizes of the tile of one program of :func:`fast_kernel`.

    Args:
        rows: Rows of x.
        outputs: Rows of W.
        blocks: Blocks of 64 inputs a step.
        strips: Parts that the rows of W are multiplied in, one after another, all with the same inputs in registers.
        spans: Times that a step is taken in one turn of the loop, 1 or 2. Lanes of which a step has less than 16 bytes
            a row are loaded for both together.
        columns: Columns that a row of x takes: groups in a step, or blocks where groups are smaller.
        window: Bits of a lane that are read from one shift, 4 or 8, in float16 with codes of at most 4 bits.
        warps: Warps a program.
        stages: Steps in flight.
        scaled: 1 if :mod:`.fast_scaled` computes it.
        pairs: 1 if levels are looked up in a table of pairs (:mod:`.fast_pairs`).
    """

    rows: int
    outputs: int
    blocks: int
    columns: int
    window: int
    warps: int = 2
    stages: int = 3
    strips: int = 1
    spans: int = 1
    scaled: int = 0
    pairs: int = 0


@triton.jit(do_not_specialize=["M"])
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
    STRIPS: tl.constexpr,
    SPANS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_OF_ONES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N), SPLIT); ``EVEN`` says that whole steps fill K.

    Arguments and ``out`` are those of :func:`.matmul.gemm_kernel`; the sizes those of :class:`FastTiles`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    R: tl.constexpr = BLOCK_M * COLUMNS
    STRIP: tl.constexpr = BLOCK_N // STRIPS

    column = tl.arange(0, R)
    m = tl.program_id(0) * BLOCK_M + column // COLUMNS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, STRIP)
    split = tl.program_id(2)
    x_row = x + tl.minimum(m, M - 1)[:, None].to(tl.int64) * K
    seen = seen_inputs(column, 32 if LAYOUT.bits == 8 else 16, BLOCKS, COLUMNS) & (m < M)[:, None]
    turns = all_turns(weight, K, LAYOUT, BLOCKS)
    exponents = power_exponents(scale_range, tl.full((1, 1), 0, tl.int32), LAYOUT)
    blocks = (K + 63) // 64
    if EVEN:
        blocks = tl.multiple_of(blocks, BLOCKS * SPANS)

    if PAIRS:
        pairs = pair_table(levels, weight, K, LAYOUT, DTYPE)
    rows = ()
    tables = ()
    totals = ()
    for strip in tl.static_range(STRIPS):
        row = tl.minimum(n + strip * STRIP, N - 1)[:, None].to(tl.int64)
        rows = rows + (row,)  # noqa: RUF005 (Triton has no other way to join tuples)
        if PAIRS:
            tables = tables + ((pairs,),)  # noqa: RUF005
        else:
            tables = tables + (level_tables(levels, row, LAYOUT, FORM, DTYPE),)  # noqa: RUF005
        totals = totals + (tl.zeros((STRIP, R), tl.float32),)  # noqa: RUF005
    for step in tl.range(split, tl.cdiv(blocks, BLOCKS * SPANS), SPLIT, num_stages=STAGES):
        words = ()
        for strip in tl.static_range(STRIPS):
            start = weight + rows[strip] * (blocks * (4 * LAYOUT.bits))
            words = words + (operands(start, step, blocks, turns, LAYOUT, BLOCKS, SPANS, EVEN),)  # noqa: RUF005
        for span in tl.static_range(SPANS):
            x_offset = step_offset(step, SPANS * BLOCKS * 64) + span * (BLOCKS * 64)
            added = ()
            for strip in tl.static_range(STRIPS):
                total = with_step(
                    *(totals[strip], words[strip][span], rows[strip], tables[strip], x_row, x_offset, seen),
                    *(scales, exponents, zeros, step * SPANS + span, K, LAYOUT, FORM),
                    *(BLOCK_M, BLOCKS, COLUMNS, WINDOW, EVEN, ROWS_OF_ONES),
                )
                added = added + (total,)  # noqa: RUF005
            totals = added

    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    for strip in tl.static_range(STRIPS):
        total = totals[strip]
        total *= shared_scale(scale_range, LAYOUT)
        if has_unit(LAYOUT, COLUMNS):
            total *= unit(FORM, LAYOUT, WINDOW)
        if COLUMNS > 1:
            total = tl.sum(total.reshape(STRIP, BLOCK_M, COLUMNS), axis=2)
        _store(out, bias, split, m[None, :], (n + strip * STRIP)[:, None], total, M, N, SPLIT)


def reads(layout: Layout, form: str) -> bool:
    """Whether :func:`fast_kernel` reads such weights; "magic" is for bfloat16, the other forms for float16."""
    if layout.ternary or form not in FORMS:
        return False
    looked_up = layout.table != "none" and not moved_e2m1(form, layout)
    fits = layout.group == 0 or layout.group >= (32 if layout.bits == 8 or looked_up else 16)
    return (fits and (layout.table == "none" or layout.bits <= 4)) or in_weights(layout, form)


def columns_of(blocks: int, layout: Layout) -> int:
    """The columns of :class:`FastTiles` that so many blocks a step need: as many groups as a step has, or blocks."""
    return 1 if layout.group == 0 else blocks if layout.group < 64 else max(1, blocks * 64 // layout.group)


def fast_tiles(M: int, layout: Layout, form: str) -> FastTiles:
    """Tiles for M rows of x, chosen by instructions and registers of compiled code; nothing here was timed.

    Two warps, so that Hopper's compiler keeps operands in registers too; as many rows of W as registers hold.
    """
    least = 0 if layout.group == 16 else 2
    if layout.zeros == "float" and form == "magic":  # two numbers to be added to each weight
        if layout.bits <= 4:
            least += 2
        elif (layout.bits, layout.group) in ((6, 32), (8, 32), (8, 64)):  # of which sums take more still
            least = 0
    if least < M and in_weights(layout, form):
        return _scaled_tiles(M, layout, form)
    return sum_tiles(M, layout, form)


def _scaled_tiles(M: int, layout: Layout, form: str) -> FastTiles:
    """As :func:`fast_tiles`, with scales and zero points in weights."""
    floats = layout.zeros == "float"
    wide = layout.bits == 4 and layout.scale in ("float16", "float32")
    full = M > 8 and (floats or layout.group == 16 or (layout.group == 32 and wide))  # registers of 128 rows
    full |= floats and (layout.bits, layout.group) == (4, 16)
    many = layout.table == "none" and layout.bits in (1, 2, 4) and not full
    # Fewer bits take less by registers.
    pairs = int(has_pairs(layout, form) and (layout.bits == 4 or (layout.bits == 3 and M > 8)))
    tiles = FastTiles(8 if M <= 8 else 16, 128 if many else 64, BLOCKS.value, 1, 8, stages=2, scaled=1, pairs=pairs)
    return tiles if not pairs or has_room(tiles, layout) else replace(tiles, outputs=32, warps=1)


def sum_tiles(M: int, layout: Layout, form: str) -> FastTiles:
    """As :func:`fast_tiles`, with scales and zero points in sums."""
    table = layout.table != "none" and layout.name != "fp4"
    if layout.table == "row":
        return _row_table_tiles(M, layout)
    if M <= 4:
        full = (layout.group == 32 and layout.bits == 8) or (layout.group in (32, 64) and layout.table != "none")
        floats = layout.zeros == "float" and form == "magic" and (layout.bits, layout.group) == (6, 64)
        few = floats or (M > 2 and full) or (layout.group == 16 and layout.bits in (5, 7))
        blocks, spans = 2 if few else 4, 1
    else:
        blocks = 1 if 0 < layout.group <= 64 and (1 not in layout.planes or table) else 2
        spans = 2 if table and blocks == 1 else 1
    columns = columns_of(blocks, layout)
    # Sums for every part of a block take registers: with small groups, 16 rows spill from some widths on.
    many = 8 if 0 < layout.group < 32 or (layout.group == 32 and layout.bits == 7) else 16
    rows = triton.next_power_of_2(M) if M <= 4 else many
    warps = 4 if M > 4 and (layout.group, layout.bits) == (32, 3) and not table else 2
    eight = layout.scale in ("e4m3", "e8m0") and layout.group == 32  # scales whose decoding leaves too few registers
    # Fewer bits take less by registers.
    pairs = int((2 if eight else 4) < M and layout.bits == 4 and has_pairs(layout, form))
    strips = 2 if table and 2 < M <= 4 and layout.group in (32, 64) else 1
    # A plane of one bit loaded for two blocks at once, next to a table and two sums a block, takes too many registers.
    wide = columns == 1 and not (table and layout.group == 32 and 1 in layout.planes) if M > 4 else strips == 2
    outputs = 128 if warps == 4 or wide else 64
    stages = 2 if len(layout.planes) > 1 or strips == 2 or (table and (M > 4 or layout.group == 32)) else 3
    window = 4 if M > 4 and 0 < layout.group <= 32 else 8  # one more shift, but no second sum for each group
    rows = max(rows, 8 // columns)
    return FastTiles(rows, outputs, blocks, columns, window, warps, stages, strips, spans, pairs=pairs)


def _row_table_tiles(M: int, layout: Layout) -> FastTiles:
    """As :func:`fast_tiles`, for a table of each row of W.

    A strip has fewer rows than the program has threads. The compiler takes the loads of so small a tile for free, and
    lets each thread load the tables of the rows that it multiplies; else it brings looked up levels through shared
    memory.
    """
    if M <= 4:
        return FastTiles(8, 64, 4, 1, 8, stages=2, strips=2)
    if layout.bits == 4:
        return FastTiles(16, 128, 1, 1, 8, stages=2, strips=4)
    return FastTiles(16, 64, 4, 1, 8, stages=2, strips=2)


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
    tiles = tiles or fast_tiles(M, layout, form)
    if tiles.spans > 2:
        raise ValueError(f"{tiles} take more than two steps a turn of the loop: give spans=1 or 2")
    if tiles.scaled and not in_weights(layout, form):
        raise ValueError(f"scales of {format!r} cannot go into weights in the form {form!r}: give other tiles")
    if tiles.pairs and not has_pairs(layout, form):
        raise ValueError(f"levels of {format!r} have no table of pairs in the form {form!r}: give other tiles")
    if tiles.pairs and not has_room(tiles, layout):
        raise ValueError(f"{tiles} leave no room for a table of pairs: give smaller ones, or pairs=0")
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    target = torch.empty((split, M, N), dtype=torch.float32, device=x.device) if split > 1 else out
    grid = (triton.cdiv(M, tiles.rows), triton.cdiv(N, tiles.outputs), split)
    tensors = name_tensors(weight, companions, layout)
    whole = K % (64 * tiles.blocks * tiles.spans) == 0
    if tiles.scaled and tensors.zeros is not None:
        whole &= tensors.zeros.data_ptr() % 4 == 0  # read by words
    with on_device(x.device):
        if tiles.scaled:
            scaled_kernel[grid](
                *(rows, *tensors, bias, target, M, N, K),
                LAYOUT=layout,
                FORM=form,
                SPLIT=split,
                BLOCK_M=tiles.rows,
                BLOCK_N=tiles.outputs,
                EVEN=whole,
                STAGES=tiles.stages,
                WARPS=tiles.warps,
                PAIRS=tiles.pairs,
                num_warps=tiles.warps,
                maxnreg=REGISTERS,
            )
        else:
            fast_kernel[grid](
                *(rows, *tensors, bias, target, M, N, K),
                LAYOUT=layout,
                FORM=form,
                SPLIT=split,
                BLOCK_M=tiles.rows,
                BLOCK_N=tiles.outputs,
                BLOCKS=tiles.blocks,
                STRIPS=tiles.strips,
                SPANS=tiles.spans,
                COLUMNS=tiles.columns,
                WINDOW=tiles.window,
                EVEN=whole,
                STAGES=tiles.stages,
                ROWS_OF_ONES=min(16 * tiles.warps, tiles.outputs // tiles.strips),
                PAIRS=tiles.pairs,
                num_warps=tiles.warps,
                maxnreg=REGISTERS,
            )
        if split > 1:
            add_shares(target, bias, out)
    return out.view(*x.shape[:-1], N)
