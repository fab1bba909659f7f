"""``outliers=0.5``: any format beside a few columns of the weight in float16.

Some inputs of a layer are many times larger than the others, and errors of the weights that they meet cost the most.
So the columns of those inputs, a given percentage of all, are taken out of the weight before its codes are chosen and
kept as they are: OWQ (Lee et al., 2023). Single weights, as in SpQR, would need a sparse product of their own. What a
column costs is the mean square of its input times that of its weights; without calibration, that of its weights.

Stored are ``weight_outliers`` (N, k), float16, and ``weight_outlier_index`` (k,), int32, their places in rising order.
A product is that of the format with an empty column in their place, plus ``x[index] @ outliers^T``. The text of the
format has ``outliers=0.5+`` before it.
"""

from dataclasses import dataclass

import torch

from .base import Format, Tensors

PREFIX = "outliers="


@dataclass(frozen=True)
class OutlierFormat(Format):
    """A format beside columns in float16.

    Args:
        stored: What the rest is stored as.
        percent: How many columns of hundred are kept, above 0 and at most 10; at least one column is.
    """

    bits: float = 0
    stored: Format | None = None
    percent: float = 0.0

    name = "outliers"

    def __post_init__(self):
        assert self.stored is not None
        if isinstance(self.percent, bool) or not isinstance(self.percent, (int, float)) or not 0 < self.percent <= 10:
            raise ValueError(f"outliers={self.percent!r} is not possible: use a percentage above 0, at most 10")
        for field in ("bits", "group_size", "scale_dtype"):
            object.__setattr__(self, field, getattr(self.stored, field))
        object.__setattr__(self, "percent", float(self.percent))
        object.__setattr__(self, "learns_levels", self.stored.learns_levels)

    @property
    def rest(self) -> Format:
        """The format of what is not taken out."""
        assert self.stored is not None
        return self.stored

    @property
    def inner(self) -> Format:
        return self.rest.inner

    @property
    def multiplied(self) -> Format:
        return self.inner.multiplied

    @property
    def spec(self) -> str:
        return f"{PREFIX}{self.percent}+{self.rest.spec}"

    def count(self, in_features: int) -> int:
        """Columns that are kept, of ``in_features``."""
        return min(in_features, max(1, round(in_features * self.percent / 100)))

    def tensors(self, shape):
        k = self.count(shape[1])
        own = {"_outliers": ((shape[0], k), torch.float16), "_outlier_index": ((k,), torch.int32)}
        return {**self.rest.tensors(shape), **own}

    def packed_tensor(self, shape):
        return self.rest.packed_tensor(shape)

    def whole_tensor_suffixes(self):
        return self.rest.whole_tensor_suffixes() | {"_outlier_index"}

    def take_out(self, weight: torch.Tensor, squares: torch.Tensor | None = None) -> tuple[torch.Tensor, Tensors]:
        """``weight`` (N, K) with zeros in the columns that are kept, and those, by suffix.

        Args:
            weight: Floating point.
            squares: Mean squares of the inputs (K,), if they are known.
        """
        cost = weight.float().square().sum(0)
        cost = cost if squares is None else cost * squares
        index = cost.argsort(descending=True, stable=True)[: self.count(weight.shape[1])].sort().values
        outliers, rest = weight[:, index].to(torch.float16), weight.clone()
        if not torch.isfinite(outliers).all():
            raise ValueError("outliers do not fit float16: quantize this layer without outliers=, by a rule")
        rest[:, index] = 0
        return rest, {"_outliers": outliers, "_outlier_index": index.to(torch.int32)}

    def pack(self, quantized) -> Tensors:
        return self.rest.pack(quantized)

    def turn(self, weight):
        return self.rest.turn(weight)

    def turn_back(self, weight):
        return self.rest.turn_back(weight)

    def unpack(self, stored, shape):
        return self.rest.unpack(stored, shape)

    def dequantize(self, stored, shape, dtype=torch.float32):
        weight = self.rest.dequantize(stored, shape, torch.float32)
        index = checked_index(stored["_outlier_index"], shape[1])
        return weight.index_add_(1, index, stored["_outliers"].float()).to(dtype)


def checked_index(index: torch.Tensor, in_features: int) -> torch.Tensor:
    """``index`` (k,), int32, as it came from a file, if it is in rising order and below ``in_features``.

    Raises:
        ValueError: if not.
    """
    if index.numel() and not (int(index[0]) >= 0 and int(index[-1]) < in_features and bool((index.diff() > 0).all())):
        raise ValueError(f"places of outliers are not in rising order below {in_features}: the file is damaged")
    return index
