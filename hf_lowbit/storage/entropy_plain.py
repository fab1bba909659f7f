"""The entropy coder in plain NumPy: the specification of the CPU and GPU kernels, and what serves without them.

All blocks of a tensor are coded side by side, a round of 32 lanes at a time; how rows become symbols, and back, is a
table of :class:`Symbols`. The range coder is rANS (Duda, arXiv 1311.2540) with states of 32 bits that are filled by
words of 16: a state ``x`` in ``2**16 .. 2**32 - 1`` and a symbol of frequency ``f`` that begins at slot ``s`` of 4096.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..formats.planes import pack_planes, unpack_planes

if TYPE_CHECKING:
    from .entropy import Coded

LANES, FREQUENCY_BITS, LEAST_STATE = 32, 12, 1 << 16
BYTES, TERNARY, UPPER, EXPONENTS = 0, 10, 16, 17
RAW = 1 << 31


@dataclass(frozen=True)
class Symbols:
    """How rows of bytes become symbols.

    Args:
        name: For messages.
        unit: Bytes that a row is made of.
        per_unit: Symbols of so many bytes.
        split: Rows, uint8 (N, R), to symbols, uint8 (N, S), and lower bytes, uint8 (N, S) or (N, 0).
        join: The inverse.
    """

    name: str
    unit: int
    per_unit: int
    split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    join: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def count(self, row_bytes: int) -> int:
        """Symbols of a row."""
        return row_bytes // self.unit * self.per_unit

    @property
    def lower(self) -> bool:
        """Whether there is a lower byte beside each symbol."""
        return self.name in ("upper bytes", "exponents")


def _nothing(rows: np.ndarray) -> np.ndarray:
    return np.empty((len(rows), 0), np.uint8)


def _words(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view("<u2")


def _split_words(turn: int):
    def split(rows):
        words = _words(rows)
        words = words << turn | words >> (16 - turn) if turn else words
        return (words >> 8).astype(np.uint8), (words & 255).astype(np.uint8)

    return split


def _join_words(turn: int):
    def join(symbols, lower):
        words = symbols.astype("<u2") << 8 | lower
        return np.ascontiguousarray(words >> turn | words << (16 - turn) if turn else words).view(np.uint8)

    return join


def _split_ternary(rows):
    numbers = (_words(rows).astype(np.uint32) * np.uint64(59049)) >> 16
    return np.stack([numbers // 243, numbers % 243], -1).astype(np.uint8).reshape(rows.shape), _nothing(rows)


def _join_ternary(symbols, lower):
    pairs = symbols.reshape(len(symbols), -1, 2).astype(np.uint32)
    lanes = ((pairs[..., 0] * 243 + pairs[..., 1]) * 65536 + 59048) // 59049
    return np.ascontiguousarray(lanes.astype("<u2")).view(np.uint8)


def _split_planes(bits: int):
    def split(rows):
        lanes = torch.from_numpy(_words(rows).view(np.int16))
        codes = unpack_planes(lanes, bits, rows.shape[1] // (8 * bits) * 64).numpy()
        if bits == 3:
            codes = codes.reshape(len(rows), -1, 2, 32)
            codes = (codes[:, :, 0] | codes[:, :, 1] << 3).reshape(len(rows), -1)
        return codes, _nothing(rows)

    return split


def _join_planes(bits: int):
    def join(symbols, lower):
        if bits == 3:
            pairs = symbols.reshape(len(symbols), -1, 1, 32)
            symbols = np.concatenate([pairs & 7, pairs >> 3 & 7], 2).reshape(len(symbols), -1)
        return pack_planes(torch.from_numpy(np.ascontiguousarray(symbols)), bits).numpy().view(np.uint8)

    return join


SYMBOLS = {
    BYTES: Symbols("bytes", 1, 1, lambda rows: (rows, _nothing(rows)), lambda symbols, lower: symbols),
    TERNARY: Symbols("ternary lanes", 2, 2, _split_ternary, _join_ternary),
    UPPER: Symbols("upper bytes", 2, 1, _split_words(0), _join_words(0)),
    EXPONENTS: Symbols("exponents", 2, 1, _split_words(1), _join_words(1)),
    3: Symbols("pairs of 3-bit codes", 24, 32, _split_planes(3), _join_planes(3)),
    **{bits: Symbols(f"{bits}-bit codes", 8 * bits, 64, _split_planes(bits), _join_planes(bits)) for bits in (5, 6, 7)},
}


# -- the range coder ---------------------------------------------------------------------------------------------------


def encode_symbols(symbols: np.ndarray, frequencies: np.ndarray) -> bytes:
    """States and words of ``symbols``, uint8 (n), none of which has the frequency 0."""
    frequency, start = frequencies.astype(np.uint64), (np.cumsum(frequencies) - frequencies).astype(np.uint64)
    states, words = np.full(LANES, LEAST_STATE, np.uint64), []
    for first in range((len(symbols) - 1) // LANES * LANES, -1, -LANES):
        part = symbols[first : first + LANES]
        x, f = states[: len(part)], frequency[part]
        full = x >= f << np.uint64(32 - FREQUENCY_BITS)
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        states[: len(part)] = (x // f << np.uint64(FREQUENCY_BITS)) + x % f + start[part]
    return states.astype("<u4").tobytes() + b"".join(w.tobytes() for w in reversed(words))


def decode_symbols(payloads: list[np.ndarray], counts: list[int], frequencies: np.ndarray) -> list[np.ndarray]:
    """The symbols of several blocks: ``payloads`` are their states and words, uint8, ``counts`` their symbols.

    Raises:
        ValueError: for one whose words are too few or too many or whose states do not end where they began.
    """
    if not payloads:
        return []
    symbol = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
    frequency = frequencies[symbol].astype(np.uint32)
    offset = (np.arange(1 << FREQUENCY_BITS) - np.repeat(np.cumsum(frequencies) - frequencies, frequencies)).astype(
        "u4"
    )
    blocks, most = len(payloads), max(counts)
    states = np.zeros((blocks, LANES), np.uint32)
    sizes = np.array([len(p) for p in payloads])
    if (sizes < 4 * LANES).any() or (sizes % 2).any():
        raise ValueError(f"a block of {sizes.min()} bytes has no states: it is damaged")
    words = np.zeros((blocks, (int(sizes.max()) - 4 * LANES) // 2 + 1), np.uint32)  # a zero where there are none left
    for b, payload in enumerate(payloads):
        states[b] = payload[: 4 * LANES].view("<u4")
        words[b, : (len(payload) - 4 * LANES) // 2] = payload[4 * LANES :].view("<u2")
    available, taken = (sizes - 4 * LANES) // 2, np.zeros(blocks, np.int64)
    out, rest = np.zeros((blocks, -(-most // LANES) * LANES), np.uint8), np.array(counts)[:, None]
    lane = np.arange(LANES)
    for first in range(0, most, LANES):
        active = lane < rest - first
        slot = states & ((1 << FREQUENCY_BITS) - 1)
        out[:, first : first + LANES] = symbol[slot]
        x = frequency[slot] * (states >> FREQUENCY_BITS) + offset[slot]
        need = (x < LEAST_STATE) & active
        place = np.minimum(taken[:, None] + np.cumsum(need, 1) - need, words.shape[1] - 1)
        x = np.where(need, x << 16 | np.take_along_axis(words, place, 1), x)
        states = np.where(active, x, states)
        taken += need.sum(1)
    if (taken != available).any() or (states != LEAST_STATE).any():
        raise ValueError("a block's words do not end with its symbols: it is damaged")
    return [out[b, : counts[b]] for b in range(blocks)]


# -- blocks ------------------------------------------------------------------------------------------------------------


def encode_blocks(raw: np.ndarray, step: int, symbols: int, frequencies: np.ndarray):
    """Blocks of ``step`` rows of ``raw``, uint8 (N, R): all of them, sizes with raw flags, and checksums."""
    kind, parts, sizes = SYMBOLS[symbols], [], []
    for first in range(0, len(raw), step):
        rows = raw[first : first + step]
        split, lower = kind.split(rows)
        exact = symbols != TERNARY or np.array_equal(kind.join(split, lower), rows)
        part = encode_symbols(split.reshape(-1), frequencies) + lower.tobytes() if exact else b""
        smaller = 0 < len(part) < rows.size
        parts.append(part if smaller else rows.tobytes())
        sizes.append(len(part) if smaller else rows.size | RAW)
    return joined(parts, sizes)


def joined(parts: list[bytes], sizes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks one after the other, uint8, with their sizes (and raw flags) and checksums, int64."""
    checksums = np.array([zlib.crc32(part) for part in parts], np.int64)
    return np.frombuffer(bytearray(b"".join(parts)), np.uint8), np.array(sizes, np.int64), checksums


def decode_blocks(record: "Coded", payload: np.ndarray, target: np.ndarray) -> None:
    """Decodes the blocks in ``payload``, uint8, to the rows ``target``, uint8 (rows * row_bytes).

    Raises:
        ValueError: for a block that is damaged.
    """
    kind, block = SYMBOLS[record.symbols], record.step * record.row_bytes
    places = [target[b * block : (b + 1) * block].reshape(-1, record.row_bytes) for b in range(len(record.raw))]
    parts = [payload[record.starts[b] : record.starts[b + 1]] for b in range(len(record.raw))]
    for place, part in ((p, q) for p, q, raw in zip(places, parts, record.raw, strict=True) if raw):
        if part.size != place.size:
            raise ValueError(f"a raw block has {part.size} bytes, not {place.size}: it is damaged")
        place[:] = part.reshape(place.shape)
    coded = [(p, q) for p, q, raw in zip(places, parts, record.raw, strict=True) if not raw]
    counts = [len(place) * kind.count(record.row_bytes) for place, _ in coded]
    lower = [count if kind.lower else 0 for count in counts]
    if any(part.size < low for (_, part), low in zip(coded, lower, strict=True)):
        raise ValueError("a block is too short for its lower bytes: it is damaged")
    streams = [np.ascontiguousarray(part[: part.size - low]) for (_, part), low in zip(coded, lower, strict=True)]
    assert record.frequencies is not None
    decoded = decode_symbols(streams, counts, record.frequencies)
    for (place, part), symbols, low in zip(coded, decoded, lower, strict=True):
        rows = len(place)
        place[:] = kind.join(symbols.reshape(rows, -1), part[part.size - low :].reshape(rows, -1))
