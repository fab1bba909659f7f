"""``format="int_columns"``: integers as in ``int``, and a factor for each column.

``w[n, k] = column[k] * scale * (code - zero)``. Inputs of a layer differ widely in what an error of their weights
costs, and a calibrated grid is fine where that is much (:mod:`hf_lowbit.methods.awq`, and with one step a row
:mod:`hf_lowbit.methods.rate_aware`). The factors are the same for all rows, so a product takes them off the weight:
``(x * column) @ V^T`` with V an ordinary ``int`` weight, which every kernel multiplies. ``weight_columns`` is
float16 (K,).
"""

from dataclasses import dataclass

import torch

from .base import Quantized, Tensors
from .integer import IntFormat

PREFIX = "int_columns:"


@dataclass(frozen=True)
class ColumnsFormat(IntFormat):
    """Integers with column factors; by default around zero, with a step for each row."""

    group_size: int = -1
    symmetric: bool = True

    name = "int_columns"

    @property
    def multiplied(self) -> IntFormat:
        return IntFormat(self.bits, self.group_size, self.scale_dtype, self.symmetric, self.zeros)

    def tensors(self, shape):
        return {**super().tensors(shape), "_columns": ((shape[1],), torch.float16)}

    def whole_tensor_suffixes(self):
        return super().whole_tensor_suffixes() | {"_columns"}

    def pack(self, quantized: Quantized) -> Tensors:
        columns = quantized.columns  # of a method that knows nothing of them: all 1
        columns = torch.ones(quantized.codes.shape[1], device=quantized.codes.device) if columns is None else columns
        return {**super().pack(quantized), "_columns": columns.to(torch.float16)}

    def unpack(self, stored: Tensors, shape) -> Quantized:
        quantized = super().unpack(stored, shape)
        quantized.columns = stored["_columns"].to(torch.float32)
        return quantized

    def decode(self, quantized: Quantized) -> torch.Tensor:
        values = super().decode(quantized)
        return values if quantized.columns is None else values.mul_(quantized.columns)


def split_columns(x: torch.Tensor, companions: list[torch.Tensor], format: str):
    """What a kernel for ``int`` needs for ``int_columns``: x times the factors, the other companions, their format.

    Args:
        x: (..., K).
        companions: The stored tensors besides the weight, the factors last.
        format: Text of the format.
    """
    *others, columns = companions
    return x * columns.to(x.dtype), others, "int:" + format.removeprefix(PREFIX)
