"""The kernels inside ``torch.compile(fullgraph=True)`` and ``torch.export``: the op is opaque, the values are equal."""

import pytest
import torch
from problems import packed
from torch._dynamo.testing import CompileCounter

from hf_lowbit import ops
from hf_lowbit.embedding import LowBitEmbedding
from hf_lowbit.formats import parse_format
from hf_lowbit.linear import LowBitLinear


def two_layers(text: str, device: str) -> torch.nn.Module:
    """A packed layer with a bias, an activation, and one without."""

    def layer(N, K, bias):
        module = LowBitLinear(K, N, bias, parse_format(text), device=device, backend="triton")
        fill(module, N, K, device)
        if bias:
            torch.nn.init.normal_(module.bias, generator=torch.Generator(device).manual_seed(5))
        return module

    return torch.nn.Sequential(layer(40, 70, True), torch.nn.SiLU(), layer(24, 40, False))


def fill(module, N: int, K: int, device: str) -> None:
    weight, companions = packed(module.format, N, K, device)
    module.set_packed(dict(zip(("", *module.format.suffixes()), (weight, *companions), strict=True)))


class OtherOps(torch.nn.Module):
    """Rows of a packed table, rotated, times the dequantized table."""

    def __init__(self, text: str, device: str):
        super().__init__()
        self.table = LowBitEmbedding.like(torch.nn.Embedding(50, 96, device=device), parse_format(text), "triton")
        fill(self.table, 50, 96, device)

    def forward(self, index):
        return ops.rotate(self.table(index), False, "triton") @ self.table.dequantize(torch.float32).mT


def rows(n: int, device: str, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(1, n, 70, generator=torch.Generator().manual_seed(n)).to(device, dtype)


def lowbit_ops(graph) -> list[str]:
    return [str(n.target).removesuffix(".default") for n in graph.graph.nodes if "lowbit" in str(n.target)]


def ops_compiled_and_exported(model, short: torch.Tensor, long: torch.Tensor) -> list[list[str]]:
    """The ops in the graph that was compiled and in the exported one, which both give what ``model`` gives."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep, dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(short), model(short)) and torch.equal(compiled(long), model(long))
        shapes = ({1: torch.export.Dim("n", min=2, max=64)},)
        program = torch.export.export(model, (short,), dynamic_shapes=shapes)
        assert torch.equal(program.module()(long), model(long))
    return [lowbit_ops(graph) for graph in (*graphs, program.graph_module)]


@pytest.mark.parametrize("text", ["int:bits=3", "nf:bits=4", "ternary:bits=1.58"])
def test_compiled_and_exported_give_what_eager_gives(text, device):
    found = ops_compiled_and_exported(two_layers(text, device), rows(6, device), rows(9, device))
    assert found == [["lowbit.linear"] * 2] * 2


@pytest.mark.parametrize("text", ["int:bits=3", "nf:bits=4", "ternary:bits=1.58"])
def test_embedding_rotation_and_dequantizing_compile_and_export(text, device):
    short, long = (torch.randint(50, (2, n), generator=torch.Generator().manual_seed(n)).to(device) for n in (5, 9))
    found = ops_compiled_and_exported(OtherOps(text, device), short, long)
    assert [sorted(ops) for ops in found] == [["lowbit.dequantize", "lowbit.embedding", "lowbit.rotate"]] * 2


def test_gradients_compile(device):
    torch._dynamo.reset()
    model, x = two_layers("int:bits=4", device), rows(3, device).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [x, model[0].bias.requires_grad_()]
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    got = torch.autograd.grad(compiled(x).square().sum(), parameters)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_many_rows_and_one_row_are_two_graphs(device):
    """Matrix-vector and tiles are chosen inside the op: the number of rows is nothing that torch has to know."""
    torch._dynamo.reset()
    model, counter = two_layers("int:bits=4", device), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for n in (5, 1, 2, 17, 1, 33):
            assert torch.equal(compiled(rows(n, device)), model(rows(n, device)))
    assert counter.frame_count == 2
