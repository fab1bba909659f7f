"""Which tensors of a packed repo are worth coding for a model that is streamed from this disk.

Coded layers are fewer bytes to read, and have to be decoded meanwhile, on the processors that also compute. So
three things are measured: the disk where the repo will lie, by reading back some of its bytes past the system's cache;
each kind of tensor (those that differ in nothing but numbers in their names), one of which is coded, and decoded by all
decoders of a stream at once; and what computing a token takes, by running the model with its layers streamed and
leaving out the time in which it waits.

For one token of a model of which nothing stays in memory, reading then takes ``bytes / disk``, and the processors need
the time of computing and that of decoding, one after the other at worst. Beginning with the kind that saves most bytes
for a second of decoding, tensors are coded for as long as the processors need no more than :data:`SHARE` of the time of
reading. The rest of it is left for what is not modelled: threads that wait for each other, and memory that all share.
"""

import dataclasses
import itertools
import math
import os
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from . import entropy
from .content import Place
from .layers import BLOCK_BYTES, Extent, Layer, layer_of, natural, spread
from .reading import PIECE_BYTES, Counts, Files, allocate, decoders, read_extent
from .shards import Reader
from .stored import store

SHARE = 0.8
"""Of the time of reading, the part that computing and decoding may take."""
TRIAL_BYTES, TRIAL_S = 2**25, 5e-3
ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """Tensors that differ only in the numbers in their names, by the one of them that was tried.

    Attributes:
        names: In the order of layers.
        nbytes: Of one of them, raw.
        coded_bytes: The same, coded.
        decoding_s: Time until one is decoded while all decoders decode, divided by their number.
    """

    names: tuple[str, ...]
    nbytes: int
    coded_bytes: int
    decoding_s: float

    @property
    def gain(self) -> float:
        """Bytes saved for a second of decoding."""
        return (self.nbytes - self.coded_bytes) / self.decoding_s


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is coded, and why.

    Attributes:
        names: Of the tensors of layers that are coded.
        fraction: Their part of all bytes of layers that coding makes smaller.
        disk: Bytes a second.
        decoding: Bytes a second that all decoders make together; 0 where nothing gets smaller.
        computing_s: For one token, in s.
    """

    names: list[str]
    fraction: float
    disk: float
    decoding: float
    computing_s: float


def choose(kinds: Sequence[Kind], nbytes: int, disk: float, computing_s: float) -> Choice:
    """The tensors to code.

    Args:
        kinds: Those that coding makes smaller.
        nbytes: All bytes that are read for a token, raw.
        disk: Bytes a second.
        computing_s: For one token, in s.
    """
    chosen: list[str] = []
    coded, read_s, busy_s = 0, nbytes / disk, computing_s
    for kind in sorted(kinds, key=lambda kind: -kind.gain):
        saved_s = (kind.nbytes - kind.coded_bytes) / disk
        # The largest n for which busy_s + n * decoding_s <= SHARE * (read_s - n * saved_s).
        fitting = math.floor((SHARE * read_s - busy_s) / (kind.decoding_s + SHARE * saved_s))
        count = min(max(fitting, 0), len(kind.names))
        chosen += [kind.names[i] for i in sorted(spread(count, len(kind.names)))]
        coded += count * kind.nbytes
        read_s, busy_s = read_s - count * saved_s, busy_s + count * kind.decoding_s
    total = sum(kind.nbytes * len(kind.names) for kind in kinds)
    seconds = sum(kind.decoding_s * len(kind.names) for kind in kinds)
    return Choice(chosen, coded / total if total else 0.0, disk, total / seconds if seconds else 0.0, computing_s)


def find_kinds(
    places: Mapping[str, Place], widths: Callable[[str], float | None], may_code: Callable[[str], bool], codec: str
) -> tuple[list[Kind], int]:
    """The kinds of tensors of packed weights in layers that coding makes smaller, and the bytes of all such tensors.

    One tensor of each kind is coded; memory holds it and a copy for each decoder.
    """
    by_kind: dict[str, list[str]] = {}
    for name in sorted(places, key=natural):
        if layer_of(name) is not None and widths(name) is not None:
            by_kind.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    reader = Reader(sorted({str(place.file) for place in places.values()}))
    kinds, nbytes = [], 0
    for names in by_kind.values():
        name = names[len(names) // 2]
        tensor = reader.read(name)
        tensor = entropy.decode_tensor(tensor) if entropy.is_coded(tensor) else tensor
        nbytes += tensor.nbytes * len(names)
        coded = store(name, tensor, widths(name), codec) if may_code(name) else tensor
        if coded is not tensor:
            seconds = _decoding_seconds(coded, tensor) / decoders()
            kinds.append(Kind(tuple(names), tensor.nbytes, coded.nbytes, seconds))
    return kinds, nbytes


def _decoding_seconds(coded: torch.Tensor, like: torch.Tensor) -> float:
    """What decoding ``coded`` takes each of all decoders at the same time; the best of some trials."""
    outs, found = [torch.empty_like(like) for _ in range(decoders())], []

    def repeat(out: torch.Tensor) -> None:
        start = time.perf_counter()
        for count in itertools.count(1):
            entropy.decode(coded, out, 1)
            if (seconds := time.perf_counter() - start) > TRIAL_S:
                return found.append(seconds / count)

    for _ in range(ROUNDS):
        threads = [threading.Thread(target=repeat, args=(out,)) for out in outs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if max(found) > TRIAL_S:
            break
    return statistics.mean(sorted(found)[: len(outs)])


def disk_speed(folder: Path, sample: Path) -> float:
    """Bytes a second that are read in ``folder``: those with which ``sample`` begins, written there for a moment.

    Raises:
        OSError: if they cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".hf_lowbit_trial_") as trial:
        with open(sample, "rb") as source:
            trial.write(source.read(TRIAL_BYTES))
        trial.flush()
        os.fsync(trial.fileno())
        nbytes = trial.tell()
        files, buffer, found = Files([trial.name]), allocate(PIECE_BYTES + BLOCK_BYTES), 0.0
        layer, counts = Layer(f"the trial of {folder}", (), {}, 0), Counts()
        for _ in range(ROUNDS):
            files.forget(trial.name, 0, nbytes)
            counts = Counts()
            for begin in range(0, nbytes, PIECE_BYTES):
                extent = Extent(trial.name, begin, min(begin + PIECE_BYTES, nbytes), 0)
                read_extent(files, layer, extent, buffer, 0, counts, lambda: True)
            found = max(found, counts.bytes_read / counts.reading_s)
        files.close()
    return found
