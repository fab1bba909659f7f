"""The kernels behind the package's ops: chosen, differentiable, and the same as plain PyTorch."""

import pytest
import torch
from problems import packed
from rich.console import Console
from support.inline_asm import emulate_inline_asm

from hf_lowbit import backends, doctor, lowbit_kernels, ops, tables
from hf_lowbit.formats import FORMATS, parse_format
from hf_lowbit.formats.nf import normal_float_levels

OPS = ("linear", "input_gradient", "dequantize", "embedding")
SPECS = [
    "int:bits=4",
    "int:bits=3,group_size=32,zeros=float",
    "int:bits=1,symmetric=True",
    "nf:bits=4",
    "fp4:bits=4",
    "codebook:bits=5",
    "codebook:bits=2,group_size=-1,codebook=row",
    "ternary:bits=1.58",
]


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_chosen_for_all_that_they_run(op, device):
    for spec in SPECS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert backends.select(op, parse_format(spec).spec, device, dtype).backend == "triton"
        reasons = dict(backends.explain(backends.Problem(op, spec, device, torch.float64)))
        assert reasons["triton"] == "does not take torch.float64" and reasons["torch"] is None
        assert dict(backends.explain(backends.Problem(op, spec, "mps", torch.float16)))["triton"] is not None


def test_doctor_says_which_form_runs_and_why(device, monkeypatch, capsys):
    if device != "cpu":
        pytest.skip("a GPU has its own record")
    emulate_inline_asm()
    monkeypatch.setattr(lowbit_kernels.forms, "describe", lambda _: lowbit_kernels.forms.Device("nvidia", "sm_80", 108))
    found = {(f["format"], f["dtype"]): f for f in doctor._forms([{"type": "cpu"}])}
    assert found["int", "float16"]["is"] == "nvidia sm_80" and found["int", "float16"]["chosen"] == "subnormal"
    assert found["nf", "bfloat16"]["chosen"] == "magic"
    assert found["ternary", "float16"]["chosen"] == found["int", "float32"]["chosen"] == "portable"
    assert found["ternary", "float16"]["passed_over"]["subnormal"].startswith("does not read ternary")
    monkeypatch.setenv(lowbit_kernels.forms.ENVIRONMENT_VARIABLE, "magic")
    result = doctor.diagnose()
    assert {f["chosen"] for f in result["forms"] if f["dtype"] == "float16"} == {None}
    tables.doctor(Console(width=240), result, {})
    printed = capsys.readouterr().out
    assert "cpu:0 (nvidia sm_80)" in printed and "FAILS" in printed and "magic does not take torch.float16" in printed


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("rows", [2, 6])
def test_gradients_are_those_of_plain_pytorch(text, rows, device):
    format, N, K = parse_format(text), 19, 130
    weight, companions = packed(format, N, K, device)
    generator = torch.Generator().manual_seed(3)
    x, bias, out = (torch.randn(shape, generator=generator).to(device) for shape in ((rows, K), (N,), (rows, N)))
    results = {}
    for backend in ("triton", "torch"):
        inputs = [t.clone().requires_grad_() for t in (x, bias)]
        y = ops.linear(inputs[0], weight, companions, inputs[1], format.spec, K, backend)
        results[backend] = [y, *torch.autograd.grad(y, inputs, out, create_graph=True)]
    # A sum of n float32 products of magnitude up to about 4 * 4 each: n * 16 * 2**-24, twice; log8 scales differ more.
    relative = 2**-18 if format.scale_dtype == "log8" else 2**-21
    for got, expected in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(got, expected, rtol=relative, atol=2 * K * 16 * relative / 8)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_scales_of_8_bits_may_be_negative(bits, device):
    format = parse_format(f"codebook:bits={bits},group_size=32,scale_dtype=e4m3")
    N, K = 19, 130
    weight, (scales, *companions) = packed(format, N, K, device)
    turned = torch.arange(scales.numel(), device=device).view(scales.shape) % 3 == 0
    scales = torch.where(turned, scales | 128, scales)
    values = [
        ops.dequantize(weight, [scales, *companions], format.spec, K, torch.float32, backend)
        for backend in ("triton", "torch")
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("text", ["int:bits=4", "ternary:bits=1.58"])
def test_opcheck(text, device):
    format, N, K = parse_format(text), 7, 65
    weight, companions = packed(format, N, K, device)
    x = torch.ones(2, 3, K, device=device, requires_grad=True)
    bias = torch.ones(N, device=device, requires_grad=True)
    lowbit, rest = torch.ops.lowbit, (format.spec, K, "triton")
    torch.library.opcheck(lowbit.linear.default, (x, weight, companions, bias, *rest))
    torch.library.opcheck(lowbit.input_gradient.default, (x[..., :N].detach(), weight, companions, *rest))


def test_constant_tables_are_those_of_the_formats():
    for name, bits in (("nf", 2), ("nf", 3), ("nf", 4), ("fp4", 4)):
        format = FORMATS[name](bits=bits)
        table = lowbit_kernels.layout.constant_levels(lowbit_kernels.parse(format.spec), torch.device("cpu"))
        assert torch.equal(table, format.levels() if name == "fp4" else normal_float_levels(bits))


def test_formats_are_read_at_their_defaults():
    for spec in SPECS:
        assert lowbit_kernels.parse(spec) == lowbit_kernels.parse(parse_format(spec).spec)


@pytest.mark.parametrize(
    "text, message",
    [
        ("trellis:bits=2", "the kernels read int, nf, fp4, codebook, ternary, not 'trellis'"),
        ("int:bits=4,order=2", "unknown option 'order'"),
        ("int:group_size=64", "bits and group_size have to be numbers"),
        ("int:bits=9", "the kernels do not read these bits, group size or scales"),
        ("nf:bits=5", "the kernels do not read these bits, group size or scales"),
        ("int:bits=4,scale_dtype=float64", "the kernels do not read these bits, group size or scales"),
        ("int:bits=4,group_size=48", "the kernels do not read these bits, group size or scales"),
    ],
)
def test_what_the_kernels_do_not_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        lowbit_kernels.parse(text)


def test_a_missing_companion_is_an_error(device):
    format = parse_format("int:bits=4")
    weight, companions = packed(format, 3, 64, device)
    with pytest.raises(ValueError, match="is stored with scales, zeros, but 1 tensors came"):
        lowbit_kernels.dequantize(weight, companions[:1], format.spec, 64, torch.float32)
