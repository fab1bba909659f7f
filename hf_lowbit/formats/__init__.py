"""Formats: what is stored for a weight. One format, one file; :mod:`.base` is the contract.

``docs/format.md`` specifies each of them bit by bit.
"""

import dataclasses
import functools
from typing import Any

from .base import Format, Quantized
from .codebook import CodebookFormat
from .columns import ColumnsFormat
from .fp4 import Fp4Format
from .integer import IntFormat
from .nested import NestedFormat
from .nf import NormalFloatFormat
from .outliers import PREFIX as OUTLIERS
from .outliers import OutlierFormat
from .rotated import PREFIX as ROTATED
from .rotated import RotatedFormat
from .ternary import TernaryFormat

FORMATS: dict[str, type[Format]] = {
    cls.name: cls
    for cls in (IntFormat, NormalFloatFormat, Fp4Format, CodebookFormat, TernaryFormat, NestedFormat, ColumnsFormat)
}

# Of whose tensors kernels are made; the others are read through one of these, or in plain PyTorch.
KERNEL_FORMATS = frozenset({"int", "nf", "fp4", "codebook", "ternary"})

_TRUTH = {"True": True, "False": False}

__all__ = ["FORMATS", "KERNEL_FORMATS", "Format", "OutlierFormat", "Quantized", "RotatedFormat", "parse_format"]


@functools.cache
def parse_format(spec: str) -> Format:
    """The format that ``spec`` (:attr:`Format.spec`) stands for.

    Raises:
        ValueError: if the text is not one that this version of the package can read.
    """
    if spec.startswith(ROTATED):
        return RotatedFormat(stored=parse_format(spec.removeprefix(ROTATED)))
    if spec.startswith(OUTLIERS):
        percent, _, rest = spec.removeprefix(OUTLIERS).partition("+")
        try:
            return OutlierFormat(stored=parse_format(rest), percent=float(percent))
        except ValueError as error:
            raise ValueError(f"format {spec!r}: {error}") from None
    name, _, text = spec.partition(":")
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: this version reads {', '.join(FORMATS)}")
    kinds: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(FORMATS[name])}
    options: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key not in kinds:
            raise ValueError(f"format {spec!r}: {name!r} has no option {key!r}, it has {', '.join(kinds)}")
        if key in options:
            raise ValueError(f"format {spec!r} gives {key!r} twice")
        try:
            options[key] = _TRUTH[value] if kinds[key] is bool else kinds[key](value)
        except (KeyError, ValueError):
            raise ValueError(f"format {spec!r}: {value!r} is not a value of {key!r}") from None
    if "bits" not in options:
        raise ValueError(f"format {spec!r} does not say its bits")
    return FORMATS[name](**options)
