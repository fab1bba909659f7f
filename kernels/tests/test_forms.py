"""Which form runs: declared, chosen, forced, explained; and that the fast ones compute right behind ``linear``.

There is no GPU here, so a device is declared: :func:`declared` gives every tensor's device another record, and inline
assembly is emulated. The tolerances are those of :mod:`test_kernels` and :mod:`test_fast`.
"""

import lowbit_kernels
import pytest
import torch
from lowbit_kernels import forms, parse, plain, tuning
from lowbit_kernels.fast import FastTiles
from lowbit_kernels.forms import Device
from problems import BF16, FP16, FP32, PROBLEMS, guard, intact, packed
from support.fast_tolerance import fast_bound

from hf_lowbit.formats import parse_format

A100, H100, B200, T4 = (Device("nvidia", f"sm_{n}", 100) for n in (80, 90, 100, 75))
MI300, ARC, INTERPRETER = Device("amd", "gfx942", 304), Device("intel"), Device("interpreter")
INT4 = parse("int:bits=4,group_size=64")


@pytest.fixture
def declared(monkeypatch, device):
    """Declares the device of all tensors, and records the forms that :func:`lowbit_kernels.linear` chose."""
    if device != "cpu":
        pytest.skip("a GPU has its own record")
    from support.inline_asm import emulate_inline_asm

    emulate_inline_asm()
    chosen, stock = [], forms.choose

    def declare(record):
        monkeypatch.setattr(forms, "describe", lambda device: record)
        return chosen

    def choose(*arguments):
        chosen.append(stock(*arguments))
        return chosen[-1]

    monkeypatch.setattr(forms, "choose", choose)
    return declare


@pytest.mark.parametrize(
    "device, format, dtype, rows, expected",
    [
        (H100, "int:bits=4", FP16, 1, "subnormal"),
        (H100, "int:bits=4", BF16, 1, "magic"),
        (H100, "int:bits=4", FP32, 1, "portable"),
        (A100, "int:bits=3,group_size=-1", FP16, 512, "subnormal"),
        (A100, "int:bits=3", FP16, 4096, "subnormal"),
        (B200, "nf:bits=4", BF16, 16, "magic"),
        (H100, "codebook:bits=8", FP16, 1, "portable"),
        (H100, "ternary:bits=1.58", FP16, 1, "portable"),
        (H100, "int:bits=8,group_size=16,zeros=float", BF16, 1, "magic"),
        (H100, "int:bits=4", FP16, 1023, "subnormal"),
        (H100, "int:bits=4", FP16, 1024, "unpacked"),
        (H100, "ternary:bits=1.58", BF16, 1024, "unpacked"),
        (H100, "int:bits=4", FP32, 1024, "portable"),
        (T4, "int:bits=4", FP16, 1, "portable"),
        (MI300, "int:bits=4", BF16, 1, "portable"),
        (ARC, "int:bits=4", FP16, 1, "portable"),
        (INTERPRETER, "int:bits=4", FP16, 4096, "portable"),
    ],
)
def test_the_choice_follows_from_what_is_declared(device, format, dtype, rows, expected):
    assert forms.choose(device, parse(format), dtype, rows).name == expected


@pytest.mark.parametrize(
    "device, format, dtype, reasons",
    [
        (
            H100,
            "int:bits=4",
            FP16,
            {"subnormal": None, "lop3": None, "magic": "does not take torch.float16", "portable": None},
        ),
        (T4, "int:bits=4", FP16, {"subnormal": "needs sm_80 or newer, not sm_75", "portable": None}),
        (MI300, "int:bits=4", BF16, {"magic": "is for nvidia, not amd gfx942", "portable": None}),
        (
            H100,
            "int:bits=8,group_size=16",
            FP16,
            {"subnormal": None, "lop3": "does not read int of 8 bits in groups of 16"},
        ),
        (INTERPRETER, "int:bits=4", FP32, {"unpacked": "does not take torch.float32", "portable": None}),
    ],
)
def test_every_form_says_why_it_is_passed_over(device, format, dtype, reasons):
    found = dict(forms.explain(device, parse(format), dtype))
    assert tuple(found) == forms.NAMES and {name: found[name] for name in reasons} == reasons


def test_a_user_forces_forms_in_an_order(monkeypatch):
    assert forms.choose(H100, INT4, FP16, 1, "lop3").name == "lop3"
    monkeypatch.setenv(forms.ENVIRONMENT_VARIABLE, "lop3, portable")
    assert forms.choose(H100, INT4, FP16, 4096).name == "lop3"
    assert forms.choose(H100, INT4, BF16, 1).name == "portable"
    assert forms.choose(H100, INT4, FP16, 1, "unpacked").name == "unpacked"  # an argument goes before
    assert [name for name, reason in forms.explain(H100, INT4, FP16) if reason is None] == ["lop3", "portable"]
    assert dict(forms.explain(H100, INT4, FP16))["subnormal"] == "is not among those asked for"


def test_a_force_that_is_impossible_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="here: subnormal is for nvidia, not amd gfx942; magic is for nvidia"):
        forms.choose(MI300, INT4, FP16, 1, "subnormal,magic")
    monkeypatch.setenv(forms.ENVIRONMENT_VARIABLE, "lop3")
    with pytest.raises(ValueError, match=r"can run int of 4 bits here: lop3 does not take torch\.float32"):
        forms.choose(H100, INT4, FP32, 1)
    monkeypatch.setenv(forms.ENVIRONMENT_VARIABLE, "lop4")
    with pytest.raises(
        ValueError, match="HF_LOWBIT_FORM='lop4': 'lop4' is unknown: use one or more of subnormal, lop3"
    ):
        forms.choose(H100, INT4, FP16, 1)


def test_the_interpreter_is_no_nvidia_device(device):
    if device != "cpu":
        pytest.skip("a GPU has its own record")
    assert forms.describe(torch.device("cpu")) == INTERPRETER


# Of every format that the fast forms read, the first problem of few rows and of many, in either dtype.
FAST = {
    (p.format, p.M > 4, p.dtype): p
    for p in reversed(PROBLEMS)
    if p.op == "linear" and any(f.objection(H100, parse(p.format), p.dtype) is None for f in forms.FAST)
}


@pytest.mark.parametrize("problem", FAST.values(), ids=lambda p: p.id)
def test_linear_takes_a_fast_form_and_computes_what_its_twin_does(problem, declared):
    format, (M, N, K), dtype = parse_format(problem.format), (problem.M, problem.N, problem.K), problem.dtype
    chosen = declared(H100)
    weight, companions = packed(format, N, K, "cpu")
    x = guard(torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(dtype))
    bias = guard(torch.randn(N, generator=torch.Generator().manual_seed(M)))
    result = lowbit_kernels.linear(x, weight, companions, bias, format.spec, K)
    assert [form.name for form in chosen] == ["magic" if dtype == BF16 else "subnormal"]
    expected, bound = fast_bound(x, weight, companions, bias, format.spec, K, chosen[0].name)
    assert result.dtype == dtype and ((result.double() - expected).abs() <= bound).all()
    assert all(intact(t) for t in (x, bias, weight, *companions))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("format", ["int:bits=3", "ternary:bits=1.58", "codebook:bits=2,group_size=-1,codebook=row"])
def test_w_is_written_out_in_parts_for_many_rows(format, dtype, declared, monkeypatch):
    format, (M, N, K) = parse_format(format), (3, 37, 130)
    chosen = declared(MI300)
    monkeypatch.setattr(lowbit_kernels, "UNPACKED_WEIGHTS", 10 * K)
    weight, companions = packed(format, N, K, "cpu")
    x, bias = torch.randn(2, M, K).to(dtype), torch.randn(N)
    result = lowbit_kernels.linear(x, weight, companions, bias, format.spec, K, form="unpacked")
    assert chosen[0].name == "unpacked" and result.shape == (2, M, N)
    values = plain.dequantize(weight, companions, format.spec, K, dtype)
    parts = [slice(i, i + 10) for i in range(0, N, 10)]
    expected = torch.cat([torch.nn.functional.linear(x, values[p], bias[p].to(dtype)) for p in parts], -1)
    # The two readers' scales may differ in float32 (log8) and then round to neighbours: one unit of a weight.
    magnitude = x.double().abs() @ values.double().abs().T
    unit = torch.finfo(dtype).eps
    assert ((result.double() - expected.double()).abs() <= unit * (magnitude + expected.double().abs())).all()


def test_tuned_tiles_reach_the_kernels(declared, monkeypatch):
    """An entry's sizes are those that are launched; without one the rule's are."""
    chosen, seen = declared(H100), []
    monkeypatch.setattr(lowbit_kernels, "fast_linear", lambda x, *rest: seen.append(rest[-2:]) or x)
    entry = tuning.Entry(
        "subnormal", "int4_g64", 1, 64, 128, {"rows": 8, "outputs": 16, "blocks": 1, "columns": 1, "window": 8}, 2
    )
    monkeypatch.setattr(tuning, "find", lambda *key: entry if key[1] == "subnormal" else None)
    weight, companions = packed(parse_format("int:bits=4"), 64, 128, "cpu")
    lowbit_kernels.linear(torch.ones(1, 128, dtype=FP16), weight, companions, None, "int:bits=4", 128)
    assert seen == [(FastTiles(8, 16, 1, 1, 8), 2)]
    monkeypatch.setattr(tuning, "find", lambda *key: None)
    lowbit_kernels.linear(torch.ones(1, 128, dtype=BF16), weight, companions, None, "int:bits=4", 128)
    assert seen[1][0] == lowbit_kernels.fast_tiles(1, INT4, "subnormal") and [f.name for f in chosen] == [
        "subnormal",
        "magic",
    ]
