"""Safetensors files written again, their tensors coded or decoded.

Apart from :mod:`.stored`, which is imported while transformers is: this needs transformers to be there.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from . import entropy
from .shards import TEMPORARY, Layout, Reader, explained
from .stored import Widths, store


def store_file(source: Path, target: Path, widths: Widths, codec: str, may_code: Callable[[str], bool] = bool) -> None:
    """Writes the tensors of the safetensors file ``source`` to ``target``, coded, or decoded for codec "raw".

    Memory holds one tensor. What is coded lies beside ``target`` until its size is known.

    Args:
        may_code: Says of a tensor, by name, whether it may be coded; by default all may.

    Raises:
        ValueError: for a tensor that is damaged, naming it and the file.
        OSError: if the disk is full.
    """
    reader = Reader([str(source)])
    with safe_open(source, framework="pt") as handle:
        metadata = handle.metadata() or {}
    meta, places, end = {}, {}, 0
    beside = target.with_name(target.name + ".coded" + TEMPORARY)
    try:
        with explained(target, source.stat().st_size), open(beside, "wb+") as file:
            for name in reader.files:
                tensor = reader.read(name)
                try:
                    tensor = entropy.decode_tensor(tensor) if entropy.is_coded(tensor) else tensor
                except (ValueError, ImportError) as error:
                    raise type(error)(f"{name} in {source.name} cannot be decoded: {error}") from error
                if codec != "raw" and may_code(name):
                    tensor = store(name, tensor, widths(name), codec)
                meta[name], places[name] = tensor.to("meta"), end
                end += file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

            def read(name):
                file.seek(places[name])
                content = bytearray(file.read(meta[name].nbytes))
                made = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
                return made.view(meta[name].dtype).view(meta[name].shape)

            Layout(meta, metadata).write(target, ((name, read(name)) for name in meta))
    finally:
        beside.unlink(missing_ok=True)
