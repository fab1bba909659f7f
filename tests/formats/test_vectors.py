"""The test vectors against a reader and a writer written from ``docs/format.md`` alone.

Nothing in the first half of this file calls the library: codes are read field by field in plain Python, as somebody
would who ports the format to another language. The second half compares it, and the library, with the vectors.
"""

import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_lowbit.formats import Quantized, parse_format

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
DEFAULTS = {
    "int": {"group_size": "64", "scale_dtype": "float16", "symmetric": "False", "zeros": "int"},
    "nf": {"group_size": "64", "scale_dtype": "log8"},
    "fp4": {"group_size": "32", "scale_dtype": "e8m0"},
    "codebook": {"group_size": "64", "scale_dtype": "log8", "codebook": "tensor"},
    "ternary": {"group_size": "-1", "scale_dtype": "log8"},
    "nested": {"group_size": "32", "scale_dtype": "e4m3"},
    "int_columns": {"group_size": "-1", "scale_dtype": "float16", "symmetric": "True", "zeros": "int"},
}
NF = {
    2: "-1 0 0.435818166 1",
    3: "-1 -0.535022736 -0.246931434 0 0.18333748 0.381993949 0.622985721 1",
    4: "-1 -0.696192801 -0.525072932 -0.394917428 -0.284441322 -0.1847734 -0.0910499766 0 "
    "0.0795803145 0.160930142 0.246112257 0.337915123 0.44070974 0.562616885 0.722956657 1",
}
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


class Port:
    """A port of the document: one packed weight, both ways."""

    def __init__(self, vector):
        self.name, _, options = vector["format"].partition(":")
        self.options = DEFAULTS[self.name] | dict(item.split("=") for item in options.split(","))
        self.rows, self.columns = vector["shape"]
        self.tensors = vector["tensors"]
        self.bits = 2 if self.name == "ternary" else int(self.options["bits"])
        size = int(self.options["group_size"])
        self.size = self.columns if size == -1 else size
        self.groups = -(-self.columns // self.size)

    def raw(self, name):
        return bytes.fromhex(self.tensors[name]["hex"])

    def numbers(self, name):
        """A tensor as rows of Python numbers, decoded byte by byte."""
        dtype, shape, data = self.tensors[name]["dtype"], self.tensors[name]["shape"], self.raw(name)
        if dtype == "BF16":  # the upper half of a float32
            flat = [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
        else:
            code = {"I16": "H", "U8": "B", "F16": "e", "F32": "f"}[dtype]
            flat = [value for (value,) in struct.iter_unpack("<" + code, data)]
        if len(shape) == 1:
            return flat
        return [flat[r * shape[1] : (r + 1) * shape[1]] for r in range(shape[0])]

    # -- codes ---------------------------------------------------------------------------------------------------------

    def read_codes(self):
        if self.name == "nested":
            parts = [("weight", 2), *((f"weight_bit{b}", 1) for b in range(3, self.bits + 1))]
            codes = [[0] * self.columns for _ in range(self.rows)]
            for name, plane in parts:
                fields = [self.read_planes(row, [plane]) for row in self.numbers(name)]
                codes = [
                    [c << plane | f for c, f in zip(*rows, strict=True)] for rows in zip(codes, fields, strict=True)
                ]
            return codes
        read = self.read_ternary if self.name == "ternary" else self.read_planes
        return [read(row) for row in self.numbers("weight")]

    def read_planes(self, row, planes=None):
        blocks, codes = -(-self.columns // 64), []
        for k in range(self.columns):
            block, i, code, start = k // 64, k % 64, 0, 0
            for plane in planes or PLANES[self.bits]:
                lanes = 4 * plane
                word = row[start + lanes * block + i % lanes]
                code = code << plane | word >> (plane * (i // lanes)) & (2**plane - 1)
                start += lanes * blocks
            codes.append(code)
        return codes

    def read_ternary(self, row):
        lanes = -(-self.columns // 10)
        return [(3 * (row[k % lanes] * 3 ** (k // lanes) % 65536)) // 65536 for k in range(self.columns)]

    def write_codes(self, codes, bits=None):
        if self.name == "nested":  # the first two bits, or that number `bits`
            shift, self.bits, width = self.bits - (bits or 2), 1 if bits else 2, self.bits
            cut = [[code >> shift & (2**self.bits - 1) for code in row] for row in codes]
            written = b"".join(struct.pack("<H", lane) for row in cut for lane in self.write_planes(row))
            self.bits = width
            return written
        write = self.write_ternary if self.name == "ternary" else self.write_planes
        return b"".join(struct.pack("<H", lane) for row in codes for lane in write(row))

    def write_planes(self, codes):
        blocks, words, low = -(-self.columns // 64), [], self.bits
        for plane in PLANES[self.bits]:
            lanes, low = 4 * plane, low - plane
            words_of_plane = [0] * (lanes * blocks)
            for k, code in enumerate(codes):
                field = code >> low & (2**plane - 1)
                words_of_plane[lanes * (k // 64) + k % 64 % lanes] |= field << (plane * (k % 64 // lanes))
            words += words_of_plane
        return words

    def write_ternary(self, codes):
        lanes = -(-self.columns // 10)
        numbers = [0] * lanes
        for k in range(10 * lanes):
            digit = codes[k] if k < self.columns else 0
            numbers[k % lanes] = 3 * numbers[k % lanes] + digit
        return [-(-number * 65536 // 59049) for number in numbers]

    # -- companions ----------------------------------------------------------------------------------------------------

    def scale_of(self, stored):
        """The decoded scale of one stored one, as an exact or double precision number."""
        kind = self.options["scale_dtype"]
        if kind == "log8":
            low, step = (np.float32(v) for v in self.numbers("weight_scales_range"))
            return 0.0 if stored == 0 else 2.0 ** float(low + step * np.float32(stored - 1))
        if kind == "e8m0":
            return 2.0 ** (stored - 127)
        if kind == "e4m3":
            exponent, mantissa = stored >> 3 & 15, stored & 7
            value = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
            return float(np.float32(value) * np.float32(self.numbers("weight_scales_range")[0]))
        return stored

    def read_scales(self):
        if "weight_scales" not in self.tensors:
            return None
        return [[self.scale_of(stored) for stored in row] for row in self.numbers("weight_scales")]

    def write_scales(self, scales):
        """Bytes of already representable ``scales``: the stored number whose meaning is nearest."""
        kind = self.options["scale_dtype"]
        flat = [s for row in scales for s in row]
        if kind == "bfloat16":
            return b"".join(struct.pack("<f", s)[2:] for s in flat)
        if kind in ("float16", "float32"):
            return b"".join(struct.pack("<e" if kind == "float16" else "<f", s) for s in flat)
        grid = [self.scale_of(q) for q in range({"log8": 256, "e8m0": 255, "e4m3": 127}[kind])]
        return bytes(min(range(len(grid)), key=lambda q: abs(Fraction(grid[q]) - Fraction(s))) for s in flat)

    def read_zeros(self):
        if "weight_zeros" not in self.tensors:
            return None
        rows = self.numbers("weight_zeros")
        if self.options["zeros"] == "float":
            return rows
        stream = [[byte >> i & 1 for byte in row for i in range(8)] for row in rows]
        return [
            [sum(bits[c * self.bits + i] << i for i in range(self.bits)) for c in range(self.groups)] for bits in stream
        ]

    def write_zeros(self, zeros):
        if self.options["zeros"] == "float":
            return b"".join(struct.pack("<e", z) for row in zeros for z in row)
        written = b""
        for row in zeros:
            stream = sum(int(z) << (c * self.bits) for c, z in enumerate(row))
            written += stream.to_bytes(-(-self.groups * self.bits // 8), "little")
        return written

    def read_levels(self):
        if self.name == "nested":
            return [[level for b in range(2, self.bits + 1) for level in self.numbers(f"weight_levels{b}")[0]]]
        return self.numbers("weight_codebook") if "weight_codebook" in self.tensors else None

    # -- values --------------------------------------------------------------------------------------------------------

    def values(self, codes, scales, zeros, levels):
        f32, result = np.float32, []
        for n, row in enumerate(codes):
            out = []
            for k, code in enumerate(row):
                g = k // self.size
                if self.name in ("int", "int_columns"):
                    middle = 0.5 if self.bits == 1 else 2 ** (self.bits - 1)
                    value = f32(code) - f32(middle if zeros is None else zeros[n][g])
                elif self.name == "ternary":
                    value = f32(code - 1)
                elif self.name == "codebook":
                    value = f32(levels[n if self.options["codebook"] == "row" else 0][code])
                elif self.name == "nested":
                    value = f32(levels[0][code - 2**self.bits])
                else:
                    value = f32(FP4[code] if self.name == "fp4" else float(NF[self.bits].split()[code]))
                value = value if scales is None else value * f32(scales[n][g])
                if self.name == "int_columns":
                    value *= f32(self.numbers("weight_columns")[k])
                out.append(float(value))
            result.append(out)
        return result


@pytest.fixture(params=VECTORS, ids=lambda v: v["name"])
def vector(request):
    return request.param


def scale_tolerance(port):
    """What the document allows: only log8 is not exact."""
    if port.options["scale_dtype"] != "log8" or "weight_scales_range" not in port.tensors:
        return 0
    low, step = port.numbers("weight_scales_range")
    return 2.0**-23 * (1 + max(abs(low), abs(low + 254 * step)))


def test_a_port_reads_what_the_library_wrote(vector):
    port = Port(vector)
    assert port.read_codes() == vector["codes"]
    assert port.read_zeros() == vector["zeros"]
    levels = port.read_levels()
    assert levels == vector["levels"]
    scales = port.read_scales()
    if vector["scales"] is None:
        assert scales is None
    else:
        np.testing.assert_allclose(scales, vector["scales"], rtol=scale_tolerance(port), atol=0)
    # With the vector's own scales the arithmetic is exactly specified.
    assert port.values(vector["codes"], vector["scales"], vector["zeros"], levels) == vector["values"]


def test_a_port_writes_the_same_bytes(vector):
    port = Port(vector)
    assert port.write_codes(vector["codes"]) == port.raw("weight")
    if vector["scales"] is not None:
        assert port.write_scales(vector["scales"]) == port.raw("weight_scales")
    if vector["zeros"] is not None:
        assert port.write_zeros(vector["zeros"]) == port.raw("weight_zeros")
    if vector["levels"] is not None:
        flat = [level for row in vector["levels"] for level in row]
        names = [name for name in port.tensors if "codebook" in name or "levels" in name]
        assert b"".join(struct.pack("<e", level) for level in flat) == b"".join(map(port.raw, names))
    for name in [name for name in port.tensors if "_bit" in name]:
        assert port.write_codes(vector["codes"], int(name[-1])) == port.raw(name)


def stored_tensors(vector):
    dtypes = {
        "I16": torch.int16,
        "U8": torch.uint8,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
    }
    return {
        name.removeprefix("weight"): torch.frombuffer(bytearray.fromhex(t["hex"]), dtype=torch.uint8)
        .view(dtypes[t["dtype"]])
        .view(t["shape"])
        for name, t in vector["tensors"].items()
    }


def test_the_library_reads_the_vectors(vector):
    format, stored, shape = parse_format(vector["format"]), stored_tensors(vector), tuple(vector["shape"])
    assert format.spec == vector["format"]
    assert {s: (tuple(t.shape), t.dtype) for s, t in stored.items()} == format.tensors(shape)
    meant = format.unpack(stored, shape)
    assert meant.codes.tolist() == vector["codes"]
    for name in ("zeros", "levels"):
        tensor = getattr(meant, name)
        assert (None if tensor is None else tensor.tolist()) == vector[name]
    tolerance = scale_tolerance(Port(vector))
    if vector["scales"] is not None:
        np.testing.assert_allclose(meant.scales.tolist(), vector["scales"], rtol=tolerance, atol=0)
    # A value is a product with a scale, rounded once: half a unit more.
    values = format.dequantize(stored, shape).tolist()
    np.testing.assert_allclose(values, vector["values"], rtol=tolerance + (2.0**-23 if tolerance else 0), atol=0)


def test_the_library_writes_the_vectors(vector):
    def tensor(name, dtype=torch.float32):
        return None if vector[name] is None else torch.tensor(vector[name], dtype=dtype)

    quantized = Quantized(tensor("codes", torch.uint8), tensor("scales"), tensor("zeros"), tensor("levels"))
    quantized.columns = tensor("columns") if "columns" in vector else None
    stored = parse_format(vector["format"]).pack(quantized)
    for suffix, wanted in stored_tensors(vector).items():
        if suffix == "_scales_range":  # found again from the decoded scales, not copied
            torch.testing.assert_close(stored[suffix], wanted, rtol=scale_tolerance(Port(vector)) or 2.0**-22, atol=0)
        else:
            assert torch.equal(stored[suffix], wanted), suffix


def test_the_vectors_cover_every_format_width_and_codec():
    ports = [Port(v) for v in VECTORS]
    assert {p.name for p in ports} == set(DEFAULTS)
    assert {p.bits for p in ports if p.name == "int"} == set(range(1, 9))
    assert {p.bits for p in ports if p.name == "nf"} == {2, 3, 4}
    codecs = {p.options["scale_dtype"] for p in ports if "weight_scales" in p.tensors}
    assert codecs == {"float16", "bfloat16", "float32", "log8", "e8m0", "e4m3"}


def test_the_document_shows_the_vectors():
    text, by_name = DOCUMENT.read_text(), {v["name"]: v["tensors"] for v in VECTORS}
    for bits in (1, 2, 3, 4):
        assert f"{bits}  {by_name[f'planes-{bits}']['weight']['hex']}\n" in text
    ternary = next(v for v in VECTORS if v["name"] == "ternary-row")
    assert f"codes  {' '.join(map(str, ternary['codes'][0]))}\n" in text
    assert f"bytes  {ternary['tensors']['weight']['hex'][:12]}\n" in text
    first_row = by_name["int-3"]["weight_zeros"]["hex"][:4]
    assert f"`{first_row[:2]} {first_row[2:]}`" in text
    for levels in NF.values():
        assert levels in " ".join(text.split())
