"""A reader of coded tensors in plain Python, written from docs/format.md, against the vectors in both directions."""

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch

from hf_lowbit.storage import entropy

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
DTYPES = ("U8", "I8", "I16", "F16", "BF16")
TORCH = dict(zip(DTYPES, entropy.DTYPES, strict=True))


def read(data: bytes) -> tuple[str, list[int], bytes]:
    """Dtype, shape and bytes of the tensor that ``data`` stands for."""
    magic, checksum, head, codec, symbols, dtype, d = struct.unpack_from("<4sIIBBBB", data)
    rows, row_bytes, step, blocks = struct.unpack_from("<QQII", data, 16)
    assert magic == b"LBC1" and checksum == zlib.crc32(data[8:head]) and codec == 1 and blocks == -(-rows // step)
    shape = list(struct.unpack_from(f"<{d}Q", data, 40))
    index = 40 + 8 * d
    frequency = read_frequencies(data[index + 8 * blocks : head])
    at, out = head, b""
    for b in range(blocks):
        size, crc = struct.unpack_from("<II", data, index + 8 * b)
        block = data[at : at + size % 2**31]
        at += size % 2**31
        assert zlib.crc32(block) == crc
        count = min(step, rows - b * step)
        out += block if size >= 2**31 else read_block(block, frequency, symbols, count, row_bytes)
    assert len(data) == -(-at // 8) * 8 and not any(data[at:])
    return DTYPES[dtype], shape, out


def read_frequencies(table: bytes) -> list[int]:
    frequency, at = [0] * 256, 2
    for symbol in range(table[0], table[1] + 1):
        frequency[symbol] = table[at] % 128
        if table[at] >= 128:
            at += 1
            frequency[symbol] += 128 * table[at]
        at += 1
    assert sum(frequency) == 4096 and at == len(table)
    return frequency


def read_block(block: bytes, frequency: list[int], symbols: int, rows: int, row_bytes: int) -> bytes:
    per_row = {0: row_bytes, 3: row_bytes // 24 * 32, 10: row_bytes, 16: row_bytes // 2, 17: row_bytes // 2}
    count = rows * per_row.get(symbols, row_bytes // (8 * symbols or 1) * 64)
    lower = block[len(block) - count :] if symbols in (16, 17) else b""
    block = block[: len(block) - len(lower)]
    x, words = list(struct.unpack_from("<32I", block)), iter(struct.unpack(f"<{len(block) // 2 - 64}H", block[128:]))
    slots = [s for s in range(256) for _ in range(frequency[s])]
    begin = [sum(frequency[:s]) for s in range(256)]
    found = []
    for i in range(count):
        slot = x[i % 32] % 4096
        s = slots[slot]
        x[i % 32] = frequency[s] * (x[i % 32] // 4096) + slot - begin[s]
        if x[i % 32] < 65536:
            x[i % 32] = x[i % 32] * 65536 + next(words)
        found.append(s)
    assert x == [65536] * 32 and next(words, None) is None
    return to_bytes(found, lower, symbols, rows)


def to_bytes(found: list[int], lower: bytes, symbols: int, rows: int) -> bytes:
    if symbols == 0:
        return bytes(found)
    if symbols in (16, 17):
        words = [256 * s + low for s, low in zip(found, lower, strict=True)]
        words = [w // 2 + w % 2 * 32768 for w in words] if symbols == 17 else words
        return struct.pack(f"<{len(words)}H", *words)
    if symbols == 10:
        numbers = [243 * found[i] + found[i + 1] for i in range(0, len(found), 2)]
        return struct.pack(f"<{len(numbers)}H", *(-(-n * 65536 // 59049) for n in numbers))
    if symbols == 3:
        found = [c for i in range(0, len(found), 32) for high in (False, True) for c in pair(found[i : i + 32], high)]
    width = len(found) // rows
    return b"".join(plane_row(found[r * width : (r + 1) * width], symbols) for r in range(rows))


def pair(values: list[int], high: bool) -> list[int]:
    return [v // 8 if high else v % 8 for v in values]


def plane_row(codes: list[int], bits: int) -> bytes:
    """A row of codes as the section on planes has it."""
    lanes, left = [], bits
    for p in {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]:
        left -= p
        for b in range(0, len(codes), 64):
            for lane in range(4 * p):
                fields = [(codes[b + 4 * p * j + lane] >> left) % 2**p for j in range(16 // p)]
                lanes.append(sum(field << (p * j) for j, field in enumerate(fields)))
    return struct.pack(f"<{len(lanes)}H", *lanes)


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_vector(vector):
    coded, content = bytes.fromhex(vector["coded"]), bytes.fromhex(vector["hex"])
    assert read(coded) == (vector["dtype"], vector["shape"], content)
    stored = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    decoded = entropy.decode_tensor(stored)
    assert decoded.dtype == TORCH[vector["dtype"]] and list(decoded.shape) == vector["shape"]
    assert decoded.reshape(-1).view(torch.uint8).numpy().tobytes() == content


def test_vectors_have_every_kind_of_symbols_in_coded_blocks():
    kinds = set()
    for vector in VECTORS:
        record = entropy.read_head(bytes.fromhex(vector["coded"]))
        kinds.add((record.symbols, bool(record.raw.all())))
    assert kinds >= {(kind, False) for kind in (0, 3, 6, 10, 16, 17)} | {(0, True)}


def test_the_page_shows_the_vector():
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    (vector,) = [v for v in VECTORS if v["name"] == "bytes"]
    assert vector["coded"] in page.replace("\n", "")
