"""``method="nested"``: codes whose first bits are good codes too, refined bit by bit (Any-Precision LLM, 2402.10517).

The narrowest width that matters, the *seed*, gets the best levels and group scales that there are for it, by
:mod:`.lloyd`. Every further bit then cuts each cell in two where two levels serve the weights in it best: 2-means
inside the cell, Any-Precision's incremental upscaling. Cells at the ends of the table are wide, so further bits reach
weights that the seed had to clip. Widths below the seed put neighbouring cells together.

The paper learns a table for every row. Here weights are divided by their group's scale and share one table per matrix
and width, which costs next to nothing and is an ordinary codebook when it is loaded. At every width one level is zero,
for the reason that :mod:`.lloyd` gives: the cell that holds zero keeps it as one of its two levels, on whichever side
leaves the smaller error.
"""

from typing import ClassVar

import torch

from ..formats import Quantized
from ..formats.base import inverse
from .base import CHUNK_WEIGHTS, Method
from .lloyd import Lloyd

BINS = 2**15
ITERATIONS = 30


class Nested(Method):
    """Levels by Lloyd at one width, refined to all wider ones.

    Args:
        seed: The width that is chosen freely, 2 to 4; others follow from it.
    """

    name: ClassVar[str] = "nested"
    formats: ClassVar[tuple[str, ...]] = ("nested",)

    def __init__(self, seed: int = 3):
        if seed not in (2, 3, 4):
            raise ValueError(f"seed={seed!r} is not possible: method 'nested' takes 2, 3 or 4")
        self.seed = seed

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        seed = format.at(min(self.seed, format.bits)).codebook
        weight = weight.to(torch.float32)
        start = Lloyd().quantize(weight, seed)
        assert start.scales is not None and start.levels is not None
        size = max(1, CHUNK_WEIGHTS // max(1, weight.shape[1]))
        chunks = [slice(i, i + size) for i in range(0, weight.shape[0], size)]
        invert = inverse(start.scales)

        def normalised(rows):
            return seed.by_group(lambda g, i: g * i.unsqueeze(-1), weight[rows], invert[rows])

        reach = max(float(normalised(rows).abs().max()) for rows in chunks) or 1.0
        mass = torch.zeros(BINS, dtype=torch.float64, device=weight.device)
        for rows in chunks:
            bins = ((normalised(rows) / reach + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
            power = seed.by_group(lambda g, s: s.square().unsqueeze(-1).expand_as(g), weight[rows], start.scales[rows])
            mass.index_add_(0, bins.reshape(-1), power.reshape(-1).to(torch.float64))
        tree = _Tree(mass, reach, start.levels[0].to(torch.float64))
        for _ in range(seed.bits, format.bits):
            tree.split()
        while len(tree.tables) < len(format.widths):
            tree.join()
        edges = tree.edges.to(torch.float32)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in chunks:
            codes[rows] = torch.bucketize(normalised(rows).contiguous(), edges, out_int32=True)
        levels = seed.storable_levels(torch.cat(tree.tables).to(torch.float32))[None]
        return Quantized(codes, start.scales, None, levels)


class _Tree:
    """Cells of the real line, and a table of levels for every width, from one density.

    Args:
        mass: What counts in each of ``len(mass)`` equal bins of ``[-reach, reach]``, float64.
        levels: The seed's table, ascending, one of them 0.

    Attributes:
        tables: Levels by width, the smallest first.
        edges: Inner edges of the widest cells, ascending.
    """

    def __init__(self, mass: torch.Tensor, reach: float, levels: torch.Tensor):
        count = len(mass)
        self.centres = ((torch.arange(count, device=mass.device, dtype=torch.float64) + 0.5) * (2 / count) - 1) * reach
        self.total = torch.nn.functional.pad(mass.cumsum(0), (1, 0))
        self.moment = torch.nn.functional.pad((mass * self.centres).cumsum(0), (1, 0))
        self.reach, self.tables = reach, [levels]
        self.edges = self.narrow = (levels[1:] + levels[:-1]) / 2  # those of the widest and of the smallest width

    def sums(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass and first moment between ``low`` and ``high``."""
        i, j = torch.searchsorted(self.centres, low), torch.searchsorted(self.centres, high)
        return self.total[j] - self.total[i], self.moment[j] - self.moment[i]

    def mean(self, low: torch.Tensor, high: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        """Mean between ``low`` and ``high``, ``otherwise`` where there is nothing."""
        mass, moment = self.sums(low, high)
        return torch.where(mass > 0, moment / mass.clamp_min(1e-300), otherwise)

    def error(self, low: torch.Tensor, high: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Squared error of ``level`` for what is between ``low`` and ``high``, less what no level can change."""
        mass, moment = self.sums(low, high)
        return level * (level * mass - 2 * moment)

    def bounds(self, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper edges of all cells between inner ``edges``."""
        end = edges.new_tensor([1.01 * self.reach])
        lowest, highest = -torch.maximum(end, -edges[:1]), torch.maximum(end, edges[-1:])
        return torch.cat([lowest, edges]), torch.cat([edges, highest])

    def split(self) -> None:
        """Adds a width above: every cell in two."""
        levels, (low, high) = self.tables[-1], self.bounds(self.edges)
        best: list[torch.Tensor] = []
        for side in (0, 1):  # the half of the cell around zero that keeps the level 0

            def held(*pair, side=side):
                return [torch.where(levels == 0, 0, half) if i == side else half for i, half in enumerate(pair)]

            lower, upper = held((low + levels) / 2, (levels + high) / 2)
            for _ in range(ITERATIONS):
                edge = (lower + upper) / 2
                lower, upper = held(self.mean(low, edge, (low + edge) / 2), self.mean(edge, high, (edge + high) / 2))
            edge = (lower + upper) / 2
            found = [self.error(low, edge, lower) + self.error(edge, high, upper), lower, edge, upper]
            better = found[0] < best[0] if best else torch.ones_like(levels, dtype=torch.bool)
            best = [torch.where(better, *pair) for pair in zip(found, best or found, strict=True)]
        _, lower, edge, upper = best
        self.tables.append(torch.stack([lower, upper], 1).flatten())
        self.edges = torch.stack([edge, torch.cat([self.edges, edge[-1:]])], 1).flatten()[:-1]

    def join(self) -> None:
        """Adds a width below: neighbouring cells together."""
        levels = self.tables[0]
        self.narrow = self.narrow[1::2]
        joined = self.mean(*self.bounds(self.narrow), (levels[::2] + levels[1::2]) / 2)
        joined[levels.abs().argmin() // 2] = 0
        self.tables.insert(0, joined)
