"""``method="rtn"``: round to nearest.

``range="minmax"``: the grid of each group spans its smallest and largest weight (or its largest magnitude). The
baseline that every paper compares with.

``range="mse"``: the range that minimises the group's squared error. The span is shrunk step by step, every candidate is
rounded, and the best is refined by alternating two exact steps: the least-squares scale for the codes,
``s = <w, u>/<u, u>`` with ``u`` the codes' values at scale one, and the nearest codes for that scale. Neither can
increase the error.

``range="weighted"`` (default): the same, with each squared error weighted by ``rms(group) + |w|``, which is what
llama.cpp's K-quants use when they have no data. Plain squared error clips a group's largest weights, and a model's
output depends on those more than on the rest: at 4 bits it is no better than min-max although its error is smaller
(docs/methods.md).
"""

import torch

from .base import GridMethod
from .ranges import least_squares_range, range_importance

RANGES = ("weighted", "mse", "minmax")


class Rtn(GridMethod):
    """Round to nearest.

    Args:
        range: "weighted", "mse" or "minmax".
    """

    name = "rtn"
    formats = ("int", "nf", "fp4", "ternary")

    def __init__(self, range: str = "weighted"):
        if range not in RANGES:
            raise ValueError(f"range={range!r} is unknown: method 'rtn' takes 'weighted', 'mse' or 'minmax'")
        self.range = range

    def fit(self, rows, format, levels):
        if self.range == "minmax":
            return (*format.by_group(format.fit, rows), None)
        return *format.by_group(lambda g, c: self.cover(g, c, format), rows, self.column_groups(format)), None

    def cover(self, groups, columns, format):
        """Scales (n, G) and zeros (n, G) or None for ``groups`` (n, G, g), float32; ``columns`` as in GridMethod."""
        importance = range_importance(groups) if self.range == "weighted" else torch.ones_like(groups)
        if columns is not None:
            importance = importance * columns[..., : groups.shape[-1]]
        return least_squares_range(groups, format, importance)
