"""Decoding coded tensors where they lie: on a GPU, by the Triton kernel of ``lowbit_kernels.entropy``.

The head and the checksums are read on the CPU, from a copy; symbols are decoded and put together on the device. What is
put together how is :mod:`.entropy_plain`'s table in plain PyTorch, which runs anywhere.
"""

import torch

from ..backends import requested_backend
from ..formats.planes import pack_planes
from . import entropy, entropy_plain


def serves(device: torch.device) -> bool:
    """Whether tensors on ``device`` are decoded there."""
    from ..triton_backend import DEVICES, unavailable

    wanted = requested_backend("auto") in ("auto", "triton")
    return wanted and device.type != "cpu" and device.type in DEVICES and unavailable() is None


def decode_on_device(coded: torch.Tensor) -> torch.Tensor:
    """The tensor that ``coded``, uint8 (n), stands for, on the same device.

    Raises:
        ValueError: for data that is damaged, as :func:`.entropy.decode`.
    """
    from ..lowbit_kernels.entropy import decode_symbols, slots

    here, device = coded.cpu(), coded.device
    record = entropy.read_head(here)
    if record.codec != entropy.ENTROPY:
        return entropy.decode_tensor(here).to(device)
    entropy.check_blocks(record, here.numpy().data)
    kind, blocks = entropy_plain.SYMBOLS[record.symbols], len(record.raw)
    whole = torch.full((blocks,), record.step)
    whole[-1] = record.rows - (blocks - 1) * record.step
    starts, ends = (record.head + torch.from_numpy(record.starts[i : blocks + i]) for i in (0, 1))
    picked = torch.from_numpy(~record.raw)
    counts = whole * kind.count(record.row_bytes)
    lower = counts if kind.lower else torch.zeros_like(counts)
    if bool((ends - starts - lower < 4 * entropy_plain.LANES)[picked].any()):
        raise ValueError("a block is too short for its states: it is damaged")
    assert record.frequencies is not None
    table = slots(torch.from_numpy(record.frequencies)).to(device)
    chosen = [t[picked].to(device) for t in (starts, ends - starts - lower, counts)]
    symbols, sound = decode_symbols(coded, *chosen, table)
    if not bool(sound.all()):
        raise ValueError("a block's words do not end with its symbols: it is damaged")
    out = torch.empty(record.rows, record.row_bytes, dtype=torch.uint8, device=device)
    rows = picked.repeat_interleave(whole)
    parts = [coded[e - n : e] for e, n, p in zip(ends.tolist(), lower.tolist(), picked.tolist(), strict=True) if p]
    count = int(rows.sum())
    if count:
        below = torch.cat(parts).view(count, -1) if kind.lower else coded[:0]
        out[rows.to(device)] = join(record.symbols, symbols.view(count, -1), below)
    for b in torch.nonzero(~picked).flatten().tolist():
        block = coded[int(starts[b]) : int(ends[b])]
        first = b * record.step
        if block.numel() != int(whole[b]) * record.row_bytes:
            raise ValueError(f"raw block {b} has {block.numel()} bytes: it is damaged")
        out[first : first + int(whole[b])] = block.view(-1, record.row_bytes)
    return out.view(-1).view(record.dtype).view(record.shape)


def join(symbols: int, values: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Rows of bytes, uint8 (N, R), of symbols, uint8 (N, S), and lower bytes, uint8 (N, S) where there are any."""
    if symbols == entropy_plain.BYTES:
        return values
    if symbols in (entropy_plain.UPPER, entropy_plain.EXPONENTS):
        words = values.to(torch.int32) << 8 | lower.to(torch.int32)
        words = words >> 1 | (words & 1) << 15 if symbols == entropy_plain.EXPONENTS else words
    elif symbols == entropy_plain.TERNARY:
        pairs = values.view(len(values), -1, 2).to(torch.int64)
        words = ((pairs[..., 0] * 243 + pairs[..., 1]) * 65536 + 59048) // 59049
    else:
        if symbols == 3:
            pairs = values.view(len(values), -1, 1, 32)
            values = torch.cat([pairs & 7, pairs >> 3 & 7], 2).reshape(len(values), -1)
        return pack_planes(values, symbols).view(torch.uint8)
    return torch.stack([words & 255, words >> 8 & 255], -1).to(torch.uint8).flatten(1)
