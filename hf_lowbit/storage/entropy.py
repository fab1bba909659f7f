"""Coded tensors: entropy-coded bytes inside an ordinary safetensors tensor, decoded to the same bits.

Low-bit codes are far from uniform: a weight stored with 4 bits holds 3 to 3.7 bits of information, and codes of one
step a row in 8 bits hold 2 to 4. Range coding (rANS) comes within a percent of that for every alphabet, where a Huffman
code pays up to a bit for each symbol; ``docs/format.md`` has the format bit by bit.

A tensor keeps its name. What is stored under it is uint8 of one dimension: a head that says dtype, shape and how rows
become symbols, and independent blocks of whole rows, each with its own checksum. 32 range coders take turns in one
stream of words, so that a vector register or a warp decodes 32 symbols at once. What does not get smaller stays raw,
block by block, and a tensor for which coding does not pay is stored as ever.

Symbols are bytes where a byte is one to eight whole codes (1, 2, 4, 8 bits), pairs of codes for 3 bits and codes for 5
to 7 (whose planes hide how codes are distributed), five digits for ternary lanes, and the upper byte of 16-bit floats,
turned by one bit for bfloat16 so that it is the exponent (DFloat11, arXiv 2504.11651); lower bytes stay as they are.

Exact size of a coded tensor, for who models it: 40 bytes, 8 a dimension, 8 a block, the frequency table (2 bytes, and
for each symbol between the first and the last that occur 1 byte where its frequency is below 128 of 4096, else 2), for
each block 128 bytes of states and 2 a word, all rounded up to 8 bytes. A word leaves when a state overflows 32 bits,
and 32 states begin with 16 bits each and end with 24 on the average, so that a block takes ``information / 8 + 96``
bytes, give or take 10, ``information`` being minus the sum of ``log2(frequency / 4096)`` over its symbols. A block has
whole rows, about :data:`BLOCK_SYMBOLS` symbols and up to four times as many of few bits (:func:`block_rows`).

:func:`decode` uses the CPU kernels and releases the interpreter's lock; without them :mod:`.entropy_plain`, the
specification of both, serves. All of it may run in any number of threads.
"""

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from .. import native_codec
from . import entropy_plain

MAGIC = b"LBC1"
HEAD = struct.Struct("<4sIIBBBBQQII")  # magic, checksum, bytes of the head, codec, symbols, dtype, dimensions, ...
ENTROPY, ZSTD = 1, 2
CODECS = {"entropy": ENTROPY, "zstd": ZSTD}
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
BLOCK_SYMBOLS = 65536
ALIGNMENT = 8  # of its size, by zeros at its end, so that what follows it in a file is aligned
RAW = 1 << 31
FREQUENCIES = 4096
LARGEST_BLOCK = 1 << 30


@dataclass(frozen=True)
class Coded:
    """The head of a coded tensor, checked.

    Attributes:
        codec: :data:`ENTROPY` or :data:`ZSTD`.
        symbols: How rows become symbols, see :mod:`.entropy_plain`.
        dtype, shape: Of the tensor that it stands for.
        rows, row_bytes: Of that tensor's bytes; a row is what the last dimension holds.
        step: Rows of a block.
        starts: Where each block begins and the last one ends, in bytes from the first, int64 (blocks + 1).
        raw: Whether each block is stored as it is, bool (blocks).
        checksums: CRC-32 of each block as stored, uint32 (blocks).
        frequencies: Of 256 symbols, their sum 4096, int64; None for zstd.
        head: Bytes before the first block.
    """

    codec: int
    symbols: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    row_bytes: int
    step: int
    starts: np.ndarray
    raw: np.ndarray
    checksums: np.ndarray
    frequencies: np.ndarray | None
    head: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that it stands for."""
        return self.rows * self.row_bytes

    @property
    def size(self) -> int:
        """Bytes of the coded tensor."""
        return -(-(self.head + int(self.starts[-1])) // ALIGNMENT) * ALIGNMENT


def is_coded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a coded one: uint8 of one dimension that begins as one. Its head may yet be damaged."""
    return (
        tensor.dtype == torch.uint8
        and tensor.ndim == 1
        and tensor.numel() >= HEAD.size
        and tensor.device.type == "cpu"
        and tensor[:4].numpy().tobytes() == MAGIC
    )


def read_head(coded: torch.Tensor | memoryview | bytes) -> Coded:
    """Reads and checks all but the blocks of ``coded``, uint8 (n).

    Raises:
        ValueError: for anything that contradicts itself, its checksum or its length, saying what.
    """
    data = _view(coded)
    if len(data) < HEAD.size or bytes(data[:4]) != MAGIC:
        raise ValueError("it does not begin as a coded tensor")
    _, checksum, head, codec, symbols, dtype, dimensions, rows, row_bytes, step, blocks = HEAD.unpack_from(data)
    if not HEAD.size <= head <= len(data):
        raise ValueError(f"its head of {head} bytes does not fit into its {len(data)} bytes: it is truncated")
    if zlib.crc32(data[8:head]) != checksum:
        raise ValueError("its head does not have its checksum: it is damaged")
    kind = entropy_plain.SYMBOLS.get(symbols)
    if codec not in CODECS.values() or kind is None or dtype >= len(DTYPES):
        raise ValueError(
            f"codec {codec}, symbols {symbols} and dtype {dtype} are not all known: it needs a newer version"
        )
    index = HEAD.size + 8 * dimensions
    if index + 8 * blocks > head:
        raise ValueError(f"its index of {blocks} blocks does not fit into its head")
    shape = struct.unpack_from(f"<{dimensions}Q", data, HEAD.size)
    if rows < 1 or row_bytes < 1 or math.prod(shape) * DTYPES[dtype].itemsize != rows * row_bytes:
        raise ValueError(f"{rows} rows of {row_bytes} bytes are not {DTYPES[dtype]} of shape {shape}")
    if row_bytes % kind.unit or step < 1 or step * row_bytes > LARGEST_BLOCK or blocks != -(-rows // step):
        raise ValueError(f"{blocks} blocks of {step} rows are not {rows} rows of {row_bytes} bytes")
    entries = np.frombuffer(data, "<u4", 2 * blocks, index).reshape(blocks, 2)
    starts = np.zeros(blocks + 1, np.int64)
    np.cumsum(entries[:, 0] & (RAW - 1), dtype=np.int64, out=starts[1:])
    end = head + int(starts[-1])
    if len(data) != -(-end // ALIGNMENT) * ALIGNMENT or any(data[end:]):
        raise ValueError(
            f"its head and blocks take {end} bytes, and {len(data)} are there: it is truncated or too long"
        )
    table = bytes(data[index + 8 * blocks : head])
    frequencies = unpack_frequencies(table) if codec == ENTROPY else None
    return Coded(
        codec, symbols, DTYPES[dtype], shape, rows, row_bytes, step, starts, entries[:, 0] >= RAW, entries[:, 1],
        frequencies, head,
    )  # fmt: skip


def describe(beginning: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of what a coded tensor stands for, from its first 40 bytes and 8 a dimension, else unchecked.

    Raises:
        ValueError: if they are cut off, or of a dtype that is not known.
    """
    data = _view(beginning)
    *_, dtype, dimensions, _, _, _, _ = HEAD.unpack_from(data)
    if HEAD.size + 8 * dimensions > len(data) or dtype >= len(DTYPES):
        raise ValueError("the head of a coded tensor is damaged, or needs a newer version")
    return DTYPES[dtype], struct.unpack_from(f"<{dimensions}Q", data, HEAD.size)


def decode(coded: torch.Tensor | memoryview, out: torch.Tensor, threads: int | None = None) -> None:
    """Decodes ``coded``, uint8 (n), to the bytes of ``out``, contiguous, uint8 (or the tensor itself) on the CPU.

    Args:
        threads: Of the CPU kernels; by default as many as torch uses. Take 1 in a pool of one's own.

    Raises:
        ValueError: for data that is damaged, saying where; what ``out`` holds is then undefined.
    """
    if not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"a coded tensor is decoded to contiguous memory of the CPU, not on {out.device}")
    if native_codec.decode(coded, out, threads or torch.get_num_threads()):
        return
    record, data = read_head(coded), _view(coded)
    target = out.view(-1).view(torch.uint8).numpy()
    if target.size != record.nbytes:
        raise ValueError(f"it stands for {record.nbytes} bytes, and the place for it has {target.size}")
    check_blocks(record, data)
    if record.codec == ZSTD:
        return _decode_zstd(record, data, target)
    entropy_plain.decode_blocks(record, np.frombuffer(data, np.uint8)[record.head :], target)


def decode_tensor(coded: torch.Tensor | memoryview, threads: int | None = None) -> torch.Tensor:
    """The tensor that ``coded`` stands for; errors as for :func:`decode`."""
    record = read_head(coded)
    out = torch.empty(record.shape, dtype=record.dtype)
    decode(coded, out, threads)
    return out


def check_blocks(record: Coded, data: memoryview) -> None:
    """Compares every block with its checksum.

    Raises:
        ValueError: naming the first that differs.
    """
    for b in range(len(record.raw)):
        first, last = record.head + int(record.starts[b]), record.head + int(record.starts[b + 1])
        if zlib.crc32(data[first:last]) != record.checksums[b]:
            raise ValueError(f"block {b} of {len(record.raw)} does not have its checksum: it is damaged")


# -- writing -----------------------------------------------------------------------------------------------------------


def encode(tensor: torch.Tensor, symbols: int | None = None, codec: str = "entropy") -> torch.Tensor:
    """Codes ``tensor``, of a dtype in :data:`DTYPES`, not empty, on the CPU.

    Args:
        symbols: How its rows become symbols, see :func:`symbols_for`; by default what fits its dtype.
        codec: "entropy" or "zstd".

    Returns:
        uint8 (n): the coded tensor, which is longer than ``tensor`` by its head where nothing was gained.

    Raises:
        ValueError: for a tensor or a codec that cannot be.
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is unknown: use one of {', '.join(CODECS)}")
    if tensor.dtype not in DTYPES or tensor.numel() == 0 or tensor.device.type != "cpu":
        raise ValueError(f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} cannot be coded")
    symbols = default_symbols(tensor.dtype) if symbols is None else symbols
    kind = entropy_plain.SYMBOLS[symbols]
    row_bytes = (tensor.shape[-1] if tensor.ndim > 1 else 1) * tensor.dtype.itemsize
    if row_bytes % kind.unit:
        raise ValueError(f"rows of {row_bytes} bytes are not made of the {kind.unit} that {kind.name} need")
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().reshape(-1, row_bytes)
    rows = raw.shape[0]
    if codec == "zstd":
        step = block_rows(rows, kind.count(row_bytes), row_bytes)
        blocks, table = _zstd_blocks(raw, step), b""
    else:
        counts = count_symbols(raw, symbols)
        step = block_rows(rows, kind.count(row_bytes), row_bytes, entropy(counts))
        frequencies = choose_frequencies(counts)
        table = pack_frequencies(frequencies)
        encoded = native_codec.encode(raw, step, symbols, frequencies)
        blocks = encoded or entropy_plain.encode_blocks(raw, step, symbols, frequencies)
    payload, sizes, checksums = blocks
    index = np.stack([sizes, checksums], 1).astype("<u4").tobytes()
    shape = struct.pack(f"<{tensor.ndim}Q", *tensor.shape)
    rest = struct.pack(
        "<IBBBBQQII", HEAD.size + len(shape) + len(index) + len(table), CODECS[codec], symbols,
        DTYPES.index(tensor.dtype), tensor.ndim, rows, row_bytes, step, len(sizes),
    )  # fmt: skip
    rest += shape + index + table
    head = MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest
    padding = bytearray(-(len(head) + len(payload)) % ALIGNMENT)
    parts = [np.frombuffer(part, np.uint8) for part in (bytearray(head), payload, padding)]
    return torch.from_numpy(np.concatenate(parts))


def block_rows(rows: int, row_symbols: int, row_bytes: int, bits: float = 8) -> int:
    """Rows of a block: about :data:`BLOCK_SYMBOLS` symbols, all blocks about alike.

    Symbols of fewer than 2 ``bits`` make longer blocks, up to four times, so that states stay half a percent of them.
    """
    symbols = BLOCK_SYMBOLS * min(4, max(1, 2 / max(bits, 0.5)))
    blocks = max(1, round(rows * row_symbols / symbols))
    return max(1, min(-(-rows // blocks), LARGEST_BLOCK // row_bytes))


def default_symbols(dtype: torch.dtype) -> int:
    """Symbols for a tensor of which nothing but its dtype is known."""
    return {torch.float16: entropy_plain.UPPER, torch.bfloat16: entropy_plain.EXPONENTS}.get(dtype, entropy_plain.BYTES)


def symbols_for(suffix: str, dtype: torch.dtype, bits: float | None) -> int:
    """Symbols for the tensor ``weight<suffix>`` of a packed weight of ``bits``, or for any other (``bits`` None)."""
    if bits is None or suffix or dtype != torch.int16:
        return default_symbols(dtype)
    if bits == 1.58:
        return entropy_plain.TERNARY
    return int(bits) if bits in (3, 5, 6, 7) else entropy_plain.BYTES


def count_symbols(raw: np.ndarray, symbols: int) -> np.ndarray:
    """How often each symbol occurs in rows of bytes, uint8 (N, R): int64 (256)."""
    counts = native_codec.count_symbols(raw, symbols)
    if counts is None:
        counts = np.bincount(entropy_plain.SYMBOLS[symbols].split(raw)[0].reshape(-1), minlength=256).astype(np.int64)
    return counts


def entropy(counts: np.ndarray) -> float:
    """Bits a symbol that ``counts`` (256) stand for: Shannon's bound for coding each symbol by itself."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def choose_frequencies(counts: np.ndarray) -> np.ndarray:
    """Frequencies of sum 4096, int64 (256): at least 1 for each symbol that occurs, the rest where it saves most.

    Symbol ``s`` costs ``-counts[s] * log2(f[s] / 4096)`` bits. From proportional ones, rounded down, slots are given or
    taken one by one where the sum of that changes for the better, or the least for the worse; ties go to the lowest.
    """
    counts = np.asarray(counts, np.int64)
    frequencies = np.where(counts > 0, np.maximum(1, counts * FREQUENCIES // counts.sum()), 0)
    weights = counts.astype(np.float64)
    while (left := FREQUENCIES - int(frequencies.sum())) != 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            if left > 0:
                gain = np.where(counts > 0, weights * np.log2((frequencies + 1) / frequencies), -1)
                frequencies[np.argmax(gain)] += 1
            else:
                loss = np.where(frequencies > 1, weights * np.log2(frequencies / (frequencies - 1)), np.inf)
                frequencies[np.argmin(loss)] -= 1
    return frequencies


def pack_frequencies(frequencies: np.ndarray) -> bytes:
    """First and last symbol that occur, then the frequency of each between them, 7 bits a byte, low ones first."""
    present = np.flatnonzero(frequencies)
    first, last = int(present[0]), int(present[-1])
    out = bytearray([first, last])
    for f in frequencies[first : last + 1].tolist():
        out += bytes([f]) if f < 128 else bytes([f & 127 | 128, f >> 7])
    return bytes(out)


def unpack_frequencies(table: bytes) -> np.ndarray:
    """Inverse of :func:`pack_frequencies`.

    Raises:
        ValueError: for bytes that are not the frequencies of symbols, or whose sum is not 4096.
    """
    frequencies = np.zeros(256, np.int64)
    at, end = 2, len(table)
    for symbol in range(table[0], table[1] + 1) if end >= 2 else ():
        value = shift = 0
        while at < end and shift <= 7:
            value |= (table[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if table[at - 1] < 128:
                break
        else:
            raise ValueError("its frequency table is cut off")
        frequencies[symbol] = value
    if frequencies.sum() != FREQUENCIES or at != end:
        raise ValueError(f"its frequency table has a sum of {frequencies.sum()}, not {FREQUENCIES}")
    return frequencies


def expected_bytes(counts: np.ndarray, frequencies: np.ndarray, blocks: int) -> float:
    """About how many bytes symbols (by ``counts``) take in ``blocks`` blocks, as the module's text says."""
    present = counts > 0
    bits = float((counts[present] * (math.log2(FREQUENCIES) - np.log2(frequencies[present]))).sum())
    return bits / 8 + 96 * blocks


# -- zstd --------------------------------------------------------------------------------------------------------------


def zstandard():
    """The zstandard library; raises ``ImportError`` with the cure where it is missing."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("storage='zstd' needs the zstandard library: pip install zstandard") from error
    return zstandard


def _zstd_blocks(raw: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks compressed at level 1, which is as small as any for packed codes: matches are not to be found in them."""
    compressor = zstandard().ZstdCompressor(level=1, write_checksum=False, write_content_size=True)
    parts, sizes = [], []
    for first in range(0, len(raw), step):
        block = raw[first : first + step].tobytes()
        packed = compressor.compress(block)
        smaller = len(packed) < len(block)
        parts.append(packed if smaller else block)
        sizes.append(len(packed) if smaller else len(block) | RAW)
    return entropy_plain.joined(parts, sizes)


def _decode_zstd(record: Coded, data: memoryview, target: np.ndarray) -> None:
    library = zstandard()
    decompressor = library.ZstdDecompressor()
    block = record.step * record.row_bytes
    for b, raw in enumerate(record.raw):
        part = data[record.head + int(record.starts[b]) : record.head + int(record.starts[b + 1])]
        place = target[b * block : (b + 1) * block]
        try:
            content = part if raw else decompressor.decompress(part, max_output_size=len(place))
        except library.ZstdError as error:
            raise ValueError(
                f"block {b} of {len(record.raw)} is not what zstd writes ({error}): it is damaged"
            ) from None
        if len(content) != len(place):
            raise ValueError(f"block {b} has {len(content)} bytes, not {len(place)}: it is damaged")
        place[:] = np.frombuffer(content, np.uint8)


def _view(coded: torch.Tensor | memoryview | bytes) -> memoryview:
    if isinstance(coded, torch.Tensor):
        return coded.contiguous().numpy().data.cast("B")
    return memoryview(coded).cast("B")
