"""``format="nf"``: normal-float tables of 2 to 4 bits with 8-bit scales (QLoRA, Dettmers et al., 2023, appendix E).

The levels are quantiles of the standard normal, scaled to reach +-1: ``2**(bits-1)`` on the positive side and one
fewer on the negative, with an exact zero between them. The outermost probability is one minus the mean of
``1/(2*(2**bits - 1))`` and ``1/(2*2**bits)``, which gives QLoRA's 0.9677083 at four bits.
"""

import functools
from dataclasses import dataclass

import torch

from .lookup import LookupFormat


@functools.cache
def normal_float_levels(bits: int) -> torch.Tensor:
    """The table (1, 2**bits), float32, ascending."""
    half = 2 ** (bits - 1)
    outer = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2

    def quantiles(count: int) -> torch.Tensor:
        p = torch.linspace(outer, 0.5, count + 1, dtype=torch.float64, device="cpu")[:-1]
        return torch.erfinv(2 * p - 1)

    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    levels = torch.cat([-quantiles(half - 1), zero, quantiles(half)]).sort().values
    return (levels / levels.abs().max()).to(torch.float32).unsqueeze(0)


@dataclass(frozen=True)
class NormalFloatFormat(LookupFormat):
    """Normal-float codes of 2, 3 or 4 bits."""

    bits: int
    scale_dtype: str = "log8"

    name = "nf"

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (2, 3, 4):
            raise ValueError(f"format='nf' takes bits=2, 3 or 4, not {self.bits!r}")

    def levels(self):
        return normal_float_levels(self.bits)
