"""Decoding of entropy-coded blocks: 32 range coders (rANS) in turn over one stream of 16-bit words, a block a program.

The format is written down in hf-lowbit's ``docs/format.md``. A program is one warp whose lanes are the coders; which
words a round's lanes take is a running sum over them. Every place that is read is compared with the block's end, and a
block whose words do not end with its symbols, or whose states do not end where they began, is reported.
"""

import torch
import triton
import triton.language as tl

from .layout import on_device

LANES, SLOTS, LEAST_STATE = 32, 4096, 65536


@triton.jit
def entropy_kernel(stream, starts, sizes, counts, places, table, out, sound, LANES: tl.constexpr):
    """A block a program: ``sizes`` bytes from ``starts`` to ``counts`` symbols from ``places``; grid (blocks,)."""
    block = tl.program_id(0)
    start = tl.load(starts + block)
    end = start + tl.load(sizes + block)
    count = tl.load(counts + block)
    to = out + tl.load(places + block)
    lane = tl.arange(0, LANES)
    state = tl.zeros((LANES,), dtype=tl.uint32)
    for byte in tl.static_range(4):
        place = start + 4 * lane + byte
        part = tl.load(stream + place, mask=place < end, other=0)
        state = state | (part.to(tl.uint32) << (8 * byte))
    at = start + 4 * LANES
    for first in range(0, count, LANES):
        active = first + lane < count
        slot = tl.load(table + (state & 4095).to(tl.int32)).to(tl.uint32)
        tl.store(to + first + lane, (slot & 255).to(tl.uint8), mask=active)
        moved = (((slot >> 8) & 4095) + 1) * (state >> 12) + (slot >> 20)
        need = active & (moved < 65536)
        taken = need.to(tl.int32)
        place = at + 2 * (tl.cumsum(taken, 0) - taken)
        inside = need & (place + 2 <= end)
        low = tl.load(stream + place, mask=inside, other=0).to(tl.uint32)
        high = tl.load(stream + place + 1, mask=inside, other=0).to(tl.uint32)
        moved = tl.where(need, (moved << 16) | (high << 8) | low, moved)
        state = tl.where(active, moved, state)
        at += 2 * tl.sum(taken, 0)
    wrong = tl.sum((state != 65536).to(tl.int32), 0)
    tl.store(sound + block, ((wrong == 0) & (at == end)).to(tl.int32))


def slots(frequencies: torch.Tensor) -> torch.Tensor:
    """The table, int32 (4096), of ``frequencies`` (256), integers of sum 4096.

    Of each slot: its symbol in bits 0 to 7, the symbol's frequency less one in 8 to 19, and in 20 to 31 which of the
    symbol's slots it is.

    Raises:
        ValueError: if the sum is not 4096.
    """
    frequencies = frequencies.to(torch.int64)
    if frequencies.shape != (256,) or int(frequencies.min()) < 0 or int(frequencies.sum()) != SLOTS:
        raise ValueError(f"256 frequencies of sum {SLOTS} are needed, not {tuple(frequencies.shape)} of another sum")
    symbol = torch.repeat_interleave(torch.arange(256, device=frequencies.device), frequencies)
    number = torch.arange(SLOTS, device=symbol.device) - (frequencies.cumsum(0) - frequencies)[symbol]
    packed = symbol | (frequencies[symbol] - 1) << 8 | number << 20
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def decode_symbols(
    stream: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor, counts: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes blocks of states and words.

    Args:
        stream: uint8 (n), all blocks.
        starts: int64 (B), where each block begins in ``stream``.
        sizes: int64 (B), its bytes: 128 of states and an even number of words' bytes.
        counts: int64 (B), its symbols.
        table: int32 (4096), from :func:`slots`.

    Returns:
        The symbols of all blocks one after the other, uint8; and for each block, bool (B), whether it was sound.

    Raises:
        ValueError: for a block that is not inside ``stream``.
    """
    check_blocks(stream, starts, sizes, counts)
    out = torch.empty(int(counts.sum()), dtype=torch.uint8, device=stream.device)
    sound = torch.zeros(len(starts), dtype=torch.int32, device=stream.device)
    if len(starts):
        places = counts.cumsum(0) - counts
        with on_device(stream.device):
            entropy_kernel[(len(starts),)](
                *(stream, starts, sizes, counts, places, table, out, sound), LANES=LANES, num_warps=1
            )
    return out, sound.bool()


def check_blocks(stream: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor, counts: torch.Tensor) -> None:
    """Refuses blocks that are not inside ``stream``."""
    if len(starts) == 0:
        return
    least, most = int(starts.min()), int((starts + sizes).max())
    if least < 0 or most > stream.numel() or int(sizes.min()) < 4 * LANES or int(counts.min()) < 0:
        raise ValueError(f"blocks from {least} to {most} are not inside a stream of {stream.numel()} bytes")


def plain_decode_symbols(
    stream: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor, counts: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`decode_symbols` in plain PyTorch, on any device: a step is a round of all blocks."""
    check_blocks(stream, starts, sizes, counts)
    if len(starts) == 0:
        return stream[:0], torch.zeros(0, dtype=torch.bool, device=stream.device)
    lane, ends = torch.arange(LANES, device=stream.device), (starts + sizes)[:, None]
    wide, padded = table.to(torch.int64) & 0xFFFFFFFF, torch.cat([stream, stream.new_zeros(2)]).to(torch.int64)
    states = sum(padded[starts[:, None] + 4 * lane + byte] << (8 * byte) for byte in range(4))
    at = starts + 4 * LANES
    rounds = []
    for first in range(0, int(counts.max()), LANES):
        active = first + lane < counts[:, None]
        slot = wide[states & (SLOTS - 1)]
        rounds.append((slot & 255).to(torch.uint8))
        moved = ((((slot >> 8) & (SLOTS - 1)) + 1) * (states >> 12) + (slot >> 20)) & 0xFFFFFFFF
        need = active & (moved < LEAST_STATE)
        place = at[:, None] + 2 * (need.cumsum(1) - need.to(torch.int64))
        inside = need & (place + 2 <= ends)
        place = torch.where(inside, place, 0)
        word = torch.where(inside, padded[place] | padded[place + 1] << 8, 0)
        states = torch.where(active, torch.where(need, moved << 16 | word, moved), states)
        at = at + 2 * need.sum(1)
    symbols = torch.cat(rounds, 1) if rounds else stream.new_empty(len(starts), 0)
    kept = torch.arange(symbols.shape[1], device=stream.device) < counts[:, None]
    return symbols[kept], (states == LEAST_STATE).all(1) & (at == ends[:, 0])
