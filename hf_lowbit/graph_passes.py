"""What is changed in a graph of compiled decoding before Inductor makes C++ of it (:mod:`.compiled`).

Products of one row with several packed weights (queries, keys and values; gate and up) become one op,
``lowbit::linears``: one call for the library and one piece of work for its threads, where each of these products is a
few microseconds. Only products without a bias, in one format, of weights that are inputs of the graph are joined;
others stay as they are.
"""

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

MOST = 16  # products in one, as in the library
_JOINED = {
    torch.ops.lowbit.linear.default: torch.ops.lowbit.linears.default,
    torch.ops.lowbit.linear_int8.default: torch.ops.lowbit.linears_int8.default,
}


def join_products(graph: fx.Graph) -> int:
    """Joins products of one row; how many ops were taken away."""
    groups = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _JOINED:
            arguments: tuple[Any, ...] = node.args
            x, weight, companions, bias, *rest = arguments
            value = x.meta["val"]
            given = all(tensor.op == "placeholder" for tensor in (weight, *companions))
            if given and bias is None and value.numel() == value.shape[-1]:
                groups[(node.target, x, len(companions), *rest)].append(node)
    joined = [(target, nodes) for (target, *_), nodes in groups.items() if 1 < len(nodes) <= MOST]
    for target, nodes in joined:
        _join(graph, target, nodes)
    return sum(len(nodes) - 1 for _, nodes in joined)


def _join(graph: fx.Graph, target: Any, nodes: list[fx.Node]) -> None:
    arguments: list[tuple[Any, ...]] = [node.args for node in nodes]
    x, _, _, _, *rest = arguments[0]
    weights = [own[1] for own in arguments]
    companions = [companion for own in arguments for companion in own[2]]
    values = [node.meta["val"] for node in nodes]
    with graph.inserting_before(nodes[0]):
        together = graph.call_function(_JOINED[target], (x, weights, companions, *rest))
        total = sum(value.shape[-1] for value in values)
        together.meta["val"] = values[0].new_empty((*values[0].shape[:-1], total))
        first = 0
        for node, value in zip(nodes, values, strict=True):
            last = first + value.shape[-1]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (together, value.dim() - 1, first, last))
            part.meta["val"] = value
            node.replace_all_uses_with(part)
            first = last
    for node in nodes:
        graph.erase_node(node)


class Passes(CustomGraphPass):
    """All of them, for the option ``post_grad_custom_post_pass``; what was compiled with others is not reused."""

    def __call__(self, graph: fx.Graph) -> None:
        join_products(graph)

    def uuid(self) -> str:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
