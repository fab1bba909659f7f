"""The contract of a format: what is stored for one weight matrix, and what it means.

A format is a small frozen record (bits, group size, how scales are stored, ...) with pure functions over plain
tensors. It says nothing about how codes are chosen; that is a method's work. A weight ``(N, K)`` = (out_features,
in_features) becomes

- ``codes`` (N, K), uint8: an index on the grid for every weight;
- ``scales`` (N, G) and, where the grid is asymmetric, ``zeros`` (N, G), float32, for ``G`` groups of consecutive
  inputs;
- ``levels`` (1, L) or (N, L), float32, for formats that learn their table;
- ``columns`` (K,), float32, for the format with a factor for each column;

together a :class:`Quantized`, which ``pack`` turns into the tensors that are saved, named by the suffix that they add
to the parameter's name: ``""`` is the packed weight itself, ``"_scales"`` its scales, and so on. ``tensors`` gives
their shapes, so that modules can be laid out on the ``meta`` device and files can be checked before they are read.

Where the group size does not divide ``K``, the last group is shorter; nothing is padded for it. Where the packing's
block does not divide ``K``, the packed row is padded, and ``nbytes`` counts it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .scales import SCALE_DTYPES, decode_scales, encode_scales, scale_tensors, signed, storable

GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
Tensors = dict[str, torch.Tensor]


@dataclass
class Quantized:
    """One quantized weight before packing; see the module's text for shapes and dtypes."""

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """``1 / scales``, or 0 where that is not finite: a group whose scale is 0 has nothing to divide."""
    result = 1 / scales
    return torch.where(result.isfinite(), result, 0)


@dataclass(frozen=True)
class Format:
    """Base of all formats. Subclasses say how codes become values; everything else is shared.

    Args:
        bits: Nominal width of a code; 1.58 stands for three levels.
        group_size: Consecutive inputs that share a scale, or -1 for the whole row.
        scale_dtype: How scales are stored, see :mod:`hf_lowbit.formats.scales`.
    """

    bits: float
    group_size: int = 64
    scale_dtype: str = "float16"

    name: ClassVar[str]
    learns_levels: ClassVar[bool] = False
    packs_natively: ClassVar[bool] = False  # whether the CPU kernels pack this layout, too

    def __post_init__(self):
        if self.group_size != -1 and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size={self.group_size!r} is not possible: use {', '.join(map(str, GROUP_SIZES))}, or 'row'"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is unknown: use one of {', '.join(SCALE_DTYPES)}")

    # -- what is stored ------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """Canonical text of this format, parsed by :func:`hf_lowbit.formats.parse_format`."""
        fields = ",".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.name}:{fields}"

    @property
    def inner(self) -> "Format":
        """The format whose codes methods choose and kernels multiply: this one, unless weights are turned before."""
        return self

    @property
    def multiplied(self) -> "Format":
        """The format that products with this one hand to a kernel."""
        return self

    def turn(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` (..., K) in the basis in which :attr:`inner` stores it."""
        return weight

    def turn_back(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`turn`; differentiable."""
        return weight

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` weights."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor of a weight of ``shape`` (N, K), by suffix."""
        rows, columns = shape
        return {"": self.packed_tensor(shape), **scale_tensors(self.scale_dtype, rows, self.groups(columns))}

    def packed_tensor(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the packed codes of a weight of ``shape`` (N, K)."""
        raise NotImplementedError

    def suffixes(self) -> tuple[str, ...]:
        """Names of the companions of the packed weight, in the order in which ops take them."""
        return tuple(suffix for suffix in self.tensors((1, 64)) if suffix)

    def empty(self, shape: tuple[int, int], device: torch.device | str | None = None) -> Tensors:
        """Uninitialised tensors for a weight of ``shape`` (N, K)."""
        return {suffix: torch.empty(s, dtype=d, device=device) for suffix, (s, d) in self.tensors(shape).items()}

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of everything stored for a weight of ``shape`` (N, K), padding included."""
        return sum(math.prod(s) * d.itemsize for s, d in self.tensors(shape).values())

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Whole bits per weight: codes, scales, zeros, tables and padding."""
        return 8 * self.nbytes(shape) / math.prod(shape)

    # -- codes <-> stored tensors --------------------------------------------------------------------------------------

    def pack(self, quantized: Quantized) -> Tensors:
        """Packs codes and companions into the tensors that :meth:`tensors` describes."""
        assert quantized.scales is not None
        return {"": self.pack_rows(quantized.codes), **encode_scales(quantized.scales, self.scale_dtype)}

    def unpack(self, stored: Tensors, shape: tuple[int, int]) -> Quantized:
        """Inverse of :meth:`pack` for a weight of ``shape`` (N, K)."""
        codes = self.unpack_codes(stored[""], shape[1])
        return Quantized(codes, decode_scales(stored, self.scale_dtype))

    def pack_rows(self, codes: torch.Tensor) -> torch.Tensor:
        """Packed codes (N, lanes) of ``codes`` (N, K), made a chunk of rows at a time to need little extra memory."""
        shape, dtype = self.packed_tensor((codes.shape[0], codes.shape[1]))
        packed = torch.empty(shape, dtype=dtype, device=codes.device)
        from ..native_packing import pack_rows  # which imports formats

        if pack_rows(self, codes, packed):
            return packed
        size = max(1, 2**20 // max(1, codes.shape[1]))
        for rows, chunk in zip(packed.split(size), codes.split(size), strict=True):
            rows.copy_(self.pack_codes(chunk))
        return packed

    def pack_codes(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def unpack_codes(self, packed: torch.Tensor, in_features: int) -> torch.Tensor:
        raise NotImplementedError

    def select_rows(self, stored: Tensors, rows: torch.Tensor | slice) -> Tensors:
        """The stored tensors of the output features ``rows``, (R,) integer or a slice, alone.

        Raises:
            IndexError: for a row that does not exist; negative ones do not.
        """
        whole = self.whole_tensor_suffixes()
        # index_select, unlike indexing, refuses negative rows, as nn.Embedding does.
        take = (lambda t: t[rows]) if isinstance(rows, slice) else (lambda t: t.index_select(0, rows))
        return {suffix: t if suffix in whole else take(t) for suffix, t in stored.items()}

    def whole_tensor_suffixes(self) -> frozenset[str]:
        """Suffixes of stored tensors whose first dimension is not the rows."""
        return frozenset({"_scales_range"})

    def dequantize(self, stored: Tensors, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) that ``stored`` stands for, computed in float32 and cast to ``dtype`` once."""
        return self.decode(self.unpack(stored, shape)).to(dtype)

    # -- codes <-> values: the grid ------------------------------------------------------------------------------------

    def fit(self, groups: torch.Tensor, shrink: float = 1.0, levels: torch.Tensor | None = None):
        """Scales (N, G) and zeros (N, G) or None that cover ``groups`` (N, G, g), shrunk by the factor ``shrink``."""
        raise NotImplementedError

    def encode_groups(self, groups, scales, zeros=None, levels=None) -> torch.Tensor:
        """Nearest codes, uint8 (N, G, g), of ``groups`` (N, G, g) on the given grid."""
        raise NotImplementedError

    def decode_groups(self, codes, scales, zeros=None, levels=None) -> torch.Tensor:
        """Values, float32 (N, G, g), of ``codes`` (N, G, g)."""
        raise NotImplementedError

    def encode(self, weight: torch.Tensor, scales, zeros=None, levels=None) -> Quantized:
        """Rounds ``weight`` (N, K) to the nearest point of the grid, with scales as they will be stored."""
        scales = self.storable_scales(scales)
        codes = self.by_group(lambda g, s, z: self.encode_groups(g, s, z, levels), weight, scales, zeros)
        return Quantized(codes, scales, zeros, levels)

    def decode(self, quantized: Quantized) -> torch.Tensor:
        """Values of a :class:`Quantized`, float32 (N, K)."""
        q = quantized
        return self.by_group(lambda c, s, z: self.decode_groups(c, s, z, q.levels), q.codes, q.scales, q.zeros)

    def storable_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """``scales`` (N, G) after the rounding of storage, float32."""
        return storable(scales, self.scale_dtype)

    @property
    def rounds_scales_alone(self) -> bool:
        """Whether storage rounds each scale by itself; other codecs need to see all scales of a tensor."""
        return self.scale_dtype not in ("log8", "e4m3")

    @property
    def signed_scales(self) -> bool:
        """Whether a negative scale can be stored."""
        return signed(self.scale_dtype)

    def by_group(self, function: Callable[..., Any], matrix: torch.Tensor, *companions: torch.Tensor | None):
        """Applies ``function`` to the groups of ``matrix`` (N, K) and the columns of ``companions`` (N, G) that match.

        ``function`` sees (N, G, g) and companions (N, G), and returns one tensor or a tuple (None allowed) of (N, G,
        g) or (N, G). A shorter last group is a call of its own; results are put together again as (N, K) and (N, G).
        """
        rows, columns = matrix.shape
        size = columns if self.group_size == -1 else self.group_size
        whole, results = columns // size, []
        if whole:
            head = matrix[:, : whole * size].reshape(rows, whole, size)
            results.append(function(head, *(None if c is None else c[:, :whole] for c in companions)))
        if columns % size:
            tail = matrix[:, whole * size :].unsqueeze(1)
            results.append(function(tail, *(None if c is None else c[:, whole:] for c in companions)))
        single = not isinstance(results[0], tuple)
        parts = [[r] if single else list(r) for r in results]
        joined = tuple(
            None
            if column[0] is None
            else torch.cat([p.reshape(rows, -1) for p in column], dim=1)
            if len(column) > 1
            else column[0].reshape(rows, -1)
            for column in zip(*parts, strict=True)
        )
        return joined[0] if single else joined
