"""Bit planes: how small unsigned codes become 16-bit lanes, and back.

A row of ``K`` codes is cut into blocks of 64 (the last one padded with code 0). A plane of ``p`` bits, p in {1, 2, 4,
8}, stores one block in ``L = 4 * p`` lanes of 16 bits: field ``j`` of lane ``l`` (bits ``p*j`` to ``p*j + p - 1``)
holds value ``k = L*j + l``. One shift and one mask therefore give ``L`` *consecutive* values, which suits vector
units, and two neighbouring lanes read as one 32-bit word give two neighbouring values, which suits half-precision
pairs on GPUs.

Other widths are sums of planes with no padding bits: 3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1, most significant plane
first. A packed row is the concatenation of its planes, so each plane is one contiguous run and can be read alone.
"""

import torch
import torch.nn.functional as F

BLOCK = 64
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def lanes_per_row(in_features: int, bits: int) -> int:
    """Number of 16-bit lanes that hold one row of ``in_features`` codes of ``bits`` bits."""
    return -(-in_features // BLOCK) * 4 * bits


def pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs ``codes`` (N, K), uint8 below ``2**bits``, into int16 lanes (N, ``lanes_per_row(K, bits)``)."""
    rows, columns = codes.shape
    blocks = -(-columns // BLOCK)
    codes = F.pad(codes, (0, blocks * BLOCK - columns))
    packed, low = [], bits
    for plane in PLANES[bits]:
        low -= plane
        lanes = 4 * plane
        fields = ((codes >> low) & (2**plane - 1)).reshape(rows, blocks, 16 // plane, lanes).to(torch.int16)
        word = fields[:, :, 0]
        for j in range(1, 16 // plane):
            word = word | (fields[:, :, j] << (plane * j))
        packed.append(word.reshape(rows, blocks * lanes))
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=1)


def unpack_planes(packed: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Inverse of :func:`pack_planes`: int16 lanes (N, lanes) to uint8 codes (N, ``in_features``)."""
    rows = packed.shape[0]
    blocks = -(-in_features // BLOCK)
    codes: torch.Tensor | None = None
    start = 0
    for plane in PLANES[bits]:
        lanes = 4 * plane
        words = packed[:, start : start + blocks * lanes].reshape(rows, blocks, lanes)
        start += blocks * lanes
        # A field at a time: a shift by a number is several times as fast on a CPU as one by a broadcast tensor.
        fields = torch.empty((rows, blocks, 16 // plane, lanes), dtype=torch.uint8, device=packed.device)
        for j in range(16 // plane):
            fields[:, :, j] = (words >> (plane * j)) & (2**plane - 1)
        field = fields.view(rows, blocks * BLOCK)
        codes = field if codes is None else (codes << plane) | field
    assert codes is not None
    return codes[:, :in_features]


def bytes_per_row(count: int, bits: int) -> int:
    """Bytes of a dense bit stream of ``count`` fields of ``bits`` bits."""
    return -(-count * bits // 8)


def pack_stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs ``values`` (N, C), integers below ``2**bits``, into a dense little-endian bit stream per row, uint8.

    Bit ``i`` of value ``c`` is bit ``(c*bits + i) % 8`` of byte ``(c*bits + i) // 8``. Used for small companions,
    such as zero points, where padding to whole blocks would cost more than it helps.
    """
    rows, count = values.shape
    size = bytes_per_row(count, bits)
    shifts = torch.arange(bits, device=values.device)
    stream = ((values.to(torch.int64).unsqueeze(-1) >> shifts) & 1).reshape(rows, count * bits)
    stream = F.pad(stream, (0, size * 8 - count * bits)).view(rows, size, 8)
    return (stream << torch.arange(8, device=values.device)).sum(-1).to(torch.uint8)


def unpack_stream(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of :func:`pack_stream`: uint8 bytes (N, size) to uint8 values (N, ``count``)."""
    rows = packed.shape[0]
    stream = (packed.to(torch.int32).unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.int32)) & 1
    stream = stream.reshape(rows, -1)[:, : count * bits].reshape(rows, count, bits)
    return (stream << torch.arange(bits, device=packed.device, dtype=torch.int32)).sum(-1).to(torch.uint8)
