"""MagR solves what it says it solves, and goes before every method that ranges matter to."""

import json
import math

import pytest
import torch
from conftest import load, logits
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import LowBitConfig, cli
from hf_lowbit.calibration import Calibration, Moments
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.plan import Packed
from hf_lowbit.quantizer import quantize_weight
from hf_lowbit.transforms.magr import project, shrink_extremes

SHAPE = (24, 96)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(rank=40) -> Moments:
    """Of inputs that nearly lie in a space of ``rank`` dimensions: the rest is free to move extremes to."""
    x = draw(800, rank, seed=1) @ draw(rank, SHAPE[1], seed=2) + 0.05 * draw(800, SHAPE[1], seed=3)
    found = Moments(SHAPE[1])
    found.add(x)
    return found


def ids():
    windows = torch.randint(4, 160, (24, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), 24, 32)


def test_the_projection_is_the_nearest_point_of_the_ball():
    values, radius = draw(50, 3, 16).double(), torch.linspace(0.5, 30, 50).view(50, 1, 1).double()
    found = project(values, radius)
    inside = values.abs().sum(-1, keepdim=True) <= radius
    assert inside.any() and not inside.all()
    assert torch.equal(found[inside.expand_as(found)], values[inside.expand_as(values)])
    sums = found.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(sums[~inside], radius.expand_as(sums)[~inside])
    # The nearest: no point of the ball, of which the corners are the extremes, lies beyond the plane through it.
    away, corners = values - found, radius * torch.cat([torch.eye(16), -torch.eye(16)]).double().view(32, 1, 1, 16)
    assert ((corners - found) * away).sum(-1).max() < 1e-12 * values.abs().max() * 30


@pytest.mark.parametrize("group_size", [-1, 64])
def test_steps_go_to_the_least_of_the_objective(group_size):
    format, W, H = parse_format(f"int:bits=3,group_size={group_size}"), draw(*SHAPE, seed=4).double(), moments().square
    strength = 1e-3
    damped = (H + 0.01 * H.diagonal().mean() * torch.eye(SHAPE[1])).double()
    damped /= torch.linalg.matrix_norm(damped, 2)
    size = SHAPE[1] if group_size == -1 else group_size
    radius = strength * size * W.abs().mean(1)

    def objective(V):
        groups = torch.nn.functional.pad(V.double(), (0, -SHAPE[1] % size)).view(SHAPE[0], -1, size)
        E = V.double() - W
        return ((E @ damped) * E).sum() / 2 + (radius * groups.abs().amax(-1).sum(-1)).sum()

    values = [objective(shrink_extremes(W, H, format, strength, steps)) for steps in (0, 3, 30, 1000)]
    assert values[0] > values[1] > values[2] > values[3]
    best = shrink_extremes(W, H, format, strength, 1000)
    for seed in range(20):  # it is convex: no step in any direction leads lower
        for length in (1e-3, 1e-1):
            assert objective(best + length * draw(*SHAPE, seed=seed + 10)) > values[3]
    assert objective(best + 0.01 * (W - best)) > values[3] * (1 - 1e-6)


def test_extremes_fall_and_outputs_stay():
    format, W, statistics = parse_format("int:bits=3,group_size=32"), draw(*SHAPE, seed=4), moments()
    before = W.clone()
    found = shrink_extremes(W, statistics.square, format, 1e-3)
    assert torch.equal(W, before)
    extremes = [t.view(SHAPE[0], -1, 32).abs().amax(-1).mean() for t in (W, found)]
    power = statistics.output_error(W, 0 * W)
    assert extremes[1] < 0.9 * extremes[0] and statistics.output_error(W, found) < 1e-3 * power


@pytest.mark.parametrize("group_size", ["-1", "32"])
def test_it_helps_rounding_where_inputs_leave_room(group_size):
    format, W, statistics = parse_format(f"int:bits=3,group_size={group_size}"), draw(*SHAPE, seed=4), moments()
    nearest = make_method("rtn", {"range": "minmax"})
    errors = []
    for strength in (0.0, 1e-3):
        quantized = nearest.quantize(shrink_extremes(W, statistics.square, format, strength), format)
        errors.append(statistics.output_error(W, format.decode(quantized)))
    assert errors[1] < errors[0]


def test_degenerate_weights_and_inputs():
    format, H = parse_format("int:bits=3,group_size=64"), moments().square
    zeros = torch.zeros(SHAPE)
    assert torch.equal(shrink_extremes(zeros, H, format), zeros)
    W = draw(*SHAPE, seed=4)
    assert torch.equal(shrink_extremes(W, torch.zeros_like(H), format), W)
    alone = draw(4, 1, seed=5)
    assert torch.isfinite(shrink_extremes(alone, torch.ones(1, 1), format)).all()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_layer_is_prepared_before_its_codes_are_chosen(method):
    config = LowBitConfig(bits=3, method=method, preprocess="magr", outliers=2, transform="hadamard")
    format, chosen = config.resolve()
    statistics, W = moments(), draw(*SHAPE, seed=4)
    stored = quantize_weight(W, Packed("layer", format, chosen, SHAPE), "layer", statistics)
    rest, kept = format.take_out(W, statistics.square.diagonal())
    turned = statistics.turned(format)
    prepared = shrink_extremes(format.turn(rest), turned.square, format.inner)
    plain = make_method(method).quantize(prepared, format.inner, turned)
    wanted = {**format.pack(plain), **kept}
    assert wanted.keys() == stored.keys() and all(torch.equal(stored[s], t) for s, t in wanted.items())


@pytest.mark.parametrize("method", ["rtn", "gptq", "signround"])
def test_whole_models(method, tiny, tmp_path):
    options = {"steps": 2} if method == "signround" else {}
    rules = {r".*\.q_proj": {"preprocess": "none"}}
    config = LowBitConfig(bits=2, method=method, preprocess="magr:0.01", method_options=options, rules=rules)
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "with", calibration=ids())
    without = LowBitConfig(bits=2, method=method, method_options=options)
    data = None if method == "rtn" else ids()
    other = hf_lowbit.quantize(tiny("llama"), without, output=tmp_path / "without", calibration=data).load()
    model, layer = repo.load(), "model.layers.0.self_attn.{}_proj"
    assert torch.equal(model.get_submodule(layer.format("q")).weight, other.get_submodule(layer.format("q")).weight)
    assert not torch.equal(model.get_submodule(layer.format("v")).weight, other.get_submodule(layer.format("v")).weight)
    saved = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert saved["preprocess"] == "magr:0.01" and repo.tokens[layer.format("v")] == 24 * 32
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load("llama", tmp_path / "again"), "llama"), logits(model, "llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocess": "magi"}, "preprocess='magi' is unknown: use 'magr'"),
        (
            {"bits_stored": 3.0},
            "preprocess='magr' does not go with bits_stored=, whose grid has no range to make smaller",
        ),
        ({"preprocess": "magr:2"}, "preprocess='magr:2' is not possible: use 'magr:' and a strength from 0 to 1"),
        ({"preprocess": "magr:"}, "preprocess='magr:' is not possible"),
        ({"format": "nested"}, "preprocess='magr' does not go with format 'nested', whose levels are learned"),
        ({"rules": {"x": {"preprocess": 1}}}, "rule 'x': preprocess=1 is unknown"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**{"preprocess": "magr", **options})


def test_the_command_line_takes_it(tiny, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": window.tolist()}) for window in ids().source))
    command = ["quantize", tiny("llama"), str(tmp_path / "packed"), "--method", "gptq", "--preprocess", "magr:1e-4"]
    command += ["--rule", ".*q_proj=preprocess=none", "--calibration", str(text), "--length", "32", "--json"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert saved["preprocess"] == "magr:1e-4" and saved["rules"] == [[".*q_proj", {"preprocess": "none"}]]


def test_it_needs_calibration(tiny, tmp_path):
    config = LowBitConfig(method="rtn", preprocess="magr")
    with pytest.raises(ValueError, match="preprocess='magr' needs calibration data"):
        hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "packed")
    assert math.isfinite(config.resolve()[0].bits) and config.needs_calibration
