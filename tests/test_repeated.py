"""Calls of a graph that are repeated: the same results, and any change leads back to the guards.

The graphs are those of torch's tracer, run as they are, so that nothing is compiled.
"""

import functools

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from hf_lowbit.repeated import ATTEMPTS, Picture, Repeated, _Call


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.factors = {"scale": 2.0}
        self.kept: list = []

    def forward(self, x=None, state=None, shift=1.0):
        y = self.down(torch.relu(self.up(x))) * self.factors["scale"] + shift
        if self.training:
            y = y * 3
        if state is not None:
            state["sum"].add_(y.detach().sum())
        return CausalLMOutput(logits=y, hidden_states=state)


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def repeats(monkeypatch):
    """How often a call was repeated."""
    counted, repeat = [], _Call.repeat
    monkeypatch.setattr(_Call, "repeat", lambda *args: counted.append(1) or repeat(*args))
    return counted


def compiled(model: nn.Module, forward=None) -> Repeated:
    return Repeated(
        model,
        lambda backend: torch.compile(forward or model.forward, backend=backend, fullgraph=True, dynamic=False),
        lambda graph, inputs: graph.forward,
    )


@torch.no_grad()
def test_repeated_calls_compute_with_their_own_arguments(model, repeats):
    run, state, expected = compiled(model), {"sum": torch.zeros(())}, {"sum": torch.zeros(())}
    for i in range(5):
        x = torch.randn(1, 8)
        got, wanted = run(x=x, state=state), model(x=x, state=expected)
        assert type(got) is CausalLMOutput and got.hidden_states is state
        assert torch.equal(got.logits, wanted.logits) and torch.equal(state["sum"], expected["sum"])
        assert len(repeats) == i


CHANGES = {
    "a layer": lambda m: setattr(m, "up", nn.Linear(8, 16)),
    "a parameter": lambda m: setattr(m.up, "weight", nn.Parameter(torch.randn(16, 8))),
    "the data of a parameter": lambda m: setattr(m.up.weight, "data", torch.randn(16, 8)),
    "the mode": lambda m: m.train(),
    "an attribute's contents": lambda m: m.factors.update(scale=5.0),
    "a forward of its own": lambda m: setattr(m.up, "forward", lambda x: torch.full((1, 16), 2.0)),
    "a parameter in its dictionary": lambda m: m.up._parameters.update(bias=nn.Parameter(torch.ones(16))),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen(model, repeats, change):
    run, x = compiled(model), torch.randn(1, 8)
    for _ in range(3):
        before = run(x=x)
    assert len(repeats) == 2
    CHANGES[change](model)
    after = run(x=x)
    assert len(repeats) == 2 and torch.equal(after.logits, model(x=x).logits)
    assert not torch.equal(after.logits, before.logits)
    assert torch.equal(run(x=x).logits, after.logits) and len(repeats) == 3


@torch.no_grad()
def test_other_arguments_and_settings_are_seen(model, repeats):
    run, x = compiled(model), torch.randn(1, 8)
    run(x=x)
    others = [{"x": torch.randn(2, 8)}, {"x": x, "shift": 2.0}, {"x": x, "shift": 3.0}, {"x": x, "state": None}]
    for arguments in others:
        assert torch.equal(run(**arguments).logits, model(**arguments).logits)
    assert not repeats
    run(x=x)
    count = len(repeats)
    with torch.enable_grad():
        assert run(x=x).logits.requires_grad
    with torch.inference_mode():
        run(x=x)
    assert len(repeats) == count


@torch.no_grad()
def test_calls_that_do_more_than_their_graph_are_not_repeated(model, repeats):
    def counting(x=None):
        model.kept.append(1)
        return model(x=x)

    def bare(x=None):
        return model(x=x).logits

    def from_elsewhere(x=None, other=torch.ones(1, 8)):  # noqa: B008
        return CausalLMOutput(logits=x + functools.reduce(torch.add, [other, model.down.bias]))

    x = torch.randn(1, 8)
    for function in (counting, bare, from_elsewhere):
        run = compiled(model, function)
        for _ in range(3):
            run(x=x)
    assert not repeats and len(model.kept) == 3


@torch.no_grad()
def test_it_stops_trying(model, monkeypatch):
    run, x, pictures = compiled(model, lambda x=None: model(x=x).logits), torch.randn(1, 8), []
    init = Picture.__init__
    monkeypatch.setattr(Picture, "__init__", lambda self, *roots: pictures.append(1) or init(self, *roots))
    for _ in range(2 * ATTEMPTS):
        run(x=x)
    assert len(pictures) == ATTEMPTS + 1  # of the model once


def test_a_picture_of_what_cannot_be_compared():
    """Two tensors in one place have no single answer to whether they are equal."""
    holder = {"a": [torch.ones(2)], "b": {1, 2}}
    picture = Picture(holder)
    assert picture.holds()
    holder["a"][0] = torch.ones(2)
    assert not picture.holds()
