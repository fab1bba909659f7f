"""What formats with a table share: ``w = scale * levels[code]``.

``levels`` is a constant of the format (:mod:`.nf`, :mod:`.fp4`) or learned and stored (:mod:`.codebook`). Codes lie
in the same bit planes as integers.
"""

from dataclasses import dataclass

import torch

from .base import Format, inverse
from .planes import lanes_per_row, pack_planes, unpack_planes


@dataclass(frozen=True)
class LookupFormat(Format):
    """Base of the table formats."""

    packs_natively = True

    def levels(self) -> torch.Tensor | None:
        """The constant table (1, 2**bits), float32 on the CPU, or None if it is learned."""
        return None

    def packed_tensor(self, shape):
        return (shape[0], lanes_per_row(shape[1], self.bits)), torch.int16

    def pack_codes(self, codes):
        return pack_planes(codes, self.bits)

    def unpack_codes(self, packed, in_features):
        return unpack_planes(packed, self.bits, in_features)

    def table(self, levels: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """``levels`` or the constant table, on ``device``, (1, L) or (N, L)."""
        table = self.levels() if levels is None else levels
        assert table is not None, "a format that learns its levels needs them"
        return table.to(device)

    def fit(self, groups, shrink=1.0, levels=None):
        reach = self.table(levels, groups.device).abs().amax(-1, keepdim=True)
        scales = shrink * groups.abs().amax(-1) / torch.where(reach > 0, reach, 1)
        return scales, None

    def encode_groups(self, groups, scales, zeros=None, levels=None):
        table = self.table(levels, groups.device)
        if scales is not None:
            groups = groups * inverse(scales).unsqueeze(-1)
        ordered, order = table.sort(-1)
        edges = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
        if table.shape[0] == 1:
            places = _count_below(groups, edges[0])
            return order[0].to(torch.uint8).index_select(0, places.reshape(-1)).view(groups.shape)
        flat = groups.reshape(groups.shape[0], -1).contiguous()
        return order.gather(1, torch.searchsorted(edges, flat)).to(torch.uint8).view(groups.shape)

    def decode_groups(self, codes, scales, zeros=None, levels=None):
        table = self.table(levels, codes.device)
        if table.shape[0] == 1:
            values = table[0].index_select(0, codes.reshape(-1).int()).view(codes.shape)
        else:
            values = table.gather(1, codes.reshape(codes.shape[0], -1).long()).view(codes.shape)
        return values if scales is None else values * scales.unsqueeze(-1)


def _count_below(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """How many of ``edges`` (E,), ascending, lie below each value, int32.

    Up to 15 comparisons are twice as fast on a CPU as the binary search of ``torch.bucketize``.
    """
    if len(edges) > 15:
        return torch.bucketize(values, edges, out_int32=True)
    count = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for edge in edges:
        count += values > edge
    return count.int()
