"""``format="int"``: a uniform grid of ``2**bits`` points in every group.

``w = scale * (code - zero)`` with codes in ``0 .. 2**bits - 1``. The zero point is

- an integer of ``bits`` bits (``zeros="int"``), a dense bit stream per row, ``weight_zeros`` uint8;
- a float16 (``zeros="float"``), as HQQ wants it, ``weight_zeros`` float16;
- fixed at ``2**(bits-1)`` when ``symmetric`` (0.5 at one bit, whose two levels are then ``+-scale/2``).
"""

from dataclasses import dataclass

import torch

from .base import Format, Quantized, Tensors, inverse
from .planes import PLANES, bytes_per_row, lanes_per_row, pack_planes, pack_stream, unpack_planes, unpack_stream

MAX_FLOAT_ZERO = 2**11


@dataclass(frozen=True)
class IntFormat(Format):
    """Uniform integers of 1 to 8 bits.

    Args:
        symmetric: No zero point is stored.
        zeros: "int" or "float", how an asymmetric zero point is stored.
    """

    bits: int
    symmetric: bool = False
    zeros: str = "int"

    name = "int"
    packs_natively = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in PLANES:
            raise ValueError(f"format='int' takes bits from 1 to 8, not {self.bits!r}")
        if self.zeros not in ("int", "float"):
            raise ValueError(f"zeros={self.zeros!r} is unknown: use 'int' or 'float'")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def fixed_zero(self) -> float:
        """The zero point of the symmetric grid."""
        return 2 ** (self.bits - 1) if self.bits > 1 else 0.5

    def packed_tensor(self, shape):
        return (shape[0], lanes_per_row(shape[1], self.bits)), torch.int16

    def tensors(self, shape):
        stored = super().tensors(shape)
        if not self.symmetric:
            rows, count = shape[0], self.groups(shape[1])
            if self.zeros == "int":
                stored["_zeros"] = ((rows, bytes_per_row(count, self.bits)), torch.uint8)
            else:
                stored["_zeros"] = ((rows, count), torch.float16)
        return stored

    def pack_codes(self, codes):
        return pack_planes(codes, self.bits)

    def unpack_codes(self, packed, in_features):
        return unpack_planes(packed, self.bits, in_features)

    def pack(self, quantized: Quantized) -> Tensors:
        stored = super().pack(quantized)
        if not self.symmetric:
            zeros = quantized.zeros
            assert zeros is not None
            stored["_zeros"] = pack_stream(zeros, self.bits) if self.zeros == "int" else zeros.to(torch.float16)
        return stored

    def unpack(self, stored: Tensors, shape) -> Quantized:
        quantized = super().unpack(stored, shape)
        if not self.symmetric:
            zeros = stored["_zeros"]
            if self.zeros == "int":
                zeros = unpack_stream(zeros, self.bits, self.groups(shape[1]))
            quantized.zeros = zeros.to(torch.float32)
        return quantized

    def storable_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """``zeros`` (N, G) after the rounding of storage, float32."""
        if self.zeros == "int":
            return zeros.round().clamp(0, self.max_code)
        return zeros.clamp(-65504, 65504).to(torch.float16).to(torch.float32)

    def fit(self, groups, shrink=1.0, levels=None):
        if self.symmetric:
            if self.bits == 1:
                return 2 * shrink * groups.abs().mean(-1), None
            if not self.signed_scales:
                return shrink * groups.abs().amax(-1) / (2 ** (self.bits - 1) - 1), None
            # The grid reaches one step further below zero than above: point that side at the largest magnitude.
            high, low = groups.amax(-1), groups.amin(-1)
            extreme = torch.where(high > -low, high, low)
            return -shrink * extreme / 2 ** (self.bits - 1), None
        high, low = shrink * groups.amax(-1), shrink * groups.amin(-1)
        if self.zeros == "int":  # an integer zero point inside the grid needs a range that spans zero
            high, low = high.clamp_min(0), low.clamp_max(0)
        scales = (high - low) / self.max_code
        if self.zeros == "float":  # keep a group far from zero where float16 resolves its zero point to half a step
            scales = torch.where(scales > 0, torch.maximum(scales, torch.maximum(high, -low) / MAX_FLOAT_ZERO), 0)
        # A constant group has no range: one step of its own size represents it exactly.
        scales = torch.where(scales > 0, scales, high.abs())
        safe = torch.where(scales > 0, scales, 1)
        return scales, self.storable_zeros(-low / safe)

    def encode_groups(self, groups, scales, zeros=None, levels=None):
        zeros = self.fixed_zero if self.symmetric else zeros.unsqueeze(-1)
        return torch.round(groups * inverse(scales).unsqueeze(-1) + zeros).clamp_(0, self.max_code).to(torch.uint8)

    def decode_groups(self, codes, scales, zeros=None, levels=None):
        zeros = self.fixed_zero if self.symmetric else zeros.unsqueeze(-1)
        return (codes.to(torch.float32) - zeros) * scales.unsqueeze(-1)
