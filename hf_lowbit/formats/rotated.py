"""``transform="hadamard"``: any format, with the input dimension rotated before its codes were chosen.

Stored is ``V = W R`` with R orthogonal (:mod:`hf_lowbit.transforms.hadamard`), and a product is ``x W^T = (x R) V^T``:
every kernel multiplies V, once x is rotated. The text of the format is that of V's with ``hadamard+`` before it.
"""

from dataclasses import dataclass

from ..transforms.hadamard import rotate
from .base import Format, Tensors

PREFIX = "hadamard+"
FOLDED = "hadamard-folded"
TRANSFORMS = ("hadamard", FOLDED)
"""What a config may ask for; folded, a calibration takes most rotations out (:mod:`..calibration.residual`)."""


@dataclass(frozen=True)
class RotatedFormat(Format):
    """A format of rotated weights.

    Args:
        stored: What V is stored as.
    """

    bits: float = 0
    stored: Format | None = None

    name = "hadamard"

    def __post_init__(self):
        assert self.stored is not None
        for field in ("bits", "group_size", "scale_dtype"):
            object.__setattr__(self, field, getattr(self.stored, field))
        object.__setattr__(self, "learns_levels", self.stored.learns_levels)

    @property
    def inner(self) -> Format:
        assert self.stored is not None
        return self.stored

    @property
    def multiplied(self) -> Format:
        return self.inner.multiplied

    @property
    def spec(self) -> str:
        return PREFIX + self.inner.spec

    def tensors(self, shape):
        return self.inner.tensors(shape)

    def packed_tensor(self, shape):
        return self.inner.packed_tensor(shape)

    def whole_tensor_suffixes(self):
        return self.inner.whole_tensor_suffixes()

    def pack(self, quantized) -> Tensors:
        return self.inner.pack(quantized)

    def unpack(self, stored, shape):
        return self.inner.unpack(stored, shape)

    def decode(self, quantized):
        return self.turn_back(self.inner.decode(quantized))

    def turn(self, weight):
        return rotate(weight)

    def turn_back(self, weight):
        return rotate(weight, inverse=True)
