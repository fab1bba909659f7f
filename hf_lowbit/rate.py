"""What codes cost once they are entropy-coded, and rounding that knows it.

Weights on a uniform grid without groups or clipping are far from uniform: most codes are near zero. The coder of
``storage="entropy"`` stores each at about ``-log2`` of its frequency in the tensor, so what counts on disk is the
order-0 entropy of the codes, and a step size is a choice of bits. The rate-aware methods share this model of it:

- :func:`coded_bits`, what the coder makes of the codes of one tensor, its tables, blocks and rounded frequencies
  included, so that a target is met in the file and not in theory; :func:`entropy` is the bound;
- :func:`code_lengths` and :func:`cheapest_codes`: rounding that gives up a little nearness where the other neighbour
  takes fewer bits (rate-distortion-optimised rounding);
- :func:`find_step`, the step at which a rate is what was asked for.

Codes are signed integers here, -128 to 127, as float32, where nothing else is said; formats shift them by the zero of
their grid.

At high rates an entropy-coded uniform grid has a squared error of ``step^2 / 12`` and takes ``h - log2(step)`` bits, so
one more bit saves ``2 ln 2 * step^2 / 12`` of error: :data:`SLOPE`, the price of a bit in units of ``step^2``. It is
0.25 bits above the rate-distortion bound of any code (Gish and Pierce, 1968). The price makes the interval that becomes
zero wider than the others (Sullivan, 1996): worth 0.02 bits at 1.5 bits of a Laplacian source, nothing of a normal one.
"""

import math
from collections.abc import Callable

import torch

from .formats.integer import IntFormat
from .storage.entropy import (
    HEAD,
    block_rows,
    choose_frequencies,
    count_symbols,
    expected_bytes,
    pack_frequencies,
    symbols_for,
)
from .storage.entropy import entropy as symbol_entropy
from .storage.entropy_plain import SYMBOLS as KINDS

ZERO = 128  # where code 0 is counted
SYMBOLS = 2 * ZERO
SLOPE = math.log(2) / 6
STEPS_TRIED = 40


def count_codes(codes: torch.Tensor) -> torch.Tensor:
    """How often each code occurs in ``codes`` (any shape, integers from -128 to 127): int64 (256,), code 0 at 128."""
    return torch.bincount(codes.flatten().to(torch.int64) + ZERO, minlength=SYMBOLS)


def entropy(counts: torch.Tensor) -> float:
    """Order-0 entropy in bits per symbol of symbols that occur ``counts`` (any,) times; 0.0 where there are none."""
    p = counts[counts > 0].double() / counts.sum().clamp_min(1)
    return float(-(p * p.log2()).sum()) if len(p) else 0.0


def coded_bits(codes: torch.Tensor, format: IntFormat, rows: int | None = None) -> float:
    """Bits of the packed weight of ``codes`` as ``storage="entropy"`` writes it, or raw where that is smaller.

    The coder's own account of its size, which leaves out only how full the last words of a block are: 10 bytes of it.

    Args:
        codes: As the format has them, uint8 (n, K).
        format: The format.
        rows: Of the whole matrix, where ``codes`` are a sample of its rows.
    """
    shape, dtype = format.packed_tensor((rows or codes.shape[0], codes.shape[1]))
    symbols = symbols_for("", dtype, format.bits)
    raw = format.pack_rows(codes).cpu().numpy().view("uint8")
    counts = (count_symbols(raw, symbols) * (shape[0] / codes.shape[0])).round()
    frequencies = choose_frequencies(counts)
    row_bytes = raw.shape[1]
    step = block_rows(shape[0], KINDS[symbols].count(row_bytes), row_bytes, symbol_entropy(counts))
    blocks = -(-shape[0] // step)
    head = HEAD.size + 8 * len(shape) + 8 * blocks + len(pack_frequencies(frequencies))
    return 8 * min(head + expected_bytes(counts, frequencies, blocks), shape[0] * row_bytes)


def bare_bits(codes: torch.Tensor, format: IntFormat, rows: int | None = None) -> float:
    """The entropy of ``codes`` alone; arguments as for :func:`coded_bits`."""
    counts = torch.bincount(codes.flatten().to(torch.int64), minlength=SYMBOLS)
    return entropy(counts) * (rows or codes.shape[0]) * codes.shape[1]


def account(total: float, shape: tuple[int, int], format: IntFormat) -> Callable[..., float]:
    """:func:`coded_bits`, or :func:`bare_bits` for a weight of ``shape`` so small that coding nothing takes half of
    ``total`` bits: it will be stored raw, and its codes get the entropy that was asked for."""
    nothing = torch.full((1, shape[1]), round(format.fixed_zero), dtype=torch.uint8)
    return coded_bits if coded_bits(nothing, format, shape[0]) < total / 2 else bare_bits


def code_lengths(counts: torch.Tensor) -> torch.Tensor:
    """Bits that an ideal coder takes for each symbol, float32, like ``counts`` (256,); unseen ones count half."""
    p = counts.double().clamp_min(0.5) / counts.sum().clamp_min(1)
    return -p.log2().clamp_max(0).float()


def cheapest_codes(x: torch.Tensor, lengths: torch.Tensor, slope: float | torch.Tensor, limit: int) -> torch.Tensor:
    """Codes, float32, of least ``(x - code)^2 + slope * lengths[code]``: the nearest, or the next one towards 0.

    Args:
        x: Weights in steps, float32, any shape.
        lengths: From :func:`code_lengths`.
        slope: The price of a bit in squared steps, 0 for the nearest code.
        limit: Largest magnitude of a code.
    """
    nearest = x.round().clamp_(-limit, limit)
    if isinstance(slope, float) and slope == 0:
        return nearest
    lower = nearest - nearest.sign()
    saved = lengths[nearest.to(torch.int64) + ZERO] - lengths[lower.to(torch.int64) + ZERO]
    # (x - lower)^2 - (x - nearest)^2 = (nearest - lower) * (2 x - nearest - lower)
    return torch.where((nearest - lower) * (2 * x - nearest - lower) < slope * saved, lower, nearest)


def find_step(rate: Callable[[float], float], target: float, start: float, tolerance: float = 1e-3) -> float:
    """The step at which ``rate`` (a falling function of it) is ``target``, or the nearest that was found.

    Args:
        rate: Bits per weight at a step.
        target: Bits per weight wanted.
        start: The first step tried.
        tolerance: In bits, the difference at which the search ends.
    """
    low, high = -math.inf, math.inf  # log2 of steps with too many and too few bits
    at, best, distance = math.log2(start), start, math.inf
    for _ in range(STEPS_TRIED):
        off = rate(2.0**at) - target
        if abs(off) < distance:
            best, distance = 2.0**at, abs(off)
        if distance <= tolerance:
            break
        low, high = (at, high) if off > 0 else (low, at)
        if math.isinf(low + high):
            at += math.copysign(max(1.0, abs(off)), off)  # a bit for each halving of the step, at high rates
        else:
            at = at + off if low < at + off < high else (low + high) / 2
    return best


def check_bits_stored(bits_stored: float) -> float:
    """``bits_stored`` if it can be met at all; raises ``ValueError`` naming it otherwise."""
    if isinstance(bits_stored, bool) or not isinstance(bits_stored, (int, float)) or not 0.5 <= bits_stored <= 7:
        raise ValueError(f"bits_stored={bits_stored!r} is not possible: use a number from 0.5 to 7, such as 3.0")
    return float(bits_stored)
