"""``method="awq"``: a factor for each input feature, so that what large inputs meet is rounded more finely.

Lin et al., 2023 (arXiv 2306.00978). Inputs of a layer differ widely in size, and an error of a weight costs what its
input is large. ``(x f) (W / f)^T`` is the same product for any factors f of the K inputs; dividing column k of W by a
small ``f_k`` makes it large in its group, and the steps of the group finer in comparison. Too small factors stretch the
range for all others, so one family of factors with one exponent is searched,

    1 / f_k = rms(x_k)^a / rms(w_k)^(1 - a),    0 <= a <= 1,

and no factors at all, for the least error of the layer's output, which the second moments of its inputs give exactly.
Every candidate is rounded on ranges that are searched too (clipping), with squared errors weighted by ``(f rms(x))^2``.

It differs from the paper in this (measured in docs/methods.md): the magnitude of an input is its root mean square; the
second part of the family makes the columns of W alike where the inputs do not say otherwise; and ranges are searched
for every exponent, not once for the best.

Where a layer reads its input alone, a calibration folds its factors into what makes that input, if it can
(:mod:`hf_lowbit.calibration.folding`), and the layer is plain ``int``. Elsewhere, and with ``fold=False``, factors are
those of the format ``int_columns``, one float16 a feature, which multiply the activations. With ``fold="all"`` layers
that read one input share its factors, searched for the sum of their errors, and these are folded too.

With ``feedback=True`` codes are then chosen by :mod:`.gptq` on the divided weight, for inputs times f. What an error
of column k costs is there ``1 / [H^-1]_kk`` in the place of ``H_kk = rms(x_k)^2``: other columns make up for the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..formats import Format, Quantized
from ..formats.scales import storable
from .base import FactorMethod
from .gptq import Gptq, inverse_factor
from .rtn import Rtn

LEAST = 1e-4  # magnitudes below this part of their mean count as this: inputs that are always 0, columns of zeros


class Awq(FactorMethod):
    """Factors of inputs by a search of their exponent.

    Args:
        grid: Number of exponents that are tried, from 0 to 1.
        feedback: Whether codes are chosen with error feedback, as in "gptq", and not by rounding to nearest.
        damping: As in "gptq"; for ``feedback``.
        fold: Which factors are folded where that is possible: True for those of layers that read their input alone,
            "all" for those too that several layers would have to share, False for none.
    """

    name = "awq"
    formats = ("int_columns",)

    def __init__(self, grid: int = 11, feedback: bool = False, damping: float = 0.01, fold: bool | str = True):
        if not isinstance(grid, int) or isinstance(grid, bool) or not 2 <= grid <= 1000:
            raise ValueError(f"grid={grid!r} is not possible: method 'awq' takes a whole number from 2 to 1000")
        if not isinstance(feedback, bool):
            raise ValueError(f"feedback={feedback!r} is not possible: method 'awq' takes True or False")
        if not isinstance(fold, bool) and fold != "all":
            raise ValueError(f"fold={fold!r} is not possible: method 'awq' takes True, False or 'all'")
        self.grid, self.feedback, self.fold, self.rounding = grid, feedback, fold, Gptq(damping)

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        if statistics is None:
            raise ValueError("method 'awq' needs calibration data: give calibration=, such as a list of texts")
        W, grid = weight.to(torch.float32), format.multiplied
        if grid is format:  # the weight is divided, and the inputs multiplied
            if self.feedback:
                return self.rounding.quantize(W, grid, statistics)
            return self.nearest(statistics.square.diagonal()).quantize(W, grid)
        factors, found = self.search(W, grid, statistics)
        if self.feedback:
            found = self.rounding.quantize(W / factors, grid, statistics.scaled(factors))
        return replace(found, columns=factors)

    @torch.no_grad()
    def factors(self, weights, format, statistics, possible):
        return self.search(torch.cat(weights), format.multiplied, statistics, possible)[0]

    def search(
        self, W: torch.Tensor, grid: Format, statistics: Any, possible: Callable | None = None
    ) -> tuple[torch.Tensor, Quantized]:
        """The factors (K,) of least error, and what W (N, K) divided by them is when it is rounded to nearest."""
        least, found = float("inf"), None
        costs = statistics.square.diagonal()
        if self.feedback:
            costs = 1 / inverse_factor(statistics.damped(self.rounding.damping)).square().sum(0)
        for factors in self.candidates(W, costs):
            factors = factors if possible is None else possible(factors)
            quantized = self.nearest(costs * factors.square()).quantize(W / factors, grid)
            V = grid.decode(quantized) * factors
            error = float(((V - W).square() @ costs).sum()) if self.feedback else statistics.output_error(W, V)
            if found is None or error < least:
                least, found = error, (factors, quantized)
        assert found is not None
        return found

    def nearest(self, columns: torch.Tensor) -> Rtn:
        """Rounding to nearest where an error in each column counts as much as ``columns`` (K,) say."""
        method = Rtn("mse")
        method.columns = columns
        return method

    def candidates(self, W: torch.Tensor, costs: torch.Tensor) -> Iterator[torch.Tensor]:
        """Factors (K,) to try, as they will be stored, for W (N, K) whose columns' errors cost ``costs`` (K,)."""
        inputs, columns = at_least(costs.sqrt()), at_least(W.square().mean(0).sqrt())
        yield torch.ones_like(inputs)
        for i in range(self.grid):
            a = i / (self.grid - 1)
            factors = columns.pow(1 - a) / inputs.pow(a)
            factors = factors / factors.log().mean().exp()
            yield storable(factors, "float16").clamp_(2.0**-14, 2.0**15)  # normal numbers of float16


def at_least(magnitudes: torch.Tensor) -> torch.Tensor:
    """``magnitudes`` (K,), no one much smaller than their mean; all 1 where that is 0."""
    mean = magnitudes.mean()
    return magnitudes.clamp_min(LEAST * mean) if mean > 0 else torch.ones_like(magnitudes)
