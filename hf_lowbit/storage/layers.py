"""Where the bytes of each decoder layer lie in a repo's files, as few large reads.

A layer is what shares a numbered prefix, such as ``model.layers.12``. Files that this package writes itself
(:class:`.shards.Layout`) hold the tensors of a layer side by side, so that a layer is one read. ``save_pretrained``
sorts a file by dtype, which makes a read for each dtype of a layer. Tensors in between that nobody asked for are read
along where the gap is smaller than what a further read costs.

What is read as it is used lies in the buffer as it lies in blocks of the file, with room for the rest of its first and
last block: whole blocks can be read past the system's cache.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .content import Place

GAP_BYTES = 2**16
"""Gaps up to this size, and an eighth of the layer, are read: a request of its own would take as long."""
STAGED_BYTES = (2**20, 2**22)
"""Coded tensors are read together up to an eighth of their layer, but at least to the first and at most to the second
of these sizes; a larger one is read by itself. Each such run is handed to a decoder, which takes about 0.1 ms."""
ALIGNMENT = 64
"""Of what is decoded, in memory: a line of the cache."""
BLOCK_BYTES = 4096
"""Reads past the system's cache begin and end at multiples of this, in the file and in memory."""


def layer_of(name: str) -> str | None:
    """The numbered layer that ``name`` belongs to, "model.layers.12"; None outside of layers."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else None


def natural(name: str) -> list:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass(frozen=True)
class Stored:
    """One tensor: where its bytes lie, what they are, and whether they are coded (:mod:`.entropy`)."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    coded: bool = False


@dataclass(frozen=True)
class Field:
    """One tensor of a layer, as it is used: at ``offset`` of the layer's buffer."""

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
class Extent:
    """One run of bytes to read, ``begin`` to ``end`` of ``file``.

    They go to ``offset`` of the layer's buffer; coded ones go somewhere else first, and are decoded from there:
    ``parts`` are the tensors' names with their first byte in the run and the one after their last.
    """

    file: str
    begin: int
    end: int
    offset: int
    parts: tuple[tuple[str, int, int], ...] = ()

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def blocks(self) -> tuple[int, int]:
        """Where the blocks of the file that hold it begin and end."""
        return self.begin - self.begin % BLOCK_BYTES, aligned(self.end, BLOCK_BYTES)


@dataclass(frozen=True)
class Layer:
    """What is read for one layer, and where its tensors then are.

    Attributes:
        name: "model.layers.12".
        extents: The reads, in the order of the files.
        fields: The tensors, by name.
        nbytes: Bytes of the buffer.
        coded: Names of those that are coded.
    """

    name: str
    extents: tuple[Extent, ...]
    fields: dict[str, Field]
    nbytes: int
    coded: frozenset[str] = frozenset()

    @property
    def read_bytes(self) -> int:
        """Bytes that are read for it."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def decoded_bytes(self) -> int:
        """Bytes that its coded tensors become."""
        return sum(self.fields[name].nbytes for name in self.coded)

    @property
    def staged_bytes(self) -> int:
        """Bytes of its largest coded run, in whole blocks of its file."""
        return max((extent.blocks[1] - extent.blocks[0] for extent in self.extents if extent.parts), default=0)


def lay_out_layer(name: str, tensors: Mapping[str, Stored]) -> Layer:
    """The reads for ``tensors``, by name, of the layer ``name``.

    Raises:
        ValueError: for a tensor whose bytes do not fit its shape, or lie outside of its file, naming both.
    """
    fields: dict[str, Field] = {}
    extents: list[Extent] = []
    end = 0
    coded_bytes = sum(s.place.end - s.place.begin for s in tensors.values() if s.coded)
    gap_bytes = min(GAP_BYTES, sum(s.place.end - s.place.begin for s in tensors.values()) // 8)
    staged_bytes = min(max(STAGED_BYTES[0], coded_bytes // 8), STAGED_BYTES[1])
    for tensor, stored in sorted(tensors.items(), key=lambda item: (str(item[1].place.file), item[1].place.begin)):
        file, begin, stop = str(stored.place.file), stored.place.begin, stored.place.end
        field = Field(end, stored.shape, stored.dtype)
        if not stored.coded and field.nbytes != stop - begin:
            raise ValueError(f"{file}: {tensor} has {stop - begin} bytes, and its shape needs {field.nbytes}")
        if stop > os.path.getsize(file):
            raise ValueError(f"{file} ends before {tensor}: it is truncated")
        last = extents[-1] if extents else Extent("", 0, 0, 0)
        joins = last.file == file and bool(last.parts) == stored.coded and 0 <= begin - last.end <= gap_bytes
        if stored.coded:
            joins = joins and stop - last.begin <= staged_bytes
            first = last.begin if joins else begin
            part = (tensor, begin - first, stop - first)
            merged = Extent(file, first, stop, 0, (*(last.parts if joins else ()), part))
            end = aligned(end)
            fields[tensor] = Field(end, stored.shape, stored.dtype)
            end += field.nbytes
        else:
            joins = joins and (last.offset + begin - last.begin) % stored.dtype.itemsize == 0
            usable = begin % stored.dtype.itemsize == 0  # where it lies in its block; else it is moved
            offset = aligned(end, BLOCK_BYTES) + begin % BLOCK_BYTES if usable else aligned(end)
            merged = Extent(file, last.begin, stop, last.offset) if joins else Extent(file, begin, stop, offset)
            fields[tensor] = Field(merged.offset + begin - merged.begin, stored.shape, stored.dtype)
            end = aligned(merged.offset + merged.nbytes, BLOCK_BYTES)
        extents[len(extents) - joins :] = [merged]
    coded = frozenset(tensor for tensor, stored in tensors.items() if stored.coded)
    return Layer(name, tuple(extents), fields, aligned(end), coded)


def aligned(offset: int, to: int = ALIGNMENT) -> int:
    """``offset``, or the next multiple of ``to`` after it."""
    return -(-offset // to) * to


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """``names`` by their layer, layers in their order; what is in no layer is left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            found.setdefault(layer, []).append(name)
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))


def spread(count: int, total: int) -> set[int]:
    """``count`` of ``range(total)``, evenly spread."""
    return {i for i in range(total) if (i + 1) * count // total > i * count // total}
