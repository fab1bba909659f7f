"""What a packed weight looks like, as compile-time data for the kernels.

:class:`Layout` is the text of a format (``int:bits=4,group_size=64,...``) parsed into one frozen record. A kernel takes
it as a single ``tl.constexpr`` and reads its fields, so that bits, groups and codecs are data and no function exists
per width. The layout itself, bit by bit, is specified in ``docs/format.md`` of the package ``hf-lowbit``; in short:

- codes of a row lie in blocks of 64, as planes of 1, 2, 4 or 8 bits whose sum is the width; lane ``l`` (16 bits) of a
  ``p``-bit plane holds in field ``j`` the value ``4*p*j + l`` of its block;
- ternary rows are one block of base-3 digits, ten to a lane;
- every group of inputs has a scale, and a zero point unless the grid is symmetric;
- table formats map a code to a level, constant or stored.

It does not validate what a writer may choose; it refuses what the kernels could not read.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK = 64
DIGITS = 10
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_NF = {
    2: (-1.0, 0.0, 0.435818166, 1.0),
    3: (-1.0, -0.535022736, -0.246931434, 0.0, 0.18333748, 0.381993949, 0.622985721, 1.0),
    4: (
        *(-1.0, -0.696192801, -0.525072932, -0.394917428, -0.284441322, -0.1847734, -0.0910499766, 0.0),
        *(0.0795803145, 0.160930142, 0.246112257, 0.337915123, 0.44070974, 0.562616885, 0.722956657, 1.0),
    ),
}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_DEFAULTS = {
    "int": {"scale_dtype": "float16"},
    "nf": {"scale_dtype": "log8"},
    "fp4": {"scale_dtype": "e8m0", "group_size": "32"},
    "codebook": {"scale_dtype": "log8"},
    "ternary": {"scale_dtype": "log8", "group_size": "-1"},
}
_OPTIONS = ("bits", "group_size", "scale_dtype", "symmetric", "zeros", "codebook")
SCALES = ("float16", "bfloat16", "float32", "log8", "e8m0", "e4m3")


@dataclass(frozen=True)
class Layout:
    """One stored format.

    Args:
        name: "int", "nf", "fp4", "codebook" or "ternary".
        bits: Width of a code in planes; 0 for ternary.
        group: Inputs that share a scale; 0 for the whole row.
        scale: One of :data:`SCALES`, or "none" where the table holds the values themselves.
        zeros: "int" (a bit stream), "float" (float16) or "fixed".
        table: "none", "tensor" (one table) or "row" (one for each output).
    """

    name: str
    bits: int
    group: int
    scale: str
    zeros: str
    table: str

    @property
    def ternary(self) -> bool:
        return self.name == "ternary"

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the planes, the most significant first."""
        return PLANES[self.bits]

    @property
    def lanes(self) -> int:
        """Lanes of the first plane in a block of 64."""
        return 4 * self.planes[0]

    @property
    def fields(self) -> int:
        """Values in a lane of the first plane."""
        return DIGITS if self.ternary else 16 // self.planes[0]

    @property
    def fixed_zero(self) -> float:
        """The code that stands for 0 where no zero points are stored."""
        return 1.0 if self.ternary else 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    @property
    def group_spans_fields(self) -> bool:
        """Whether one field of the lanes of a block shares a group."""
        return self.group == 0 or (not self.ternary and self.group >= self.lanes)

    @property
    def sum_parts(self) -> int:
        """Parts that a tile is decoded in, one after another, where inputs are summed over (:func:`.decode.load_last`).

        A thread that loads 16 bytes of a 1-bit plane has 128 weights; next to a plane of 4 bits, all at once would need
        more registers than there are.
        """
        return 2 if self.bits in (5, 7) else 1

    @property
    def step(self) -> int:
        """The fewest lanes of the first plane that a sum over the inputs takes a step; any number if ternary."""
        return 1 if self.ternary else self.lanes * self.sum_parts

    def groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` weights."""
        return 1 if self.group == 0 else -(-in_features // self.group)

    def row_lanes(self, in_features: int) -> int:
        """Lanes of the first plane in a row."""
        if self.ternary:
            return -(-in_features // DIGITS)
        return -(-in_features // BLOCK) * self.lanes


@functools.cache
def parse(text: str) -> Layout:
    """The layout that the text of a format stands for.

    Raises:
        ValueError: if these kernels cannot read it.
    """
    name, _, options = text.partition(":")
    if name not in _DEFAULTS:
        raise ValueError(f"format {text!r}: the kernels read {', '.join(_DEFAULTS)}, not {name!r}")
    given = {"group_size": "64", "symmetric": "False", "zeros": "int", "codebook": "tensor", **_DEFAULTS[name]}
    for item in options.split(","):
        key, _, value = item.partition("=")
        if key not in _OPTIONS:
            raise ValueError(f"format {text!r}: unknown option {key!r}")
        given[key] = value
    try:
        bits, group = 0 if name == "ternary" else int(given["bits"]), max(0, int(given["group_size"]))
    except (KeyError, ValueError):
        raise ValueError(f"format {text!r}: bits and group_size have to be numbers") from None
    widths = {"nf": tuple(_NF), "fp4": (4,), "ternary": (0,)}.get(name, tuple(PLANES))
    if bits not in widths or given["scale_dtype"] not in SCALES or group & (group - 1):
        raise ValueError(f"format {text!r}: the kernels do not read these bits, group size or scales")
    by_row = name == "codebook" and given["codebook"] == "row"
    return Layout(
        name=name,
        bits=bits,
        group=group,
        scale="none" if by_row else given["scale_dtype"],
        zeros=given["zeros"] if name == "int" and given["symmetric"] == "False" else "fixed",
        table="row" if by_row else "tensor" if name in ("nf", "fp4", "codebook") else "none",
    )


@functools.lru_cache(maxsize=64)
def constant_levels(layout: Layout, device: torch.device) -> torch.Tensor:
    """The table (1, 2**bits), float32, of "nf" and "fp4"."""
    return torch.tensor([_FP4 if layout.name == "fp4" else _NF[layout.bits]], dtype=torch.float32, device=device)


class Packed(NamedTuple):
    """The tensors of one packed weight, None where the format has none."""

    weight: torch.Tensor
    scales: torch.Tensor | None
    scale_range: torch.Tensor | None
    zeros: torch.Tensor | None
    levels: torch.Tensor | None


def name_tensors(weight: torch.Tensor, companions: list[torch.Tensor], layout: Layout) -> Packed:
    """Gives ``companions`` their names: scales, what they share, zeros or the learned table, in this order.

    Raises:
        ValueError: if there are more or fewer than the format has.
    """
    names = ["scales"] * (layout.scale != "none") + ["scale_range"] * (layout.scale in ("log8", "e4m3"))
    names += ["zeros"] * (layout.zeros != "fixed") + ["levels"] * (layout.name == "codebook")
    if len(names) != len(companions):
        raise ValueError(f"{layout} is stored with {', '.join(names)}, but {len(companions)} tensors came")
    found = {name: tensor.contiguous() for name, tensor in zip(names, companions, strict=True)}
    if layout.table != "none" and "levels" not in found:
        found["levels"] = constant_levels(layout, weight.device)
    return Packed(weight.contiguous(), *(found.get(name) for name in Packed._fields[1:]))


def even(in_features: int, layout: Layout, address: int = 0) -> int:
    """1 if every plane of every row begins at 16 bytes; of ternary rows, every how many-th does.

    Planes do where blocks come in pairs, the least of which has 16 bytes. Ternary rows begin anywhere, unless they have
    whole 8 lanes: each 2nd, 4th or 8th begins at 16 bytes again, and kernels read the 16 bytes that a row begins or
    ends in whole. Behind the last row these may be no part of the tensor; but memory is mapped by pages of many times
    16 bytes, so what lies in 16 such bytes with a part of it can be read, and is left out as another row's is.
    0 if nothing is promised: other planes, and ternary weights whose ``address`` is no multiple of 16.
    """
    if not layout.ternary:
        return int(in_features % (2 * BLOCK) == 0)
    return 0 if address % 16 else 8 // math.gcd(layout.row_lanes(in_features), 8)


def on_device(device: torch.device):
    """Triton launches on the current device: makes ``device`` that."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
