"""Writes ``vectors.json``, the test vectors of ``docs/format.md``: one object per vector, described there.

Run once, by hand (``python tests/formats/make_vectors.py``); a change of this file's output is a change of the format.
Codes, scales and zeros follow from their position by arithmetic, so no generator of random numbers matters.
"""

import json
from pathlib import Path

import torch

from hf_lowbit.formats import Quantized, parse_format

FILE = Path(__file__).with_name("vectors.json")
DTYPES = {
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
# Name, format, shape (N, K). The "planes" ones have code k mod 2**bits, which is easy to follow by eye.
VECTORS = [
    *((f"planes-{b}", f"int:bits={b},group_size=-1,scale_dtype=float32,symmetric=True", (1, 66)) for b in range(1, 9)),
    *((f"int-{b}", f"int:bits={b},group_size=32", (2, 70)) for b in range(1, 9)),
    ("int-4-float-zeros", "int:bits=4,group_size=32,zeros=float", (2, 70)),
    ("int-3-row", "int:bits=3,group_size=-1,scale_dtype=bfloat16", (3, 63)),
    ("int-2-log8", "int:bits=2,group_size=16,scale_dtype=log8", (3, 65)),
    ("int-4-one-column", "int:bits=4,group_size=64", (2, 1)),
    *((f"nf-{b}", f"nf:bits={b},group_size=64", (2, 70)) for b in (2, 3, 4)),
    ("nf-4-float32", "nf:bits=4,group_size=16,scale_dtype=float32", (2, 33)),
    ("fp4-mx", "fp4:bits=4,group_size=32,scale_dtype=e8m0", (2, 70)),
    ("fp4-nv", "fp4:bits=4,group_size=16,scale_dtype=e4m3", (2, 70)),
    ("codebook-3-tensor", "codebook:bits=3,group_size=64,codebook=tensor", (2, 70)),
    ("codebook-2-row", "codebook:bits=2,group_size=-1,codebook=row", (2, 70)),
    ("nested-4", "nested:bits=4,group_size=32", (2, 70)),
    ("int-columns-8", "int_columns:bits=8", (2, 70)),
    ("int-columns-3-groups", "int_columns:bits=3,group_size=32,symmetric=False", (2, 70)),
    ("ternary-row", "ternary:bits=1.58", (2, 23)),
    ("ternary-groups", "ternary:bits=1.58,group_size=16,scale_dtype=float16", (3, 40)),
]


def make(name: str, text: str, shape: tuple[int, int]) -> dict:
    """One vector as the object that is written."""
    format = parse_format(text)
    rows, columns = shape
    count = 3 if format.name == "ternary" else 2**format.bits
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    mixed = ((k + 131 * n + 1) * 2654435761 % 2**32) >> 13
    codes = (k if name.startswith("planes") else mixed) % count
    g = torch.arange(format.groups(columns))[None]
    quantized = Quantized(codes.to(torch.uint8))
    tensors = format.tensors(shape)
    if "_scales" in tensors:
        scales = 0.01 * 1.37 ** ((5 * n + 3 * g) % 11).to(torch.float32)
        quantized.scales = torch.where((n + g) % 5 == 4, 0, scales)
    if "_zeros" in tensors:
        quantized.zeros = ((3 * n + 5 * g + 1) % count).to(torch.float32)
        if tensors["_zeros"][1].is_floating_point:
            quantized.zeros += 0.3
    if "_codebook" in tensors:
        shape_of_levels = tensors["_codebook"][0]
        level = torch.linspace(-1, 1, shape_of_levels[1])[None]
        quantized.levels = level * level.abs().sqrt() + 0.01 * torch.arange(shape_of_levels[0])[:, None]
    if format.name == "nested":
        tables = [torch.linspace(-1, 1, 2**bits) for bits in format.widths]
        quantized.levels = torch.cat([t * t.abs().sqrt() + 0.01 * len(t) for t in tables])[None]
    if "_columns" in tensors:
        quantized.columns = 1.21 ** ((7 * k[0]) % 9 - 4).to(torch.float32)
    stored = format.pack(quantized)
    meant = format.unpack(stored, shape)
    return {
        "name": name,
        "format": format.spec,
        "shape": list(shape),
        "codes": meant.codes.tolist(),
        "scales": None if meant.scales is None else meant.scales.tolist(),
        "zeros": None if meant.zeros is None else meant.zeros.tolist(),
        "levels": None if meant.levels is None else meant.levels.tolist(),
        **({} if meant.columns is None else {"columns": meant.columns.tolist()}),
        "tensors": {
            "weight" + suffix: {
                "dtype": DTYPES[t.dtype],
                "shape": list(t.shape),
                "hex": t.contiguous().view(torch.uint8).numpy().tobytes().hex(),
            }
            for suffix, t in stored.items()
        },
        "values": format.decode(meant).tolist(),
    }


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(make(*vector)) for vector in VECTORS)
    FILE.write_text(f"[\n{lines}\n]\n")
