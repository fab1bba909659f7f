"""LoRA's usual start on a packed weight, which corrects nothing: the baseline of the other methods."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration import Layer, Solution
from ..quantizer import quantize_weight
from .factors import LowRankHook


@dataclass
class Zeros(LowRankHook):
    """The weight as its own method packs it; A uniform (Kaiming, a = sqrt 5), B zero."""

    activations: ClassVar[str] = "none"

    def solve_layer(self, layer: Layer, moments, generator) -> Solution:
        rows, columns = layer.planned.shape
        tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight")
        A = torch.empty(self.rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
        return Solution(tensors, A.to(layer.weight.device), torch.zeros(rows, self.rank, device=layer.weight.device))
