"""``method="gptq"``: rounding column by column, each error made up for by the columns that are not rounded yet.

Frantar et al., 2022 (arXiv 2210.17323). With ``H = mean x^T x`` the mean squared error of a layer's output is
``tr((W - Q) H (W - Q)^T)``. Once column i is rounded, the best that the later columns can do about its error is

    w_j -= (w_i - q_i) [H_F^-1]_ij / [H_F^-1]_ii,   F = i and the columns after it,

and the rows of the upper Cholesky factor U of ``H^-1 = U^T U`` hold just these quotients: ``U_ij / U_ii``. Corrections
reach the columns of a block at once and the rest of the matrix when the block is done, in one product.

- Columns run in order of falling ``H_ii`` (act-order): the inputs that carry most are rounded while most others can
  still make up for them. The grid of each group is fixed before, so codes stay in their own order in the file.
- Grids minimise a weighted squared error by the search of "rtn" (of "lloyd" for learned tables). The weight of a column
  is ``1 / [H^-1]_ii``, what its error costs once all other columns have made up for it as well as they can; the usual
  ``H_ii`` is what it costs if none does, and gives 8 % more error on fresh inputs (docs/methods.md).
- At 2 bits and below an error counts ``rms(group) + |w|`` times that too, as in "rtn": a group's largest weights, which
  plain squared error clips, count for more in a model than in the layer's own error (docs/methods.md).
- Afterwards, ``refine`` times: the scales of all groups of a row are fitted together to its codes, which is a small
  linear system, and every column is rounded once more, to the best that it can be given all the others. A row keeps the
  result only where its error fell (:mod:`.refining`).
- ``damping`` times the mean of the diagonal is added to the diagonal.
- What is called true sequential lies in the pipeline: a layer sees the inputs that the layers quantized before leave.
"""

from collections.abc import Callable

import torch
from transformers.utils import logging

from ..formats import Format, Quantized
from ..rate import check_bits_stored
from .base import Method
from .lloyd import Lloyd
from .refining import refine
from .rtn import RANGES, Rtn

logger = logging.get_logger(__name__)
BLOCK = 128


class Gptq(Method):
    """Rounding with error feedback.

    Args:
        damping: Added to the diagonal of the moments, in parts of its mean; above 0.
        act_order: Whether columns run in order of falling second moment, not from left to right.
        refine: How many times scales are fitted to the codes and the codes chosen once more.
        range: As in "rtn", with a column's weight besides; by default "weighted" up to 2 bits, and "mse" above. Learned
            tables and ``bits_stored`` have no such range.
        bits_stored: Bits per weight to meet once entropy-coded, on the unclipped grid of :mod:`.rate_aware`; by default
            the format's own width.
    """

    name = "gptq"
    formats = ("int", "nf", "fp4", "ternary", "codebook", "int_columns")
    needs_calibration = True

    def __init__(
        self,
        damping: float = 0.01,
        act_order: bool = True,
        refine: int = 1,
        bits_stored: float | None = None,
        range: str | None = None,
    ):
        if not damping > 0:
            raise ValueError(f"damping={damping!r} is not possible: method 'gptq' takes a number above 0, such as 0.01")
        if not isinstance(refine, int) or isinstance(refine, bool) or not 0 <= refine < 1000:
            raise ValueError(f"refine={refine!r} is not possible: method 'gptq' takes a whole number, 0 or more")
        if range is not None and range not in RANGES:
            raise ValueError(f"range={range!r} is unknown: method 'gptq' takes {', '.join(map(repr, RANGES))}")
        self.damping, self.act_order, self.refine, self.range = damping, act_order, refine, range
        self.bits_stored = None if bits_stored is None else check_bits_stored(bits_stored)

    def check(self, format):
        if (format.name == "int_columns") != (self.bits_stored is not None):
            raise ValueError("format 'int_columns' and bits_stored= belong together: use neither, or both, with 'gptq'")
        if format.name == "int_columns" and (format.group_size != -1 or not format.symmetric):
            raise ValueError("bits_stored= has one step a row and is symmetric: drop group_size and symmetric")
        if self.range is not None and (format.learns_levels or self.bits_stored is not None):
            what = "bits_stored= clips nothing" if self.bits_stored is not None else "a table of levels is learned"
            raise ValueError(f"range={self.range!r} is of no use, since {what}: drop it")

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        if statistics is None:
            raise ValueError("method 'gptq' needs calibration data: give calibration=, such as a list of texts")
        W = weight.to(torch.float32)
        if self.bits_stored is not None:
            from .rate_aware import Share, quantize_to_rate  # which feeds errors back by this module's functions

            share = statistics if isinstance(statistics, Share) else Share(statistics, self.bits_stored * W.numel())
            return quantize_to_rate(W, share, format, self.damping)
        H = statistics.damped(self.damping)
        chosen = Lloyd() if format.learns_levels else Rtn(self.range or ("weighted" if format.bits <= 2 else "mse"))
        chosen.columns = 1 / inverse_factor(H).square().sum(0)  # 1 / [H^-1]_ii, since H^-1 = U^T U
        grid = chosen.quantize(W, format)
        found = Quantized(feed_back(W, H, self.order(H), format, grid), grid.scales, grid.zeros, grid.levels)
        for _ in range(self.refine):
            found = refine(W, H, format, found)
        return found

    def order(self, H: torch.Tensor) -> torch.Tensor:
        """The order (K,), int64, in which columns are rounded where the damped moments are H (K, K)."""
        if self.act_order:
            return H.diagonal().argsort(descending=True, stable=True)
        return torch.arange(len(H), device=H.device)


def feed_back(
    W: torch.Tensor, H: torch.Tensor, order: torch.Tensor, format: Format, grid: Quantized, block: int = BLOCK
) -> torch.Tensor:
    """Codes (N, K), uint8, on a fixed ``grid``.

    Args:
        W: Weight (N, K), float32.
        H: Moments (K, K), float32, positive definite.
        order: (K,) int64, the order in which columns are rounded.
        format: The format.
        grid: Its scales, zeros and levels; its codes are not looked at.
        block: Columns that are corrected one by one; those after them get one product.
    """
    N, K = W.shape
    U = inverse_factor(H[order][:, order])
    size = K if format.group_size == -1 else format.group_size
    of_column = (order // size).tolist()
    codes = torch.empty((K, N), dtype=torch.uint8, device=W.device)

    def to_grid(i: int, column: torch.Tensor) -> torch.Tensor:
        group = slice(of_column[i], of_column[i] + 1)
        scales, zeros = (None if t is None else t[:, group] for t in (grid.scales, grid.zeros))
        code = format.encode_groups(column.view(N, 1, 1), scales, zeros, grid.levels)
        codes[i] = code.view(N)
        return format.decode_groups(code, scales, zeros, grid.levels).view(N)

    round_columns(W.T[order].contiguous(), U, to_grid, block)
    result = torch.empty((N, K), dtype=torch.uint8, device=W.device)
    result[:, order] = codes.T
    return result


def round_columns(
    left: torch.Tensor, U: torch.Tensor, to_grid: Callable[[int, torch.Tensor], torch.Tensor], block: int = BLOCK
) -> None:
    """Rounds columns one after the other, and adds what makes up for the error of each to those after it.

    Args:
        left: The columns (K, N), float32, in the order in which they are rounded; changed.
        U: From :func:`inverse_factor`, (K, K), in the same order.
        to_grid: What column i (N,) is rounded to.
        block: As in :func:`feed_back`.
    """
    for begin in range(0, len(left), block):
        end = min(begin + block, len(left))
        errors = torch.empty_like(left[begin:end])
        for i in range(begin, end):
            error = (left[i] - to_grid(i, left[i])) / U[i, i]
            left[i + 1 : end].addr_(U[i, i + 1 : end], error, alpha=-1)
            errors[i - begin] = error
        left[end:].addmm_(U[begin:end, end:].T, errors, alpha=-1)


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """Upper triangular U (K, K) with ``U^T U = H^-1``, for H (K, K) symmetric and positive definite.

    With the order of rows and columns reversed, Cholesky's lower factor of H is an upper one, M with ``M M^T = H``, and
    ``U = M^-1``. Where rounding leaves H without a factor, ever more is added to its diagonal.
    """
    identity, level = torch.eye(len(H), dtype=H.dtype, device=H.device), 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex((H + level * H.diagonal().mean() * identity).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
        if level > 1:
            raise ValueError("the moments of its inputs are not finite, or not positive: the model is damaged")
        level = max(1e-6, 10 * level)
        logger.info("moments without a Cholesky factor: %g of their mean added to the diagonal", level)
