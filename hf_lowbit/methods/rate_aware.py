"""GPTQ on a uniform, unclipped grid whose steps meet a rate: ``method="gptq", bits_stored=3.0``.

What is stored is entropy-coded, so the grid needs no groups and no range: step sizes alone say what is spent where.
With ``H = mean x^T x`` of a layer's inputs, G the mean squared gradient of the model's loss at its outputs, and U the
Cholesky factor of ``H^-1`` that error feedback works with (:mod:`.gptq`), rounding the weight of row n and column k
costs, after feedback,

    G_n * (step_nk / U_kk)^2 / 12                (in nats of KL at the model's output, with a half in front).

At high rates the best steps are those at which every weight of the model costs the same (reverse water-filling):
proportional to ``U_kk / sqrt(G_n)``, with one factor for all layers. So a weight has a step for its row and a factor
for its column, and the model one number that is sought for the bits wanted. What that leaves a layer is its
:class:`Share` (:mod:`hf_lowbit.calibration.damage`), and the layer's own number is sought until its codes, as coded,
take just that.

- Codes are chosen by error and rate together (:func:`hf_lowbit.rate.cheapest_codes`). Columns that are hardly worth a
  bit become zero by that.
- Where the largest weights do not fit the codes in memory, rows and columns get wider steps, whichever costs less
  (:func:`widened`); what feedback pushes out of range after that is clipped, and the error fed back like any other.
  Their number is logged.
- Steps of rows are fitted to the codes last, in the norm of H.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..formats import Format, Quantized
from ..formats.columns import ColumnsFormat
from ..formats.scales import storable
from ..rate import SLOPE, account, cheapest_codes, code_lengths, coded_bits, count_codes, find_step
from .gptq import inverse_factor, round_columns

if TYPE_CHECKING:
    from ..calibration import Moments

logger = logging.get_logger(__name__)
PASSES = 4  # of error feedback at most, each with the step that the one before asks for
TOLERANCE = 0.002  # in parts of the rate, at which no further pass is made
SAMPLE_WEIGHTS = 2**17  # to begin with a good step
SHRINK = 0.1
LEVELS = 17


@dataclass
class Share:
    """What a layer may take, and what its rows are worth.

    Attributes:
        moments: Of its inputs.
        bits: For the coded weight, its steps and its column factors, in all.
        gradients: Mean squared gradient at each output (N,), or None where all count the same.
    """

    moments: "Moments"
    bits: float
    gradients: torch.Tensor | None = None

    def turned(self, format: Format) -> "Share":
        """The same in the basis in which ``format`` stores its codes."""
        return replace(self, moments=self.moments.turned(format))


def row_worth(weight: torch.Tensor, gradients: torch.Tensor | None) -> torch.Tensor:
    """Steps of rows (N, 1) up to the model's factor: ``1 / sqrt(G_n)``, a tenth of their mean added to each G_n.

    The gradients of a few thousand tokens are noisy: rows that seem to be worth nothing must not get nothing.
    """
    if gradients is None:
        return torch.ones(len(weight), 1, device=weight.device)
    worth = gradients.to(weight.device).double()
    return (worth + SHRINK * worth.mean()).clamp_min(1e-30).rsqrt().float().unsqueeze(1)


def side_bits(shape: tuple[int, int]) -> int:
    """Bits of the row steps and the column factors of a weight of ``shape`` (N, K)."""
    return 16 * sum(shape)


@torch.no_grad()
def quantize_to_rate(W: torch.Tensor, share: Share, format: ColumnsFormat, damping: float) -> Quantized:
    """Codes, row steps and column factors of ``W`` (N, K), float32, that take ``share.bits`` when they are coded.

    A weight so small that steps and factors would be half of that or more gets codes of half of it.
    """
    N, K = W.shape
    H = share.moments.damped(damping)
    U, rows = inverse_factor(H), row_worth(W, share.gradients)
    worth = U.diagonal() / U.diagonal().log().mean().exp()
    limit = 2 ** (int(format.bits) - 1) - 1
    wanted = max(share.bits - side_bits((N, K)), share.bits / 2)
    bits_of = account(wanted, (N, K), format)
    part = slice(None, None, -(-N * K // SAMPLE_WEIGHTS))
    start = float((W[part] / rows[part] / worth).square().mean().sqrt())
    if start == 0:
        zeros = torch.full(W.shape, format.fixed_zero, device=W.device).to(torch.uint8)
        return Quantized(zeros, torch.zeros_like(rows), columns=torch.ones_like(worth))
    factor = find_step(lambda f: rate_of(W[part], f * rows[part], worth, format, N, bits_of), wanted / (N * K), start)
    best, nearest, lengths = None, float("inf"), None
    for _ in range(PASSES):
        wide_rows, wide_columns = widened(in_steps(W, factor * rows, worth).abs_().div_(limit))
        steps = format.storable_scales(factor * rows * wide_rows)
        columns = storable(worth * wide_columns, "float16")
        if lengths is None:
            lengths = code_lengths(count_codes(in_steps(W, steps, columns).round_().clamp_(-limit, limit)))
        codes, clipped = _feed_back(W, U, steps, columns, lengths, limit)
        bits = bits_of((codes + format.fixed_zero).to(torch.uint8), format)
        if abs(bits - wanted) < nearest:
            best, nearest = (codes, steps, columns, clipped), abs(bits - wanted)
        if nearest < TOLERANCE * wanted:
            break
        lengths = code_lengths(count_codes(codes))
        factor *= 2.0 ** ((bits - wanted) / (N * K))
    assert best is not None
    codes, steps, columns, clipped = best
    if clipped:
        logger.info("%d of %d codes were clipped to %d bits", clipped, N * K, format.bits)
    steps = format.storable_scales(fitted_steps(W, codes * columns, H, steps))
    return Quantized((codes + format.fixed_zero).to(torch.uint8), steps, columns=columns)


def in_steps(W: torch.Tensor, steps: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``W`` (N, K) by ``steps`` (N, 1) and ``columns`` (K,); 0 where those are 0."""
    return (W / steps / columns).nan_to_num_(0, 0, 0)


def widened(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rows (N, 1) and of columns (K,), at least 1, whose products are at least ``x`` (N, K), not negative.

    Wider steps cost ``mean(rows^2) * mean(columns^2)`` times the error. A row whose gradients are large overflows in
    many columns, a column in which few weights are large in one row: it is the least cost of 2 x 17 ways, in which the
    rows (or the columns) take what exceeds a level and the others all that is left.
    """
    (N, K), large = x.shape, x > 1
    rows, columns = torch.ones_like(x[:, :1]), torch.ones_like(x[0])
    some, others = large.any(1), large.any(0)
    if not some.any():
        return rows, columns
    x, best = x[some][:, others].clamp_min_(1).log2_(), float("inf")
    for level in torch.linspace(0, float(x.max()), LEVELS).tolist():
        for first in (0, 1):
            one = (x.amax(first, keepdim=True) - level).clamp_min_(0)
            other = (x - one).amax(1 - first, keepdim=True).clamp_min_(0)
            wide = (one, other) if first else (other, one)
            cost = math.prod(1 + float((4**w - 1).sum()) / n for w, n in zip(wide, (N, K), strict=True))
            if cost < best:
                best, rows[some], columns[others] = cost, wide[0].exp2(), wide[1][0].exp2()
    return rows, columns


def rate_of(
    W: torch.Tensor, steps: torch.Tensor, columns: torch.Tensor, format: ColumnsFormat, rows: int, bits_of=coded_bits
) -> float:
    """Bits per weight of ``W`` (n, K), a sample of a matrix of ``rows`` rows, when it is coded without feedback."""
    limit = 2 ** (int(format.bits) - 1) - 1
    x = in_steps(W, steps, columns)
    codes = cheapest_codes(x, code_lengths(count_codes(x.round().clamp_(-limit, limit))), SLOPE, limit)
    return bits_of((codes + format.fixed_zero).to(torch.uint8), format, rows) / (rows * W.shape[1])


def _feed_back(W, U, steps, columns, lengths, limit) -> tuple[torch.Tensor, int]:
    """Codes (N, K), float32, and how many were clipped."""
    codes, clipped = torch.empty_like(W.T), 0
    inverse = torch.where(steps > 0, 1 / steps, 0)[:, 0]

    def to_grid(i: int, column: torch.Tensor) -> torch.Tensor:
        nonlocal clipped
        x = column * inverse / columns[i]
        codes[i] = cheapest_codes(x, lengths, SLOPE, limit)
        clipped += int((x.abs() > limit + 0.5).sum())
        return codes[i] * steps[:, 0] * columns[i]

    round_columns(W.T.clone(memory_format=torch.contiguous_format), U, to_grid)  # (W may be a transposed weight)
    return codes.T.contiguous(), clipped


def fitted_steps(W: torch.Tensor, values: torch.Tensor, H: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Steps (N, 1) of least ``(W - s V) H (W - s V)^T`` for the rows of ``values`` V (N, K); ``steps`` where V is 0."""
    weighted = values @ H
    power = (weighted * values).sum(1, keepdim=True)
    fitted = (weighted * W).sum(1, keepdim=True) / power
    return torch.where((power > 0) & (fitted > 0), fitted, steps)
