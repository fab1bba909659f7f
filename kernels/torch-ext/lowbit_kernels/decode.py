"""Portable dequantization: device functions that every kernel here is made of. No inline assembly, any target.

A packed weight can be walked in two orders with the same functions, because they only ask for a lane and a field:

- *lane order*: load a tile of 16-bit lanes once and take field 0, 1, 2, ... of all of them (``field`` a constant). One
  shift and one mask give a tile of values. Kernels that sum over the inputs use it: the order of a sum is free.
- *natural order*: lane and field are computed from the input index (``field`` a tensor). Lanes are loaded as often as
  they have fields, mostly from cache. Kernels whose output runs along the inputs use it.

A width that is a sum of planes is walked by the lanes of its first plane. Those of the others are fewer: every one is
loaded again for each field that it holds of the first plane's lanes, and shifted once so that the field's index alone
says where the bits are.

``row`` is an int64 tile of output features, ``lane``, ``group`` and ``field`` int32 tiles; all broadcast together.
"""

import triton
import triton.language as tl


@triton.jit
def lane_and_field(k, K, LAYOUT: tl.constexpr):
    """Where input ``k`` of a row lies: its lane in the first plane, and its field there."""
    if LAYOUT.ternary:
        lanes = (K + 9) // 10
        lane = k % lanes
        field = k // lanes
    else:
        lane = k // 64 * LAYOUT.lanes + k % LAYOUT.lanes
        field = k % 64 // LAYOUT.lanes
    return lane, field


@triton.jit
def input_index(lane, field, K, LAYOUT: tl.constexpr):
    """Inverse of :func:`lane_and_field`."""
    if LAYOUT.ternary:
        k = (K + 9) // 10 * field + lane
    else:
        k = lane // LAYOUT.lanes * 64 + field * LAYOUT.lanes + lane % LAYOUT.lanes
    return k


@triton.jit
def row_lanes(K, LAYOUT: tl.constexpr):
    """Lanes of the first plane in a row."""
    if LAYOUT.ternary:
        lanes = (K + 9) // 10
    else:
        lanes = (K + 63) // 64 * LAYOUT.lanes
    return lanes


@triton.jit
def _plane(row_start, lane, mask, start, LAYOUT: tl.constexpr, PLANE: tl.constexpr):
    """Lanes of a later plane, shifted to where the fields of the first plane's ``lane`` begin."""
    within = lane % LAYOUT.lanes
    address = start + lane // LAYOUT.lanes * (4 * PLANE) + within % (4 * PLANE)
    word = tl.load(row_start + address, mask=mask, other=0).to(tl.int32)
    return word >> (within // (4 * PLANE) * PLANE)


@triton.jit
def load_lanes(weight, row, lane, mask, K, LAYOUT: tl.constexpr):
    """Lanes of all planes, int32; what a format has not is the first plane again."""
    if LAYOUT.ternary:
        row_start = weight + row * ((K + 9) // 10)
        first = tl.load(row_start + lane, mask=mask, other=0).to(tl.int32) & 0xFFFF
        second = first
        third = first
    else:
        blocks = (K + 63) // 64
        row_start = weight + row * (blocks * (4 * LAYOUT.bits))
        first = tl.load(row_start + lane, mask=mask, other=0).to(tl.int32)
        second = first
        third = first
        if len(LAYOUT.planes) > 1:
            start = blocks * LAYOUT.lanes
            second = _plane(row_start, lane, mask, start, LAYOUT, LAYOUT.planes[1])
            if len(LAYOUT.planes) > 2:
                third = _plane(row_start, lane, mask, start + blocks * (4 * LAYOUT.planes[1]), LAYOUT, LAYOUT.planes[2])
    return first, second, third


@triton.jit
def _bits(word, field, LAYOUT: tl.constexpr, PLANE: tl.constexpr):
    return (word >> (field * (LAYOUT.lanes // 4))) & ((1 << PLANE) - 1)


@triton.jit
def decode_field(first, second, third, field, LAYOUT: tl.constexpr):
    """Codes, int32, of field ``field`` of lanes from :func:`load_lanes`."""
    if LAYOUT.ternary:
        # 3**field, from the binary digits of the field.
        power = (1 + (field & 1) * 2) * (1 + (field >> 1 & 1) * 8)
        power *= (1 + (field >> 2 & 1) * 80) * (1 + (field >> 3 & 1) * 6560)
        code = ((first * power) & 0xFFFF) * 3 >> 16
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
def load_scale(scales, scale_range, row, group, mask, K, LAYOUT: tl.constexpr):
    """Scales, float32; 1 for a format that has none, 0 where ``mask`` is not."""
    if LAYOUT.scale == "none":
        scale = 1.0
    else:
        groups = group_of(K - 1, LAYOUT) + 1
        stored = tl.load(scales + row * groups + group, mask=mask, other=0)
        if LAYOUT.scale == "log8":
            low = tl.load(scale_range)
            step = tl.load(scale_range + 1)
            code = stored.to(tl.int32)
            scale = tl.where(code == 0, 0.0, tl.exp2(low + step * (code - 1).to(tl.float32)))
        elif LAYOUT.scale == "e8m0":
            code = stored.to(tl.int32)
            scale = tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)
        elif LAYOUT.scale == "e4m3":
            code = stored.to(tl.int32)
            small = (code & 7).to(tl.float32) * 0.001953125  # 2**-9
            normal = (((code & 127) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
            magnitude = tl.where((code & 127) < 8, small, normal)
            scale = tl.where(code < 128, magnitude, -magnitude) * tl.load(scale_range)
        else:
            scale = stored.to(tl.float32)
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
def load_values(weight, scales, scale_range, zeros, levels, row, k, mask, K, LAYOUT: tl.constexpr):
    """Weights (row, k), float32, in natural order; 0 where ``mask`` is not."""
    lane, field = lane_and_field(k, K, LAYOUT)
    first, second, third = load_lanes(weight, row, lane, mask, K, LAYOUT)
    group = group_of(k, LAYOUT)
    scale = load_scale(scales, scale_range, row, group, mask, K, LAYOUT)
    zero = load_zero(zeros, row, group, mask, K, LAYOUT)
    value = dequantize(decode_field(first, second, third, field, LAYOUT), scale, zero, levels, row, mask, LAYOUT)
    return tl.where(mask, value, 0.0)
