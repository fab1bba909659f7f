"""AWQ searches factors that pay, stores them as they are used, and goes with everything that it should go with."""

import json

import pytest
import torch
from conftest import load, logits
from test_gptq import inputs, moments, weight

import hf_lowbit
from hf_lowbit import LowBitConfig, ops
from hf_lowbit.calibration import Calibration, Moments
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.methods.awq import Awq

FORMATS = [
    "int_columns:bits=3,group_size=64,scale_dtype=float16,symmetric=False,zeros=int",
    "int_columns:bits=2,group_size=32,scale_dtype=log8,symmetric=False,zeros=int",
    "int_columns:bits=4,group_size=-1,scale_dtype=float32,symmetric=False,zeros=float",
    "int_columns:bits=4,group_size=64,scale_dtype=float16,symmetric=True,zeros=int",
]
SHAPE = (40, 200)


def ids(count=24, length=32):
    windows = torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), count, length)


def fresh_error(quantized, format) -> float:
    """Of the layer's output, on inputs that nothing was chosen on."""
    judge = Moments(SHAPE[1])
    judge.add(inputs(2000, 9))
    return judge.output_error(weight(), format.decode(quantized))


@pytest.mark.parametrize("text", FORMATS)
def test_factors_pay_on_fresh_inputs(text):
    """Rounding to nearest is beaten by factors, GPTQ by factors with error feedback, on the same grid."""
    format = parse_format(text)
    plain = format.multiplied
    nearest = make_method("rtn", {"range": "mse"})
    nearest.columns = moments().square.diagonal()
    errors = {
        "rtn": fresh_error(nearest.quantize(weight(), plain), plain),
        "awq": fresh_error(make_method("awq").quantize(weight(), format, moments()), format),
        "gptq": fresh_error(make_method("gptq").quantize(weight(), plain, moments()), plain),
        "both": fresh_error(make_method("awq", {"feedback": True}).quantize(weight(), format, moments()), format),
    }
    assert errors["awq"] < errors["rtn"] and errors["both"] < errors["gptq"] < errors["awq"], errors


def test_the_candidates_are_the_family_and_can_be_stored():
    W, costs = weight(), moments().square.diagonal()
    none, *found = Awq(grid=5).candidates(W, costs)
    assert torch.equal(none, torch.ones(200)) and len(found) == 5
    for i, factors in enumerate(found):
        assert torch.equal(factors, factors.half().float())
        wanted = W.square().mean(0).sqrt() ** (1 - i / 4) / costs.sqrt() ** (i / 4)
        ratio = factors / wanted
        assert ratio.max() / ratio.min() < (1 + 2**-11) ** 2 / (1 - 2**-11) ** 2  # roundings to float16
        assert abs(factors.log().mean()) < 2**-10
    # Inputs whose magnitude is the inverse of their weights': one exponent makes all errors alike.
    assert (found[4] * costs.sqrt()).std() < 2**-10 * (found[4] * costs.sqrt()).mean()


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_the_result_is_sound(text, feedback):
    format, W, statistics = parse_format(text), weight(), moments()
    before = W.clone(), statistics.square.clone()
    quantized = Awq(feedback=feedback).quantize(W, format, statistics)
    assert torch.equal(W, before[0]) and torch.equal(statistics.square, before[1])
    stored = format.pack(quantized)
    assert {s: (tuple(t.shape), t.dtype) for s, t in stored.items()} == format.tensors(SHAPE)
    again = format.unpack(stored, SHAPE)
    assert torch.equal(again.codes, quantized.codes) and torch.equal(again.columns, quantized.columns)
    second = Awq(feedback=feedback).quantize(W, format, statistics)
    assert all(torch.equal(t, format.pack(second)[suffix]) for suffix, t in stored.items())
    x, V = inputs(7, 11), format.dequantize(stored, SHAPE)
    y = ops.linear(x, stored[""], [stored[s] for s in format.suffixes()], None, format.spec, SHAPE[1])
    torch.testing.assert_close(y, x @ V.T, rtol=1e-4, atol=1e-5)  # two orders of float32 sums of 200 terms


@pytest.mark.parametrize("feedback", [False, True])
def test_dead_inputs_and_empty_weights(feedback):
    format, method = parse_format(FORMATS[0]), Awq(feedback=feedback)
    alive = torch.arange(200) % 2
    dead = Moments(200)
    dead.add(inputs(500, 3) * alive)
    quantized = method.quantize(weight(), format, dead)
    assert torch.isfinite(format.decode(quantized)).all()
    judge = Moments(200)
    judge.add(inputs(500, 9) * alive)
    relative = judge.output_error(weight(), format.decode(quantized)) / judge.output_error(weight(), 0 * weight())
    assert relative < 0.1
    for statistics in (moments(), Moments(200)):  # with tokens, and without any
        assert (format.decode(method.quantize(torch.zeros(SHAPE), format, statistics)) == 0).all()
    empty = weight().clone()
    empty[:, 7] = 0
    assert torch.isfinite(format.decode(method.quantize(empty, format, moments()))).all()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_whole_models_pack_load_and_save(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    config = LowBitConfig(bits=3, method="awq")
    repo = hf_lowbit.quantize(tiny(name), config, output=tmp_path / "packed", calibration=ids())
    model = load(name, repo.folder)
    specs = {m.spec for n, m in model.named_modules() if hasattr(m, "spec") and ".0." in n}
    integers = ":bits=3,group_size=32,scale_dtype=log8,symmetric=False,zeros=int"
    assert specs == {"int" + integers, "int_columns" + integers}  # factors that one layer has alone are folded
    plain = load(name, repo.folder, quantization_config=LowBitConfig(dequantize=True))
    torch.testing.assert_close(logits(model, name), logits(plain, name), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(name, tmp_path / "again"), name), logits(model, name))
    config = LowBitConfig(bits=3, method="awq", calibration=ids())
    assert torch.equal(logits(load(name, tiny(name), quantization_config=config), name), logits(model, name))


def test_factors_count_in_a_budget(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    config = LowBitConfig(bits=3.7, method="awq", preprocess="magr", embeddings="float")
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "packed", calibration=ids())
    assert 3.4 < repo.coverage["bits_per_packed_weight"] <= 3.7


def test_it_goes_with_rotation_outliers_and_rules(tiny, tmp_path):
    rules = {r".*\.q_proj": {"method": "gptq", "method_options": {}}, r".*\.k_proj": {"transform": "none"}}
    config = LowBitConfig(
        bits=3, method="awq", method_options={"feedback": True}, transform="hadamard", outliers=2, rules=rules
    )
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "packed", calibration=ids())
    layers = json.loads((repo.folder / "config.json").read_text())["quantization_config"]["layers"]
    integers = ":bits=3,group_size=32,scale_dtype=log8,symmetric=False,zeros=int"
    assert layers["model.layers.*.self_attn.q_proj"] == "outliers=2.0+hadamard+int" + integers
    assert layers["model.layers.*.self_attn.k_proj"] == "outliers=2.0+int_columns" + integers
    assert layers["model.layers.*.mlp.up_proj"] == "outliers=2.0+hadamard+int_columns" + integers
    plain = load("llama", repo.folder, quantization_config=LowBitConfig(dequantize=True))
    torch.testing.assert_close(logits(repo.load(), "llama"), logits(plain, "llama"), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_corrections_of_low_rank_lower_its_error(tiny, tmp_path):
    tokens, errors = torch.stack([torch.as_tensor(w) for w in ids().source]), []
    float_logits = load("llama", tiny("llama"))(tokens).logits
    for rank in (None, 16):
        more = {} if rank is None else {"compensation": "eora", "compensation_rank": rank}
        config = LowBitConfig(bits=2, method="awq", embeddings="float", preprocess="magr", **more)
        repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / str(rank), calibration=ids())
        errors.append((repo.load()(tokens).logits - float_logits).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf"}, "method 'awq' does not make format 'nf'"),
        ({"bits_stored": 3.0}, "method 'awq' cannot aim at bits_stored=3.0: use 'ecsq' or 'gptq'"),
        ({"method_options": {"grid": 1}}, "grid=1 is not possible: method 'awq' takes a whole number from 2"),
        ({"method_options": {"feedback": 1}}, "feedback=1 is not possible: method 'awq' takes True or False"),
        ({"method_options": {"damping": 0}}, "damping=0 is not possible"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(method="awq", **options)


def test_it_needs_calibration(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"method 'awq' .*needs calibration data"):
        hf_lowbit.quantize(tiny("llama"), LowBitConfig(method="awq"), output=tmp_path / "packed")
    with pytest.raises(ValueError, match="method 'awq' needs calibration data"):
        Awq().quantize(weight(), parse_format(FORMATS[0]))
