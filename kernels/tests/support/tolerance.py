"""How far a kernel may be off from its plain twin, and random input between canaries.

How far a result may be off follows from what is computed. With ``u = 2**-24``:

- The weights are the same float32 numbers in both, but for ``log8`` scales, whose power of two each side may have off
  by a relative ``2**-23 * (1 + |exponent|)`` (docs/format.md), and one more rounding of the product.
- Tiles round a weight to the dtype of ``x``, and so does the twin's here. Where the float32 values differ as said, the
  two may round to neighbours: ``2 * u_x`` more, ``u_x`` being the unit roundoff of that dtype.
- A sum of ``n`` products in float32, in any order, is off by at most ``(n + 1) * u / (1 - (n + 1) * u)`` times the
  sum of their magnitudes, one rounding for each product and each addition; the bias is one more term.
- The result is rounded once to its dtype: a relative ``u_x``, or half the smallest subnormal.

The twin's sum is taken in float64, where its own error does not matter.
"""

import torch
from lowbit_kernels import layout
from problems import BF16, FP16, FP32, guard

U = 2.0**-24
ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: U}
SMALLEST = {BF16: 2.0**-133, FP16: 2.0**-24, FP32: 2.0**-149}


def weight_error(packed: layout.Packed, layout: layout.Layout) -> float:
    """Relative difference between two readers' float32 weights."""
    if layout.scale != "log8":
        return 0.0
    low, step = (float(v) for v in packed.scale_range)
    return 2 * 2.0**-23 * (1 + max(abs(low), abs(low + 254 * step))) + 2 * U


def flip(error: float, dtype: torch.dtype) -> float:
    """What a relative ``error`` of float32 values can become when they are rounded to ``dtype``."""
    return error + 2 * ROUNDOFF[dtype] if error and dtype != FP32 else error


def random(*shape, dtype, device, seed=1):
    return guard(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype))


def check_sum(result, left, right, dtype, terms, error, bias=None):
    """``result`` against ``left`` (M, n) @ ``right`` (n, L) + bias, both float32; see the module's text."""
    left, right = left.double(), right.double()
    expected, magnitude = left @ right, left.abs() @ right.abs()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    summing = (terms + 1) * U / (1 - (terms + 1) * U)
    bound = magnitude * (error + summing * (1 + error))
    bound += ROUNDOFF[dtype] * (expected.abs() + bound) + SMALLEST[dtype] / 2
    wrong = (result.double() - expected).abs()
    assert (wrong <= bound).all(), f"off by {(wrong / bound).max():.3g} of what it may be"
