"""Sizes of tiles as data: one JSON file for each family of devices in the folder ``tuning``, read when first needed.

A file has ``family`` (its own name), ``origin`` (how its numbers were found), ``unpack_rows`` (from so many rows of x
on W is written out and multiplied by torch; null for never), ``multiprocessors`` (of the device that its splits are
for, null for any) and ``entries``. An entry says for one ``form``, one ``format`` (:func:`format_class`), one bucket of
``rows`` (:func:`bucket`) and one shape ``N``, ``K`` of the weight which ``tiles`` and how many programs to a sum
(``split``) are used:

    {"form": "subnormal", "format": "int4_g64", "rows": 1, "N": 4096, "K": 4096,
     "tiles": {"rows": 1, "outputs": 64, "blocks": 8, "columns": 8, "window": 8, "warps": 2, "stages": 3}, "split": 4}

A problem takes the entry of its form, format and bucket whose shape is nearest, by ``|log(N / N')| + |log(K / K')|``;
the first of those equally near. A device with half the multiprocessors shares a sum among half the programs. Where
there is no entry, the rules of :mod:`.tiles` and :mod:`.fast` decide. Nothing is ever timed at a call:
``benchmarks/tune.py`` does that, and writes a file of this kind; the shipped ones are written, from the rules and from
counting in compiled code, by ``benchmarks/count_tiles.py``. ``HF_LOWBIT_TUNING`` names such a file, or a folder of them
named after their families; its entries go before the shipped ones.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .fast import FORMS, FastTiles
from .layout import Layout
from .tiles import Tiles

ENVIRONMENT_VARIABLE = "HF_LOWBIT_TUNING"
SHIPPED = Path(__file__).parent / "tuning"
BUCKETS = (1, 2, 4, 8, 16, 64, 256, 1024)
# Architectures that take the file of another; the others have one of their own, or that of "default".
FAMILIES = {
    **{f"sm_{n}": f"nvidia-sm{n}" for n in (80, 89, 90, 100, 120)},
    **{"sm_86": "nvidia-sm89", "sm_87": "nvidia-sm80", "sm_103": "nvidia-sm100", "sm_121": "nvidia-sm120"},
    **{"gfx942": "amd-gfx942", "gfx950": "amd-gfx942"},
    **{f"gfx110{n}": "amd-gfx1100" for n in range(4)},
}
_SIZES = {"portable": Tiles, **dict.fromkeys(FORMS, FastTiles)}
_COUNT = (int, type(None))
_FILE = {"family": str, "origin": str, "unpack_rows": _COUNT, "multiprocessors": _COUNT, "entries": list}
_KEYS = {"form": str, "format": str, "rows": int, "N": int, "K": int, "tiles": dict, "split": int}
_ANY_COUNT = {"stages"}  # the only size that need not be a power of two


@dataclass(frozen=True)
class Entry:
    """One line of a file; ``tiles`` are keyword arguments of the form's record, without the split."""

    form: str
    format: str
    rows: int
    N: int
    K: int
    tiles: Mapping[str, int]
    split: int


@dataclass(frozen=True)
class Settings:
    """One file, read and checked."""

    family: str
    origin: str
    unpack_rows: int | None
    multiprocessors: int | None
    entries: tuple[Entry, ...]


def family(architecture: str) -> str:
    """The family of an architecture such as "sm_90" or "gfx942"."""
    return FAMILIES.get(architecture, "default")


def format_class(layout: Layout) -> str:
    """What is tuned alike: "int4_g64", "table4_g64" (nf and codebooks), "table4_g32_e4m3", "fp4_g32", "ternary_row".

    Zero points as floats are apart: "int4_g64_floats".
    """
    kind = {"nf": f"table{layout.bits}", "codebook": f"table{layout.bits}", "int": f"int{layout.bits}"}
    scale = f"_{layout.scale}" if layout.name in ("nf", "codebook") and layout.scale in ("e4m3", "e8m0") else ""
    zeros = "_floats" if layout.zeros == "float" else ""
    return f"{kind.get(layout.name, layout.name)}_{f'g{layout.group}' if layout.group else 'row'}{scale}{zeros}"


def bucket(rows: int) -> int:
    """The bucket of a number of rows: the least that is not below it, or the last."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


def read(path: Path) -> Settings:
    """The settings in a file.

    Raises:
        ValueError: for anything in it that is unknown, missing or of a wrong type, naming file and entry.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    given = _checked(str(path), data, _FILE)
    for key in ("unpack_rows", "multiprocessors"):
        if given[key] is not None and given[key] < 1:
            raise ValueError(f"{path}: {key} is {given[key]}; give 1 or more, or null")
    entries = tuple(_entry(f"{path}, entry {i}", entry) for i, entry in enumerate(given["entries"]))
    return Settings(**{**given, "entries": entries})


def _checked(where: str, data: Any, types: dict) -> dict:
    """``data`` if it is a dict with exactly these keys and types of values."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(types)}, not {type(data).__name__}")
    if wrong := sorted(set(data) ^ set(types)):
        known = "is missing" if wrong[0] in types else f"is unknown; there are {', '.join(types)}"
        raise ValueError(f"{where}: {wrong[0]!r} {known}")
    for key, type_ in types.items():
        if not isinstance(data[key], type_) or isinstance(data[key], bool):
            raise ValueError(f"{where}: {key} is {data[key]!r}, of a wrong type")
    return data


def _entry(where: str, data: Any) -> Entry:
    given = _checked(where, data, _KEYS)
    if given["form"] not in _SIZES:
        raise ValueError(f"{where}: form {given['form']!r} has no tiles; there are {', '.join(_SIZES)}")
    sizes = [f for f in fields(_SIZES[given["form"]]) if f.name != "split"]
    required = {f.name: int for f in sizes if f.default is MISSING or f.name in given["tiles"]}
    for name, size in {**_checked(f"{where}, tiles", given["tiles"], required), "split": given["split"]}.items():
        if size < 1 or (name not in _ANY_COUNT and size & (size - 1)):
            raise ValueError(f"{where}: {name} is {size}; it has to be a power of two")
    if given["rows"] not in BUCKETS:
        raise ValueError(f"{where}: rows is {given['rows']}; the buckets are {', '.join(map(str, BUCKETS))}")
    if min(given["N"], given["K"]) < 1:
        raise ValueError(f"{where}: N and K have to be at least 1")
    return Entry(**given)


@functools.cache
def shipped(family: str) -> Settings:
    """What comes with the package for a family."""
    return read(SHIPPED / f"{family}.json")


@functools.cache
def _own(path: str, family: str) -> Settings | None:
    """What the user gave for a family; None if it is a folder that has nothing for it."""
    file = Path(path)
    if file.is_dir():
        file /= f"{family}.json"
        if not file.exists():
            return None
    settings = read(file)
    if settings.family != family:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={path}: the file is for {settings.family}, this device is of {family}: unset it, "
            "tune on this device, or give a folder of files named after their families"
        )
    return settings


def _all(family: str) -> list[Settings]:
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    own = _own(path, family) if path else None
    return [shipped(family)] if own is None else [own, shipped(family)]


def unpack_rows(architecture: str) -> float:
    """From how many rows of x on a device of that architecture writes W out first; infinity for never."""
    rows = _all(family(architecture))[0].unpack_rows
    return math.inf if rows is None else rows


def find(
    architecture: str, form: str, layout: Layout, M: int, N: int, K: int, multiprocessors: int = 0
) -> Entry | None:
    """The entry for ``x`` (M, K) and a weight (N, K), or None if no file has any for its form, format and rows.

    Its split is that for a device with so many multiprocessors; as it stands for 0.
    """
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    return _find(family(architecture), path, form, format_class(layout), bucket(M), N, K, multiprocessors)


@functools.lru_cache(maxsize=4096)
def _find(
    family: str, path: str | None, form: str, format: str, rows: int, N: int, K: int, multiprocessors: int
) -> Entry | None:
    for settings in _all(family):
        fits = [e for e in settings.entries if (e.form, e.format, e.rows) == (form, format, rows)]
        if fits:
            nearest = min(fits, key=lambda e: abs(math.log(N / e.N)) + abs(math.log(K / e.K)))
            of = settings.multiprocessors
            share = multiprocessors / of if of and multiprocessors else 1.0
            return replace(nearest, split=max(1, 2 ** round(math.log2(nearest.split * share))))
    return None
