"""``method="ecsq"``: entropy-coded scalar quantization, a step for each row and a rate for the whole, without data.

Fixed widths spend bits on ranges: groups, their scales, and levels that are hardly used. With an entropy coder behind
them, codes need none of that. Every row is a uniform grid around zero with one step, nothing is clipped, and the step
decides how many bits the coder needs. ``bits_stored`` says how many that shall be for a weight, steps and the
coder's overhead included (:mod:`hf_lowbit.rate`); each matrix gets the steps that meet it, so the whole model does.

- The step of a row is proportional to the root mean square of its weights, by one factor for the matrix.
- Codes are chosen by error and rate together, which matters at low rates.
- The stored step is the least-squares one for the codes, as zero gets more than its share of them.
- A row whose largest weight lies outside the ``bits`` of the codes in memory gets a wider step instead of a clipped
  weight. With the default, the next whole number and two, that takes a weight of 7 to 8 times the row's root mean
  square: 1 to 3 rows in a hundred of a real model, whose squared error grows by 0.6 % at 2 bits and not at 4.
- Matrices of a few hundred weights, for which the coder's tables alone would take half of that, get codes whose entropy
  is ``bits_stored``.

In memory these are ordinary integers of ``bits`` bits: without ``storage="entropy"`` they take those on disk too.
"""

import torch

from ..formats import Quantized
from ..rate import SLOPE, account, bare_bits, cheapest_codes, check_bits_stored, code_lengths, count_codes, find_step
from .base import CHUNK_WEIGHTS, Method

SAMPLE_WEIGHTS = 2**20  # to find the step


class Ecsq(Method):
    """Entropy-coded scalar quantization.

    Args:
        bits_stored: Bits per weight to meet, from 0.5 to 7: the coded weight and its steps.
    """

    name = "ecsq"
    formats = ("int",)

    def __init__(self, bits_stored: float = 3.0):
        self.bits_stored = check_bits_stored(bits_stored)

    def check(self, format):
        check_grid(format, self.name)

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        self.check(format)
        rows, columns = weight.shape
        limit = 2 ** (int(format.bits) - 1) - 1
        total = self.bits_stored * rows * columns - 16 * rows  # for the coded weight
        bits_of = account(total, (rows, columns), format)
        if bits_of is bare_bits:
            total = self.bits_stored * rows * columns
        size = max(1, CHUNK_WEIGHTS // columns)
        rms, widest = torch.empty(2, rows, 1, device=weight.device)
        for i in range(0, rows, size):
            part = weight[i : i + size].float()
            rms[i : i + size] = part.square().mean(1, keepdim=True).sqrt()
            widest[i : i + size] = part.abs().amax(1, keepdim=True)
        every = -(-rows * columns // SAMPLE_WEIGHTS)
        sample = weight[::every].float()

        def steps_at(factor: float, some=slice(None)) -> torch.Tensor:
            steps = format.storable_scales(torch.maximum(factor * rms[some], widest[some] / limit))
            return torch.where(steps * (limit + 0.5) < widest[some], format.storable_scales(steps * 1.001), steps)

        def lengths_at(factor: float) -> torch.Tensor:
            return code_lengths(count_codes(in_steps(sample, steps_at(factor, slice(None, None, every))).round()))

        def rate_at(factor: float) -> float:
            x = in_steps(sample, steps_at(factor, slice(None, None, every)))
            lengths = code_lengths(count_codes(x.round()))
            codes = cheapest_codes(x, lengths, SLOPE, limit).add_(format.fixed_zero).to(torch.uint8)
            return bits_of(codes, format, rows) / (rows * columns)

        rate = total / (rows * columns)
        factor = find_step(rate_at, rate, 4.13 * 2.0**-rate)  # of normal weights: sqrt(2 pi e) = 4.13
        steps, lengths = steps_at(factor), lengths_at(factor)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for i in range(0, rows, size):
            part = weight[i : i + size].float()
            chosen = cheapest_codes(in_steps(part, steps[i : i + size]), lengths, SLOPE, limit)
            power = chosen.square().sum(1, keepdim=True)
            fitted = (chosen * part).sum(1, keepdim=True) / power.clamp_min(1)
            steps[i : i + size] = torch.where(power > 0, fitted, steps[i : i + size])
            codes[i : i + size] = (chosen + format.fixed_zero).to(torch.uint8)
        return Quantized(codes, format.storable_scales(steps))


def in_steps(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """``weight`` (n, K) by ``steps`` (n, 1); 0 where a row is 0."""
    return torch.where(steps > 0, weight / steps, 0)


def check_grid(format, method: str) -> None:
    """Raises ``ValueError`` unless ``format`` is a symmetric integer grid with one step a row."""
    if format.group_size != -1 or not format.symmetric or format.bits < 2:
        raise ValueError(
            f"method {method!r} needs one step a row on a grid around zero, of at least 2 bits: use group_size='row' "
            f"and symmetric=True, not {format.spec}"
        )
