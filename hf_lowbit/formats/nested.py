"""``format="nested"``: one code for every width from 2 bits up (Any-Precision LLM, Park et al., 2024).

The first ``b`` bits of a code are a code of ``b`` bits, with a table of ``2**b`` levels of its own. All widths share
the group scales. The bits lie in planes that are tensors of their own: ``weight`` has the first two, ``weight_bit3``
and so on one each. Reading a width therefore touches nothing of the bits after it.

:func:`to_codebook` makes the ordinary ``codebook`` weight of a width, which the kernels run; as it is, a nested weight
runs in plain PyTorch alone. :mod:`hf_lowbit.methods.nested` chooses the codes and says why levels are learned: a
uniform grid that is halved again and again has no zero, or a lopsided one, at every width but one.
"""

from dataclasses import dataclass, replace

import torch

from .base import Quantized, Tensors
from .codebook import CodebookFormat
from .integer import IntFormat
from .lookup import LookupFormat

SMALLEST = 2
_FIRST, _BIT = IntFormat(SMALLEST), IntFormat(1)


@dataclass(frozen=True)
class NestedFormat(LookupFormat):
    """Codes of 2 to 8 bits whose first bits are codes too.

    ``levels`` of a :class:`Quantized` holds the tables of all widths, smallest first: (1, 2**(bits + 1) - 4).
    """

    bits: int = 8
    group_size: int = 32
    scale_dtype: str = "e4m3"

    name = "nested"
    learns_levels = True

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in range(SMALLEST, 9):
            raise ValueError(f"format='nested' takes bits from {SMALLEST} to 8, not {self.bits!r}")

    @property
    def widths(self) -> range:
        """The widths that it holds."""
        return range(SMALLEST, self.bits + 1)

    def at(self, bits: int) -> "NestedFormat":
        """The part of this format that codes of ``bits`` bits need: the same tensors, fewer of them."""
        return replace(self, bits=bits)

    @property
    def codebook(self) -> CodebookFormat:
        """What the widest codes are as an ordinary format."""
        return CodebookFormat(self.bits, self.group_size, self.scale_dtype)

    def packed_tensor(self, shape):
        return _FIRST.packed_tensor(shape)

    def tensors(self, shape):
        stored = super().tensors(shape)
        for bits in self.widths:
            stored[f"_levels{bits}"] = ((1, 2**bits), torch.float16)
            if bits > SMALLEST:
                stored[f"_bit{bits}"] = _BIT.packed_tensor(shape)
        return stored

    def whole_tensor_suffixes(self):
        return super().whole_tensor_suffixes() | {f"_levels{bits}" for bits in self.widths}

    def pack(self, quantized: Quantized) -> Tensors:
        stored, start = super().pack(quantized), 0
        assert quantized.levels is not None
        for bits in self.widths:
            stored[f"_levels{bits}"] = quantized.levels[:, start : start + 2**bits].to(torch.float16)
            start += 2**bits
            if bits > SMALLEST:
                stored[f"_bit{bits}"] = _BIT.pack_rows((quantized.codes >> (self.bits - bits)) & 1)
        return stored

    def pack_rows(self, codes):
        return _FIRST.pack_rows(codes >> (self.bits - SMALLEST))

    def unpack(self, stored: Tensors, shape) -> Quantized:
        quantized = super().unpack(stored, shape)
        for bits in range(SMALLEST + 1, self.bits + 1):
            quantized.codes = quantized.codes << 1 | _BIT.unpack_codes(stored[f"_bit{bits}"], shape[1])
        quantized.levels = torch.cat([stored[f"_levels{bits}"] for bits in self.widths], 1).to(torch.float32)
        return quantized

    def unpack_codes(self, packed, in_features):
        return _FIRST.unpack_codes(packed, in_features)

    def table(self, levels, device):
        return super().table(levels, device)[:, -(2**self.bits) :]

    def to_codebook(self, stored: Tensors, shape: tuple[int, int]) -> Tensors:
        """The tensors of :attr:`codebook` for a weight of ``shape`` (N, K), of the same values."""
        made = self.codebook.pack_rows(self.unpack(stored, shape).codes)
        kept = {suffix: stored[suffix] for suffix in self.codebook.suffixes() if suffix in stored}
        return {"": made, **kept, "_codebook": stored[f"_levels{self.bits}"]}
