"""The range of a group that minimises its squared error, for any grid.

The span that covers the group is shrunk step by step and every candidate rounded; the best is then refined by
alternating two exact steps: the least-squares scale for the codes, ``s = <w, u>/<u, u>`` with ``u`` the codes' values
at scale one, and the nearest codes for that scale. The best candidate is kept, so no step increases the error.
"""

import torch

from ..formats import Format

SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
REFINEMENTS = 4


def least_squares_range(
    groups: torch.Tensor, format: Format, importance: torch.Tensor | None = None, levels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (N, G) and zeros (N, G) or None of least squared error for ``groups`` (N, G, g), float32.

    Args:
        groups: The weights.
        format: The grid.
        importance: What each weight's squared error counts, broadcastable to ``groups``; by default all the same.
        levels: The table (1, L) of a format that learns it.
    """
    importance = torch.ones_like(groups) if importance is None else importance
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best_scales, best_zeros = format.fit(groups, SHRINK[0], levels)

    def consider(scales, zeros):
        nonlocal best_error, best_scales, best_zeros
        if format.rounds_scales_alone:
            scales = format.storable_scales(scales)
        codes = format.encode_groups(groups, scales, zeros, levels)
        error = format.decode_groups(codes, scales, zeros, levels).sub_(groups).square_().mul_(importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        if zeros is not None:
            best_zeros = torch.where(better, zeros, best_zeros)

    for shrink in SHRINK:
        consider(*format.fit(groups, shrink, levels))
    for _ in range(REFINEMENTS):
        codes = format.encode_groups(groups, best_scales, best_zeros, levels)
        units = format.decode_groups(codes, torch.ones_like(best_scales), best_zeros, levels)
        power = (importance * units).mul_(units).sum(-1)
        scales = (importance * units).mul_(groups).sum(-1) / power.clamp_min(1e-30)
        scales = torch.where(power > 0, scales, best_scales)
        if not format.signed_scales:
            scales = torch.where(scales > 0, scales, best_scales)
        consider(scales, best_zeros)
    return best_scales, best_zeros


def range_importance(groups: torch.Tensor) -> torch.Tensor:
    """``rms(group) + |w|`` for ``groups`` (..., g): what an error counts without data (as in llama.cpp's K-quants)."""
    return groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
