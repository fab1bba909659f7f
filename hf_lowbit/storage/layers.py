"""Where the bytes of each decoder layer lie in a repo's files, as few large reads.

A layer is what shares a numbered prefix, such as ``model.layers.12``. Files that this package writes itself
(:class:`.shards.Layout`) hold the tensors of a layer side by side, so that a layer is one read. ``save_pretrained``
sorts a file by dtype, which makes a read for each dtype of a layer. Tensors in between that nobody asked for are read
along where the gap is smaller than what a further read costs.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers.modeling_utils import str_to_torch_dtype

from .content import Place

GAP_BYTES = 2**16
"""Gaps up to this size are read: a disk that reads 1 GB/s needs as long for them as for a request of its own."""
ALIGNMENT = 64
"""Of what each read begins with, in memory: a line of the cache."""


def layer_of(name: str) -> str | None:
    """The numbered layer that ``name`` belongs to, "model.layers.12"; None outside of layers."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None


def natural(name: str) -> list:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Extent:
    """Bytes ``begin`` to ``end`` of ``file``, which go to ``offset`` of the layer's buffer."""

    file: str
    begin: int
    end: int
    offset: int


@dataclass(frozen=True)
class Field:
    """One tensor of a layer, at ``offset`` of its buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor in ``buffer``, uint8 of one dimension, which it shares."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layer:
    """What is read for one layer, and where its tensors then are.

    Attributes:
        name: "model.layers.12".
        extents: The reads, in the order of their buffer offsets.
        fields: The tensors, by stored name.
        nbytes: Bytes of the buffer.
    """

    name: str
    extents: tuple[Extent, ...]
    fields: dict[str, Field]
    nbytes: int

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it."""
        return sum(extent.end - extent.begin for extent in self.extents)


def lay_out_layer(name: str, places: Mapping[str, Place]) -> Layer:
    """The reads for the tensors in ``places``, by stored name, of the layer ``name``.

    Raises:
        ValueError: for a tensor whose bytes do not fit its shape, or lie outside of its file, naming both.
    """
    fields: dict[str, Field] = {}
    extents: list[Extent] = []
    for tensor, place in sorted(places.items(), key=lambda item: (str(item[1].file), item[1].begin)):
        file, dtype = str(place.file), str_to_torch_dtype.get(place.dtype)
        if dtype is None or math.prod(place.shape) * dtype.itemsize != place.end - place.begin:
            raise ValueError(f"{file}: {tensor} has {place.end - place.begin} bytes, which {place.dtype} does not fill")
        if place.end > os.path.getsize(file):
            raise ValueError(f"{file} ends before {tensor}: it is truncated")
        last = extents[-1] if extents else None
        near = last is not None and last.file == file and 0 <= place.begin - last.end <= GAP_BYTES
        if last is not None and near and (last.offset + place.begin - last.begin) % dtype.itemsize == 0:
            extents[-1] = Extent(file, last.begin, place.end, last.offset)
        else:
            end = 0 if last is None else last.offset + last.end - last.begin
            extents.append(Extent(file, place.begin, place.end, -(-end // ALIGNMENT) * ALIGNMENT))
        offset = extents[-1].offset + place.begin - extents[-1].begin
        fields[tensor] = Field(offset, place.shape, dtype)
    end = extents[-1].offset + extents[-1].end - extents[-1].begin
    return Layer(name, tuple(extents), fields, -(-end // ALIGNMENT) * ALIGNMENT)


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """``names`` by their layer, layers in their order; what is in no layer is left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            found.setdefault(layer, []).append(name)
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))
