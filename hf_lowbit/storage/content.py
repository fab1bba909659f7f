"""What lies in the files of a model: the place of every tensor's bytes, and a hash over all of them."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..skeleton import checkpoint_files, read_json
from .headers import read_headers

CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Place:
    """One stored tensor: its dtype as safetensors names it, and where its bytes lie in ``file``, from the start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_places(folder: str | os.PathLike) -> dict[str, Place]:
    """Every stored tensor of the model in ``folder``, by name.

    Raises:
        ValueError: for a file that is missing or damaged, or an index that does not fit its files, naming them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists() and (folder / SAFE_WEIGHTS_NAME).exists():
        raise ValueError(f"{folder} holds both {SAFE_WEIGHTS_NAME} and {index.name}: delete the one that is stale")
    files, _ = checkpoint_files(folder)
    if not index.exists():
        return places_in(Path(files[0]))
    where, places = read_json(index)["weight_map"], {}
    for file in map(Path, files):
        for tensor, place in places_in(file).items():
            if where.get(tensor) != file.name:
                raise ValueError(f"{file.name} holds {tensor}, which {index.name} places in {where.get(tensor)}")
            places[tensor] = place
    lost = sorted(set(where) - set(places))
    if lost:
        raise ValueError(f"{where[lost[0]]} does not hold {lost[0]}, which {index.name} places there")
    return places


def content_hash(folder: str | os.PathLike) -> str:
    """SHA-256, in hexadecimal, of all tensors of a repo, however they are cut into files; needs 1 MiB of memory.

    Hashed is, for every tensor in the order of the names' code points, ``[name, dtype, shape]`` as JSON (ASCII, no
    spaces; dtype as in safetensors' header) with a line feed, then its bytes as they are stored.

    Raises:
        ValueError: for files that are missing or damaged, naming the file.
    """
    digest = hashlib.sha256()
    for name, place in sorted(read_places(folder).items()):
        digest.update(json.dumps([name, place.dtype, place.shape], separators=(",", ":")).encode() + b"\n")
        with open(place.file, "rb") as handle:
            handle.seek(place.begin)
            left = place.end - place.begin
            while left:
                chunk = handle.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise ValueError(f"{place.file.name} ends inside {name}: it was truncated while it was read")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def places_in(file: Path) -> dict[str, Place]:
    """Every stored tensor of one safetensors file, by name; raises ``ValueError`` for one that is damaged."""
    read_headers([str(file)])  # the safetensors library checks the header: sizes, order, nothing outside the file
    with open(file, "rb") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(start - 8))
    header.pop("__metadata__", None)
    return {
        name: Place(file, e["dtype"], tuple(e["shape"]), *(start + offset for offset in e["data_offsets"]))
        for name, e in header.items()
    }
