"""Learned rounding starts where GPTQ ends, changes only what it may, and brings blocks closer to the float model's."""

from pathlib import Path

import pytest
import torch
from conftest import load
from test_gptq import moments, weight

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration, Planned, calibrate, planned_hook
from hf_lowbit.convert import open_source
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.methods.gptq import Gptq
from hf_lowbit.methods.signround import Learned, SignRound, places

FORMATS = [
    "int:bits=2,group_size=64,symmetric=False,zeros=int,scale_dtype=log8",
    "int:bits=3,group_size=32,symmetric=True,scale_dtype=float16",
    "int:bits=4,group_size=-1,symmetric=False,zeros=float,scale_dtype=float32",
    "int:bits=1,group_size=64,symmetric=True,scale_dtype=float16",
]
TWO_BITS = {"bits": 2, "embeddings": "float"}


def windows(count, seed):
    return torch.randint(4, 160, (count, 24), generator=torch.Generator().manual_seed(seed))


def solve(tiny, work, config, tokens=None):
    source = open_source(Path(tiny("llama")), config, None)
    tokens = windows(40, 0) if tokens is None else tokens
    return calibrate(source, work, planned_hook(source.plan), tokens, {}, batch_size=4)


def block_error(tiny, run) -> float:
    """Mean squared error of the first block's output on windows that nothing was calibrated on."""
    model = load("llama", tiny("llama"))
    hidden = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: hidden.append(args[2]))
    with torch.no_grad():
        model(windows(20, 1))
        for name, solution in run.read(0).items():
            planned = run.planned[name]
            model.get_submodule(name).weight.copy_(planned.format.dequantize(solution.tensors, planned.shape))
        model(windows(20, 1))
    handle.remove()
    first, second = hidden
    return float((first - second).square().mean())


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"range": "minmax"}])
@pytest.mark.parametrize("text", FORMATS)
def test_it_starts_at_gptqs_codes(text, options):
    format, W, statistics = parse_format(text), weight(), moments()
    gptq = Gptq(**options).quantize(W, format, statistics)
    quantized, learned = make_method("signround", options).begin(W, format, statistics)
    for found in (quantized, learned.quantized()):
        assert torch.equal(found.codes, gptq.codes) and torch.equal(found.scales, gptq.scales)
    assert (learned.place - gptq.codes).abs().median() > 0.05  # it is not simply the codes


def test_places_are_where_one_weight_does_least_harm():
    W, H = weight().double(), moments().damped(0.01).double()
    Q = W + 0.01 * torch.randn(W.shape, generator=torch.Generator().manual_seed(5)).double()
    found = places(W, Q, H)
    for column in (0, 7, 199):
        moved = Q.clone()
        moved[:, column] = found[:, column]
        slope = ((moved - W) @ H)[:, column]  # of the error by that weight, which is 0 at its least
        assert slope.abs().max() < 1e-12 * ((Q - W) @ H).abs().max()


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_pass_straight_through_rounding(text):
    format, W = parse_format(text), weight()
    grid = Gptq().quantize(W, format, moments())
    learned = Learned(format, grid, W)
    value, upstream = learned.value(), torch.randn(W.shape, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(value, format.decode(learned.quantized()), rtol=0, atol=0)
    value.backward(upstream)
    steps = format.by_group(lambda u, s: u * s.unsqueeze(-1), upstream, grid.scales)
    torch.testing.assert_close(learned.offset.grad, steps)
    units = format.by_group(lambda c, z: c - z.unsqueeze(-1), learned.codes(), learned.zeros) * upstream
    change = format.by_group(lambda u, s: (u.sum(-1) * s).unsqueeze(-1), units, grid.scales)
    torch.testing.assert_close(learned.change.grad, change.reshape(grid.scales.shape), rtol=1e-4, atol=1e-5)


def test_every_rounding_moves_by_one_step_at_most():
    format = parse_format(FORMATS[0])
    gptq, learned = SignRound(steps=4).begin(weight(), format, moments())
    generator = torch.Generator().manual_seed(8)
    for _ in range(40):  # far more than it would take to leave the limits
        learned.value().backward(torch.randn(weight().shape, generator=generator) + 1)
        learned.step(0.25, 0.25, 1.0)
    found = learned.quantized()
    moved = found.codes.int() - gptq.codes.int()
    assert moved.abs().max() == 1 and (moved != 0).any()
    assert torch.equal(found.zeros, gptq.zeros)
    ratio = found.scales[gptq.scales > 0] / gptq.scales[gptq.scales > 0]
    step = 2 ** (24 / 254)  # of logarithmic scales, at the widest range
    assert ratio.min() > 0.5 / step and ratio.max() < 1.5 * step


def test_a_block_comes_closer_than_with_gptq_on_fresh_text(tiny, tmp_path):
    def error(method):
        return block_error(tiny, solve(tiny, tmp_path / method, LowBitConfig(method=method, **TWO_BITS)))

    assert error("signround") < error("gptq") < error("rtn")


def test_training_that_does_not_help_leaves_gptqs_codes(tiny, tmp_path):
    wild = LowBitConfig(method="signround", method_options={"lr": 0.5, "range_lr": 0.5, "steps": 2}, **TWO_BITS)
    found, gptq = (
        dict(solve(tiny, tmp_path / str(i), config).solutions())
        for i, config in enumerate((wild, LowBitConfig(method="gptq", **TWO_BITS)))
    )
    first = [name for name in found if ".layers.0." in name]
    assert first and all(
        torch.equal(found[name].tensors[part], gptq[name].tensors[part])
        for name in first
        for part in gptq[name].tensors
    )


def test_rules_mix_it_with_other_methods(tiny, tmp_path):
    rules = {r".*\.q_proj": {"method": "rtn"}, r".*\.down_proj": {"method": "gptq"}}
    rules[r".*\.up_proj"] = {"method_options": {"steps": 8}}
    run = solve(tiny, tmp_path / "mixed", LowBitConfig(method="signround", rules=rules, **TWO_BITS))
    found = dict(run.solutions())
    rtn = dict(solve(tiny, tmp_path / "rtn", LowBitConfig(method="rtn", **TWO_BITS)).solutions())
    name = "model.layers.0.self_attn.q_proj"
    assert all(torch.equal(found[name].tensors[part], tensor) for part, tensor in rtn[name].tensors.items())
    assert found[name].tokens is None and found["model.layers.0.mlp.up_proj"].tokens == 40 * 24
    source = open_source(Path(tiny("llama")), LowBitConfig(method="rtn", **TWO_BITS), None)
    assert type(planned_hook(source.plan)) is Planned  # which needs no activations of the float model


def test_the_same_seed_gives_the_same_bits(tiny, tmp_path):
    config = LowBitConfig(bits=2, method="signround", method_options={"steps": 4})
    data = Calibration(list(windows(8, 0)), 8, 24)
    repos = [hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / i, calibration=data) for i in "ab"]
    first, second = (
        {p.name: p.read_bytes() for p in repo.folder.iterdir() if p.suffix == ".safetensors"} for repo in repos
    )
    assert first == second
    assert "signround" in (repos[0].folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is not possible: method 'signround' takes a whole number from 1"),
        ({"lr": -1.0}, "lr=-1.0 is not possible"),
        ({"range_lr": float("nan")}, "range_lr=nan is not possible"),
        ({"damping": 0}, "damping=0 is not possible"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        make_method("signround", options)


def test_it_is_for_integers_and_needs_text():
    with pytest.raises(ValueError, match="method 'signround' does not make format 'nf'"):
        LowBitConfig(bits=4, format="nf", method="signround")
    with pytest.raises(ValueError, match="needs calibration data"):
        make_method("signround").quantize(weight(), parse_format(FORMATS[0]))
