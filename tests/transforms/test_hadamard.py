"""Rotated weights: the same products in another basis, for every format, and what that is good for."""

import re
from pathlib import Path

import pytest
import torch
from conftest import inputs, load, logits
from peft import LoraConfig, get_peft_model

import hf_lowbit
from hf_lowbit import LowBitConfig, ops
from hf_lowbit.adapters.scales import train_scales
from hf_lowbit.calibration import Calibration, Moments
from hf_lowbit.formats import RotatedFormat, parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.plan import Packed
from hf_lowbit.quantizer import quantize_weight
from hf_lowbit.transforms.hadamard import factor, hadamard_matrix, rotate, signs

SIZES = [1, 2, 3, 5, 36, 40, 63, 64, 96, 576, 577, 1536, 4096, 11008]
FORMATS = [
    "int:bits=3,group_size=32,symmetric=False,zeros=int,scale_dtype=log8",
    "int:bits=8,group_size=-1,symmetric=True,scale_dtype=float16",
    "nf:bits=4,group_size=64,scale_dtype=log8",
    "fp4:bits=4,group_size=16,scale_dtype=e4m3",
    "codebook:bits=2,group_size=64",
    "ternary:bits=1.58,group_size=-1",
    "int_columns:bits=4,scale_dtype=float16",
]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(text, shape=(24, 96)):
    """A rotated random weight in the format ``text``, with an outlier."""
    format = RotatedFormat(stored=parse_format(text))
    weight = draw(*shape, seed=1)
    weight[3, 5] = 20
    if text.startswith("int_columns"):
        quantized = parse_format("int:bits=4,group_size=-1,symmetric=True").encode
        turned = format.turn(weight)
        quantized = quantized(turned, turned.abs().amax(1, keepdim=True) / 7)
        quantized.columns = torch.ones(shape[1])
        return format, format.pack(quantized), weight
    method = make_method("lloyd" if format.inner.learns_levels else "rtn")
    return format, quantize_weight(weight, Packed("layer", format, method, shape), "layer"), weight


# -- the rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_it_is_a_rotation(size):
    x = draw(2, 3, size, dtype=torch.float64)
    turned = rotate(x)
    # Sums of at most 4096 terms in float64.
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(turned, inverse=True), x, rtol=1e-12, atol=1e-12)
    r, b = factor(size)
    assert size % (r * b) == 0 and b & (b - 1) == 0
    column = rotate(torch.eye(size, dtype=torch.float64))[:, 0]
    assert (column != 0).sum() == r * b  # every input of a block reaches every output of it, by the same weight
    torch.testing.assert_close(column[column != 0].abs(), torch.full((r * b,), (r * b) ** -0.5, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_transform_of_the_kernels(size):
    kernels = pytest.importorskip("hf_lowbit.lowbit_kernels.hadamard")
    x = draw(4, size, dtype=torch.float64)
    assert factor(size) == kernels.factor(size)
    torch.testing.assert_close(rotate(x), kernels.plain_hadamard(x * signs(size).double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 64])
def test_matrices(order):
    H = hadamard_matrix(order)
    assert torch.equal(H.abs(), torch.ones_like(H)) and torch.equal(H @ H.T, order * torch.eye(order).double())
    assert hadamard_matrix(order + 1) is None or order == 1


def test_gradients_and_dtypes():
    x = draw(3, 24, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rotate, (x,)) and torch.autograd.gradcheck(lambda x: rotate(x, inverse=True), (x,))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        y = draw(3, 96, dtype=dtype)
        assert rotate(y).dtype == dtype
        # One rounding of the result; its norm in a block is that of the input.
        torch.testing.assert_close(rotate(y).float(), rotate(y.float()), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert rotate(torch.empty(0, 96)).shape == (0, 96)


def test_documented_vectors():
    text = (Path(__file__).parents[2] / "docs/format.md").read_text()
    section = text.split("## Rotated weights")[1]
    found = re.search(r"s = ((?:[+-]1, )+[+-]1)", section)
    assert [int(v) for v in found[1].split(", ")] == signs(16).int().tolist()
    rows = re.search(r"`e_0 R` in four inputs is `\[(.*?)\]`", section)
    assert [float(v) for v in rows[1].split(", ")] == rotate(torch.eye(4))[0].tolist()


# -- the format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_products_are_those_with_the_dequantized_weight(text):
    format, stored, _ = packed(text)
    weight = format.dequantize(stored, (24, 96))
    companions = [tensor for suffix, tensor in stored.items() if suffix]
    assert parse_format(format.spec).spec == format.spec and parse_format(format.spec) == format
    for rows in ((), (1,), (5,), (2, 3)):
        x = draw(*rows, 96, seed=2).requires_grad_()
        y = ops.linear(x, stored[""], companions, None, format.spec, 96)
        # Two orders of float32 sums of 96 terms of size up to 20.
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-3)
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(
                ops.linear(x, stored[""], companions, None, format.spec, 96), y, rtol=1e-5, atol=1e-4
            )
    for backend in ("auto", "torch"):
        torch.testing.assert_close(
            ops.dequantize(stored[""], companions, format.spec, 96, torch.float32, backend), weight
        )


def test_compiled_as_one_graph():
    format, stored, _ = packed(FORMATS[0])
    companions = [tensor for suffix, tensor in stored.items() if suffix]

    def run(x):
        return ops.linear(x, stored[""], companions, None, format.spec, 96)

    x = draw(3, 96, seed=4)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_an_outlier_harms_less():
    def error(format, tensors, weight):
        return (format.dequantize(tensors, weight.shape) - weight).square().mean()

    format, stored, weight = packed(FORMATS[1].replace("bits=8", "bits=4"))
    plain = quantize_weight(weight, Packed("layer", format.inner, make_method("rtn"), weight.shape), "layer")
    assert error(format, stored, weight) < 0.5 * error(format.inner, plain, weight)


def test_moments_turn_with_the_inputs():
    x, r = draw(50, 40, seed=5), draw(50, 40, seed=6)
    moments, turned = Moments(40, cross=True), Moments(40, cross=True)
    moments.add(x, r)
    turned.add(rotate(x), rotate(r))
    found = moments.turned(RotatedFormat(stored=parse_format(FORMATS[0])))
    torch.testing.assert_close(found.square, turned.square, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.cross, turned.cross, rtol=1e-4, atol=1e-5)
    assert found.tokens == 50 and moments.turned(parse_format(FORMATS[0])) is moments


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq", "signround"])
def test_whole_models(tiny, tmp_path, method):
    data = Calibration(list(torch.randint(4, 160, (8, 24), generator=torch.Generator().manual_seed(0))), 8, 24)
    options = {"method_options": {"steps": 4}} if method == "signround" else {}
    config = LowBitConfig(bits=4, method=method, transform="hadamard", **options)
    calibration = {} if method == "rtn" else {"calibration": data}
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "packed", **calibration)
    model = repo.load()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.spec.startswith("hadamard+int:bits=4") and "hadamard" not in model.model.embed_tokens.spec
    reference = load("llama", tiny("llama"))
    weight = reference.model.layers[0].self_attn.q_proj.weight
    assert (layer.dequantize() - weight).norm() < 0.2 * weight.norm()  # 4 bits: about a tenth
    plain = load("llama", tmp_path / "packed", quantization_config=LowBitConfig(dequantize=True))
    torch.testing.assert_close(logits(model, "llama"), logits(plain, "llama"), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load("llama", tmp_path / "again"), "llama"), logits(model, "llama"))


def test_rules_choose_layers(tiny):
    rules = {r".*\.(q|k|v)_proj": {"transform": "hadamard"}, r".*\.down_proj": {"transform": "none"}}
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, rules=rules))
    specs = {name: m.spec for name, m in model.named_modules() if hasattr(m, "spec")}
    assert {n.rpartition(".")[2] for n, s in specs.items() if s.startswith("hadamard+")} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


def test_lora_trains_over_rotated_weights(tiny):
    config = LowBitConfig(bits=8, transform="hadamard")
    model = load("llama", tiny("llama"), quantization_config=config)
    plain = load(
        "llama", tiny("llama"), quantization_config=LowBitConfig(bits=8, transform="hadamard", dequantize=True)
    )
    batch, found = inputs("llama"), []
    for m in (model, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(m, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    first, second = found
    assert first and first.keys() == second.keys()
    for name, gradient in first.items():
        # Another order of float32 sums; relative to the largest term.
        torch.testing.assert_close(gradient, second[name], rtol=0, atol=1e-4 * second[name].abs().max().item())


def test_bad_input(tiny):
    with pytest.raises(ValueError, match="transform='fourier' is unknown: use 'hadamard'"):
        LowBitConfig(transform="fourier")
    with pytest.raises(ValueError, match="rule 'x': transform='fourier' is unknown"):
        LowBitConfig(rules={"x": {"transform": "fourier"}})
    with pytest.raises(ValueError, match="format 'nested' takes no transform"):
        LowBitConfig(format="nested", transform="hadamard")
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, transform="hadamard"))
    with pytest.raises(ValueError, match="is stored with 'hadamard', beside which scales cannot be trained"):
        train_scales(model)
