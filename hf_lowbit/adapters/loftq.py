"""LoftQ: a packed weight and a low-rank correction that together approximate the float weight, without data.

Li et al., 2023 (arXiv 2310.08659), algorithm 1. Two steps alternate: ``Q = quant(W - B A)`` and
``B A = SVD_r(W - Q)``. The second is optimal; the first is not a projection (rounding minimises no norm over a whole
matrix, and the default rounding weights errors by the weights' size), so the distance may grow again. The closest pair
seen is returned.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration import Layer, Solution
from ..low_rank import low_rank
from ..quantizer import quantize_weight
from .factors import LowRankHook


@dataclass
class LoftQ(LowRankHook):
    """Alternating quantization and SVD.

    Args:
        iterations: Number of alternations; 5 as in the paper.
    """

    iterations: int = 5

    activations: ClassVar[str] = "none"

    def solve_layer(self, layer: Layer, moments, generator) -> Solution:
        weight, best, distance = layer.weight, None, float("inf")
        residual = weight
        for _ in range(self.iterations):
            tensors = quantize_weight(residual, layer.planned, layer.name + ".weight")
            B, A = low_rank(weight - layer.value(Solution(tensors)), self.rank)
            candidate = Solution(tensors, A.float(), B.float())
            error = (weight - layer.value(candidate)).square().sum().item()
            if error < distance:
                best, distance = candidate, error
            residual = weight - torch.mm(B.float(), A.float())
        assert best is not None
        return best
