"""Safetensors files written one tensor at a time.

``safetensors.save_file`` needs all tensors of a file in memory. Here the header is written first, from shapes and
dtypes that are known beforehand, and every tensor goes to its place as it is made, in any order. A file gets its
name only once it is complete and on disk: whatever has the name of a shard can be trusted.
"""

import errno
import json
import math
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import str_to_torch_dtype

from .layers import layer_of, natural

DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
TEMPORARY = ".tmp"
ALIGNMENT = 64  # of the first tensor, and so of most: a line of the cache


def ordered(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of ``tensors`` in the order of their bytes in a file.

    Each layer's lie side by side, so that it can be read at once (:mod:`.layers`), in it larger items first. Where
    that would leave a tensor unaligned to its dtype, since a layer has an odd number of bytes, larger items come first
    in the whole file, as the safetensors library does it.
    """
    by_dtype = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    layers, end = sorted(by_dtype, key=lambda n: natural(layer_of(n) or "")), 0
    for name in layers:
        if end % tensors[name].dtype.itemsize:
            return by_dtype
        end += tensors[name].numel() * tensors[name].dtype.itemsize
    return layers


class Layout:
    """Where every tensor of one safetensors file lies.

    Args:
        tensors: Tensors on ``meta``, by name.
        metadata: Text by name, for the header.

    Attributes:
        size: Bytes of the whole file.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
        header: dict = {"__metadata__": metadata}
        self.places: dict[str, int] = {}
        self.tensors, end = tensors, 0
        for name in ordered(tensors):
            tensor, start = tensors[name], end
            end += tensor.numel() * tensor.dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self.places[name] = start
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)  # which the format allows
        self.head = len(text).to_bytes(8, "little") + text
        self.size = len(self.head) + end

    def write(self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Writes ``path`` from ``tensors``, each of which is used once and may be freed after that.

        Raises:
            RuntimeError: if a tensor is missing or not as laid out.
            OSError: if the disk is full, saying how much is needed; nothing named ``path`` is left.
        """
        temporary, left = path.with_name(path.name + TEMPORARY), set(self.places)
        with explained(path, self.size), open(temporary, "wb") as file:
            file.write(self.head)
            file.truncate(self.size)
            for name, tensor in tensors:
                expected = self.tensors[name]
                if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                    raise RuntimeError(
                        f"{name} became {tensor.dtype} of shape {tuple(tensor.shape)}, planned was {expected.dtype} of "
                        f"shape {tuple(expected.shape)}"
                    )
                left.discard(name)
                file.seek(len(self.head) + self.places[name])
                file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if left:
                raise RuntimeError(f"{path.name} lacks {sorted(left)[0]}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)

    def finished(self, path: Path) -> bool:
        """Whether ``path`` was written by :meth:`write` with this layout."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with open(path, "rb") as file:
            return file.read(len(self.head)) == self.head


class Reader:
    """Tensors of several safetensors files, read when asked for; memory is used for what was asked for only."""

    def __init__(self, files: Iterable[str]):
        self.handles, self.files = {}, {}
        for file in files:
            handle = safe_open(file, framework="pt", backend="pread")
            for name in handle.keys():  # noqa: SIM118  (not a dict)
                self.handles[name], self.files[name] = handle, os.path.basename(file)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor ``name``, or some of its rows.

        Raises:
            ValueError: if it cannot be read, naming it and its file.
        """
        try:
            return self.handles[name].get_tensor(name) if rows is None else self.handles[name].get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.files[name]}: {name} cannot be read ({error}): the file is damaged") from error

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor ``name`` in its file."""
        view = self.handles[name].get_slice(name)
        return math.prod(view.get_shape()) * str_to_torch_dtype[view.get_dtype()].itemsize

    def equal(self, first: str, second: str, chunk_bytes: int = 2**24) -> bool:
        """Whether two tensors of the same shape and dtype hold the same values, compared in chunks of rows."""
        shape = self.handles[first].get_slice(first).get_shape()
        if not shape:
            return torch.equal(self.read(first), self.read(second))
        step = max(1, chunk_bytes // max(1, 8 * math.prod(shape[1:])))
        chunks = (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))
        return all(torch.equal(self.read(first, rows), self.read(second, rows)) for rows in chunks)


@contextmanager
def explained(path: Path, needed: int):
    """Turns a full disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left for {path} ({needed / 1e6:.1f} MB): free some and start again with the same settings; "
            "finished shards are kept",
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` last through a loss of power, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
