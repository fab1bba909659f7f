"""``method="hqq"``: half-quadratic quantization, without data (Badri & Shaji, 2023).

Minimises ``sum |w - deq(quant(w))|^p`` with ``p < 1`` over the grid, so that a few outliers may keep a large error
and the bulk of the weights gets a small one. The problem is split with an auxiliary error ``e``:

1. ``e = shrink_p(w - deq)``, the proximal step of ``|.|^p``: values are pulled towards zero by ``|x|^(p-1) / beta``;
2. the grid is refitted to ``w - e`` in the least-squares sense; ``beta`` grows by ``kappa``.

The original fits the zero point alone, which must then be a float: ``zeros="float"``. With ``fit_scale=True`` the
scale is fitted too, jointly. With integer zero points (or none) only the scale can move. The best grid seen is kept
per group.
"""

import torch

from .base import GridMethod


class Hqq(GridMethod):
    """Half-quadratic quantization.

    Args:
        lp_norm: The exponent ``p``, in (0, 1].
        beta: Initial weight of the proximal step, for weights in their own units (the authors' default).
        kappa: Growth of ``beta`` per iteration.
        iterations: Number of iterations.
        fit_scale: Whether the scale is fitted as well as the zero point.
    """

    name = "hqq"
    formats = ("int",)

    def __init__(
        self,
        lp_norm: float = 0.7,
        beta: float = 10.0,
        kappa: float = 1.01,
        iterations: int = 20,
        fit_scale: bool = False,
    ):
        if not 0 < lp_norm <= 1:
            raise ValueError(f"lp_norm={lp_norm!r} is not possible: method 'hqq' takes an exponent above 0, at most 1")
        self.lp_norm, self.beta, self.kappa, self.iterations = lp_norm, beta, kappa, iterations
        self.fit_scale = fit_scale

    def fit(self, rows, format, levels):
        return (*format.by_group(lambda groups: self.solve(groups, format), rows), None)

    def solve(self, groups: torch.Tensor, format) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales (N, G) and zeros (N, G) or None for ``groups`` (N, G, g), float32."""
        scales, zeros = format.fit(groups)
        move_zero = zeros is not None and format.zeros == "float"
        best = (torch.full_like(scales, torch.inf), scales, zeros)
        beta = self.beta
        for _ in range(self.iterations):
            codes = format.encode_groups(groups, scales, zeros)
            residual = groups - format.decode_groups(codes, scales, zeros)
            loss = residual.abs().pow(self.lp_norm).sum(-1)
            better = loss < best[0]
            best = (
                torch.where(better, loss, best[0]),
                torch.where(better, scales, best[1]),
                None if zeros is None else torch.where(better, zeros, best[2]),
            )
            size = residual.abs()
            pull = size.clamp_min(1e-8).pow(self.lp_norm - 1) / beta
            error = residual.sign().mul_((size - pull).clamp_min_(0))
            scales, zeros = self.refit(groups - error, codes, scales, zeros, format, move_zero)
            beta *= self.kappa
        return best[1], best[2]

    def refit(self, target, codes, scales, zeros, format, move_zero):
        """The least-squares grid for ``target`` (N, G, g) given ``codes``."""
        q = codes.to(torch.float32)
        if move_zero and not self.fit_scale:
            safe = torch.where(scales == 0, 1, scales)
            return scales, format.storable_zeros((q - target / safe.unsqueeze(-1)).mean(-1))
        if move_zero:
            q_mean, t_mean = q.mean(-1, keepdim=True), target.mean(-1, keepdim=True)
            variance = (q - q_mean).square().sum(-1)
            slope = ((q - q_mean) * (target - t_mean)).sum(-1) / variance.clamp_min(1e-12)
            slope = torch.where((variance > 0) & (slope > 0), slope, scales)
            safe = torch.where(slope == 0, 1, slope)
            return slope, format.storable_zeros((q_mean - t_mean / safe.unsqueeze(-1)).squeeze(-1))
        units = format.decode_groups(codes, torch.ones_like(scales), zeros)
        power = units.square().sum(-1)
        slope = (target * units).sum(-1) / power.clamp_min(1e-12)
        keep = (power == 0) if format.signed_scales else (power == 0) | (slope <= 0)
        return torch.where(keep, scales, slope), zeros
