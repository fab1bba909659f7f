"""``torch.compile`` and ``torch.export`` of a packed model: an opaque op a layer, a graph to prefill, one to decode."""

import pytest
import torch
from conftest import inputs, load
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from hf_lowbit import LowBitConfig

LENGTHS = (5, 9, 14)


@pytest.fixture(scope="module")
def model(tiny):
    return load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, group_size=32))


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def tokens(length: int) -> torch.Tensor:
    return inputs("llama", batch=1, length=length)["input_ids"]


def ops_of(graph: torch.nn.Module) -> list[str]:
    """Names of this package's ops in a graph, in order."""
    return [str(node.target).removesuffix(".default") for node in graph.graph.nodes if "lowbit" in str(node.target)]


def expected_ops(model) -> list[str]:
    """One op for every packed module, in the order in which they run."""
    kinds = {"LowBitEmbedding": "embedding", "LowBitLinear": "linear"}
    found = [kinds[type(m).__name__] for m in model.modules() if type(m).__name__ in kinds]
    return [f"lowbit.{kind}" for kind in found]


@pytest.mark.parametrize("dynamic, graphs", [(True, (1, 2, 2, 2)), (None, (1, 2, 3, 3))], ids=["dynamic", "automatic"])
@torch.no_grad()
def test_prefills_and_decodes_share_graphs(model, dynamic, graphs):
    """One graph for a prompt of any length and one for a token. Unasked, torch takes the first length for the only one.

    ``graphs``: how many there are after the first prompt, after its tokens, and after the second and third prompts.
    """
    counter = CompileCounter()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=dynamic, backend=counter)
    compiles = []
    for length in LENGTHS:
        ids, position = tokens(length), torch.arange(length)[None]
        caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        for _ in range(4):
            got, wanted = (
                f(ids, past_key_values=c, position_ids=position).logits
                for f, c in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(got, wanted)
            ids, position = wanted[:, -1:].argmax(-1), position[:, -1:] + 1
            compiles.append(counter.frame_count)
    assert (compiles[0], compiles[3], compiles[7], compiles[11]) == graphs


@torch.no_grad()
def test_the_ops_are_opaque_in_a_compiled_graph(model):
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compile(model, fullgraph=True, backend=keep)(tokens(7), use_cache=False)
    (graph,) = graphs
    assert ops_of(graph) == expected_ops(model)


@torch.no_grad()
def test_export_keeps_the_ops_and_any_length(model):
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(7), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
    )
    assert ops_of(program.graph_module) == expected_ops(model)
    for n in (2, 7, 23):
        got = program.module()(input_ids=tokens(n), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens(n), use_cache=False).logits, rtol=0, atol=0)


def test_an_exported_program_can_be_saved(model, tmp_path):
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": tokens(7), "use_cache": False})
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        got = loaded(input_ids=tokens(7), use_cache=False).logits
        torch.testing.assert_close(got, model(tokens(7), use_cache=False).logits, rtol=0, atol=0)
