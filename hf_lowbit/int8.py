"""Activations in 8 bits: the definition that every kernel of ``linear_int8`` computes.

Weights of few bits are read at the speed of memory, and what then limits a processor is multiplying. Integer products
are several times as fast as float ones, so where the user asks for it, ``x`` is rounded to 8 bits as well: dynamically,
each row (token) for itself, symmetrically, in groups of inputs of the weight's group size, but of 32 at least and of
128 at most. Sums within a group are exact. A row with anything that is not finite gives NaN: no scale could hold it.

Tables (``nf``, ``fp4``, ``codebook``) have their levels rounded to 8 bits too, to multiples of a step of which the
largest level is 64 to 127, whichever fits best. That is exact for ``fp4``; the levels of NF4 move by 0.2 % of the
largest one (root mean square), much less than ``x`` does.

Gradients are those of float activations (straight through). What all this costs in quality is measured in
``benchmarks/quality_int8.py``.
"""

import torch

from .formats.base import inverse

LARGEST = 127
GROUP_LIMITS = (32, 128)


def activation_group(group_size: int) -> int:
    """How many inputs share a scale, beside a weight of ``group_size`` (-1: the whole row)."""
    low, high = GROUP_LIMITS
    return high if group_size == -1 else min(max(group_size, low), high)


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` in 8 bits.

    Args:
        x: (..., K), floating point.
        group_size: Of the weight.

    Returns:
        Codes (..., K), int8, and scales (..., ceil(K / g)), float32, for ``g`` of :func:`activation_group`: the largest
        magnitude of a group over 127, or NaN (and codes 0) where a group holds anything that is not finite. A code is
        ``x / scale``, rounded to nearest even.
    """
    group, columns = activation_group(group_size), x.shape[-1]
    groups = -(-columns // group)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, groups * group - columns))
    padded = padded.view(*x.shape[:-1], groups, group)
    scales = padded.abs().amax(-1) / LARGEST
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    rounding = inverse(scales).unsqueeze(-1)
    codes = torch.where(rounding > 0, (padded * rounding).round(), 0)
    return codes.to(torch.int8).view(*x.shape[:-1], groups * group)[..., :columns], scales


def dequantize_activations(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """What the results of :func:`quantize_activations` stand for, float32 (..., K)."""
    wide = scales.repeat_interleave(activation_group(group_size), dim=-1)
    return codes * wide[..., : codes.shape[-1]]


def int8_levels(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables with levels in 8 bits.

    Args:
        levels: (T, L), the levels of T tables.

    Returns:
        Integer levels (T, L), int8, and steps (T, 1), float32: ``levels`` is about their product. A table's largest
        level becomes 64 to 127, the one with the least sum of squared errors (the smallest among equals).
    """
    levels = levels.to(torch.float32)
    largest = levels.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    steps = torch.zeros_like(largest)
    for count in range(LARGEST // 2 + 1, LARGEST + 1):
        step = largest / count
        error = (levels - (levels * inverse(step)).round() * step).double().square().sum(-1, keepdim=True)
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, step, steps)
    return (levels * inverse(steps)).round().to(torch.int8), steps
