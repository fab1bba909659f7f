"""Which layers of a model stay where under budgets of memory (:mod:`.budgets`).

A plain size, or one for ``"cpu"`` alone, is for a model that computes on the CPU. With an accelerator among the devices
the model computes there, on several in the order in which they are named, each with a run of consecutive layers about
in proportion to its budget. Each keeps as many whole layers as fit, spread evenly over its run, and one buffer for the
others, which come out of the host's memory. There the CPU's budget holds as many of them as fit, as they are stored,
and the buffers for reading the rest from disk. Without a budget for the CPU only these buffers are there. What belongs
to no layer is on the first accelerator.

On the CPU a coded layer may stay as it is stored, so that more of them fit, or decoded, which saves decoding it in
every pass. That is chosen by what a pass takes, the slower of reading and decoding by the speeds that were measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from .budgets import HOST
from .storage.layers import Layer, spread
from .storage.reading import HUGE_BYTES, Speeds
from .storage.stream import buffer_bytes

SLOTS = 2
"""Buffers of the host that layers are read into."""
SMALL_PART = 64
"""A read of this part of its layer, or less, is a small one."""
QUICK_S = 2e-3
"""Where reading a layer takes less than this there is one buffer more: handing it over, some 0.2 ms, else counts."""


class TooSmall(ValueError):
    """A budget that is too small; ``least`` bytes would do."""

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


@dataclasses.dataclass
class Placement:
    """Where layers are.

    Attributes:
        devices: What each layer computes on.
        kept: Numbers of layers in the memory of that device.
        stored: Numbers of those in the host's memory as they are stored; the others are read in each pass.
        held: Bytes held, by device.
        limits: Bytes allowed, by device.
        extents: Reads of other layers whose bytes stay in the host's memory, too, as (layer, number).
        buffers: Of the bytes held by the host, those of the buffers for reading.
        slots: How many layers these buffers hold.
    """

    devices: list[str]
    kept: set[int] = dataclasses.field(default_factory=set)
    stored: set[int] = dataclasses.field(default_factory=set)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    buffers: int = 0
    slots: int = SLOTS
    extents: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    @property
    def first(self) -> str:
        """The device of what belongs to no layer."""
        return next((name for name in self.limits if name != HOST), HOST)


def place(
    layers: Sequence[Layer],
    others: Mapping[str | None, int],
    budgets: Mapping[str, int],
    speeds: Speeds | None = None,
    lays: bool = False,
) -> Placement:
    """Decides what stays where.

    Args:
        layers: All of them, in order.
        others: Bytes of what is not streamed, by the layer's name, None for what is in no layer.
        budgets: As :func:`read_budgets` gives them.
        speeds: Of reading and decoding, where coded layers are to be placed by them; else by the bytes to read.
        lays: Whether what is read may lie decoded on disk (:mod:`.storage.laying`).

    Raises:
        ValueError: for a budget that is too small, naming its device and the least that would do.
    """
    accelerators = [name for name in budgets if name != HOST]
    if not accelerators:
        return _on_host(layers, sum(others.values()), budgets[HOST], speeds, lays)
    sizes = [layer.nbytes + others.get(layer.name, 0) for layer in layers]
    outside = sum(others.values()) - sum(others.get(layer.name, 0) for layer in layers)
    room = [budgets[name] - (0 if number else outside) for number, name in enumerate(accelerators)]
    found = Placement([], limits=dict(budgets))
    begin = 0
    for number, (name, end) in enumerate(zip(accelerators, _ends(sizes, room), strict=True)):
        run = range(begin, end)
        begin = end
        own = (0 if number else outside) + sum(others.get(layers[i].name, 0) for i in run)
        for count in range(len(run), -1, -1):
            kept = {run[i] for i in spread(count, len(run))}
            buffer = max((layers[i].nbytes for i in run if i not in kept), default=0)
            held = own + sum(layers[i].nbytes for i in kept) + buffer
            if held <= budgets[name]:
                break
        else:
            raise ValueError(
                f"max_memory_bytes= allows {mb(budgets[name])} of {name}, which is too small: what is always there "
                f"needs {mb(own)}, and the buffer for one layer {mb(buffer)}; the least that would do is {held}"
            )
        found.devices += [name] * len(run)
        found.kept |= kept
        found.held[name] = held
    _store_on_host(layers, found, budgets.get(HOST))
    return found


def _ends(sizes: list[int], room: list[int]) -> list[int]:
    """Where the run of each device ends: filled one by one if that takes all layers, else in proportion."""
    ends, begin = [], 0
    for space in room:
        end = begin
        while end < len(sizes) and sum(sizes[begin : end + 1]) <= space:
            end += 1
        ends.append(end)
        begin = end
    if begin == len(sizes):
        return ends
    shares = [max(space, 0) for space in room]
    total = sum(shares) or 1
    return [round(len(sizes) * sum(shares[: i + 1]) / total) for i in range(len(room) - 1)] + [len(sizes)]


def _buffers(layers: Sequence[Layer], streamed: Sequence[int], slots: int = SLOTS) -> int:
    """Bytes of the host's buffers that the layers ``streamed`` are read and decoded in."""
    return buffer_bytes([layers[i] for i in streamed], slots)


def _store_on_host(layers: Sequence[Layer], found: Placement, budget: int | None) -> None:
    """Fills the host's budget with layers as they are stored."""
    streamed = [i for i in range(len(layers)) if i not in found.kept]
    found.held[HOST] = found.buffers = least = _buffers(layers, streamed)
    if budget is None:
        return
    if least > budget:
        raise ValueError(
            f"max_memory_bytes= allows {mb(budget)} of the CPU's memory, which is too small: the buffers that layers "
            f"are read into need {mb(least)}; the least that would do is {least}"
        )
    found.stored = _stored(layers, streamed, budget - least)
    found.held[HOST] += sum(layers[i].read_bytes for i in found.stored)


def _stored(layers: Sequence[Layer], some: Sequence[int], room: int) -> set[int]:
    """As many of the layers ``some`` as fit into ``room`` as they are stored, evenly spread."""
    for count in range(len(some), 0, -1):
        stored = {some[i] for i in spread(count, len(some))}
        if sum(layers[i].read_bytes for i in stored) <= room:
            return stored
    return set()


def _extents(layers: Sequence[Layer], some: Sequence[int], room: int) -> tuple[set[tuple[int, int]], int]:
    """Reads of the layers ``some`` that fit into ``room`` as they are stored, and what is left of it.

    Small ones come first, whose time is that of asking for them, then the largest coded ones.
    """
    found, reads = set(), []
    for i in some:
        small = layers[i].read_bytes // SMALL_PART
        numbered = [(e.nbytes, i, n) for n, e in enumerate(layers[i].extents) if e.parts or e.nbytes <= small]
        reads += [(nbytes > small, nbytes, i, n) for nbytes, i, n in numbered]
    for _, nbytes, i, number in sorted(reads, key=lambda read: (read[0], -read[1])):
        if nbytes <= room:
            found.add((i, number))
            room -= nbytes
    return found, room


def _on_host(layers: Sequence[Layer], others: int, budget: int, speeds: Speeds | None, lays: bool) -> Placement:
    """All of it in the CPU's memory, where a layer in memory needs no buffer."""
    quick = speeds is not None and max(layer.nbytes for layer in layers) < QUICK_S * speeds.disk
    with_more = _with_slots(layers, others, budget, speeds, lays, SLOTS + 1)[0] if quick else None
    found, least = _with_slots(layers, others, budget, speeds, lays, SLOTS)
    if found is None:
        raise TooSmall(
            f"max_memory_bytes={budget} ({mb(budget)}) is too small: what is outside of this model's "
            f"{len(layers)} layers needs {mb(others)}, and buffers for {min(SLOTS, len(layers))} of them "
            f"{mb(least - others)}; the least that would do is {least}",
            least,
        )
    return with_more or found


def _with_slots(
    layers: Sequence[Layer], others: int, budget: int, speeds: Speeds | None, lays: bool, slots: int
) -> tuple[Placement | None, int]:
    """The placement with so many buffers, if there is one, and the bytes of the smallest that was tried."""
    best, least_time, least = None, float("inf"), others
    for count in range(len(layers), -1, -1):
        kept = spread(count, len(layers))
        streamed = [i for i in range(len(layers)) if i not in kept]
        buffers = _buffers(layers, streamed, slots)
        least = others + sum(layers[i].nbytes for i in kept) + buffers
        if least > budget:
            continue
        if buffers >= HUGE_BYTES and least + -buffers % HUGE_BYTES <= budget:  # whole huge pages, if there is room
            least, buffers = least + -buffers % HUGE_BYTES, buffers + -buffers % HUGE_BYTES
        room = budget - least
        stored = _stored(layers, [i for i in streamed if layers[i].coded], room)
        room -= sum(layers[i].read_bytes for i in stored)
        others_read = [i for i in streamed if i not in stored]
        extents, rest = _extents(layers, others_read, room)
        read = sum(layers[i].read_bytes for i in others_read) - (room - rest)
        seconds = float(read)
        if speeds is not None:
            raw = sum(layers[i].nbytes for i in others_read) if lays else None
            seconds = speeds.seconds(read, sum(layers[i].decoded_bytes for i in streamed), raw)
        if seconds < least_time:
            held, limits = {HOST: budget - rest}, {HOST: budget}
            best = Placement([HOST] * len(layers), kept, stored, held, limits, buffers, slots, extents)
            least_time = seconds
    return best, least


def mb(nbytes: int) -> str:
    """For messages."""
    return f"{nbytes / 1e6:.1f} MB"
