"""``method="rtn"``: round to nearest.

``range="minmax"``: the grid of each group spans its smallest and largest weight (or its largest magnitude). The
baseline that every paper compares with.

``range="mse"``: the range that minimises the group's squared error. The span is shrunk step by step, every candidate is
rounded, and the best is refined by alternating two exact steps: the least-squares scale for the codes,
``s = <w, u>/<u, u>`` with ``u`` the codes' values at scale one, and the nearest codes for that scale. Neither can
increase the error.

``range="weighted"`` (default): the same, with each squared error weighted by ``rms(group) + |w|``, which is what
llama.cpp's K-quants use when they have no data. Plain squared error clips a group's largest weights, and a model's
output depends on those more than on the rest: at 4 bits it is worse than min-max although its error is smaller
(docs/methods.md).
"""

import torch

from .base import GridMethod

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
REFINEMENTS = 4


class Rtn(GridMethod):
    """Round to nearest.

    Args:
        range: "weighted", "mse" or "minmax".
    """

    name = "rtn"
    formats = ("int", "nf", "fp4", "ternary")

    def __init__(self, range: str = "weighted"):
        if range not in ("weighted", "mse", "minmax"):
            raise ValueError(f"range={range!r} is unknown: method 'rtn' takes 'weighted', 'mse' or 'minmax'")
        self.range = range

    def fit(self, rows, format, levels):
        if self.range == "minmax":
            return (*format.by_group(format.fit, rows), None)
        return (
            *format.by_group(lambda groups: least_squares_range(groups, format, self.range == "weighted"), rows),
            None,
        )


def least_squares_range(groups: torch.Tensor, format, weighted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (N, G) and zeros of least (weighted) squared error for ``groups`` (N, G, g), float32."""
    importance = torch.ones_like(groups)
    if weighted:
        importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best_scales = best_zeros = None

    def consider(scales, zeros):
        nonlocal best_error, best_scales, best_zeros
        codes = format.encode_groups(groups, scales, zeros)
        error = format.decode_groups(codes, scales, zeros).sub_(groups).square_().mul_(importance).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = scales if best_scales is None else torch.where(better, scales, best_scales)
        if zeros is not None:
            best_zeros = zeros if best_zeros is None else torch.where(better, zeros, best_zeros)

    for shrink in SHRINK:
        consider(*format.fit(groups, shrink))
    for _ in range(REFINEMENTS):
        codes = format.encode_groups(groups, best_scales, best_zeros)
        units = format.decode_groups(codes, torch.ones_like(best_scales), best_zeros)
        power = (importance * units).mul_(units).sum(-1)
        scales = (importance * units).mul_(groups).sum(-1) / power.clamp_min(1e-30)
        scales = torch.where(power > 0, scales, best_scales)
        if not format.signed_scales:
            scales = torch.where(scales > 0, scales, best_scales)
        consider(scales, best_zeros)
    return best_scales, best_zeros
