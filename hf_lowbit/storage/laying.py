"""What of the coded layers of a stream is read decoded, from a scratch file (:mod:`.scratch`) that it is laid in.

Decoding takes processors, and a disk may give the decoded bytes sooner. So after every pass over the layers the balance
is struck anew, by what that pass took: the longer of reading, and of computing and decoding one after the other, is to
be short. What a trial before the first pass measured of the disk and the decoders is where this begins. Computing is
the time in which the model did not wait, or all that was not decoding where the disk was not what it waited for.
Reading gets slower by decoding beside it, where the system needs processors for it too, so that the disk's speed is
taken to fall with the part that is decoded, once both have been seen. Each layer is then read in two parts: what stays
coded first, so that it is decoded while the other part, already decoded, is read.

That part has to lie there first. What two passes in a row asked for is written as it comes out of the decoders, from
the buffer in which the layer is used, so that no further memory is needed, and one layer at a time, so that reading
goes on beside it. What is on disk in both forms is read in the one that the last pass asks for: a long prompt, which
needs the processors for itself, and the single tokens after it want different parts.

Errors of the scratch file are no errors of the model: the layers are then read as they are stored.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from .layers import BLOCK_BYTES, Extent, Layer, aligned
from .reading import Counts, Files, Speeds, decoders
from .scratch import Scratch

logger = logging.get_logger("transformers.hf_lowbit")
SHARE = 0.9
"""Of the time of reading, the part that computing and decoding may take; the rest is for threads waiting for others."""
STEPS = 16
"""Parts of the layers, all but this many, of which the best is chosen."""
COST = 0.1
"""What a second of the processors counts beside one of waiting: decoding that gains next to nothing is left out."""
WORTH = 1.03
"""Where nothing decoded takes at most so many times the least time, nothing is: speeds are not known better."""
BESIDE = 1.5
"""How much longer decoding takes beside computing, as long as no pass has shown it. On two processors a model of 1.2
billion weights that is streamed raw did not wait for 0.081 s of a token, and coded for 0.147 s beside 0.156 s of
decoding by each, 1.4 times (`benchmarks/streaming.py --bits-stored 2.8 --disks 1500 --tokens 24 --print`)."""
QUIET = 0.25
"""Of the time of all decoders, the part in which a trial of the disk is believed no more than a pass."""
BOUND = 0.85
"""Where reading took a smaller part of a pass than this, all of it was the processors' time. A pass that took about as
long as its bytes do at the speed of the trial, the same part or its inverse, was reading all of the time."""
NEWEST, FAR, FORGOTTEN = 0.25, 1.25, 0.005
"""What is known of the disk is by the first part that of the newest pass, of which at most so many times the speed that
was expected is believed; passes that decode little forget the last part of how decoding slows it down."""


class _Cuts:
    """Where a layer may be cut: its first extents are read as they are stored, and the rest of it decoded.

    Args:
        layer: As it is stored.
        sizes: What is read for each of its extents, 0 for those in memory.

    Attributes:
        offsets: By the number of extents before the cut, where the rest begins in the layer's buffer.
        read: By the same, bytes that are read.
        decoded: By the same, bytes that are decoded.
        place: Of the layer in the scratch file, or None.
        laid: The first cut whose rest lies there.
        asked, target: The cut to read by, and the one to write.
    """

    def __init__(self, layer: Layer, sizes: Sequence[int]):
        self.layer, self.offsets, self.read, self.decoded = layer, [0], [layer.nbytes], [0]
        for number in range(1, len(layer.extents) + 1):
            made = sum(layer.fields[name].nbytes for name, *_ in layer.extents[number - 1].parts)
            self.decoded.append(self.decoded[-1] + made)
            rest = layer.extents[number:]
            first = [layer.fields[rest[0].parts[0][0]].offset if rest[0].parts else rest[0].offset] if rest else []
            self.offsets.append(first[0] if first else layer.nbytes)
            self.read.append(sum(sizes[:number]) + layer.nbytes - self.offsets[number])
        self.laid = self.asked = self.target = len(layer.extents)
        self.place: int | None = None

    def form(self, file: str) -> Layer:
        """How the layer is to be read now."""
        number = max(self.asked, self.laid)
        if self.place is None or number == len(self.layer.extents):
            return self.layer
        offset = self.offsets[number]
        rest = Extent(file, self.place + offset, self.place + self.layer.nbytes, offset)
        return dataclasses.replace(self.layer, extents=(*self.layer.extents[:number], rest))

    def nearest(self, nbytes: float) -> int:
        """The cut before which about ``nbytes`` are decoded."""
        return min(range(len(self.decoded)), key=lambda i: abs(self.decoded[i] - nbytes))


class Laying:
    """The choice for the layers of one stream; changed by the thread that uses it and the one that writes.

    Args:
        layers: Of the stream, as they are stored.
        kept: Their extents that are in memory, as (layer, number).
        folder: For the scratch file, which is made when it is first needed.
        files: Those of the stream.
        speeds: Of a trial: reading with nothing beside it, and decoding.

    Attributes:
        cuts: Of the coded layers that are read from disk, by number.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kept: Collection[tuple[int, int]],
        folder: Path,
        files: Files,
        speeds: Speeds | None = None,
    ):
        self.layers, self.folder, self.files = layers, folder, files
        sizes = [[0 if (i, n) in kept else e.nbytes for n, e in enumerate(x.extents)] for i, x in enumerate(layers)]
        self.cuts = {i: _Cuts(layer, sizes[i]) for i, layer in enumerate(layers) if layer.coded and any(sizes[i])}
        # What is read and decoded however the choice is.
        self.others_read = sum(sum(sizes[i]) for i in range(len(layers)) if i not in self.cuts)
        self.others_decoded = sum(layer.decoded_bytes for i, layer in enumerate(layers) if i not in self.cuts)
        self.fraction = 1.0  # of the other bytes, what is to be decoded in the next pass
        self.scratch: Scratch | None = None
        self.end, self.failed = 0, False
        self.decoding_s = 0.0  # for a byte, by all decoders, the last time that any was decoded
        self.computing_s = 0.0  # for a pass
        self.speeds, self.noted = [0.0, 0.0], [0, 0]  # of the disk, with nothing and with all decoded; how often noted
        self.passes = self.planned = self.uses = 0
        self.since, self.before = 0.0, Counts()
        self.trial = speeds.disk if speeds is not None else float("inf")
        if speeds is not None:
            self.speeds, self.noted = [speeds.disk] * 2, [1, 0]
            self.decoding_s, self.computing_s = 1 / speeds.decoding / decoders(), speeds.computing_s
            self.fraction = self._best(speeds.disk, speeds.disk)

    def form(self, index: int) -> Layer:
        """The layer ``index`` as it is to be read now."""
        if index not in self.cuts or self.scratch is None:
            return self.layers[index]
        return self.cuts[index].form(self.scratch.name)

    def wants(self, index: int) -> bool:
        """Whether something of the layer ``index`` is to be written once it is decoded."""
        return not self.failed and index in self.cuts and self.cuts[index].target < self.cuts[index].laid

    def note_use(self, counts: Counts) -> None:
        """Another layer is used; ``counts`` are those of the stream."""
        now = time.perf_counter()
        if self.uses == len(self.layers):
            names = [field.name for field in dataclasses.fields(Counts)]
            passed = Counts(**{name: getattr(counts, name) - getattr(self.before, name) for name in names})
            # The first pass, and those beside which was written, took longer than the next one will.
            if self.passes and passed.bytes_read > 0 and not passed.bytes_written:
                self.plan(passed, now - self.since)
            self.passes += 1
            self.uses = 0
        if not self.uses:
            self.since, self.before = now, dataclasses.replace(counts)
        self.uses += 1

    def plan(self, passed: Counts, seconds: float) -> None:
        """Chooses for the next pass after one that took ``seconds`` and did what ``passed`` says."""
        if passed.bytes_decoded:
            self.decoding_s = passed.decoding_s / passed.bytes_decoded / decoders()
        total = sum(cuts.decoded[-1] for cuts in self.cuts.values())
        done = min(1.0, max(0.0, (passed.bytes_decoded - self.others_decoded) / total))
        if self.noted == [1, 0] and passed.decoding_s < QUIET * seconds * decoders():
            self.noted[0] = 0  # decoding so little did not slow the disk down: the trial was wrong if it was quicker
        reading_s = passed.reading_s
        if BOUND * seconds < (steady_s := passed.bytes_read / self.trial) < seconds / BOUND:
            reading_s = max(reading_s, min(steady_s, seconds))  # it read ahead while nobody asked
        idle, loaded = self._note_speed(done, passed.bytes_read / reading_s)
        # Threads that share processors take each longer; together they did not take longer than the pass.
        busy_s = seconds - self.decoding_s * passed.bytes_decoded
        if reading_s > BOUND * seconds:
            busy_s = min(busy_s, (seconds - passed.waiting_s) * min(1.0, torch.get_num_threads() / decoders()))
        self.computing_s = busy_s if not self.planned else (self.computing_s + busy_s) / 2
        self.planned += 1
        self._choose(self._best(idle, loaded))

    def _best(self, idle: float, loaded: float) -> float:
        """The part to decode that makes a pass shortest, with ``idle`` and ``loaded`` speeds of the disk."""
        times = self.times(idle, loaded)
        best = min(times, key=lambda part: times[part])
        return 0.0 if times[0.0] <= WORTH * times[best] else best

    def times(self, idle: float, loaded: float) -> dict[float, float]:
        """What a pass takes by the part to decode, in s."""
        total = sum(cuts.decoded[-1] for cuts in self.cuts.values())
        raw = self.others_read + sum(cuts.read[0] for cuts in self.cuts.values())
        saved = sum(cuts.read[0] - cuts.read[-1] for cuts in self.cuts.values())
        times: dict[float, float] = {}
        stalled_s = self.decoding_s * self.others_decoded  # layers in memory as stored fill the buffers meanwhile
        for step in range(STEPS + 1):
            part = step / STEPS
            reading_s = (raw - part * saved) / (idle + part * (loaded - idle))
            working_s = self.computing_s + self.decoding_s * (self.others_decoded + part * total)
            times[part] = max(reading_s + stalled_s, working_s / SHARE) + COST * working_s
        return times

    def _choose(self, fraction: float) -> None:
        """Has about ``fraction`` of the bytes decoded in the next pass, and the rest read as it lies, or laid."""
        if (lasting := max(fraction, self.fraction)) < 1 and not self.failed:
            if self.scratch is None:
                self._open()
            for cuts, asked in zip(self.cuts.values(), self._spread(lasting), strict=True):
                cuts.target = min(cuts.target, asked)
        self.fraction = fraction
        for cuts, asked in zip(self.cuts.values(), self._spread(fraction), strict=True):
            cuts.asked = asked

    def _note_speed(self, part: float, speed: float) -> tuple[float, float]:
        """Its speeds with nothing and with all decoded; ``speed`` is the last one, with ``part`` of it decoded."""
        idle, loaded = self.speeds if all(self.noted) else [max(self.speeds) or speed] * 2
        most, known = part >= 0.5, idle + part * (loaded - idle)
        weight = max(NEWEST, 1 / (1 + self.noted[most]))
        if self.noted[most] > 1:
            speed = min(max(speed, known / FAR), known * FAR)
        if most:
            loaded += weight * ((speed - (1 - part) * idle) / part - loaded)
        else:
            idle += weight * ((speed - part * loaded) / (1 - part) - idle)
            loaded += FORGOTTEN * (idle - loaded)
        self.noted[most] += 1
        if not all(self.noted):  # the other one is not known better
            idle = loaded = loaded if most else idle
        self.speeds = [idle, max(min(loaded, idle), idle / 8)]
        return self.speeds[0], self.speeds[1]

    def _spread(self, fraction: float) -> list[int]:
        """The cut of each layer for which about ``fraction`` is decoded of every run of layers."""
        wanted, found = 0.0, []
        for cuts in self.cuts.values():
            wanted += fraction * cuts.decoded[-1]
            found.append(cuts.nearest(wanted))
            wanted -= cuts.decoded[found[-1]]
        return found

    def _open(self) -> None:
        try:
            self.scratch = Scratch(self.folder, self.files)
        except OSError as error:
            return self.give_up(error)
        room = self.scratch.room / 1e6
        logger.info("coded layers are laid decoded in %s, which may take %.0f MB", self.scratch.name, room)

    def write(self, index: int, buffer: torch.Tensor, wanted: Callable[[], bool]) -> int:
        """Writes what is to be written of the layer ``index``, which is in ``buffer``, for as long as ``wanted()``.

        Called by one thread at a time.

        Returns:
            Bytes written, 0 where that did not succeed.
        """
        cuts, layer = self.cuts[index], self.layers[index]
        assert self.scratch is not None
        place, cut = self.end if cuts.place is None else cuts.place, cuts.target
        begin = cuts.offsets[cut] // BLOCK_BYTES * BLOCK_BYTES
        end = aligned(cuts.offsets[cuts.laid], BLOCK_BYTES)
        try:
            if place + end > self.scratch.room:
                raise OSError(0, f"{self.scratch.room / 1e6:.0f} MB, half of what was free, are used up")
            if not self.scratch.write(buffer[begin:end], place + begin, wanted):
                return 0
        except OSError as error:
            self.give_up(error)
            return 0
        self.end = max(self.end, place + aligned(layer.nbytes, BLOCK_BYTES))
        cuts.place, cuts.laid = place, cut
        return end - begin

    def give_up(self, error: OSError) -> None:
        """Writes nothing more, and says why, once."""
        if not self.failed:
            self.failed = True
            logger.warning(
                "coded layers cannot %sbe laid decoded in %s (%s) and are decoded in every pass, which is slower here: "
                "give another offload_folder=, or False to have none",
                "all " if self.end else "", self.folder, error.strerror or error,
            )  # fmt: skip

    def give_back(self, index: int, error: OSError) -> None:
        """Reads the layer ``index`` as it is stored from now on, since the scratch file failed."""
        self.give_up(error)
        self.cuts[index].laid = len(self.layers[index].extents)


def pass_seconds(layers: Sequence[Layer], kept: Collection[tuple[int, int]], speeds: Speeds) -> float:
    """What a pass over ``layers`` takes by the ``speeds`` of a trial, where the best part of them lies decoded.

    ``kept``: As for :class:`Laying`.
    """
    beside = dataclasses.replace(speeds, decoding=speeds.decoding / BESIDE)
    found = Laying(layers, kept, Path(), Files([]), beside)
    return min(found.times(speeds.disk, speeds.disk).values())
