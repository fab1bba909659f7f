"""``format="codebook"``: a learned table of ``2**bits`` levels, per tensor or per row.

``codebook="tensor"``: one table for the matrix over weights normalised by group scales (as FLUTE runs them).
``codebook="row"``: one table for each output feature that holds the values themselves, with no scales (weight
clustering, as in eDKM). The table is stored as ``weight_codebook``, float16, in ascending order.
"""

from dataclasses import dataclass

import torch

from .base import Quantized, Tensors
from .lookup import LookupFormat
from .planes import PLANES


@dataclass(frozen=True)
class CodebookFormat(LookupFormat):
    """Learned levels.

    Args:
        codebook: "tensor" or "row", what shares a table.
    """

    bits: int
    scale_dtype: str = "log8"
    codebook: str = "tensor"

    name = "codebook"
    learns_levels = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in PLANES:
            raise ValueError(f"format='codebook' takes bits from 1 to 8, not {self.bits!r}")
        if self.codebook not in ("tensor", "row"):
            raise ValueError(f"codebook={self.codebook!r} is unknown: use 'tensor' or 'row'")
        if self.codebook == "row" and self.group_size != -1:
            raise ValueError(f"codebook='row' has no groups: use group_size='row', not {self.group_size}")

    @property
    def has_scales(self) -> bool:
        return self.codebook == "tensor"

    def tensors(self, shape):
        stored = super().tensors(shape) if self.has_scales else {"": self.packed_tensor(shape)}
        tables = shape[0] if self.codebook == "row" else 1
        return {**stored, "_codebook": ((tables, 2**self.bits), torch.float16)}

    def pack(self, quantized: Quantized) -> Tensors:
        stored = super().pack(quantized) if self.has_scales else {"": self.pack_rows(quantized.codes)}
        assert quantized.levels is not None
        return {**stored, "_codebook": self.storable_levels(quantized.levels).to(torch.float16)}

    def unpack(self, stored: Tensors, shape) -> Quantized:
        levels = stored["_codebook"].to(torch.float32)
        if not self.has_scales:
            return Quantized(self.unpack_codes(stored[""], shape[1]), levels=levels)
        quantized = super().unpack(stored, shape)
        quantized.levels = levels
        return quantized

    def whole_tensor_suffixes(self):
        return super().whole_tensor_suffixes() | ({"_codebook"} if self.codebook == "tensor" else frozenset())

    def storable_scales(self, scales):
        return None if scales is None else super().storable_scales(scales)

    def storable_levels(self, levels: torch.Tensor) -> torch.Tensor:
        """``levels`` after the rounding of storage, float32; raises ``ValueError`` when they do not fit."""
        stored = levels.to(torch.float16)
        if not levels.is_meta and not torch.isfinite(stored).all():
            raise ValueError(f"a level of {levels.abs().max():.3g} does not fit float16; use codebook='tensor'")
        return stored.to(torch.float32)
