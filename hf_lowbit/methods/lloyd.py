"""``method="lloyd"``: learned levels by one-dimensional k-means (Lloyd, 1982; Max, 1960), for ``format="codebook"``.

With a table per tensor, weights are first divided by the largest magnitude of their group; Lloyd's two steps then run
on a histogram of the normalised weights in which each counts by its squared scale, which is what it adds to the squared
error. Scales are then fitted to the table (:mod:`.ranges`). With a table per row the steps run on the row's weights
themselves. Both start from quantiles and are deterministic.

Where scales can be negative, a group is turned around so that its largest weight is positive. A table that may be
lopsided, as one with an even number of levels and a zero is, then fits all groups: at 3 bits this took 20 % off the KL
of a model (docs/methods.md).

One level is held at zero: the optimum for a symmetric density has none, and a model suffers more from noise on its many
weights near zero than from the little that the level costs (docs/methods.md).
"""

from dataclasses import replace

import torch

from ..formats.base import inverse
from ..formats.scales import takes_negative
from .base import CHUNK_WEIGHTS, GridMethod
from .ranges import least_squares_range, range_importance

BINS = 8192


class Lloyd(GridMethod):
    """Lloyd-Max levels.

    Args:
        iterations: Number of Lloyd iterations.
        zero: Whether one level is exactly zero.
        weighted: Whether squared errors count in proportion to ``rms(group) + |w|``, as in "rtn".
    """

    name = "lloyd"
    formats = ("codebook",)

    def __init__(self, iterations: int = 50, zero: bool = True, weighted: bool = False):
        self.iterations, self.zero, self.weighted = iterations, zero, weighted

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        if format.codebook == "row" or not takes_negative(format.scale_dtype):
            return super().quantize(weight, format, statistics)
        weight = weight.to(torch.float32)
        sign = format.by_group(lambda g: torch.where(g.amax(-1) >= -g.amin(-1), 1.0, -1.0), weight)
        turned = format.by_group(lambda g, s: g * s.unsqueeze(-1), weight, sign)
        found = super().quantize(turned, format, statistics)
        return replace(found, scales=found.scales * sign)

    def prepare(self, weight, format):
        if format.codebook == "row":
            return None
        mass = torch.zeros(BINS, dtype=torch.float64, device=weight.device)
        size = max(1, CHUNK_WEIGHTS // max(1, weight.shape[1]))
        for rows in weight.split(size):
            rows = rows.to(torch.float32)
            scales = format.by_group(lambda g: g.abs().amax(-1), rows)
            bins = format.by_group(lambda g, i: (g * i.unsqueeze(-1) + 1) * (BINS / 2), rows, inverse(scales))
            power = format.by_group(
                lambda g, s, c: s.square().unsqueeze(-1) * self.importance(g, c),
                rows,
                scales,
                self.column_groups(format),
            )
            index = bins.long().clamp_(0, BINS - 1).reshape(-1)
            mass.index_add_(0, index, power.reshape(-1).to(torch.float64))
        centres = (torch.arange(BINS, device=weight.device, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
        table = self.lloyd(centres[None], mass[None], 2**format.bits, takes_negative(format.scale_dtype))
        return format.storable_levels(table.to(torch.float32))

    def fit(self, rows, format, levels):
        if format.codebook == "tensor":
            grid = format.by_group(
                lambda g, c: least_squares_range(g, format, self.importance(g, c), levels),
                rows,
                self.column_groups(format),
            )
            return (*grid, None)
        points, order = rows.to(torch.float64).sort(dim=1)
        columns = None if self.columns is None else self.columns[order]
        table = self.lloyd(points, self.importance(points, columns), 2**format.bits)
        return None, None, format.storable_levels(table.to(torch.float32))

    def importance(self, groups: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """What the squared error of each weight of ``groups`` (..., g) counts, with ``columns`` as in GridMethod."""
        importance = range_importance(groups) if self.weighted else torch.ones_like(groups)
        return importance if columns is None else importance * columns[..., : groups.shape[-1]]

    def lloyd(self, points: torch.Tensor, mass: torch.Tensor, count: int, turned: bool = False) -> torch.Tensor:
        """Levels (R, count), ascending, for sorted ``points`` (R, P) of weight ``mass`` (R, P), float64.

        Where groups are ``turned``, the zero starts with more levels above it than below. Left to itself it may start
        with fewer, and stays so: at 2 bits that is a quarter more error.

        The cells of a one-dimensional quantizer are intervals, so prefix sums give every cell's mean at once.
        """
        total = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
        moment = torch.nn.functional.pad((mass * points).cumsum(1), (1, 0))
        # Start where a companding quantizer would put its levels: quantiles of the density to the power 1/3.
        compressed = total.diff(dim=1).pow(1 / 3).cumsum(1)
        targets = (torch.arange(count, device=points.device, dtype=torch.float64) + 0.5) / count * compressed[:, -1:]
        levels = points.gather(1, torch.searchsorted(compressed, targets).clamp_(max=points.shape[1] - 1))
        if turned and self.zero:
            levels[:, count // 2 - 1] = 0
        for _ in range(self.iterations):
            edges = torch.searchsorted(points, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous())
            edges = torch.nn.functional.pad(edges, (1, 1))
            edges[:, -1] = points.shape[1]
            weight = total.gather(1, edges).diff(dim=1)
            means = moment.gather(1, edges).diff(dim=1) / weight.clamp_min(1e-300)
            levels = torch.where(weight > 0, means, levels)
            if self.zero:
                levels.scatter_(1, levels.abs().argmin(1, keepdim=True), 0.0)
            levels = levels.sort(dim=1).values
        return levels
