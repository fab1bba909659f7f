"""Properties of pack and unpack over all widths, formats, shapes, groups and scale codecs.

Codes, zero points and levels must come back exactly. Scales may be rounded by storage: exactly for the float dtypes
and ``e8m0``; for ``log8`` within a step of its grid, ``e4m3`` within half a unit of its three mantissa bits.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_lowbit.formats import FORMATS, Quantized, parse_format
from hf_lowbit.formats.codebook import CodebookFormat
from hf_lowbit.formats.fp4 import MAGNITUDES, NEGATIVE_ZERO, Fp4Format
from hf_lowbit.formats.integer import MAX_FLOAT_ZERO, IntFormat
from hf_lowbit.formats.nested import NestedFormat
from hf_lowbit.formats.nf import NormalFloatFormat, normal_float_levels
from hf_lowbit.formats.planes import (
    bytes_per_row,
    lanes_per_row,
    pack_planes,
    pack_stream,
    unpack_planes,
    unpack_stream,
)
from hf_lowbit.formats.scales import SCALE_DTYPES, decode_scales, encode_scales, storable
from hf_lowbit.formats.ternary import TernaryFormat

GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
COLUMNS = st.one_of(st.sampled_from((1, 2, 9, 10, 11, 63, 64, 65, 128, 577)), st.integers(1, 300))
WIDTHS = st.integers(1, 8)
# N x K of the linear layers of SmolLM2-135M.
SMOLLM2_SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))


@st.composite
def formats(draw):
    name = draw(st.sampled_from(sorted(FORMATS)))
    common = {"group_size": draw(st.sampled_from(GROUPS)), "scale_dtype": draw(st.sampled_from(SCALE_DTYPES))}
    if name in ("int", "int_columns"):
        zeros = draw(st.sampled_from(("int", "float")))
        return FORMATS[name](draw(WIDTHS), symmetric=draw(st.booleans()), zeros=zeros, **common)
    if name == "nf":
        return NormalFloatFormat(draw(st.sampled_from((2, 3, 4))), **common)
    if name == "fp4":
        return Fp4Format(**common)
    if name == "ternary":
        return TernaryFormat(**common)
    if name == "nested":
        return NestedFormat(draw(st.integers(2, 8)), **common)
    if draw(st.booleans()):
        return CodebookFormat(draw(WIDTHS), **common)
    return CodebookFormat(draw(WIDTHS), group_size=-1, scale_dtype=common["scale_dtype"], codebook="row")


def code_count(format):
    return 3 if format.name == "ternary" else 2**format.bits


def random_quantized(format, shape, seed):
    """A :class:`Quantized` of random codes whose companions are storable."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    tensors, groups = format.tensors(shape), format.groups(columns)
    codes = torch.randint(0, code_count(format), shape, generator=generator, dtype=torch.uint8)
    scales = zeros = levels = None
    if "_scales" in tensors:
        scales = torch.exp2(torch.rand(rows, groups, generator=generator) * 8 - 10)
        scales[torch.rand(rows, groups, generator=generator) < 0.1] = 0
        scales = format.storable_scales(scales)
    if "_zeros" in tensors:
        zeros = format.storable_zeros(torch.rand(rows, groups, generator=generator) * format.max_code)
    if "_codebook" in tensors:
        levels = torch.randn(tensors["_codebook"][0], generator=generator).sort(-1).values
        levels = format.storable_levels(levels)
    if format.name == "nested":
        tables = [torch.randn(1, 2**bits, generator=generator).sort(-1).values for bits in format.widths]
        levels = format.codebook.storable_levels(torch.cat(tables, 1))
    columns = torch.rand(shape[1], generator=generator).half().float() if "_columns" in tensors else None
    return Quantized(codes, scales, zeros, levels, columns)


@settings(deadline=None, max_examples=150)
@given(format=formats(), rows=st.integers(1, 5), columns=COLUMNS, seed=st.integers(0, 2**16))
def test_pack_and_unpack_are_inverse_and_take_the_stated_bytes(format, rows, columns, seed):
    shape = (rows, columns)
    quantized = random_quantized(format, shape, seed)
    before = [None if t is None else t.clone() for t in vars(quantized).values()]
    stored = format.pack(quantized)

    described = {suffix: (tuple(t.shape), t.dtype) for suffix, t in stored.items()}
    assert list(described.items()) == list(format.tensors(shape).items())
    assert format.suffixes() == tuple(stored)[1:]
    assert format.nbytes(shape) == sum(t.nbytes for t in stored.values())
    assert format.bits_per_weight(shape) == 8 * sum(t.nbytes for t in stored.values()) / (rows * columns)

    again = format.unpack(stored, shape)
    assert torch.equal(again.codes, quantized.codes)
    for name in ("zeros", "levels", "columns"):
        wanted, got = getattr(quantized, name), getattr(again, name)
        assert (got is None) == (wanted is None) and (wanted is None or torch.equal(got, wanted))
    if quantized.scales is None:
        assert again.scales is None
    elif format.scale_dtype in ("log8", "e4m3"):
        # Scales that are storable already move by the rounding of the range that is found again: a few float32 steps.
        torch.testing.assert_close(again.scales, quantized.scales, rtol=2.0**-19, atol=0)
    else:
        assert torch.equal(again.scales, quantized.scales)
    for tensor, copy in zip(vars(quantized).values(), before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "pack changed its input"


@settings(deadline=None, max_examples=60)
@given(format=formats(), columns=COLUMNS, seed=st.integers(0, 2**16), data=st.data())
def test_selected_rows_dequantize_to_the_same_bits(format, columns, seed, data):
    shape = (6, columns)
    stored = format.pack(random_quantized(format, shape, seed))
    whole = format.dequantize(stored, shape)
    rows = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    some = format.dequantize(format.select_rows(stored, torch.tensor(rows)), (len(rows), columns))
    assert torch.equal(some, whole[rows])
    part = slice(1, 4)
    assert torch.equal(format.dequantize(format.select_rows(stored, part), (3, columns)), whole[part])


@settings(deadline=None, max_examples=60)
@given(format=formats(), rows=st.integers(1, 5), columns=COLUMNS)
def test_meta_tensors_have_the_same_layout(format, rows, columns):
    shape = (rows, columns)
    real = random_quantized(format, shape, 0)
    meta = Quantized(*(None if t is None else t.to("meta") for t in vars(real).values()))
    stored, empty = format.pack(meta), format.empty(shape, device="meta")
    for tensors in (stored, empty):
        assert {s: (tuple(t.shape), t.dtype) for s, t in tensors.items()} == format.tensors(shape)
        assert all(t.is_meta for t in tensors.values())
    assert format.dequantize(stored, shape, torch.bfloat16).shape == shape
    normal_float_levels.cache_clear()
    with torch.device("meta"):  # as while a model's skeleton is built: nothing of it may leak into (cached) tables
        values = format.dequantize(format.pack(real), shape)
    assert torch.equal(values, format.dequantize(format.pack(real), shape))


@settings(deadline=None, max_examples=100)
@given(format=formats())
def test_the_text_of_a_format_is_read_back(format):
    assert parse_format(format.spec) == format


@pytest.mark.parametrize(
    "text, message",
    [
        ("int4:bits=4", "unknown format 'int4': this version reads int, nf, fp4, codebook, ternary"),
        ("int:bits=4,group=64", "'int' has no option 'group', it has bits, group_size"),
        ("int:bits=four", "'four' is not a value of 'bits'"),
        ("int:bits=4,symmetric=yes", "'yes' is not a value of 'symmetric'"),
        ("int:bits=4,bits=3", "gives 'bits' twice"),
        ("int:group_size=64", "does not say its bits"),
        ("int:bits=9", "takes bits from 1 to 8, not 9"),
        ("int:bits=4,group_size=48", "group_size=48 is not possible: use 16, 32, 64"),
        ("int:bits=4,scale_dtype=int8", "scale_dtype='int8' is unknown: use one of float16"),
        ("int:bits=4,zeros=none", "zeros='none' is unknown: use 'int' or 'float'"),
        ("nf:bits=5", "takes bits=2, 3 or 4, not 5"),
        ("fp4:bits=3", "has 4 bits, not 3"),
        ("ternary:bits=2", "has bits=1.58, not 2.0"),
        ("codebook:bits=4,codebook=column", "codebook='column' is unknown: use 'tensor' or 'row'"),
        ("codebook:bits=4,group_size=64,codebook=row", "use group_size='row', not 64"),
    ],
)
def test_a_wrong_text_is_refused_with_its_reason(text, message):
    with pytest.raises(ValueError) as caught:
        parse_format(text)
    assert message in str(caught.value)


# -- planes and streams ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(bits=WIDTHS, rows=st.integers(1, 4), columns=COLUMNS, seed=st.integers(0, 2**16), transposed=st.booleans())
def test_planes_hold_any_codes(bits, rows, columns, seed, transposed):
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if transposed else (rows, columns)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    codes = codes.T if transposed else codes
    packed = pack_planes(codes, bits)
    assert packed.shape == (rows, lanes_per_row(columns, bits))
    assert torch.equal(unpack_planes(packed, bits, columns), codes)
    padded = -(-columns // 64) * 64
    assert lanes_per_row(columns, bits) * 16 == padded * bits, "planes have no padding but that of the last block"
    assert (unpack_planes(packed, bits, padded)[:, columns:] == 0).all()


@settings(deadline=None, max_examples=100)
@given(bits=WIDTHS, rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_streams_hold_any_values_densely(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = pack_stream(values, bits)
    assert packed.shape == (rows, bytes_per_row(count, bits)) == (rows, math.ceil(count * bits / 8))
    assert torch.equal(unpack_stream(packed, bits, count), values)


def test_every_ternary_lane_is_read_exactly():
    """All 3**10 numbers that a lane can spell."""
    numbers = torch.arange(3**10)
    codes = torch.stack([numbers // 3 ** (9 - j) % 3 for j in range(10)], dim=1).to(torch.uint8)
    format = TernaryFormat()
    packed = format.pack_codes(codes)
    assert packed.shape == (3**10, 1)
    assert torch.equal(format.unpack_codes(packed, 10), codes)


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scales_are_rounded_no_further_than_their_codec_says(scale_dtype):
    scales = torch.exp2(torch.linspace(-14, 2, 1000)).reshape(10, 100)
    ratio = storable(scales, scale_dtype) / scales
    low, high = {
        # Half a unit of the mantissa, either way.
        "float32": (1, 1),
        "float16": (1 - 2**-11, 1 + 2**-11),
        "bfloat16": (1 - 2**-8, 1 + 2**-8),
        # Up by less than one step of the grid: 16 octaves in 254 steps; a thousandth of a step is left below.
        "log8": (2 ** (-0.001 * 16 / 254) - 2**-20, 2 ** (16 / 254) + 2**-20),
        "e8m0": (1, 2),
        # Three mantissa bits; below 2**-6 of a base of 4/448, steps of 2**-9 * base.
        "e4m3": (1 - 2**-4, 1 + 2**-4),
    }[scale_dtype]
    if scale_dtype == "e4m3":
        normal = scales > 2**-6 * 4 / 448
        assert ((storable(scales, scale_dtype) - scales).abs()[~normal] <= 2**-10 * 4 / 448 * (1 + 2**-20)).all()
        ratio = ratio[normal]
    assert ratio.min() >= low and ratio.max() <= high


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32", "log8", "e4m3"])
def test_a_zero_scale_stays_zero(scale_dtype):
    scales = torch.tensor([[0.0, 0.25], [0.5, 0.0]])
    assert torch.equal(storable(scales, scale_dtype) == 0, scales == 0)
    assert (storable(torch.zeros(2, 3), scale_dtype) == 0).all()


def test_log8_keeps_24_octaves():
    scales = torch.exp2(torch.tensor([[0.0, -10, -23.9, -24, -40]]))
    stored = storable(scales, "log8")
    ratio = torch.log2(stored / scales)[0]
    step = 24 / 254
    assert (ratio[:4] >= -0.001 * step - 1e-5).all() and (ratio[:4] <= step + 1e-5).all()
    assert abs(torch.log2(stored[0, 4]).item() + 24) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_scale_that_does_not_fit_is_an_error(dtype):
    with pytest.raises(ValueError, match=f"does not fit {dtype}; use scale_dtype='float32'"):
        encode_scales(torch.tensor([[3.4e38 * 10]]), dtype)


def test_scales_that_vanish_are_an_error():
    with pytest.raises(ValueError, match="scales of at most 1e-07 vanish in float16; use scale_dtype='log8'"):
        encode_scales(torch.tensor([[1e-9, -1e-7, 0]]), "float16")
    for scales in (torch.zeros(1, 3), torch.tensor([[1e-9, 0.1]])):  # nothing is lost, or nothing that matters
        encode_scales(scales, "float16")


def test_e8m0_reads_every_code():
    codes = torch.arange(255, dtype=torch.uint8)[None]
    assert decode_scales({"_scales": codes}, "e8m0")[0].tolist() == [2.0 ** (q - 127) for q in range(255)]


def test_a_level_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"a level of 1e\+05 does not fit float16; use codebook='tensor'"):
        CodebookFormat(2, group_size=-1, codebook="row").storable_levels(torch.tensor([[-1.0, 0, 1, 1e5]]))


# -- the grids ---------------------------------------------------------------------------------------------------------


def test_nf4_is_qloras_table():
    """The published NF4 levels (Dettmers et al., 2023, appendix E; the same as in the authors' bitsandbytes)."""
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    # The paper's table was computed in float32 from an outer probability written with seven digits.
    torch.testing.assert_close(normal_float_levels(4)[0], torch.tensor(published), rtol=0, atol=5e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_levels_are_ascending_with_an_exact_zero_and_one(bits):
    levels = normal_float_levels(bits)[0]
    assert levels.shape == (2**bits,) and (levels.diff() > 0).all()
    assert levels[0] == -1 and levels[-1] == 1 and levels[2 ** (bits - 1) - 1] == 0


def mx_weight(rows=8, columns=96, seed=0):
    """A weight that lies on MXFP4's grid: E2M1 values times a power of two for each block of 32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    exponents = torch.randint(-9, 3, (rows, columns // 32), generator=generator).repeat_interleave(32, dim=1)
    return torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])[codes] * torch.exp2(exponents.float())


def test_mxfp4_round_trip_is_exact_on_its_own_grid():
    format, weight = Fp4Format(group_size=32, scale_dtype="e8m0"), mx_weight()
    scales, _ = format.by_group(format.fit, weight)
    stored = format.pack(format.encode(weight, scales))
    assert torch.equal(format.dequantize(stored, tuple(weight.shape)), weight)
    assert format.bits_per_weight((8, 128)) == 4.25


@pytest.mark.parametrize("magnitude", MAGNITUDES[1:])
def test_mxfp4_is_exact_whatever_the_largest_value_of_a_block(magnitude):
    values = [m for m in MAGNITUDES if m <= magnitude]
    weight = torch.tensor([[*values, *(-v for v in values)] + [magnitude] * (32 - 2 * len(values))]) * 2.0**-7
    format = Fp4Format()
    stored = format.pack(format.encode(weight, format.by_group(format.fit, weight)[0]))
    assert torch.equal(format.dequantize(stored, (1, 32)), weight)


def test_fp4_reads_negative_zero_and_never_writes_it():
    format = Fp4Format(scale_dtype="float32")
    assert format.decode(Quantized(torch.tensor([[NEGATIVE_ZERO]], dtype=torch.uint8), torch.ones(1, 1))).item() == 0
    weight = torch.linspace(-6, 6, 4097)[None]
    codes = format.encode(weight, torch.ones(1, format.groups(4097))).codes
    assert (codes != NEGATIVE_ZERO).all()


@settings(deadline=None, max_examples=80)
@given(format=formats(), rows=st.integers(1, 3), columns=COLUMNS, seed=st.integers(0, 2**16))
def test_encode_is_the_nearest_point_of_the_grid(format, rows, columns, seed):
    """Against a search over all codes; ties and points that float32 cannot tell apart may go either way."""
    assume(format.name != "int_columns")  # which is encoded as "int", its columns taken off before
    quantized = random_quantized(format, (rows, columns), seed)
    weight = format.decode(quantized) + 0.01 * torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed + 1)
    )
    encoded = format.encode(weight, quantized.scales, quantized.zeros, quantized.levels)
    error = (format.decode(encoded) - weight).abs()
    candidates = [
        Quantized(torch.full_like(quantized.codes, c), encoded.scales, encoded.zeros, encoded.levels)
        for c in range(code_count(format))
    ]
    best = torch.stack([(format.decode(c) - weight).abs() for c in candidates]).amin(0)
    # A code is computed as w * (1/s) + z: each step adds a relative 2**-24 of a number at most the grid's width.
    width = weight.abs().max() + torch.stack([format.decode(c).abs() for c in candidates]).max()
    assert ((error - best) <= 8 * 2.0**-24 * width).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", ["int", "float"])
@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 0.01, -300.0])
def test_constant_groups_are_exact_up_to_the_scale(bits, zeros, constant):
    format = IntFormat(bits, zeros=zeros)
    weight = torch.full((2, 100), constant)
    grid = format.by_group(format.fit, weight)
    error = (format.decode(format.encode(weight, *grid)) - weight).abs().max()
    assert error <= abs(constant) * 2**-11, "half a unit of a float16 scale"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [0.02, -1.0, 40.0])
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5, 1e-7])
def test_a_float_zero_point_copes_with_groups_far_from_zero(bits, offset, spread):
    format = IntFormat(bits, zeros="float", scale_dtype="float32")
    weight = offset * (1 + spread * torch.linspace(-1, 1, 64))[None]
    error = (format.decode(format.encode(weight, *format.by_group(format.fit, weight))) - weight).abs().max()
    step = max(2 * spread / (2**bits - 1), 1 / MAX_FLOAT_ZERO) * abs(offset)
    # Half a step of rounding; as much again for a zero point near 2**11 in float16; one part in a hundred for float32.
    assert error <= 1.01 * step


def test_ternary_is_at_most_1_63_bits_on_real_shapes_whole():
    for shape in SMOLLM2_SHAPES:
        assert TernaryFormat().bits_per_weight(shape) <= 1.63, shape


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_scales_cost_at_most_0_13_bits_at_groups_of_64(bits):
    for shape in SMOLLM2_SHAPES:
        format = NormalFloatFormat(bits)
        assert format.group_size == 64
        assert format.bits_per_weight(shape) - bits <= 0.13, shape


@pytest.mark.parametrize(
    "format, shape, nbytes",
    [
        (IntFormat(4, symmetric=True), (3, 64), 3 * (32 + 2)),
        (IntFormat(4, symmetric=True), (3, 65), 3 * (64 + 4)),  # a second block and group for one weight
        (IntFormat(3, group_size=32), (1, 577), 10 * 24 + 2 * 19 + 8),  # 19 zeros of 3 bits are 57 bits
        (IntFormat(4, zeros="float"), (1, 64), 32 + 2 + 2),
        (NormalFloatFormat(2), (5, 1), 5 * (16 + 1) + 8),
        (TernaryFormat(), (2, 21), 2 * (6 + 1) + 8),
        (CodebookFormat(3, group_size=-1, codebook="row"), (4, 64), 4 * (24 + 16)),
        (Fp4Format(group_size=16, scale_dtype="e4m3"), (1, 64), 32 + 4 + 4),
    ],
)
def test_bytes_by_hand_padding_included(format, shape, nbytes):
    assert format.nbytes(shape) == nbytes
