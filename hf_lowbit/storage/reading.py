"""Reading layers from disk and decoding them, as :mod:`.stream` does it again and again, and how fast that is.

Files are read past the system's cache where that is possible: a file larger than memory would push everything else out
of it and find nothing of itself there in the next cycle, and copying out of it takes processors from the model. Reads
are then of whole blocks, into huge pages where the system has them, of which a disk gets long requests. Elsewhere
pages that were read are given back to the system.
"""

import contextlib
import dataclasses
import errno
import io
import mmap
import os
import time
import weakref
from collections.abc import Callable, Sequence

import torch

from . import entropy
from .layers import BLOCK_BYTES, Extent, Layer

PIECE_BYTES = 2**22
"""Of one read: large enough for the disk's full speed, small enough to stop soon."""
TRIAL_BYTES = 2**25
"""Of layers that are read one after another to measure the disk."""
HUGE_BYTES = 2**21
"""Of a huge page."""
MOST_DECODERS = 4


def decoders() -> int:
    """Threads that decode: one for each processor that this process may use, up to :data:`MOST_DECODERS`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_DECODERS, usable)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Bytes a second: read from the disk, and decoded by one thread; and what computing a pass takes, in s."""

    disk: float
    decoding: float = float("inf")
    computing_s: float = 0.0

    def seconds(self, read: int, decoded: int, raw: int | None = None) -> float:
        """What reading and decoding so many bytes takes, side by side and with all decoders.

        ``raw``: Bytes to read if all of it lies decoded on disk, where it may: then the best mixture of both.
        """
        reading_s, decoding_s = read / self.disk, decoded / (self.decoding * decoders())
        if raw is None or decoding_s <= reading_s:
            return max(reading_s, decoding_s)
        more_s = (raw - read) / self.disk
        part = min(1.0, (decoding_s - reading_s) / (decoding_s + more_s))
        return reading_s + part * more_s


@dataclasses.dataclass
class Counts:
    """What a stream has done.

    Attributes:
        bytes_read: Bytes read from disk.
        wasted_bytes: Of these, those of layers that were not used then.
        bytes_decoded: Bytes that coded tensors became.
        layers_read: Layers read whole.
        waits: How often a layer had to be waited for.
        waiting_s: Time that this took, in s.
        reading_s: Time that the reader spent in reads, in s.
        bytes_written: Bytes of decoded layers written to a scratch file.
        writing_s: Time that this took, in s.
        decoding_s: Processor time that the decoders spent, together, in s.
    """

    bytes_read: int = 0
    wasted_bytes: int = 0
    bytes_decoded: int = 0
    layers_read: int = 0
    waits: int = 0
    waiting_s: float = 0.0
    reading_s: float = 0.0
    decoding_s: float = 0.0
    bytes_written: int = 0
    writing_s: float = 0.0

    def add(self, other: "Counts") -> None:
        """Adds what ``other`` has done."""
        for field in dataclasses.fields(Counts):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Files:
    """Files kept open, read by one thread at a time; closed by :meth:`close`, or when nobody uses this any more."""

    def __init__(self, names: Sequence[str]):
        self.handles: dict[tuple[str, bool], io.FileIO] = {}  # by name, and whether past the system's cache
        self.close = weakref.finalize(self, _close, self.handles)
        self.open(names)

    def open(self, names: Sequence[str]) -> None:
        """Opens those that are not open."""
        for name in dict.fromkeys(name for name in names if (name, False) not in self.handles):
            self.handles[name, False] = open(name, "rb", buffering=0)  # noqa: SIM115 (until close)
            with contextlib.suppress(OSError):  # file systems without that refuse to open
                self.handles[name, True] = open(name, "rb", buffering=0, opener=_open_direct)  # noqa: SIM115

    def direct(self, name: str) -> bool:
        """Whether whole blocks of ``name`` are read past the system's cache."""
        return (name, True) in self.handles

    def read(self, name: str, into: memoryview, begin: int) -> int:
        """Reads into the whole of ``into`` from ``begin`` on, or less where the file ends; bytes read."""
        if self.direct(name) and not (begin % BLOCK_BYTES or len(into) % BLOCK_BYTES):
            try:
                self.handles[name, True].seek(begin)
                return self.handles[name, True].readinto(into)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.handles.pop((name, True)).close()  # its blocks are larger
        self.handles[name, False].seek(begin)
        return self.handles[name, False].readinto(into)

    def write(self, name: str, data: memoryview, begin: int) -> int:
        """Writes ``data``, from a block of memory to one of ``name``, which has to be open for that; bytes written."""
        return os.pwrite(self.handles[name, self.direct(name)].fileno(), data, begin)

    def forget(self, name: str, begin: int, end: int) -> None:
        """Tells the system that these bytes of ``name`` need not stay in its cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handles[name, False].fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _open_direct(name: str, flags: int) -> int:
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.EINVAL, "no reads past the cache", name)
    return os.open(name, flags | os.O_DIRECT)


def _close(handles: dict[tuple[str, bool], io.FileIO]) -> None:
    while handles:
        handles.popitem()[1].close()


def allocate(nbytes: int) -> torch.Tensor:
    """``nbytes`` of uint8, uninitialised, that begin at a block, and are huge pages as far as these fill it."""
    huge = nbytes // HUGE_BYTES * HUGE_BYTES
    if not (huge and hasattr(mmap, "MADV_HUGEPAGE")):
        raw = torch.empty(nbytes + BLOCK_BYTES, dtype=torch.uint8, device="cpu")
        start = -raw.data_ptr() % BLOCK_BYTES
    else:
        memory = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = torch.frombuffer(memory, dtype=torch.uint8)
        start = -raw.data_ptr() % HUGE_BYTES
        with contextlib.suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return raw[start : start + nbytes]


def read_extent(
    files: Files, layer: Layer, extent: Extent, buffer: torch.Tensor, place: int, counts: Counts,
    wanted: Callable[[], bool],
) -> bool:  # fmt: skip
    """Reads ``extent`` of ``layer`` to ``buffer[place:]``, uint8, in pieces, for as long as ``wanted()``.

    Where the rest of its first and last block has room there, ``place`` being where in a block of memory the extent is
    in one of its file, these are overwritten, too.

    Returns:
        Whether it was read whole.

    Raises:
        OSError: naming the file, the layer and the place, if the disk or the file's end is the reason.
    """
    target, (at, end) = memoryview(buffer.numpy()), extent.blocks  # type: ignore[arg-type]
    start = place - (extent.begin - at)
    whole = start >= 0 and start + end - at <= len(target) and (buffer.data_ptr() + start) % BLOCK_BYTES == 0
    if not whole:
        start, at, end = place, extent.begin, extent.end
    offset = start - at
    while at < extent.end:
        if not wanted():
            return False
        piece = target[offset + at : offset + min(at + PIECE_BYTES, end)]
        clock = time.perf_counter()
        try:
            found = files.read(extent.file, piece, at)
        except OSError as error:
            message = f"{layer.name} cannot be read from byte {at} of {extent.file}: {error.strerror or error}"
            raise OSError(error.errno, message) from error
        if not found:
            raise OSError(f"{extent.file} ends at byte {at}, inside {layer.name}: it was truncated")
        counts.reading_s += time.perf_counter() - clock
        counts.bytes_read += max(0, min(at + found, extent.end) - max(at, extent.begin))
        at += found
    if not (whole and files.direct(extent.file)):
        files.forget(extent.file, extent.begin, extent.end)
    return True


def decode_extent(
    layer: Layer, extent: Extent, staged: torch.Tensor, buffer: torch.Tensor, threads: int | None
) -> tuple[int, float]:
    """Decodes the tensors of ``extent``, whose bytes ``staged`` begins with, into the layer's ``buffer``.

    An extent that is not coded is copied.

    Returns:
        How many bytes came out, and the processor time of this thread that it took, in s.

    Raises:
        ValueError: for damaged data, naming the tensor and the file.
    """
    start, nbytes = time.thread_time(), 0
    if not extent.parts:
        buffer[extent.offset : extent.offset + extent.nbytes] = staged
    for name, first, last in extent.parts:
        field = layer.fields[name]
        try:
            entropy.decode(staged[first:last], field.view(buffer), threads)
        except ValueError as error:
            raise ValueError(f"{name} in {extent.file} cannot be decoded: {error}") from error
        nbytes += field.nbytes
    return nbytes, time.thread_time() - start


def read_layer(layer: Layer, buffer: torch.Tensor, threads: int | None = None) -> Counts:
    """Reads ``layer`` into ``buffer``, uint8, at once, and says what that took; errors as in :func:`read_extent`."""
    files, counts = Files([extent.file for extent in layer.extents]), Counts()
    staged = allocate(layer.staged_bytes)
    for extent in layer.extents:
        place = extent.begin % BLOCK_BYTES if extent.parts else extent.offset
        read_extent(files, layer, extent, staged if extent.parts else buffer, place, counts, lambda: True)
        if extent.parts:
            nbytes, seconds = decode_extent(layer, extent, staged[place:], buffer, threads)
            counts.bytes_decoded += nbytes
            counts.decoding_s += seconds
    files.close()
    return counts


def measure(layers: Sequence[Layer]) -> Speeds:
    """The speeds of reading ``layers`` one after another, some of them, and of decoding the first coded one.

    What a disk gives at once, from a cache or read ahead, is left out: of the reads the first ones do not count.
    """
    files, counts, nbytes = Files([extent.file for layer in layers for extent in layer.extents]), Counts(), 0
    coded, found = next((layer for layer in layers if layer.coded), None), Speeds(reading_speed(layers, files))
    if coded is None:
        return found
    buffer, staged = allocate(coded.nbytes), [allocate(e.blocks[1] - e.blocks[0]) for e in coded.extents]
    for extent, memory in zip(coded.extents, staged, strict=True):
        read_extent(files, coded, extent, memory, extent.begin % BLOCK_BYTES, counts, lambda: True)
    times = []
    for _ in range(4 if coded.nbytes <= 2 * PIECE_BYTES else 2):  # the first may load the CPU kernels
        done = [
            decode_extent(coded, extent, memory[extent.begin % BLOCK_BYTES :], buffer, 1)
            for extent, memory in zip(coded.extents, staged, strict=True)
            if extent.parts
        ]
        nbytes = sum(made for made, _ in done)
        times.append(sum(seconds for _, seconds in done))
    return dataclasses.replace(found, decoding=nbytes / max(min(times), 1e-9))  # clocks may be coarse


def reading_speed(layers: Sequence[Layer], files: Files) -> float:
    """Bytes a second that are read of ``layers``, some of them, from ``files``, without what is there at once.

    What lies side by side is read as one, as if it were not coded.
    """
    runs: list[Extent] = []
    for extent in (extent for layer in layers for extent in layer.extents):
        last = runs[-1] if runs and runs[-1].file == extent.file else None
        if last is not None and 0 <= extent.begin - last.end <= BLOCK_BYTES:
            runs[-1] = dataclasses.replace(last, end=extent.end)
        else:
            runs.append(Extent(extent.file, extent.begin, extent.end, 0))
    cuts = ((run, begin) for run in runs for begin in range(run.blocks[0], run.end, PIECE_BYTES))
    counts, first, buffer = Counts(), Counts(), allocate(PIECE_BYTES)
    for run, begin in cuts:
        if counts.bytes_read >= TRIAL_BYTES:
            break
        piece = dataclasses.replace(run, begin=begin, end=min(begin + PIECE_BYTES, run.end))
        read_extent(files, layers[0], piece, buffer, 0, counts, lambda: True)
        if not first.bytes_read and counts.bytes_read >= 2 * PIECE_BYTES:
            first = dataclasses.replace(counts)
    if first.bytes_read == counts.bytes_read:
        return counts.bytes_read / counts.reading_s
    return (counts.bytes_read - first.bytes_read) / (counts.reading_s - first.reading_s)
