"""Portable dequantization: device functions that every kernel here is made of. No inline assembly, any target.

A packed weight can be walked in two orders with the same functions, because they only ask for a lane and a field:

- *lane order*: load a tile of 16-bit lanes once and take field 0, 1, 2, ... of all of them (``field`` a constant). One
  shift and one mask give a tile of values. Kernels that sum over the inputs use it: the order of a sum is free.
- *natural order*: a tile of lanes is spread over a dimension of fields (``field`` a tensor), and the dimensions blocks,
  fields and lanes together run along the inputs. Kernels whose output does too use it (:mod:`.natural`), but for
  ternary rows.

A width that is a sum of planes is walked by the lanes of its first plane. Those of the others are fewer: they are
loaded once, spread over the lanes they go with, and shifted so that the field's index alone says where the bits are.

``row`` is an int64 tile of output features, ``lane``, ``group`` and ``field`` int32 tiles; all broadcast together.
"""

import triton
import triton.language as tl


@triton.jit
def input_index(lane, field, lanes, LAYOUT: tl.constexpr):
    """The input of field ``field`` of lane ``lane`` of the first plane, in a row of so many ``lanes``."""
    if LAYOUT.ternary:
        k = lanes * field + lane
    else:
        k = lane // LAYOUT.lanes * 64 + field * LAYOUT.lanes + lane % LAYOUT.lanes
    return k


@triton.jit
def row_lanes(K, EVEN: tl.constexpr, LAYOUT: tl.constexpr):
    """Lanes of the first plane in a row; if ``EVEN`` is 1, they come in pieces of 16 bytes."""
    if LAYOUT.ternary:
        lanes = (K + 9) // 10
        if EVEN == 1:
            lanes = tl.multiple_of(lanes, 8)
    else:
        lanes = _blocks(K, EVEN) * LAYOUT.lanes
    return lanes


@triton.jit
def lanes_before(row, K, EVEN: tl.constexpr, LAYOUT: tl.constexpr):
    """Lanes of other rows in the 16 bytes that a ternary row begins in, int32; the same for each ``EVEN``-th row."""
    if LAYOUT.ternary and EVEN > 1:
        before = (row & 7).to(tl.int32) * (row_lanes(K, EVEN, LAYOUT) % 8) % 8
    else:
        before = 0
    return before


@triton.jit
def outputs_of(program, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr):
    """Rows of W (BLOCK_N,) of a program: neighbours, or those :func:`lanes_before` which are as many."""
    if LAYOUT.ternary and EVEN > 1:
        n = program // EVEN * (EVEN * BLOCK_N) + program % EVEN + EVEN * tl.arange(0, BLOCK_N)
    else:
        n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    return n


@triton.jit
def own_lanes(lane, lanes, EVEN: tl.constexpr, LAYOUT: tl.constexpr):
    """Which lanes are those of a row of so many ``lanes``, and not of the rows around it."""
    own = lane < lanes
    if LAYOUT.ternary and EVEN > 1:
        own = own & (lane >= 0)
    return own


@triton.jit
def _blocks(K, EVEN: tl.constexpr):
    blocks = (K + 63) // 64
    if EVEN:
        blocks = tl.multiple_of(blocks, 2)
    return blocks


@triton.jit
def _tile_lanes(start, part, BLOCKS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """Numbers (1, BLOCKS * LANES) of lanes in a plane of LANES a block: every PARTS-th block from ``start + part``."""
    lane = tl.arange(0, BLOCKS * LANES)[None, :]
    if PARTS > 1:
        lane = (lane // LANES * PARTS + part) * LANES + lane % LANES
    return start * LANES + lane


@triton.jit
def lane_tile(start, part, before, LAYOUT: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr):
    """Numbers (1, BLOCK_L // PARTS) of the lanes of the first plane in a part of the BLOCK_L lanes from ``start``.

    Of ternary rows, of the BLOCK_L from ``start - before``; a column of ``before`` gives rows of numbers.
    """
    if LAYOUT.ternary:
        lane = start + tl.arange(0, BLOCK_L)[None, :] - before
    else:
        BLOCKS: tl.constexpr = BLOCK_L // LAYOUT.lanes // PARTS
        lane = _tile_lanes(start // LAYOUT.lanes, part, BLOCKS, LAYOUT.lanes, PARTS)
    return lane


@triton.jit
def _plane(
    plane,
    start,
    part,
    inside,
    blocks,
    last,
    LAYOUT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Lanes of a later plane for those of the first that they go with, shifted to where the fields of those begin.

    They are fewer: each is loaded once, or taken from ``last``, and repeated.
    """
    PLANE: tl.constexpr = LAYOUT.planes[INDEX]
    LANES: tl.constexpr = 4 * PLANE
    TIMES: tl.constexpr = LAYOUT.lanes // LANES
    if PARTS > 1 and LAYOUT.planes[-1] == PLANE:
        word = last
    else:
        lane = _tile_lanes(start, part, BLOCKS, LANES, PARTS)
        word = tl.load(plane + lane, mask=inside & (lane < blocks * LANES), other=0)
    word = word.reshape(word.shape[0], BLOCKS, 1, LANES).broadcast_to(word.shape[0], BLOCKS, TIMES, LANES)
    shift = (tl.arange(0, TIMES) * PLANE).to(tl.int16)[None, None, :, None]
    return (word >> shift).reshape(word.shape[0], BLOCKS * LAYOUT.lanes)


@triton.jit
def load_last(
    weight, row, start, inside, K, EVEN: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr
):
    """Words of the last plane for both parts of BLOCK_L lanes from ``start``: two tiles; anything if PARTS is 1."""
    if PARTS == 1:
        words = (row, row)
    else:
        LANES: tl.constexpr = 4 * LAYOUT.planes[-1]
        BLOCKS: tl.constexpr = BLOCK_L // LAYOUT.lanes
        blocks = _blocks(K, EVEN)
        plane = weight + row * (blocks * (4 * LAYOUT.bits)) + blocks * (4 * (LAYOUT.bits - LAYOUT.planes[-1]))
        lane = _tile_lanes(start // LAYOUT.lanes, 0, BLOCKS, LANES, 1)
        word = tl.load(plane + lane, mask=inside & (lane < blocks * LANES), other=0)
        words = tl.split(word.reshape(word.shape[0], BLOCKS // 2, 2, LANES).permute(0, 1, 3, 2))
    return words


@triton.jit
def load_lanes(
    weight,
    row,
    start,
    part,
    inside,
    K,
    before,
    last,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Lanes of the first plane that :func:`lane_tile` numbers, of rows (BLOCK_N, 1), and what goes with them.

    Three tiles (BLOCK_N, BLOCK_L // PARTS), int16; what a format has not is the first plane again. ``last`` is this
    part's share of :func:`load_last`. Lanes that are not :func:`own_lanes` are 0 or those of other rows.
    """
    if LAYOUT.ternary:
        lanes = row_lanes(K, EVEN, LAYOUT)
        place = start + tl.arange(0, BLOCK_L)[None, :]
        begin = row * lanes
        if EVEN > 1:
            begin = tl.multiple_of(begin - before, [8, 1])
            lanes = (lanes + before + 7) // 8 * 8
        first = tl.load(weight + begin + place, mask=inside & (place < lanes), other=0)
        second = first
        third = first
    else:
        PLANES: tl.constexpr = LAYOUT.planes
        BLOCKS: tl.constexpr = BLOCK_L // LAYOUT.lanes // PARTS
        block = start // LAYOUT.lanes
        blocks = _blocks(K, EVEN)
        plane = weight + row * (blocks * (4 * LAYOUT.bits))
        lane = _tile_lanes(block, part, BLOCKS, LAYOUT.lanes, PARTS)
        first = tl.load(plane + lane, mask=inside & (lane < blocks * LAYOUT.lanes), other=0)
        second = first
        third = first
        if len(PLANES) > 1:
            plane += blocks * LAYOUT.lanes
            second = _plane(plane, block, part, inside, blocks, last, LAYOUT, 1, BLOCKS, PARTS)
        if len(PLANES) > 2:
            plane += blocks * (4 * PLANES[1])
            third = _plane(plane, block, part, inside, blocks, last, LAYOUT, 2, BLOCKS, PARTS)
    return first, second, third


@triton.jit
def _bits(word, field, LAYOUT: tl.constexpr, PLANE: tl.constexpr):
    return (word.to(tl.int32) >> (field * (LAYOUT.lanes // 4))) & ((1 << PLANE) - 1)


@triton.jit
def decode_field(first, second, third, field, LAYOUT: tl.constexpr):
    """Codes, int32, of field ``field`` of lanes from :func:`load_lanes`."""
    if LAYOUT.ternary:
        # 3**field, from the binary digits of the field.
        power = (1 + (field & 1) * 2) * (1 + (field >> 1 & 1) * 8)
        power *= (1 + (field >> 2 & 1) * 80) * (1 + (field >> 3 & 1) * 6560)
        code = (((first.to(tl.int32) & 0xFFFF) * power) & 0xFFFF) * 3 >> 16
    else:
        code = _bits(first, field, LAYOUT, LAYOUT.planes[0])
        if len(LAYOUT.planes) > 1:
            code = (code << LAYOUT.planes[1]) | _bits(second, field, LAYOUT, LAYOUT.planes[1])
        if len(LAYOUT.planes) > 2:
            code = (code << LAYOUT.planes[2]) | _bits(third, field, LAYOUT, LAYOUT.planes[2])
    return code


@triton.jit
def group_of(k, LAYOUT: tl.constexpr):
    """The group of input ``k``."""
    if LAYOUT.group == 0:
        group = k * 0
    else:
        group = k // LAYOUT.group
    return group


@triton.jit
def halves_of_e4m3(stored):
    """Codes of e4m3 as float16 of ``2**-8`` times their value, subnormal ones too: their bits, moved."""
    code = stored.to(tl.int8, bitcast=True).to(tl.int32)
    return ((code << 7) & 0xBF80).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def decode_scale(stored, scale_range, LAYOUT: tl.constexpr):
    """Scales, float32, as they are ``stored``."""
    if LAYOUT.scale == "log8":
        low = tl.load(scale_range)
        step = tl.load(scale_range + 1)
        code = stored.to(tl.int32)
        scale = tl.where(code == 0, 0.0, tl.exp2(low + step * (code - 1).to(tl.float32)))
    elif LAYOUT.scale == "e8m0":
        code = stored.to(tl.int32)
        scale = tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)
    elif LAYOUT.scale == "e4m3":
        scale = halves_of_e4m3(stored).to(tl.float32) * (tl.load(scale_range) * 256.0)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def load_scale(scales, scale_range, row, group, mask, K, LAYOUT: tl.constexpr):
    """Scales, float32; 1 for a format that has none, 0 where ``mask`` is not."""
    if LAYOUT.scale == "none":
        scale = 1.0
    else:
        groups = group_of(K - 1, LAYOUT) + 1
        stored = tl.load(scales + row * groups + group, mask=mask, other=0)
        scale = decode_scale(stored, scale_range, LAYOUT)
    return scale


@triton.jit
def load_zero(zeros, row, group, mask, K, LAYOUT: tl.constexpr):
    """Zero points, float32."""
    if LAYOUT.zeros == "fixed":
        zero = LAYOUT.fixed_zero
    elif LAYOUT.zeros == "float":
        groups = group_of(K - 1, LAYOUT) + 1
        zero = tl.load(zeros + row * groups + group, mask=mask, other=0).to(tl.float32)
    else:
        size = ((group_of(K - 1, LAYOUT) + 1) * LAYOUT.bits + 7) // 8
        bit = group * LAYOUT.bits
        byte = zeros + row * size + bit // 8
        stream = tl.load(byte, mask=mask, other=0).to(tl.int32)
        if 8 % LAYOUT.bits != 0:  # a zero point may begin in one byte and end in the next
            stream |= tl.load(byte + 1, mask=mask & (bit // 8 + 1 < size), other=0).to(tl.int32) << 8
        zero = ((stream >> (bit % 8)) & ((1 << LAYOUT.bits) - 1)).to(tl.float32)
    return zero


@triton.jit
def dequantize(code, scale, zero, levels, row, mask, LAYOUT: tl.constexpr):
    """Values, float32, of ``code``."""
    if LAYOUT.table == "row":
        value = tl.load(levels + row * (1 << LAYOUT.bits) + code, mask=mask, other=0).to(tl.float32)
    elif LAYOUT.table == "tensor":
        value = tl.load(levels + code).to(tl.float32) * scale
    else:
        value = (code.to(tl.float32) - zero) * scale
    return value


@triton.jit
def _over_lanes(value, BLOCK_L: tl.constexpr):
    """A value of every block (BLOCK_N, BLOCKS), for all lanes of the block: (BLOCK_N, BLOCK_L)."""
    LANES: tl.constexpr = BLOCK_L // value.shape[1]
    value = value[:, :, None].broadcast_to(value.shape[0], value.shape[1], LANES)
    return value.reshape(value.shape[0], BLOCK_L)


@triton.constexpr_function
def starts_group(field, layout):
    """Whether a field's scale is another than that of the field before, where groups span fields."""
    return field == 0 if layout.group == 0 else field * layout.lanes % min(layout.group, 64) == 0


@triton.jit
def load_grid(
    scales,
    scale_range,
    zeros,
    row,
    start,
    part,
    field,
    inside,
    K,
    LAYOUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Scales and zero points of a field of the lanes of :func:`lane_tile`, where no group ends within one of a block.

    They are loaded once for each block; tiles (BLOCK_N, BLOCK_L // PARTS), or what broadcasts to that.
    """
    if LAYOUT.group == 0:
        group = (row * 0).to(tl.int32)
        scale = load_scale(scales, scale_range, row, group, inside, K, LAYOUT)
        zero = load_zero(zeros, row, group, inside, K, LAYOUT)
    else:
        BLOCKS: tl.constexpr = BLOCK_L // LAYOUT.lanes // PARTS
        k = _tile_lanes(start // LAYOUT.lanes, part, BLOCKS, 1, PARTS) * 64 + field * LAYOUT.lanes
        here = inside & (k < K)
        scale = load_scale(scales, scale_range, row, group_of(k, LAYOUT), here, K, LAYOUT)
        zero = load_zero(zeros, row, group_of(k, LAYOUT), here, K, LAYOUT)
        if LAYOUT.scale != "none":
            scale = _over_lanes(scale, BLOCK_L // PARTS)
        if LAYOUT.zeros != "fixed":
            zero = _over_lanes(zero, BLOCK_L // PARTS)
    return scale, zero
