"""Layers read from disk into a few buffers while other layers are computed.

The order in which a model uses its layers is a cycle: forwards for every token, forwards and backwards in training. A
cache of the layers used last would hit nothing; what can be done is to read the next one while this one is computed.
So there are few buffers, two by default: one is in use, the others are filled by a thread of the stream. Which
layer comes next is learned: what followed this pair of layers the last time, or else the next one in the same
direction, from the last layer to the first. A wrong guess costs what had been read of it, at most one piece of
:data:`.reading.PIECE_BYTES` after it was found wrong.

Coded tensors are read into buffers of their own, from where other threads decode them into the layer's while the next
ones are read. There is one such buffer more than there are decoders, which bounds what waits for them.

A layer is used inside ``with stream.use(i) as buffer``, by one thread at a time. Its buffer may be filled with another
layer as soon as another one is used, or after as many uses in a row as it had the last time: whoever wants a tensor for
longer has to copy it, or to ask again.

How files are read and tensors decoded is in :mod:`.reading`.
"""

import dataclasses
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from .laid import Laid, read_decoded
from .layers import BLOCK_BYTES, Extent, Layer, aligned
from .laying import Laying
from .reading import Counts, Files, Speeds, allocate, decode_extent, decoders, read_extent

logger = logging.get_logger("transformers.hf_lowbit")


def buffer_bytes(layers: Collection[Layer], slots: int) -> int:
    """Bytes of all buffers of a stream of ``layers``: ``slots`` of one layer each, and those for coded tensors."""
    size, staged = _buffer_sizes(layers)
    return min(slots, len(layers)) * size + (decoders() + 1) * staged


def _buffer_sizes(layers: Collection[Layer]) -> tuple[int, int]:
    """Bytes of a buffer for a layer, and for what is decoded."""
    size = aligned(max((layer.nbytes for layer in layers), default=0), BLOCK_BYTES)
    return size, max((layer.staged_bytes for layer in layers), default=0)


class _Slot:
    """One buffer, and how far the layer in it is."""

    def __init__(self, buffer: torch.Tensor):
        self.buffer = buffer
        self.layer: int | None = None
        self.form: Layer | None = None  # what is read for it
        self.turn = 0  # counts the layers that were assigned to it
        self.left = 0  # extents that are not there yet
        self.busy = 0  # threads at work on what is in it: the reader, decoders, and the writer of the scratch file
        self.used = False
        self.failure: Exception | None = None

    @property
    def ready(self) -> bool:
        return self.layer is not None and not self.left


def _is_due(slot: _Slot, turn: int) -> bool:
    """Whether nobody is at work on the layer before in ``slot``, or the one of ``turn`` is not wanted any more."""
    return not slot.busy or slot.turn != turn


class _State:
    """What the threads and the user of a stream share; it knows nothing of the stream, which can so be deleted."""

    def __init__(
        self,
        layers: Sequence[Layer],
        slots: int,
        kept: Collection[tuple[int, int]],
        nbytes: int,
        folder: Path | None,
        speeds: Speeds | None,
        laid: Laid | None,
        stored: Sequence[Layer] | None,
    ):
        self.layers, self.stored = layers, stored or layers
        self.counts, self.files = (Counts(), Files([])) if laid is None else (laid.counts, laid.files)
        self.files.open([extent.file for layer in layers for extent in layer.extents])
        self.lost = False  # whether the scratch file that they were laid in has failed
        size, staged = _buffer_sizes(layers)
        memory = allocate(max(nbytes, buffer_bytes(layers, slots)))  # in one, so that huge pages fit
        self.slots = [_Slot(memory[i * size : (i + 1) * size]) for i in range(slots)]
        memory = memory[slots * size :]
        self.queue: list[tuple[int, _Slot, int]] = []  # (layer, slot, its turn) to read, the most urgent one first
        self.jobs: deque = deque()  # to decode: (layer, slot, its turn, extent, staged, whether that is to be returned)
        self.stored_jobs: deque = deque()  # the same of layers in memory, for which no reader waits
        self.decodes, self.stopped = any(layer.coded for layer in layers), False
        # One lock, and who waits for what, so that nobody is woken for nothing.
        self.lock = threading.Lock()
        self.to_read, self.to_decode, self.to_use, self.to_write = (threading.Condition(self.lock) for _ in range(4))
        self.staging = [memory[i * staged : (i + 1) * staged] for i in range(decoders() + 1 if staged else 0)]
        self.kept: dict[tuple[int, int], torch.Tensor] = {}  # stored extents that stay, by layer and number
        for index, number in kept:
            extent = layers[index].extents[number]
            self.kept[index, number] = kept_bytes = allocate(extent.nbytes)
            read_extent(self.files, layers[index], extent, kept_bytes, 0, Counts(), lambda: True)
        self.whole = {i for i, x in enumerate(layers) if all((i, n) in self.kept for n in range(len(x.extents)))}
        laying = Laying(layers, self.kept, folder, self.files, speeds) if folder is not None else None
        self.laying = laying if laying is not None and laying.cuts else None
        self.writing: tuple[int, _Slot] | None = None  # to the scratch file: a layer, and what it is in

    def slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.layer == layer), None)

    def assign(self, index: int, slot: _Slot) -> None:
        """Has the layer ``index`` put into ``slot``, in the form in which it is best read now; the lock is held."""
        slot.form = self.layers[index] if self.laying is None else self.laying.form(index)
        slot.layer, slot.turn, slot.used, slot.left = index, slot.turn + 1, False, len(slot.form.extents)
        self.order(index, slot)

    def bytes_of(self, index: int, form: Layer) -> int:
        """Bytes that are read for the layer ``index`` in ``form``."""
        return sum(e.nbytes for n, e in enumerate(form.extents) if self.kept_bytes(index, n, e) is None)

    def kept_bytes(self, index: int, number: int, extent: Extent) -> torch.Tensor | None:
        """What is in memory of the layer ``index`` as its extent ``number``, which may also be one to read decoded."""
        return self.kept.get((index, number)) if extent is self.layers[index].extents[number] else None

    def order(self, index: int, slot: _Slot) -> None:
        """Has the layer ``index`` put into ``slot``: by the decoders if it is in memory, else by the reader."""
        if self.decodes and index in self.whole and not slot.busy:
            for number, extent in enumerate(self.layers[index].extents):
                job = (self.layers[index], slot, slot.turn, extent, self.kept[index, number], False)
                self.stored_jobs.append(job)
            self.to_decode.notify_all()
        else:
            self.queue.append((index, slot, slot.turn))
            self.to_read.notify()

    def wait_for(self, changed: threading.Condition, condition: Callable[[], object]) -> bool:
        """Waits until ``condition()``, notified by ``changed``; False where the stream has ended. The lock is held."""
        changed.wait_for(lambda: self.stopped or condition())
        return not self.stopped

    def finish(self, slot: _Slot, turn: int, failure: Exception | None = None) -> None:
        """Notes that one extent is there, or why not; the lock is held."""
        if slot.turn == turn:
            slot.left -= 1
            slot.failure = slot.failure or failure
            self.counts.layers_read += slot.ready and slot.failure is None
            if slot.ready or slot.failure is not None:
                self.to_use.notify_all()
            if slot.ready and slot.failure is None:
                self.offer(slot)

    def offer(self, slot: _Slot) -> None:
        """Has the layer in ``slot`` written to the scratch file if it is to be and none is; the lock is held."""
        if self.laying is None or self.writing is not None or slot.layer is None or not self.laying.wants(slot.layer):
            return
        self.writing, slot.busy = (slot.layer, slot), slot.busy + 1
        self.to_write.notify()

    def run_reader(self) -> None:
        """The thread that reads."""
        while True:
            with self.lock:
                if not self.wait_for(self.to_read, lambda: self.queue):
                    return
                index, slot, turn = self.queue.pop(0)
                if not self.wait_for(self.to_read, functools.partial(_is_due, slot, turn)):
                    return
                if slot.turn != turn:
                    continue
                slot.busy += 1  # so that no decoder fills it with another layer before what is read now is there
                layer, counts = slot.form or self.layers[index], self.counts
                before = counts.bytes_read
            for number in range(len(layer.extents)):
                if not self.read(index, layer, number, slot, turn):
                    counts.wasted_bytes += counts.bytes_read - before
                    break
            with self.lock:
                slot.busy -= 1

    def read(self, index: int, layer: Layer, number: int, slot: _Slot, turn: int) -> bool:
        """Reads one extent and hands it to the decoders where it is coded; whether to go on."""
        extent = layer.extents[number]
        kept, laid = self.kept_bytes(index, number, extent), extent is not self.layers[index].extents[number]
        staged, failure = kept, None
        if extent.parts and kept is None:
            with self.lock:
                if not self.wait_for(self.to_read, lambda: self.staging):
                    return False
                staged = self.staging.pop()
        buffer, place = (slot.buffer, extent.offset) if staged is None else (staged, extent.begin % BLOCK_BYTES)
        try:
            if kept is not None and not extent.parts:
                slot.buffer[extent.offset : extent.offset + extent.nbytes] = kept
            if self.layers[index] is not self.stored[index] and kept is None:
                whole = self.read_laid(index, slot, turn)
            else:
                whole = kept is not None or read_extent(
                    self.files, layer, extent, buffer, place, self.counts, functools.partial(self.wants, slot, turn)
                )
        except Exception as error:  # raised where the layer is used
            whole, failure = False, error
        with self.lock:
            if laid and isinstance(failure, OSError) and self.laying is not None:
                self.laying.give_back(index, failure)
                if slot.turn == turn:  # again, as it is stored
                    self.assign(index, slot)
                return False
            if extent.parts and whole:
                self.jobs.append((layer, slot, turn, extent, staged, kept is None))
                self.to_decode.notify()
                return True
            if extent.parts and kept is None:
                self.staging.append(staged)  # type: ignore[arg-type]
            if whole or failure is not None:
                self.finish(slot, turn, failure)
        return whole

    def wants(self, slot: _Slot, turn: int) -> bool:
        """Whether the layer that was assigned to ``slot`` in that turn is still to be read."""
        return slot.turn == turn and not self.stopped

    def read_laid(self, index: int, slot: _Slot, turn: int) -> bool:
        """Reads a layer that was laid before, or, in further memory, as it is stored once that has failed."""
        layer, wanted = self.layers[index], functools.partial(self.wants, slot, turn)
        if not self.lost:
            try:
                return read_extent(self.files, layer, layer.extents[0], slot.buffer, 0, self.counts, wanted)
            except OSError as error:
                self.lost = True
                logger.warning(
                    "%s: coded layers are decoded in every pass from now on, which is slower here, in memory beside "
                    "the budget: load the model again, with another offload_folder=",
                    error,
                )
        memory = allocate(self.stored[index].nbytes)
        self.counts.add(read_decoded(self.stored[index], memory))
        slot.buffer[: layer.nbytes] = memory[: layer.nbytes]
        return True

    def run_writer(self) -> None:
        """The thread that writes decoded layers to the scratch file."""
        while True:
            with self.lock:
                if not self.wait_for(self.to_write, lambda: self.writing) or self.writing is None:
                    return
                index, slot = self.writing
            assert self.laying is not None
            start = time.perf_counter()
            written = self.laying.write(index, slot.buffer, lambda: not self.stopped)
            with self.lock:
                self.counts.bytes_written += written
                self.counts.writing_s += time.perf_counter() - start
                self.writing, slot.busy = None, slot.busy - 1
                self.to_read.notify()  # who may wait for the slot

    def run_decoder(self) -> None:
        """A thread that decodes."""
        while True:
            with self.lock:
                if not self.wait_for(self.to_decode, lambda: self.jobs or self.stored_jobs):
                    return
                layer, slot, turn, extent, staged, returned = (self.jobs or self.stored_jobs).popleft()
                place = extent.begin % BLOCK_BYTES if returned else 0
                wanted = slot.turn == turn
                slot.busy += wanted
            failure, nbytes, seconds = None, 0, 0.0
            if wanted:
                try:
                    nbytes, seconds = decode_extent(layer, extent, staged[place:], slot.buffer, 1)
                except Exception as error:  # raised where the layer is used
                    failure = error
            with self.lock:
                slot.busy -= wanted
                if returned:
                    self.staging.append(staged)
                self.counts.bytes_decoded += nbytes
                self.counts.decoding_s += seconds
                self.finish(slot, turn, failure)
                self.to_read.notify()  # who may wait for a buffer, or for the slot


def _stop(state: _State, threads: list[threading.Thread]) -> None:
    with state.lock:
        state.stopped = True
        for waiting in (state.to_read, state.to_decode, state.to_use, state.to_write):
            waiting.notify_all()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
    state.files.close()


class LayerStream:
    """``layers``, of which a few are in memory.

    Args:
        layers: In the order of use.
        slots: Buffers, two or more (fewer layers need no more than one each).
        kept: Numbers of layers whose stored bytes are kept in memory, so that they are only decoded.
        extents: The same of single extents of other layers, as (layer, number).
        nbytes: Of all buffers together, where they may take more than :func:`buffer_bytes`: whole huge pages.
        folder: For a scratch file, from which coded layers are read decoded where that is faster (:mod:`.laying`).
        speeds: Of a trial, by which that choice begins.
        laid: What some of ``layers`` were laid in before (:mod:`.laid`).
        stored: All layers as they are stored, in which form those are read where that fails.

    Attributes:
        buffers: The buffers, uint8.

    Raises:
        OSError: for a file that cannot be opened.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        slots: int = 2,
        kept: Collection[int] = (),
        extents: Collection[tuple[int, int]] = (),
        nbytes: int = 0,
        folder: Path | None = None,
        speeds: Speeds | None = None,
        laid: Laid | None = None,
        stored: Sequence[Layer] | None = None,
    ):
        all_kept = [*((index, n) for index in kept for n in range(len(layers[index].extents))), *extents]
        slots = min(slots, len(layers))
        self._state = state = _State(layers, slots, all_kept, nbytes, folder, speeds, laid, stored)
        self._in_use = threading.RLock()
        self._previous: int | None = None
        self._current: int | None = None
        self._released, self._uses = False, 0
        self._follows: dict[tuple[int | None, int], int] = {}
        self._lasts: dict[tuple[int | None, int], int] = {}  # how many uses in a row a layer had after another
        self._slot = 0
        runs = [state.run_reader] + [state.run_decoder] * (decoders() if state.decodes else 0)
        runs += [state.run_writer] if state.laying is not None else []
        self._threads = [threading.Thread(target=run, name=f"hf_lowbit {run.__name__}", daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()
        self.close = weakref.finalize(self, _stop, state, self._threads)  # also when Python ends

    def __reduce__(self):
        raise TypeError(
            "a model whose layers are streamed cannot be copied or pickled, since it reads from open files: use "
            "save_pretrained, or load it without max_memory_bytes"
        )

    @property
    def buffers(self) -> list[torch.Tensor]:
        return [slot.buffer for slot in self._state.slots]

    @property
    def files(self) -> Files:
        """The files that are read, open."""
        return self._state.files

    @property
    def forms(self) -> list[Layer]:
        """The layers as they are to be read now."""
        state = self._state
        return list(state.layers) if state.laying is None else list(map(state.laying.form, range(len(state.layers))))

    @property
    def layers_laid(self) -> int:
        """How many of them are read decoded, or a part of them is, from the scratch file."""
        state = self._state
        return 0 if state.lost else sum(form is not x for form, x in zip(self.forms, state.stored, strict=True))

    @property
    def pass_bytes(self) -> int:
        """Bytes that are read for all layers, once."""
        return sum(map(self._state.bytes_of, range(len(self._state.layers)), self.forms))

    @property
    def counts(self) -> Counts:
        """What was done so far, a copy."""
        return dataclasses.replace(self._state.counts)

    def reset(self) -> None:
        """Sets all counts to zero."""
        self._state.counts = Counts()
        if self._state.laying is not None:
            self._state.laying.uses = 0

    @contextmanager
    def use(self, index: int) -> Iterator[int]:
        """The number of the buffer that holds layer ``index`` while the context lasts.

        Raises:
            OSError: if it could not be read; the next use tries again.
            ValueError: if it could not be decoded.
            RuntimeError: in a process that was forked, where there is no thread to read.
        """
        with self._in_use:
            if index != self._current or self._released:
                self._go_to(index)
            self._uses += 1
            yield self._slot
            if self._uses == self._lasts.get((self._previous, index)):
                self._released = True
                with self._state.lock:
                    self._assign(self._expected(self._previous, index, [], len(self._state.slots)))

    def _go_to(self, index: int) -> None:
        state = self._state
        if index != self._current:
            if state.laying is not None:
                state.laying.note_use(state.counts)
            if self._current is not None:
                self._follows[self._previous, self._current] = index
                self._lasts[self._previous, self._current] = self._uses
            self._previous, self._uses = self._current, 0
        self._current, self._released = None, False
        with state.lock:
            self._assign(self._expected(self._previous, index, [index], len(state.slots)))
            found = state.slot_of(index)
            assert found is not None
            if not found.ready and found.failure is None:
                self._wait(found)
            if found.failure is not None:
                raise found.failure
            found.used = True
        self._slot, self._current = state.slots.index(found), index

    def _assign(self, wanted: list[int]) -> None:
        """Gives every layer of ``wanted``, the most urgent one first, a buffer, and has it read; the lock is held."""
        state = self._state
        for slot in state.slots:
            if slot.failure is not None:  # try again
                slot.layer, slot.failure, slot.turn = None, None, slot.turn + 1
        free = [slot for slot in state.slots if slot.layer not in wanted]
        free.sort(key=lambda slot: slot.ready and not slot.used)  # what was read stays as long as it can
        for layer in wanted:
            if state.slot_of(layer) is None:
                slot = free.pop(0)
                if slot.ready and not slot.used and slot.layer is not None and slot.form is not None:
                    state.counts.wasted_bytes += state.bytes_of(slot.layer, slot.form)
                state.assign(layer, slot)
        for slot in free:
            if not slot.ready:
                slot.layer, slot.turn = None, slot.turn + 1
        entries = [entry for entry in state.queue if entry[1].turn == entry[2]]
        state.queue = sorted(entries, key=lambda entry: wanted.index(entry[0]))

    def _wait(self, slot: _Slot) -> None:
        start = time.perf_counter()
        while not slot.ready and slot.failure is None:
            if not self._state.to_use.wait(1.0) and not all(thread.is_alive() for thread in self._threads):
                raise RuntimeError(
                    "the threads that read layers have ended: a streamed model cannot be used after it was closed, or "
                    "in a process forked from the one that loaded it"
                )
        self._state.counts.waits += 1
        self._state.counts.waiting_s += time.perf_counter() - start

    def _expected(self, previous: int | None, index: int, found: list[int], number: int) -> list[int]:
        """``found`` and the layers likely to follow ``index``, which was used after ``previous``, up to ``number``."""
        for _ in range(2 * number):  # a layer may come twice
            if len(found) == number:
                break
            backwards = previous is not None and index == previous - 1
            following = (index + (-1 if backwards else 1)) % len(self._state.layers)
            following = self._follows.get((previous, index), following)
            previous, index = index, following
            if index not in found:
                found.append(index)
        return found
