"""Coded layers laid decoded in a scratch file before the first pass, and streamed from there as those of a raw repo.

That is for disks that give decoded bytes sooner than the processors make them. It needs no buffers for coded tensors
while the model runs, and so leaves as much of a budget for layers in memory as a raw repo does. What :mod:`.laying`
lays later, of layers that are decoded meanwhile, has these buffers beside it.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from .layers import BLOCK_BYTES, Extent, Field, Layer, aligned
from .reading import TRIAL_BYTES, Counts, Files, allocate, read_layer, reading_speed
from .scratch import Scratch

logger = logging.get_logger("transformers.hf_lowbit")


@dataclasses.dataclass
class Laid:
    """Layers that lie decoded, the open file that they lie in, and what laying them took."""

    layers: list[Layer]
    files: Files
    counts: Counts


def as_decoded(layer: Layer, file: str = "", begin: int = 0) -> Layer:
    """``layer`` as it is read where its tensors lie decoded in ``file``, one behind the other from ``begin`` on."""
    fields, end = {}, 0
    for name, field in _in_order(layer):
        fields[name] = dataclasses.replace(field, offset=end)
        end = aligned(end + field.nbytes)
    return Layer(layer.name, (Extent(file, begin, begin + end, 0),), fields, end)


def _in_order(layer: Layer) -> list[tuple[str, Field]]:
    return sorted(layer.fields.items(), key=lambda item: item[1].offset)


def read_decoded(layer: Layer, memory: torch.Tensor) -> Counts:
    """Reads ``layer`` as it is stored into ``memory``, uint8, at the beginning of which it then is as if decoded.

    ``memory`` has to hold ``layer.nbytes``, which include room around what is read as it is used. Errors as in
    :func:`.reading.read_layer`.
    """
    counts, values = read_layer(layer, memory[: layer.nbytes]), memory.numpy()
    form = as_decoded(layer)
    for name, field in _in_order(layer):
        to, nbytes = form.fields[name].offset, field.nbytes
        values[to : to + nbytes] = values[field.offset : field.offset + nbytes]  # which may overlap
    return counts


def lay(layers: Sequence[Layer], folder: Path, pays: Callable[[float], bool]) -> Laid | None:
    """Lays ``layers`` decoded in a scratch file, one after the other, in memory for one of them.

    Args:
        layers: As they are stored.
        folder: For the scratch file.
        pays: Whether that is right with so many bytes a second from where they then lie, asked when there is enough
            to measure it.

    Returns:
        None where it is not right, where the file cannot be made, has no room or fails, and where a layer cannot be
        read, which is then said where it is used.

    Raises:
        ValueError: for damaged data, naming the tensor and the file.
    """
    found, sizes = Laid([], Files([]), Counts()), [aligned(as_decoded(x).nbytes, BLOCK_BYTES) for x in layers]
    try:
        if _lay(layers, sizes, Scratch(folder, found.files), found, pays):
            logger.info("%.0f MB of layers lie decoded in %s", sum(sizes) / 1e6, folder)
            return found
        reason = "it is too slow"
    except OSError as error:
        reason = error.strerror or str(error)
    logger.info("layers are not laid decoded in %s at once: %s", folder, reason)
    found.files.close()
    return None


def _lay(layers: Sequence[Layer], sizes: list[int], scratch: Scratch, found: Laid, pays: Callable[[float], bool]):
    if sum(sizes) > scratch.room:
        raise OSError(0, f"{scratch.room / 1e6:.0f} MB, half of what is free, are too little")
    buffer, end, tried = allocate(max(*sizes, *(layer.nbytes for layer in layers))), 0, False
    with logging.tqdm(total=sum(sizes), desc="Laying layers decoded", unit="B", unit_scale=True) as bar:
        for layer, size in zip(layers, sizes, strict=True):
            read_decoded(layer, buffer)
            start = time.perf_counter()
            scratch.write(buffer[:size], end, lambda: True)
            found.counts.writing_s += time.perf_counter() - start
            found.layers.append(as_decoded(layer, scratch.name, end))
            end += size
            bar.update(size)
            if not tried and (end >= TRIAL_BYTES or len(found.layers) == len(layers)):
                tried = True
                if not pays(reading_speed(found.layers, found.files)):
                    return False
    found.counts.bytes_written = end
    return True
