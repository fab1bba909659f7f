"""Layers read from disk into a few buffers while other layers are computed.

The order in which a model uses its layers is a cycle: forwards for every token, forwards and backwards in training. A
cache of the layers used last would hit nothing; what can be done is to read the next one while this one is computed.
So there are few buffers, two by default: one is in use, the others are filled by a thread of the stream. Which
layer comes next is learned: what followed this pair of layers the last time, or else the next one in the same
direction, from the last layer to the first. A wrong guess costs what had been read of it, at most one piece of
:data:`PIECE_BYTES` after it was found wrong.

A layer is used inside ``with stream.use(i) as buffer``, by one thread at a time. Its buffer may be filled with another
layer as soon as another one is used: whoever wants a tensor for longer has to copy it, or to ask again.

Pages that were read are given back to the system: a file larger than memory would push everything else out of its
cache and find nothing of itself there in the next cycle.
"""

import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .layers import ALIGNMENT, Layer

PIECE_BYTES = 2**22
"""Of one read: large enough for the disk's full speed, small enough to stop soon."""


@dataclasses.dataclass
class Counts:
    """What a stream has done.

    Attributes:
        bytes_read: Bytes read from disk.
        wasted_bytes: Of these, those of layers that were not used then.
        layers_read: Layers read whole.
        waits: How often a layer had to be waited for.
        waiting_s: Time that this took, in s.
        reading_s: Time that the thread spent in reads, in s.
    """

    bytes_read: int = 0
    wasted_bytes: int = 0
    layers_read: int = 0
    waits: int = 0
    waiting_s: float = 0.0
    reading_s: float = 0.0


class Files:
    """Files kept open for reading at any place. Closed by :meth:`close`, or when it is no longer used."""

    def __init__(self, names: Sequence[str]):
        self.handles: dict[str, int] = {}
        self.close = weakref.finalize(self, _close, self.handles)
        for name in dict.fromkeys(names):
            self.handles[name] = os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, name: str, into: memoryview, begin: int) -> int:
        """Reads into the whole of ``into`` from ``begin`` on, or less where the file ends; bytes read."""
        if hasattr(os, "preadv"):
            return os.preadv(self.handles[name], [into], begin)
        data = os.pread(self.handles[name], len(into), begin)
        into[: len(data)] = data
        return len(data)

    def forget(self, name: str, begin: int, end: int) -> None:
        """Tells the system that these bytes of ``name`` need not stay in its cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handles[name], begin, end - begin, os.POSIX_FADV_DONTNEED)


def _close(handles: dict[str, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


def allocate(nbytes: int) -> torch.Tensor:
    """``nbytes`` of uint8, uninitialised, that begin at a line of the cache."""
    raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + nbytes]


def read_layer(files: Files, layer: Layer, buffer: torch.Tensor, counts: Counts, wanted=lambda: True) -> bool:
    """Reads ``layer`` into ``buffer``, in pieces, for as long as ``wanted()``.

    Returns:
        Whether it was read whole.

    Raises:
        OSError: naming the file, the layer and the place, if the disk or the file's end is the reason.
    """
    target = memoryview(buffer.numpy())
    for extent in layer.extents:
        begin, shift = extent.begin, extent.offset - extent.begin
        while begin < extent.end:
            if not wanted():
                return False
            piece = target[shift + begin : shift + min(begin + PIECE_BYTES, extent.end)]
            start = time.perf_counter()
            try:
                found = files.read(extent.file, piece, begin)
            except OSError as error:
                message = f"{layer.name} cannot be read from byte {begin} of {extent.file}: {error.strerror or error}"
                raise OSError(error.errno, message) from error
            if not found:
                raise OSError(f"{extent.file} ends at byte {begin}, inside {layer.name}: it was truncated")
            counts.reading_s += time.perf_counter() - start
            counts.bytes_read += found
            begin += found
        files.forget(extent.file, extent.begin, extent.end)
    counts.layers_read += 1
    return True


class _Slot:
    """One buffer: the layer in it, and whether that has been read."""

    def __init__(self, nbytes: int):
        self.buffer = allocate(nbytes)
        self.layer: int | None = None
        self.ready = self.used = False
        self.failure: Exception | None = None


class _State:
    """What the thread and the users of a stream share; it knows nothing of the stream, which can so be deleted."""

    def __init__(self, layers: Sequence[Layer], files: Files, slots: int):
        self.layers, self.files, self.counts = layers, files, Counts()
        self.slots = [_Slot(max(layer.nbytes for layer in layers)) for _ in range(slots)]
        self.queue: list[int] = []  # layers to read, the most urgent one first
        self.changed, self.stopped = threading.Condition(), False

    def slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.layer == layer), None)

    def run(self) -> None:
        """The thread."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.stopped)
                if self.stopped:
                    return
                index = self.queue.pop(0)
                slot, counts = self.slot_of(index), self.counts
            if slot is None or slot.ready:
                continue
            failure, before = None, counts.bytes_read
            try:
                whole = read_layer(
                    self.files,
                    self.layers[index],
                    slot.buffer,
                    counts,
                    lambda slot=slot, index=index: slot.layer == index and not self.stopped,
                )
            except Exception as error:  # raised where the layer is used
                whole, failure = False, error
            with self.changed:
                if slot.layer == index:
                    slot.ready, slot.failure = whole, failure
                else:
                    counts.wasted_bytes += counts.bytes_read - before
                self.changed.notify_all()


def _stop(state: _State, thread: threading.Thread) -> None:
    with state.changed:
        state.stopped = True
        state.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join()


class LayerStream:
    """``layers``, of which a few are in memory.

    Args:
        layers: In the order of use.
        slots: Buffers, two or more (fewer layers need no more than one each).

    Attributes:
        buffers: The buffers, uint8.

    Raises:
        OSError: for a file that cannot be opened.
    """

    def __init__(self, layers: Sequence[Layer], slots: int = 2):
        files = Files([extent.file for layer in layers for extent in layer.extents])
        self._state = _State(layers, files, min(slots, len(layers)))
        self._in_use = threading.RLock()
        self._previous: int | None = None
        self._current: int | None = None
        self._follows: dict[tuple[int | None, int], int] = {}
        self._slot: _Slot = self._state.slots[0]
        self._thread = threading.Thread(target=self._state.run, name="hf_lowbit reader", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop, self._state, self._thread)  # also when Python ends

    def __reduce__(self):
        raise TypeError(
            "a model whose layers are streamed cannot be copied or pickled, since it reads from open files: use "
            "save_pretrained, or load it without max_memory_bytes"
        )

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._state.slots]

    @property
    def counts(self) -> Counts:
        """What was done so far, a copy."""
        return dataclasses.replace(self._state.counts)

    def reset(self) -> None:
        """Sets all counts to zero."""
        self._state.counts = Counts()

    @contextmanager
    def use(self, index: int) -> Iterator[int]:
        """The number of the buffer that holds layer ``index`` while the context lasts.

        Raises:
            OSError: if it could not be read; the next use tries again.
            RuntimeError: in a process that was forked, where there is no thread to read.
        """
        with self._in_use:
            if index != self._current:
                self._go_to(index)
            yield self._state.slots.index(self._slot)

    def _go_to(self, index: int) -> None:
        state = self._state
        if self._current is not None:
            self._follows[self._previous, self._current] = index
        wanted = self._expected(index)
        with state.changed:
            self._previous, self._current = (self._current, None)
            free = [slot for slot in state.slots if slot.layer not in wanted]
            for slot in state.slots:
                if slot.failure is not None:  # try again
                    slot.layer, slot.failure = None, None
                    free.append(slot) if slot not in free else None
            for layer in wanted:
                if state.slot_of(layer) is None:
                    slot = free.pop()
                    if slot.ready and not slot.used:
                        state.counts.wasted_bytes += state.layers[slot.layer].read_bytes
                    slot.layer, slot.ready, slot.used = layer, False, False
                    state.queue.append(layer)
            state.queue = [layer for layer in wanted if layer in state.queue]
            state.changed.notify_all()
            found = state.slot_of(index)
            assert found is not None
            if not found.ready and found.failure is None:
                self._wait(found)
            if found.failure is not None:
                raise found.failure
            found.used = True
        self._slot, self._current = found, index

    def _wait(self, slot: _Slot) -> None:
        counts, start = self._state.counts, time.perf_counter()
        while not slot.ready and slot.failure is None:
            if not self._state.changed.wait(1.0) and not self._thread.is_alive():
                raise RuntimeError(
                    "the thread that reads layers has ended: a streamed model cannot be used after it was closed, or "
                    "in a process forked from the one that loaded it"
                )
        counts.waits += 1
        counts.waiting_s += time.perf_counter() - start

    def _expected(self, index: int) -> list[int]:
        """``index`` and the layers that are likely to follow it, as many as there are buffers."""
        count, previous, found = len(self._state.layers), self._current, [index]
        for _ in range(2 * len(self._state.slots)):  # a layer may come twice
            if len(found) == len(self._state.slots):
                break
            backwards = previous is not None and index == previous - 1
            following = (index + (-1 if backwards else 1)) % count
            following = self._follows.get((previous, index), following)
            previous, index = index, following
            if index not in found:
                found.append(index)
        return found
