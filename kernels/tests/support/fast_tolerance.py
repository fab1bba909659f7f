"""How far the result of a fast form may be from the exact one, element by element.

Products of codes and inputs are exact in float32 (a code has at most 8 bits, an input 11), and K of them are summed
there: 4 * sqrt(K) roundings of 2**-24 of the sum of magnitudes (four standard deviations of independent roundings).
The zero point comes off the sum, so that the magnitude is that of the codes and not of the weights; the form "magic"
sums 128 + code, and does so for each of the two nibbles of 8 bits. Tables are rounded to the dtype of x first.
``log8`` scales are a power of two that each reader may have off (docs/format.md). The result is rounded once.

Where scales go into weights (``fast_scaled``), a weight is rounded to the dtype of x, and so is the scale if it has
more bits, each by half a unit in the last place. In bfloat16 that is all but for zero points as floats: there a weight
is ``(q s - a) - b`` with two roundings, where ``a`` is ``z s`` rounded and ``b`` the rest, rounded as well; the first
rounding is of ``b`` more than the weight, and ``b`` at most half a unit in the last place of ``z s``.

In float16, where a weight is ``q s - z s``, ``z s`` is rounded, too, and each may be off by half of the least float16,
2**-25, which is so much of a row whose greatest scale is brought to 2**14 or more (float16 ones by 2**30 at most),
times 2**-24, or more where a code stands higher. Scales of e8m0 less than 2**-28 of that are 0 there, which is off by
less. Levels times a scale have no zero point; where they are 1 or more, the greatest scale is brought to as much less.
"""

import torch
from lowbit_kernels import layout, plain
from lowbit_kernels.fast import fast_tiles
from lowbit_kernels.fast_asm import code_position

U = 2.0**-24


def fast_bound(x, weight, companions, bias, format: str, K: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``x @ W.T + bias`` in float64 and the bound on what a fast form may be off, (M, N) each."""
    lay = layout.parse(format)
    named = layout.name_tensors(weight, companions, lay)
    values = plain.weight_values(named, lay, K).double()
    exact = x.double() @ values.T
    offset = 0.0 if form != "magic" or lay.table != "none" else 128.0 * (17 if lay.bits == 8 else 1)
    scales = torch.as_tensor(plain.group_scales(named, lay)).double().abs()
    scales = scales.repeat_interleave(lay.group or K, 1)[:, :K].expand_as(values)
    sums = x.double().abs() @ (values.abs() + scales * (offset + 2.0 ** (lay.bits + 1))).T
    magnitude = x.double().abs() @ values.abs().T
    half = torch.finfo(x.dtype).eps / 2
    error = half if lay.table != "none" else 0.0
    if lay.scale == "log8":
        low, step = (float(v) for v in named.scale_range)
        error += 2 * 2.0**-23 * (1 + max(abs(low), abs(low + 254 * step))) + 2 * U
    added = 0.0
    if fast_tiles(x.shape[0], lay, form).scaled:
        off = half * 2 * values.abs()
        if x.dtype == torch.float16:
            most = scales.amax(1, keepdim=True)
            if lay.scale == "float16":
                most = most.clamp(min=2.0**-16)
            if lay.scale == "log8":
                most = torch.full_like(most, 2.0 ** (low + 254 * step))
            if lay.table == "none":
                off += half * (values.abs() + scales * 2.0**lay.bits)  # no less than a zero point times its scale
                off += 2 * 2.0**-25 * 2.0 ** (10 - code_position("subnormal", lay.bits, 0, 8)) * most
            else:  # a scale and a product below the least normal number
                level = named.levels.double().abs().amax()
                room = 2.0 ** -(14 - max(int(level.log2().floor()) + 1, 0))
                off += 2.0**-25 * room * (1 + level) * most
        elif lay.zeros == "float":
            off += half * values.abs() + 2 * half**2 * scales * 2.0**lay.bits
        added = x.double().abs() @ off.T
    bias = torch.zeros(1, dtype=x.dtype, device=x.device) if bias is None else bias.to(x.dtype)
    expected = exact + bias.double()
    bound = (
        added + sums * 4 * K**0.5 * U + magnitude * error + half * expected.abs() * 1.01 + U + bias.double().abs() * U
    )
    return expected, bound
