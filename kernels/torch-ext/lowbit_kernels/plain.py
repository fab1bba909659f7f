"""The plain PyTorch twin of every kernel: the same arguments, the same result, nothing clever.

It follows the description of the stored bits literally, value by value, and is what tests hold the kernels against.
"""

import torch
import torch.nn.functional as F

from .layout import BLOCK, DIGITS, Layout, Packed, name_tensors, parse


def codes(weight: torch.Tensor, layout: Layout, K: int) -> torch.Tensor:
    """Codes (N, K), int32, of packed rows (N, lanes), int16."""
    words = weight.to(torch.int32) & 0xFFFF
    k = torch.arange(K, device=weight.device)
    if layout.ternary:
        lanes = -(-K // DIGITS)
        return ((words[:, k % lanes] * (3 ** (k // lanes)) & 0xFFFF) * 3 >> 16).to(torch.int32)
    code, start, blocks = torch.zeros_like(words[:, :1]), 0, -(-K // BLOCK)
    for plane in layout.planes:
        lanes = 4 * plane
        lane, field = start + lanes * (k // BLOCK) + k % BLOCK % lanes, k % BLOCK // lanes
        code = (code << plane) | (words[:, lane] >> (plane * field) & (2**plane - 1))
        start += lanes * blocks
    return code.to(torch.int32)


def group_scales(packed: Packed, layout: Layout) -> torch.Tensor | float:
    """Scales (N, G), float32."""
    if layout.scale == "none":
        return torch.ones(1, 1, device=packed.weight.device)
    assert packed.scales is not None
    if layout.scale == "log8":
        assert packed.scale_range is not None
        low, step = packed.scale_range
        power = torch.exp2(low + step * (packed.scales.to(torch.float32) - 1))
        return torch.where(packed.scales == 0, 0, power)
    if layout.scale == "e8m0":
        return torch.exp2(packed.scales.to(torch.float32) - 127)
    if layout.scale == "e4m3":
        return packed.scales.view(torch.float8_e4m3fn).to(torch.float32) * packed.scale_range
    return packed.scales.to(torch.float32)


def group_zeros(packed: Packed, layout: Layout, groups: int) -> torch.Tensor:
    """Zero points (N, G), float32."""
    if layout.zeros == "fixed":
        return torch.full((1, 1), layout.fixed_zero, device=packed.weight.device)
    assert packed.zeros is not None
    if layout.zeros == "float":
        return packed.zeros.to(torch.float32)
    bits = torch.arange(groups * layout.bits, device=packed.weight.device).view(groups, layout.bits)
    stream = packed.zeros.to(torch.int32)[:, bits // 8] >> (bits % 8).to(torch.int32) & 1
    return (stream << torch.arange(layout.bits, device=stream.device)).sum(-1).to(torch.float32)


def weight_values(packed: Packed, layout: Layout, K: int) -> torch.Tensor:
    """The weight (N, K), float32."""
    code = codes(packed.weight, layout, K)
    if layout.table == "none":
        group = torch.arange(K, device=code.device) // (layout.group or K)
        scales = group_scales(packed, layout)
        zeros = group_zeros(packed, layout, layout.groups(K)).expand_as(scales)
        return (code.to(torch.float32) - zeros[:, group]) * scales[:, group]
    assert packed.levels is not None
    levels = packed.levels.to(torch.float32).expand(code.shape[0], -1).gather(1, code.to(torch.int64))
    if layout.scale == "none":
        return levels
    return levels * group_scales(packed, layout)[:, torch.arange(K, device=code.device) // (layout.group or K)]


def dequantize(weight, companions, format, in_features, dtype):
    """``W`` (N, K) in ``dtype``."""
    layout = parse(format)
    return weight_values(name_tensors(weight, companions, layout), layout, in_features).to(dtype)


def linear(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias``: (..., K) to (..., N)."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, dequantize(weight, companions, format, in_features, x.dtype), bias)


def input_gradient(gradient, weight, companions, format, in_features):
    """``gradient @ W``: (..., N) to (..., K)."""
    return gradient @ dequantize(weight, companions, format, in_features, gradient.dtype)


def embedding(index, weight, companions, format, in_features, dtype):
    """``W[index]`` (..., K) in ``dtype``."""
    return dequantize(weight, companions, format, in_features, dtype)[index]


def _by_expert(function, rows, ends, width, weight, companions):
    """``function(rows of an expert, its weight, its companions, expert)`` for all experts, as (R, width)."""
    out, first = rows.new_zeros(rows.shape[0], width), 0
    for expert, end in enumerate(ends.tolist()):
        out[first:end] = function(rows[first:end], weight[expert], [c[expert] for c in companions], expert)
        first = end
    return out


def grouped_linear(x, ends, weight, companions, bias, format, in_features):
    """``x[r] @ W[e].T + bias[e]``: (R, K) to (R, N) for rows sorted by expert, which end at ``ends`` (E,)."""

    def one(x, weight, companions, expert):
        return linear(x, weight, companions, None if bias is None else bias[expert], format, in_features)

    return _by_expert(one, x, ends, weight.shape[1], weight, companions)


def grouped_input_gradient(gradient, ends, weight, companions, format, in_features):
    """``gradient[r] @ W[e]``: (R, N) to (R, K)."""

    def one(gradient, weight, companions, expert):
        return input_gradient(gradient, weight, companions, format, in_features)

    return _by_expert(one, gradient, ends, in_features, weight, companions)
