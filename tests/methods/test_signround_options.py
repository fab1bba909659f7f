"""Learned ends of ranges and trained norms: they start where learned rounding does, are stored, loaded and undone."""

import pytest
import torch
from conftest import load
from test_gptq import moments, weight
from test_signround import FORMATS, TWO_BITS, block_error, solve, windows

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.methods.gptq import Gptq
from hf_lowbit.methods.signround import LearnedClipping, find_norms


def signround(**options):
    return LowBitConfig(method="signround", method_options={"steps": 24, **options}, **TWO_BITS)


@pytest.mark.parametrize("text", FORMATS)
def test_ends_of_ranges_start_at_gptqs_codes(text):
    format, W, statistics = parse_format(text), weight(), moments()
    gptq = Gptq().quantize(W, format, statistics)
    found = make_method("signround", {"lwc": True}).begin(W, format, statistics)[1].quantized()
    assert torch.equal(found.codes, gptq.codes) and torch.equal(found.scales, gptq.scales)
    assert (found.zeros is None) == format.symmetric
    torch.testing.assert_close(format.decode(found), format.decode(gptq))


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_of_ends_are_those_of_the_unrounded_grid(text):
    format, W = parse_format(text), weight()
    learned = LearnedClipping(format, Gptq().quantize(W, format, moments()), W)
    upstream = torch.randn(W.shape, generator=torch.Generator().manual_seed(6))
    value = learned.value()
    torch.testing.assert_close(value, format.decode(learned.quantized()), rtol=1e-5, atol=1e-6)
    value.backward(upstream)
    # value = (code - zero) * scale with code = clip(w / scale + zero + v), and a rounding that has no gradient.
    places = learned._places().detach()
    inside = (places >= 0) & (places <= format.max_code)
    offsets = format.by_group(lambda u, s: u * s.unsqueeze(-1), upstream * inside, learned.first)
    torch.testing.assert_close(learned.offset.grad, offsets)
    # By the scale: what rounding did where weights are inside, the whole code where they are clipped.
    moved = torch.where(inside, learned.codes() - places, 0) * upstream
    units = format.by_group(lambda c, z: c - z.unsqueeze(-1), learned.codes(), learned.zeros)
    if format.symmetric:
        moved = moved + torch.where(inside, 0, units) * upstream
        change = format.by_group(lambda u, s: (u.sum(-1) * s).unsqueeze(-1), moved, learned.first)
        torch.testing.assert_close(learned.change.grad, change.reshape(learned.first.shape), rtol=1e-3, atol=1e-3)
        assert learned.lower.grad is None
    else:
        assert (learned.lower.grad != 0).any() and (learned.change.grad != 0).any()


def test_zero_points_move_and_stay_on_the_grid():
    format = parse_format("int:bits=4,group_size=64,symmetric=False,zeros=int,scale_dtype=float32")
    start, learned = make_method("signround", {"lwc": True}).begin(weight(), format, moments())
    for _ in range(8):
        learned.lower.grad, learned.change.grad = (torch.ones_like(learned.lower) for _ in range(2))
        learned.offset.grad = torch.zeros_like(learned.offset)
        learned.step(0, 0.02, 1.0)
    found = learned.quantized()
    # Both ends lower by 8 * 0.02 of the range: the same scales, and zero points 0.16 * 15 = 2.4 higher, rounded.
    torch.testing.assert_close(found.scales, start.scales)
    assert torch.equal(found.zeros, (start.zeros + 2.4).round().clamp(0, 15))
    # Weights keep their places where they are not clipped: codes move with the zero point.
    same = (found.codes > 0) & (found.codes < 15) & (start.codes > 0) & (start.codes < 15)
    moved = format.decode(found)[same] - format.decode(start)[same]
    assert moved.abs().max() <= 1e-4 * start.scales.max()  # in values nothing moved


def test_ends_of_zero_groups_have_finite_gradients():
    format = parse_format(FORMATS[0])
    W = weight()
    W[:, :64] = 0
    learned = make_method("signround", {"lwc": True}).begin(W, format, moments())[1]
    learned.value().sum().backward()
    assert learned.change.grad.isfinite().all() and learned.lower.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"lwc": True}, {"tune_norms": True, "norm_lr": 0.002}])
def test_a_block_comes_closer_than_with_gptq(options, tiny, tmp_path):
    gptq = block_error(tiny, solve(tiny, tmp_path / "gptq", LowBitConfig(method="gptq", **TWO_BITS)))
    assert block_error(tiny, solve(tiny, tmp_path / "learned", signround(**options))) < gptq


def test_trained_norms_are_stored_and_loaded_on_every_way(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    data, config = Calibration(list(windows(8, 0)), 8, 24), signround(tune_norms=True, norm_lr=0.002)
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "out", calibration=data)
    packed, plain = load("llama", repo.folder), load("llama", tiny("llama"))
    changed = {n for n, p in plain.named_parameters() if "norm" in n and not torch.equal(p, packed.get_parameter(n))}
    assert changed == {n for n, _ in plain.named_parameters() if ".layers." in n and "norm" in n}  # not the last one
    config.calibration = data
    loaded = load("llama", tiny("llama"), quantization_config=config).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in packed.state_dict().items())


def test_training_that_does_not_help_leaves_norms_alone(tiny, tmp_path):
    run = solve(tiny, tmp_path / "wild", signround(tune_norms=True, norm_lr=5.0, steps=2))
    plain = load("llama", tiny("llama"))
    tuned = {name: value for name, value in run.parameters.items() if ".layers.0." in name}
    assert tuned and all(torch.equal(value, plain.get_parameter(name)) for name, value in tuned.items())


def test_norms_are_found_by_their_class():
    block = torch.nn.ModuleDict({"a": torch.nn.LayerNorm(4), "b": torch.nn.Linear(4, 4), "c": torch.nn.RMSNorm(4)})
    assert set(find_norms(block)) == {"a.weight", "a.bias", "c.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lwc": 1}, "lwc=1 is not possible: method 'signround' takes True or False"),
        ({"tune_norms": "yes"}, "tune_norms='yes' is not possible"),
        ({"norm_lr": 0.1}, "norm_lr=0.1 is of no use without tune_norms=True"),
        ({"norm_lr": -1, "tune_norms": True}, "norm_lr=-1 is not possible"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        make_method("signround", options)
