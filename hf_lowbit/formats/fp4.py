"""``format="fp4"``: E2M1 floats with block scales (OCP Microscaling v1.0; NVFP4).

A code is ``sign << 3 | magnitude`` with magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6. Blocks of 32 have a power-of-two scale
(MXFP4), blocks of 16 an E4M3 scale under one float32 per tensor (NVFP4); other scale dtypes and block sizes are
possible.
"""

from dataclasses import dataclass

import torch

from .lookup import LookupFormat

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NEGATIVE_ZERO = 8  # read, never written


@dataclass(frozen=True)
class Fp4Format(LookupFormat):
    """Four-bit floats."""

    bits: int = 4
    group_size: int = 32
    scale_dtype: str = "e8m0"

    name = "fp4"

    def __post_init__(self):
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"format='fp4' has 4 bits, not {self.bits!r}")

    def levels(self):
        return torch.tensor([[*MAGNITUDES, *(-m for m in MAGNITUDES)]], device="cpu")

    def encode_groups(self, groups, scales, zeros=None, levels=None):
        codes = super().encode_groups(groups, scales, zeros, levels)
        return torch.where(codes == NEGATIVE_ZERO, 0, codes)
