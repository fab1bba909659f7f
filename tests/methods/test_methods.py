"""Every method with every format it makes: claims, on synthetic weights, counted as stored.

Errors are relative squared errors of the weight that a reader gets back from the packed tensors. The claims about
the real model are measured elsewhere; here they must hold on normal weights and on heavy-tailed ones (Student's t with
three degrees of freedom), for which every method has to decide what to do about outliers.
"""

import functools
import itertools
import re

import pytest
import torch

from hf_lowbit.formats import parse_format
from hf_lowbit.methods import base, ecsq, lloyd, make_method, methods

ROWS, COLUMNS = 48, 577  # the last group is a single weight

# Formats by name, with the widths that exist; "{}" is the width.
FORMATS = {
    "int": [
        ("int:bits={},group_size=64", range(1, 9)),
        ("int:bits={},group_size=64,zeros=float", range(1, 9)),
        ("int:bits={},group_size=128,symmetric=True", range(1, 9)),
        ("int:bits={},group_size=32,symmetric=True,scale_dtype=log8", range(1, 9)),
        ("int:bits={},group_size=-1,scale_dtype=bfloat16", range(1, 9)),
    ],
    "nf": [("nf:bits={}", (2, 3, 4)), ("nf:bits={},group_size=-1,scale_dtype=float32", (2, 3, 4))],
    "fp4": [("fp4:bits={}", (4,)), ("fp4:bits={},group_size=16,scale_dtype=e4m3", (4,))],
    "ternary": [("ternary:bits={}", (1.58,)), ("ternary:bits={},group_size=64,scale_dtype=float16", (1.58,))],
    "codebook": [
        ("codebook:bits={}", range(1, 9)),
        ("codebook:bits={},group_size=-1,codebook=row", range(1, 9)),
    ],
}
# Of methods that do not make every format of a name.
OWN_FORMATS = {
    "ecsq": {"int": [("int:bits={},group_size=-1,symmetric=True", range(2, 9))]},
    "nested": {"nested": [("nested:bits={}", range(2, 9)), ("nested:bits={},group_size=64", range(2, 9))]},
}
# Options worth a case of their own, beside the defaults.
OPTIONS = {"rtn": [{"range": "minmax"}], "hqq": [{"fit_scale": False}]}

FAMILIES = [
    pytest.param(name, options, text, widths, id=f"{name}-{'-'.join(map(str, options.values()))}-{text}")
    for name, cls in sorted(methods().items())
    if not cls.needs_calibration
    for options in ({}, *OPTIONS.get(name, ()))
    for format in cls.formats
    for text, widths in OWN_FORMATS.get(name, FORMATS)[format]
]
# One width each: the middle one.
CASES = [
    pytest.param(name, options, text.format(widths[len(widths) // 2]), id=case.id)
    for case in FAMILIES
    for name, options, text, widths in [case.values]
]


@functools.cache
def weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    if kind == "normal":
        return normal
    chi = torch.randn(3, ROWS, COLUMNS, generator=generator).square().sum(0)
    return normal / (chi / 3).sqrt()


def restored(weight, method, format):
    """What a reader gets back."""
    shape = tuple(weight.shape)
    return format.dequantize(format.pack(method.quantize(weight, format)), shape)


@functools.cache
def error(kind: str, name: str, text: str, **options) -> float:
    weight = weights(kind)
    got = restored(weight, make_method(name, options), parse_format(text))
    return ((got - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name, options, text, widths", FAMILIES)
def test_more_bits_never_hurt(kind, name, options, text, widths):
    if name == "ecsq":
        pytest.skip("its bits are bits_stored, not the width in memory: see test_ecsq.py")
    if options == {"range": "minmax"} and "symmetric" in text:
        widths = range(2, 9)  # at one bit there is no range to span: the scale is the mean magnitude, which is better
    errors = [error(kind, name, text.format(bits), **options) for bits in widths]
    assert all(more <= fewer for fewer, more in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize(
    "text", [t.format(b) for name in methods()["rtn"].formats for t, widths in FORMATS[name] for b in widths]
)
def test_the_mse_range_is_never_worse_than_minmax(kind, text):
    if not parse_format(text).rounds_scales_alone:
        # The codec moves all scales after the choice, by up to a step of its grid: not this method's doing.
        text += ",scale_dtype=float32" if "scale_dtype" not in text else ""
        text = re.sub(r"scale_dtype=\w+", "scale_dtype=float32", text)
    assert error(kind, "rtn", text, range="mse") <= error(kind, "rtn", text, range="minmax")


@pytest.mark.parametrize("name, options, text", CASES)
def test_the_result_is_sound(name, options, text):
    method, format, weight = make_method(name, options), parse_format(text), weights("heavy").clone()
    quantized = method.quantize(weight, format)
    assert torch.equal(weight, weights("heavy")), "the input was changed"
    assert quantized.codes.shape == weight.shape and quantized.codes.dtype == torch.uint8
    assert quantized.codes.max() < (3 if format.name == "ternary" else 2**format.bits)
    shape = (ROWS, format.groups(COLUMNS))
    for companion in (quantized.scales, quantized.zeros):
        assert companion is None or (companion.shape == shape and companion.dtype == torch.float32)

    # The scales are ones that the format stores. It finds the ranges of log8 and e4m3 again: a few roundings.
    again = format.unpack(format.pack(quantized), (ROWS, COLUMNS))
    exact = format.scale_dtype not in ("log8", "e4m3")
    assert torch.equal(again.codes, quantized.codes)
    for part in ("scales", "zeros", "levels"):
        wanted, got = getattr(quantized, part), getattr(again, part)
        assert (wanted is None) == (got is None)
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=0 if exact else 2.0**-19, atol=0)

    second = make_method(name, options).quantize(weight, format)
    for part in ("codes", "scales", "zeros", "levels"):
        first, other = getattr(quantized, part), getattr(second, part)
        assert (first is None) == (other is None) and (first is None or torch.equal(first, other)), part


@pytest.mark.parametrize("name, options, text", CASES)
def test_chunks_of_rows_change_nothing(monkeypatch, name, options, text):
    method, format, weight = make_method(name, options), parse_format(text), weights("heavy")
    whole = method.quantize(weight, format)
    for module in (base, lloyd, ecsq):
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", 5 * COLUMNS)
    chunked = method.quantize(weight, format)
    for part in ("codes", "scales", "zeros", "levels"):
        first, other = getattr(whole, part), getattr(chunked, part)
        assert (first is None) == (other is None) and (first is None or torch.equal(first, other)), part


@pytest.mark.parametrize("name, options, text", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_quantized_as_its_float32_values(name, options, text, dtype):
    method, format, weight = make_method(name, options), parse_format(text), weights("normal").to(dtype)
    assert torch.equal(restored(weight, method, format), restored(weight.float(), method, format))


@pytest.mark.parametrize("name, options, text", CASES)
def test_zeros_stay_exactly_zero(name, options, text):
    got = restored(torch.zeros(3, COLUMNS), make_method(name, options), parse_format(text))
    assert torch.equal(got, torch.zeros(3, COLUMNS))


@pytest.mark.parametrize("name, options, text", CASES)
def test_a_row_of_zeros_stays_zero_among_others(name, options, text):
    weight = weights("normal").clone()
    weight[5] = 0
    format = parse_format(text)
    assert (restored(weight, make_method(name, options), format)[5] == 0).all()


@pytest.mark.parametrize("constant", [1.0, -0.013, 300.0])
@pytest.mark.parametrize("name, options, text", CASES)
def test_constants_survive(name, options, text, constant):
    weight = torch.full((3, COLUMNS), constant)
    got = restored(weight, make_method(name, options), parse_format(text))
    # A unit of a scale or level: of float16, or of bfloat16; of fp4, half of the gap between 4 and 6.
    relative = 0.2 if text.startswith("fp4") else 2**-8 if "bfloat16" in text else 2**-10
    assert ((got - weight).abs() <= relative * abs(constant)).all()


@pytest.mark.parametrize("name, options, text", CASES)
def test_one_huge_outlier_leaves_other_rows_alone(name, options, text):
    method, format, weight = make_method(name, options), parse_format(text), weights("normal")
    hit = weight.clone()
    hit[7, 100] = 1000.0
    got = restored(hit, method, format)
    assert torch.isfinite(got).all()
    if format.name == "nested" or (format.name == "codebook" and format.codebook == "tensor"):
        return  # the table is shared, and least squares gives it to the outlier
    others = torch.arange(ROWS) != 7
    before = (restored(weight, method, format) - weight)[others].square().sum()
    after = (got - weight)[others].square().sum()
    # What scales share gets coarser: log8 has 254 steps for the 16 octaves up to the outlier, so up to 4.5 % each;
    # e4m3's scales lose mantissa bits (subnormal ones are off by up to a factor of two).
    allowed = {"log8": 1.25, "e4m3": 30}.get(format.scale_dtype, 1)
    assert after <= allowed * before


# -- one method against another ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("range", ["mse", "minmax"])
def test_nf4_beats_symmetric_int4_at_equal_bits_on_normal_weights(range):
    nf, integer = "nf:bits=4", "int:bits=4,symmetric=True,scale_dtype=log8"
    shape = (ROWS, COLUMNS)
    assert parse_format(nf).bits_per_weight(shape) == parse_format(integer).bits_per_weight(shape)
    assert error("normal", "rtn", nf, range=range) < error("normal", "rtn", integer, range=range)
    # Even where the integers pay for float16 scales, whose sign turns the longer side of the grid to the extreme.
    assert error("normal", "rtn", nf, range=range) < error("normal", "rtn", "int:bits=4,symmetric=True", range=range)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_beats_normal_floats_at_equal_bits(kind, bits):
    assert error(kind, "lloyd", f"codebook:bits={bits}") < error(kind, "rtn", f"nf:bits={bits}", range="mse")


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("text", [t for t, _ in FORMATS["int"]])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_its_own_objective(kind, text, bits):
    format, weight = parse_format(text.format(bits)), weights(kind)
    hqq = make_method("hqq")

    def objective(method):
        return (restored(weight, method, format) - weight).abs().pow(hqq.lp_norm).sum()

    assert objective(hqq) < objective(make_method("rtn", {"range": "minmax"}))  # where it starts


@pytest.mark.parametrize("options", [{}, {"range": "minmax"}], ids=["mse", "minmax"])
@pytest.mark.parametrize("largest", range(1, 8))
def test_rtn_is_exact_on_mxfp4s_own_grid(options, largest):
    """Whatever the largest magnitude of a block is, from 0.5 to 6 times its power of two."""
    generator = torch.Generator().manual_seed(0)
    format = parse_format("fp4:bits=4")
    codes = torch.randint(0, largest + 1, (32, 256), generator=generator)
    codes[:, ::32] = largest
    codes += 8 * torch.randint(0, 2, codes.shape, generator=generator)
    exponents = torch.randint(-9, 3, (32, 8), generator=generator).repeat_interleave(32, dim=1)
    weight = format.levels()[0][codes] * torch.exp2(exponents.float())
    assert torch.equal(restored(weight, make_method("rtn", options), format), weight)


# -- the registry ------------------------------------------------------------------------------------------------------


def test_the_table_above_covers_every_method_and_format():
    covered = {(case.values[0], case.values[2].partition(":")[0]) for case in FAMILIES}
    assert covered == {(n, f) for n, cls in methods().items() if not cls.needs_calibration for f in cls.formats}
    assert {"rtn", "hqq", "lloyd"} <= set(methods())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gptqq", {}, "method='gptqq' is unknown: use one of awq, ecsq, gptq, hqq, lloyd, nested, rtn, signround"),
        ("rtn", {"rang": "mse"}, "method 'rtn' has no option 'rang': it takes range"),
        ("rtn", {"range": "max"}, "range='max' is unknown: method 'rtn' takes 'weighted', 'mse' or 'minmax'"),
        ("hqq", {"lp_norm": 0}, "lp_norm=0 is not possible: method 'hqq' takes an exponent above 0, at most 1"),
    ],
)
def test_what_does_not_exist_is_refused(name, options, message):
    with pytest.raises(ValueError) as caught:
        make_method(name, options)
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_are_turned_around_where_scales_take_a_sign(bits):
    """A table with a zero is lopsided: one orientation for all groups costs less than either for each."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 512, generator=generator)
    format = parse_format(f"codebook:bits={bits},group_size=32,scale_dtype=e4m3")
    found = make_method("lloyd").quantize(weight, format)
    groups = weight.view(64, 16, 32)
    expected = torch.where(groups.amax(-1) >= -groups.amin(-1), 1.0, -1.0)
    assert torch.equal(found.scales.sign(), expected)

    assert torch.equal(make_method("lloyd").quantize(-weight, format).codes, found.codes)
    normal, heavy = (error(kind, "lloyd", format.spec) for kind in ("normal", "heavy"))
    finer = format.spec.replace("e4m3", "log8")  # scales without a sign, that lose less by rounding
    assert normal < error("normal", "lloyd", finer) and heavy < error("heavy", "lloyd", finer)
