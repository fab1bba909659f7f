"""Coded tensors: the same bits back, the same bytes from every coder, sizes near the entropy, and every fault named."""

import itertools
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowbit import native_backend, native_codec
from hf_lowbit.formats import parse_format
from hf_lowbit.storage import entropy, entropy_plain

NATIVE = native_backend.unavailable() is None
CODERS = ["plain", *(native_backend.library().lowbit_isas().decode().split(",") if NATIVE else [])]
WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 1.58]


@pytest.fixture(params=CODERS)
def coder(request, monkeypatch):
    """Each coder in turn: plain NumPy, and the kernels with each instruction set of this machine."""
    if request.param == "plain":
        monkeypatch.setattr(native_codec, "serves", lambda: False)
        yield request.param
    else:
        library = native_backend.library()
        before = library.lowbit_isa()
        assert library.lowbit_force_isa(request.param.encode()) == 0
        yield request.param
        library.lowbit_force_isa(before)


def packed(bits, rows=70, columns=200, seed=0, spread=1.0):
    """Lanes of codes that are distributed like a quantized Gaussian, and the number of their symbols."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 1.58:
        format, top = parse_format("ternary:bits=1.58"), 2
    else:
        format, top = parse_format(f"int:bits={bits},symmetric=True"), 2**bits - 1
    values = torch.randn(rows, columns, generator=generator) * spread * (top + 1) / 6 + (top + 1) / 2 - 0.5
    return format.pack_codes(values.round().clamp(0, top).to(torch.uint8)), entropy.symbols_for("", torch.int16, bits)


def tensors():
    generator = torch.Generator().manual_seed(1)
    for bits in WIDTHS:
        yield f"{bits} bits", *packed(bits)
        yield f"{bits} bits, one row of 66", *packed(bits, 1, 66)
    floats = torch.randn(90, 131, generator=generator) * 0.02
    yield "bfloat16", floats.bfloat16(), None
    yield "float16", floats.half(), None
    yield "three dimensions", floats[:60].reshape(3, 20, 131).bfloat16(), None
    yield "one dimension", floats[0].bfloat16(), None
    yield "no dimension", torch.tensor(7, dtype=torch.uint8), None
    yield "one symbol only", torch.full((50, 40), 9, dtype=torch.uint8), None
    yield "two symbols, the first and the last", torch.randint(0, 2, (50, 40), generator=generator).byte() * 255, None
    yield "random bytes", torch.randint(0, 256, (50, 41), generator=generator).byte(), None
    yield "int8", (floats * 100).round().to(torch.int8), None
    lanes = packed(1.58)[0]
    lanes[3, 5] = 1  # ten digits never give that
    yield "lanes that are not ternary", lanes, entropy_plain.TERNARY


CASES = list(tensors())


@pytest.fixture(scope="module")
def reference():
    """Each case coded in plain NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_codec, "serves", lambda: False)
        patch.setattr(entropy, "BLOCK_SYMBOLS", 3000)
        return {name: entropy.encode(tensor, symbols) for name, tensor, symbols in CASES}


@pytest.mark.parametrize(("name", "tensor", "symbols"), CASES, ids=[c[0] for c in CASES])
def test_round_trip_and_the_same_bytes_from_every_coder(name, tensor, symbols, coder, reference, monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK_SYMBOLS", 3000)
    coded = entropy.encode(tensor, symbols)
    assert torch.equal(coded, reference[name])
    assert entropy.is_coded(coded) and coded.numel() % 8 == 0
    decoded = entropy.decode_tensor(coded)
    assert (decoded.dtype, decoded.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(decoded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert entropy.read_head(coded).size == coded.numel()


@settings(max_examples=40, deadline=None)
@given(data=st.binary(min_size=1, max_size=700), width=st.integers(1, 9))
def test_any_bytes_come_back(data, width):
    width = min(width, len(data))
    rows = torch.frombuffer(bytearray(data[: len(data) // width * width]), dtype=torch.uint8).view(-1, width)
    for coded in (entropy.encode(rows), entropy.encode(rows, codec="zstd")):
        assert torch.equal(entropy.decode_tensor(coded), rows)


@pytest.mark.parametrize("bits", WIDTHS)
def test_size_is_within_2_percent_of_the_entropy_of_the_codes(bits):
    tensor, symbols = packed(bits, 512, 1024)
    format = parse_format("ternary:bits=1.58" if bits == 1.58 else f"int:bits={bits},symmetric=True")
    counts = np.bincount(format.unpack_codes(tensor, 1024).reshape(-1).numpy())
    bound = entropy.entropy(counts) * 512 * 1024 / 8
    assert entropy.encode(tensor, symbols).nbytes <= 1.02 * bound


@pytest.mark.parametrize("deviation", [0.4, 0.6, 1.0, 2.0, 5.0, 30.0])
def test_rate_aware_codes_of_a_layer_are_within_2_percent_of_their_entropy(deviation):
    """Codes of one step a row, from 1 to 7 bits of information: what 8 bits in memory become on disk."""
    generator = torch.Generator().manual_seed(3)
    codes = (torch.randn(576, 576, generator=generator) * deviation).round().clamp(-128, 127).to(torch.int8)
    counts = entropy.count_symbols(codes.view(torch.uint8).numpy(), 0)
    coded = entropy.encode(codes)
    assert coded.nbytes <= 1.02 * entropy.entropy(counts) * codes.numel() / 8
    record = entropy.read_head(coded)
    modelled = record.head + entropy.expected_bytes(counts, record.frequencies, len(record.raw))
    assert abs(coded.nbytes - modelled) <= 10 * len(record.raw) + 8  # as the module's text says


def test_bfloat16_takes_about_11_bits():
    floats = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    assert 10 < 8 * entropy.encode(floats).nbytes / floats.numel() < 11


def test_never_above_raw_by_more_than_a_thousandth():
    noise = torch.randint(0, 256, (1024, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    coded = entropy.encode(noise)
    assert entropy.read_head(coded).raw.all() and coded.nbytes <= 1.001 * noise.nbytes


def test_blocks_are_whole_rows_about_as_long_as_each_other():
    tensor, symbols = packed(3, 1000, 640)
    record = entropy.read_head(entropy.encode(tensor, symbols))
    row_symbols = 320
    assert record.step == entropy.block_rows(1000, row_symbols, record.row_bytes) and len(record.raw) == 5
    assert record.step * row_symbols == pytest.approx(entropy.BLOCK_SYMBOLS, rel=0.5)
    assert entropy.block_rows(3, 10**6, 10**6) == 1


def test_frequencies():
    counts = np.zeros(256, np.int64)
    counts[[3, 200]] = 10**9, 1
    frequencies = entropy.choose_frequencies(counts)
    assert frequencies.sum() == 4096 and frequencies[200] == 1 and (frequencies > 0).sum() == 2
    for case in (counts, np.arange(256), np.ones(256), counts * 0 + 7):
        frequencies = entropy.choose_frequencies(case)
        assert (entropy.unpack_frequencies(entropy.pack_frequencies(frequencies)) == frequencies).all()


def test_the_coder_is_as_good_as_its_frequencies():
    """No other frequencies that differ by one slot would take fewer bits."""
    counts = np.bincount((np.random.default_rng(0).normal(size=10**5) * 9 + 128).round().astype(int), minlength=256)
    frequencies = entropy.choose_frequencies(counts)

    def bits(f):
        return -(counts[counts > 0] * np.log2(f[counts > 0] / 4096)).sum()

    present = np.flatnonzero(counts)
    for giver in present[frequencies[present] > 1]:
        for taker in present[present != giver]:
            other = frequencies.copy()
            other[giver], other[taker] = other[giver] - 1, other[taker] + 1
            assert bits(other) >= bits(frequencies) - 1e-6 * bits(frequencies)


# -- faults ------------------------------------------------------------------------------------------------------------


def coded_case(monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK_SYMBOLS", 3000)
    return entropy.encode(*packed(4))


def resealed(coded: torch.Tensor, change) -> torch.Tensor:
    """``coded`` after ``change(bytearray)``, with the checksum of its head set right again."""
    data = bytearray(coded.numpy().tobytes())
    change(data)
    head = struct.unpack_from("<I", data, 8)[0]
    struct.pack_into("<I", data, 4, zlib.crc32(data[8:head]))
    return torch.frombuffer(data, dtype=torch.uint8)


def test_every_flipped_bit_is_found(coder, monkeypatch):
    coded = coded_case(monkeypatch)
    out, size = torch.empty(entropy.read_head(coded).nbytes, dtype=torch.uint8), coded.numel()
    for place in sorted({*range(0, 300), *range(300, size, 37), *range(size - 20, size)}):
        broken = coded.clone()
        broken[place] ^= 1 << (place % 8)
        with pytest.raises(ValueError, match=r"damaged|begin|truncated|fit|newer"):
            entropy.decode(broken, out)


@pytest.mark.parametrize("length", [0, 3, 39, 40, 100, -200, -8, -1])
def test_truncated(length, coder, monkeypatch):
    coded = coded_case(monkeypatch)
    out = torch.empty(entropy.read_head(coded).nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"truncated|begin|fit"):
        entropy.decode(coded[:length], out)


def put(format, place, *values):
    return lambda data: struct.pack_into(format, data, place, *values)


INDEX = 40 + 16  # of a tensor of two dimensions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("<B", 12, 9), "codec 9"),
        (put("<B", 13, 4), "symbols 4"),
        (put("<B", 14, 77), "dtype 77"),
        (put("<Q", 16, 2**63), "rows of"),
        (put("<Q", 24, 0), "rows of 0 bytes"),
        (put("<Q", 40, 71), "rows of"),
        (put("<I", 32, 0), "blocks of 0 rows"),
        (put("<I", 36, 2**31), "index of"),
        (put("<B", 15, 255), "index of|fit"),
        (put("<I", INDEX, 2**31 - 1), "truncated"),
        (put("<I", INDEX + 8, 0), "truncated"),
    ],
)
def test_a_head_that_contradicts_itself(change, message, coder, monkeypatch):
    broken = resealed(coded_case(monkeypatch), change)
    with pytest.raises(ValueError, match=message):
        entropy.decode(broken, torch.empty(70 * 4 * 4 * 8, dtype=torch.uint8))


def test_a_table_that_is_none(coder, monkeypatch):
    """Frequencies whose sum is not 4096, of too few bytes, of too many, and of more than 4096 slots for one symbol."""
    coded = coded_case(monkeypatch)
    record = entropy.read_head(coded)
    start = INDEX + 8 * len(record.raw)
    out = torch.empty(record.nbytes, dtype=torch.uint8)

    def widen(data):
        data[start + 2] = 255

    for change in (
        put("<B", start + 2, 5),
        put("<B", start + 1, 255),
        put("<B", start, 250),
        put("<H", start + 2, 0x7FFF),
    ):
        with pytest.raises(ValueError, match="frequency table"):
            entropy.decode(resealed(coded, change), out)
    with pytest.raises(ValueError, match="frequency table"):
        entropy.decode(resealed(coded, widen), out)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_a_block_whose_words_do_not_end_with_its_symbols(block, coder, monkeypatch):
    """Checksums set right: only the states and the number of words tell. Blocks are decoded two at a time."""
    coded = coded_case(monkeypatch)
    record = entropy.read_head(coded)
    assert len(record.raw) == 3 and not record.raw.any()
    block %= len(record.raw)

    def change(data):
        first, last = (record.head + int(record.starts[block + i]) for i in (0, 1))
        data[first + 200] ^= 255
        struct.pack_into("<I", data, INDEX + 8 * block + 4, zlib.crc32(data[first:last]))

    with pytest.raises(ValueError, match="damaged" if coder == "plain" else f"block {block} is damaged"):
        entropy.decode(resealed(coded, change), torch.empty(record.nbytes, dtype=torch.uint8))


@pytest.mark.parametrize("case", ["4 bits", "3 bits", "bfloat16"])
@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, -2, -1])
@pytest.mark.parametrize("block", [0, 1])
def test_a_truncated_block_whose_index_and_checksum_agree(case, length, block, coder, monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK_SYMBOLS", 3000)
    coded = entropy.encode(*next((tensor, symbols) for name, tensor, symbols in CASES if name == case))
    record = entropy.read_head(coded)
    first, last = (record.head + int(record.starts[block + i]) for i in (0, 1))
    data = bytearray(coded.numpy().tobytes()[: record.head + int(record.starts[-1])])
    kept = data[first:last][:length]
    data[first:last] = kept
    struct.pack_into("<II", data, 40 + 8 * len(record.shape) + 8 * block, len(kept), zlib.crc32(kept))
    broken = resealed(torch.frombuffer(data + bytes(-len(data) % 8), dtype=torch.uint8), lambda data: None)
    assert len(entropy.read_head(broken).raw) == len(record.raw)  # all but the block itself is sound
    with pytest.raises(ValueError, match="damaged" if coder == "plain" else f"block {block} is damaged"):
        entropy.decode(broken, torch.empty(record.nbytes, dtype=torch.uint8))


def test_coded_and_raw_blocks_of_any_length_stand_beside_each_other(coder, monkeypatch):
    """Blocks are decoded two at a time, of which one may be raw, shorter, or have other words."""
    monkeypatch.setattr(entropy, "block_rows", lambda *_: 5)
    generator, raw = torch.Generator().manual_seed(5), set()
    for pattern in itertools.product([0.3, 40.0, None], repeat=3):
        deviations = [d for d in pattern for _ in range(5)] + [0.5] * 3  # the last block has three rows
        rows = [
            torch.randint(0, 256, (200,), generator=generator) - 128
            if d is None
            else (torch.randn(200, generator=generator) * d).round().clamp(-128, 127)
            for d in deviations
        ]
        tensor = torch.stack(rows).to(torch.int8)
        coded = entropy.encode(tensor)
        raw.add(tuple(entropy.read_head(coded).raw.tolist()))
        assert torch.equal(entropy.decode_tensor(coded, threads=2), tensor)
    assert len(raw) == 8 and {len(flags) for flags in raw} == {4}


def test_a_raw_block_of_another_length(coder, monkeypatch):
    coded = coded_case(monkeypatch)
    record = entropy.read_head(coded)
    change = put("<I", INDEX, int(record.starts[1]) | 1 << 31)
    with pytest.raises(ValueError, match="damaged"):
        entropy.decode(resealed(coded, change), torch.empty(record.nbytes, dtype=torch.uint8))


def test_a_place_of_another_size(coder, monkeypatch):
    coded = coded_case(monkeypatch)
    with pytest.raises(ValueError, match="stands for"):
        entropy.decode(coded, torch.empty(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        entropy.decode(coded, torch.empty(64, 64, dtype=torch.uint8).T)


def test_what_cannot_be_coded():
    with pytest.raises(ValueError, match="cannot be coded"):
        entropy.encode(torch.zeros(4))
    with pytest.raises(ValueError, match="cannot be coded"):
        entropy.encode(torch.zeros(0, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="unknown"):
        entropy.encode(torch.zeros(4, dtype=torch.uint8), codec="lz4")
    with pytest.raises(ValueError, match="not made of"):
        entropy.encode(torch.zeros(4, 10, dtype=torch.uint8), symbols=3)


def test_damage_inside_zstd(monkeypatch):
    monkeypatch.setattr(entropy, "BLOCK_SYMBOLS", 3000)
    tensor, symbols = packed(4)
    coded = entropy.encode(tensor, symbols, "zstd")
    record = entropy.read_head(coded)
    assert torch.equal(entropy.decode_tensor(coded), tensor)
    broken = coded.clone()
    broken[record.head + 30] ^= 4
    with pytest.raises(ValueError, match="block 0 of"):
        entropy.decode_tensor(broken)

    def change(data):  # right checksums, and still not what zstd writes
        first, last = record.head, record.head + int(record.starts[1])
        data[first : first + 4] = b"none"
        struct.pack_into("<I", data, INDEX + 4, zlib.crc32(data[first:last]))

    with pytest.raises(ValueError, match="not what zstd writes"):
        entropy.decode_tensor(resealed(coded, change))


def test_threads_decode_at_once():
    tensor, symbols = packed(3, 600, 640)
    coded, failed = entropy.encode(tensor, symbols), []

    def work():
        for _ in range(5):
            if not torch.equal(entropy.decode_tensor(coded, threads=1), tensor):
                failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
