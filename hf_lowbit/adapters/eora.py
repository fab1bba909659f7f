"""EoRA: the low-rank correction that is best for the inputs a layer really gets, in closed form.

Liu et al., 2024 (arXiv 2410.21271). With ``S = mean x^T x`` over calibration tokens, the mean squared error of a
layer's output is ``|(W - Q - B A) R|^2`` for any R with ``R R^T = S``. In these coordinates it is a plain Frobenius
norm, so the best ``B A`` is the truncated SVD of ``(W - Q) R``, mapped back by the inverse of R. The paper takes R from
the eigenvectors and eigenvalues of S; here it is the Cholesky factor, which gives the same product at a small part of
the cost. Nothing is trained. The inputs are those of the quantized model: the layers and blocks before are solved.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..calibration import Layer, Moments, Solution
from ..low_rank import correction
from ..quantizer import quantize_weight
from .factors import LowRankHook


@dataclass
class EoRA(LowRankHook):
    """The optimal low-rank correction in the norm of the inputs' second moments.

    Args:
        damping: Added to the diagonal of the second moments, in parts of its mean, so that directions that calibration
            hardly saw count a little.
    """

    damping: float = 0.01

    activations: ClassVar[str] = "quantized"

    def solve_layer(self, layer: Layer, moments: Moments | None, generator) -> Solution:
        assert moments is not None
        tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight")
        error = layer.weight - layer.value(Solution(tensors))
        A, B = correction(error, moments.damped(self.damping), self.rank)
        return Solution(tensors, A, B)
