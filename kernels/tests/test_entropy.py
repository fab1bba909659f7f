"""The decoder of coded blocks: the kernel, its plain twin and the coder of hf_lowbit agree, on damaged blocks too."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_lowbit.lowbit_kernels.entropy import LANES, decode_symbols, plain_decode_symbols, slots

from hf_lowbit.formats import parse_format
from hf_lowbit.storage import entropy, entropy_plain
from hf_lowbit.storage.entropy_device import decode_on_device


def blocks(device, sizes=(1, 31, 32, 33, 130), spread=3.0, seed=0):
    """Coded blocks of ``sizes`` symbols in one stream with something between them, and the symbols."""
    generator = np.random.default_rng(seed)
    symbols = [(generator.normal(size=n) * spread + 128).round().clip(0, 255).astype(np.uint8) for n in sizes]
    counts = np.bincount(np.concatenate(symbols), minlength=256)
    frequencies = entropy.choose_frequencies(counts)
    parts, starts, at = [], [], 0
    for s in symbols:
        coded = entropy_plain.encode_symbols(s, frequencies)
        parts.append(b"\xee\xee\xee" + coded)  # at odd places, too
        starts.append(at + 3)
        at += len(parts[-1])
    stream = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).to(device)
    starts = torch.tensor(starts, device=device)
    lengths = torch.tensor([len(p) - 3 for p in parts], device=device)
    table = slots(torch.from_numpy(frequencies)).to(device)
    return stream, starts, lengths, torch.tensor(sizes, device=device), table, torch.from_numpy(np.concatenate(symbols))


@pytest.mark.parametrize("spread", [0.3, 3.0, 60.0])
def test_kernel_and_twin_give_the_symbols(spread, device):
    *arguments, expected = blocks(device, spread=spread)
    for decode in (decode_symbols, plain_decode_symbols):
        symbols, sound = decode(*arguments)
        assert sound.all() and torch.equal(symbols.cpu(), expected)


def test_one_symbol_alone(device):
    frequencies = torch.zeros(256, dtype=torch.int64)
    frequencies[255] = 4096
    stream = torch.tensor([0, 0, 1, 0] * LANES, dtype=torch.uint8, device=device)
    where = [torch.tensor([n], device=device) for n in (0, 128, 77)]
    for decode in (decode_symbols, plain_decode_symbols):
        symbols, sound = decode(stream, *where, slots(frequencies).to(device))
        assert sound.all() and symbols.tolist() == [255] * 77


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_reported_by_both_alike_and_nothing_outside_is_read(seed, device):
    """A flipped bit in each block, and blocks cut short: the same symbols, and no block is called sound."""
    stream, starts, lengths, counts, table, _ = blocks(device, (40, 130, 64), seed=seed)
    broken = stream.clone()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        broken[start + (7 * seed + 11) % length] ^= 1 << seed
    shorter = lengths - 2 * (lengths > 128)
    for arguments, whole in (((broken, starts, lengths), lengths < 0), ((stream, starts, shorter), lengths == shorter)):
        one, sound = decode_symbols(*arguments, counts, table)
        other, also = plain_decode_symbols(*arguments, counts, table)
        assert torch.equal(one, other) and torch.equal(sound, also) and torch.equal(sound, whole)


def test_blocks_outside_are_refused(device):
    stream, starts, lengths, counts, table, _ = blocks(device, (40, 50))
    for bad in ((starts - 9, lengths), (starts, lengths + 1), (starts, lengths * 0 + 100)):
        for decode in (decode_symbols, plain_decode_symbols):
            with pytest.raises(ValueError, match="not inside"):
                decode(stream, *bad, counts, table)


def test_a_table_that_is_none():
    with pytest.raises(ValueError, match="sum"):
        slots(torch.ones(256, dtype=torch.int64))


COMPILE = """
import sys
sys.path.insert(0, {folder!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lowbit_kernels.entropy import LANES, entropy_kernel
kind, number, lanes = {target!r}
names = ("stream", "starts", "sizes", "counts", "places", "table", "out", "sound")
types = ("*u8", "*i64", "*i64", "*i64", "*i64", "*i32", "*u8", "*i32")
source = ASTSource(entropy_kernel, dict(zip((*names, "LANES"), (*types, "constexpr"))), {{(8,): LANES}})
made = triton.compile(source, target=GPUTarget(kind, number, lanes), options=dict(num_warps=1))
print("cubin" in made.asm or "hsaco" in made.asm)
"""


@pytest.mark.parametrize(
    "target",
    [*(("cuda", n, 32) for n in (80, 89, 90, 100, 120)), ("hip", "gfx942", 64), ("hip", "gfx1100", 32)],
    ids=lambda target: str(target[1]),
)
def test_compiles(target):
    """To machine code for every family of devices, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = COMPILE.format(folder=str(Path(__file__).parents[1] / "torch-ext"), target=target)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr[-2000:]


def test_no_blocks(device):
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    stream = torch.zeros(4, dtype=torch.uint8, device=device)
    table = blocks(device)[4]
    assert decode_symbols(stream, nothing, nothing, nothing, table)[0].numel() == 0


def tensors():
    """Tensors of every kind of symbols, with their kind."""
    generator = torch.Generator().manual_seed(0)
    for bits in (1.58, 3, 4, 6):
        format = parse_format("ternary:bits=1.58" if bits == 1.58 else f"int:bits={bits},symmetric=True")
        top = 2 if bits == 1.58 else 2**bits - 1
        codes = (torch.randn(20, 64, generator=generator) * top / 12 + top / 2).round().clamp(0, top)
        yield format.pack_codes(codes.to(torch.uint8)), entropy.symbols_for("", torch.int16, bits)
    yield (torch.randn(20, 33, generator=generator) * 0.02).bfloat16(), None
    yield (torch.randn(20, 33, generator=generator) * 0.02).half(), None
    yield torch.cat([torch.randint(0, 256, (9, 90), generator=generator), torch.full((9, 90), 3)]).byte(), None


@pytest.mark.parametrize("case", list(tensors()), ids=lambda case: f"{case[1]}-{case[0].dtype}")
def test_whole_tensors_are_decoded_where_they_lie(case, device, monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK_SYMBOLS", 700)
    coded = entropy.encode(*case)
    decoded = decode_on_device(coded.to(device))
    assert decoded.dtype == case[0].dtype and torch.equal(decoded.cpu(), case[0])
    coded[-12] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        decode_on_device(coded.to(device))
