"""``format="ternary"``: weights in {-1, 0, 1} times a scale, ten to a 16-bit lane: 1.6 bits each.

A row of ``K`` codes (0, 1, 2 for -1, 0, 1) is one block of ``L = ceil(K/10)`` lanes, padded with code 0: digit ``j``
of lane ``l``, most significant first, is value ``k = L*j + l``. A lane holds ``v = ceil(n * 2**16 / 3**10)`` for the
number ``n`` that its ten digits spell in base 3, so that digit ``j`` is ``(3 * (v * 3**j mod 2**16)) >> 16``: two
multiplications and no division. (``v`` exceeds ``n * 2**16 / 3**10`` by less than one, and ``3**10 < 2**16``, so the
fraction never carries into a digit.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Format, inverse

DIGITS = 10


@dataclass(frozen=True)
class TernaryFormat(Format):
    """Three levels, 1.6 bits a weight and scales per row by default (BitNet b1.58: Ma et al., 2024)."""

    bits: float = 1.58
    group_size: int = -1
    scale_dtype: str = "log8"

    name = "ternary"
    packs_natively = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits != 1.58:
            raise ValueError(f"format='ternary' has bits=1.58, not {self.bits!r}")

    def packed_tensor(self, shape):
        return (shape[0], -(-shape[1] // DIGITS)), torch.int16

    def pack_codes(self, codes):
        rows, columns = codes.shape
        lanes = -(-columns // DIGITS)
        digits = F.pad(codes, (0, lanes * DIGITS - columns)).view(rows, DIGITS, lanes).to(torch.int64)
        number = torch.zeros_like(digits[:, 0])
        for j in range(DIGITS):
            number = number * 3 + digits[:, j]
        return -((-number * 2**16) // 3**DIGITS).to(torch.int32).to(torch.int16)

    def unpack_codes(self, packed, in_features):
        powers = torch.tensor([3**j for j in range(DIGITS)], dtype=torch.int32, device=packed.device)
        value = packed.to(torch.int32).bitwise_and(0xFFFF).unsqueeze(1)
        digits = ((value * powers.view(1, -1, 1)).bitwise_and(0xFFFF) * 3) >> 16
        return digits.to(torch.uint8).reshape(packed.shape[0], -1)[:, :in_features]

    def fit(self, groups, shrink=1.0, levels=None):
        return shrink * groups.abs().mean(-1), None  # BitNet b1.58's absmean

    def encode_groups(self, groups, scales, zeros=None, levels=None):
        return (torch.round(groups * inverse(scales).unsqueeze(-1)).clamp_(-1, 1) + 1).to(torch.uint8)

    def decode_groups(self, codes, scales, zeros=None, levels=None):
        return (codes.to(torch.float32) - 1) * scales.unsqueeze(-1)
