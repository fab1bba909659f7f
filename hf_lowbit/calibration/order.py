"""In which order a model runs its blocks, and what it does between them, found by one run of it on one sample.

The run is a cheap one: the model has only the weights that are outside its blocks, and every block is replaced by a
player that hands its hidden states on. What comes out of a player is a leaf of autograd's graph, so that for each block
it can be told what of the earlier ones its arguments are made of. Blocks that get just what the one before gave make a
*row*; a row begins wherever the model does something of its own, as between an encoder and a decoder, or a vision tower
and a language model. To know the inputs of a row, the model is run again with what the blocks before it really gave;
:attr:`Order.needed` says for which of them that has to be kept.

One block of each kind is really run, for what it returns besides hidden states and whether it changes their shape.

Left out: blocks that run more than once for a sample, and members of lists that are linear layers themselves.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..plan import _tied_weights
from ..quantizer import quantize_weight
from .arguments import Later, tensors_in

DATA = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")
Play = Callable[[str, torch.Tensor, list, dict], Any]


class Stop(Exception):
    """Ends a forward pass when all that is wanted of it is known."""


class Unfollowed(ValueError):
    """A model does what calibration cannot follow."""


@dataclass
class Returned:
    """What a block returns besides hidden states: None if it returns these alone, otherwise the rest of the tuple, with
    True at each place that is not known before it runs.
    """

    rest: tuple | None = None
    reshapes: bool = False

    def with_hidden(self, index: int, hidden: torch.Tensor) -> Any:
        """The like with ``hidden``, as the model expects it of block ``index``."""
        if self.rest is None:
            return hidden
        return (hidden, *(Later(index, i) if v is True else v for i, v in enumerate(self.rest, 1)))


@dataclass
class Order:
    """How a model runs its blocks.

    Attributes:
        names: The blocks that run, in this order.
        returned: What each returns.
        rows: Numbers of blocks that follow each other directly.
        needed: For each block whose output is used elsewhere, the number of the last row that needs it.
        examples: Input and other arguments, as on the sample, of the blocks that were really run, by name.
    """

    names: list[str] = field(default_factory=list)
    returned: list[Returned] = field(default_factory=list)
    rows: list[range] = field(default_factory=list)
    needed: dict[int, int] = field(default_factory=dict)
    examples: dict[str, tuple[torch.Tensor, list, dict]] = field(default_factory=dict)


class Outside:
    """The model of ``blocks`` with the weights that are in none of them.

    Args:
        blocks: A :class:`~hf_lowbit.calibration.blocks.Blocks`.
        packed: Whether weights that will be packed are rounded as they will be.
    """

    def __init__(self, blocks, packed: bool):
        self.model = copy.deepcopy(blocks.model)
        self.members = {name: self.model.get_submodule(name) for name in blocks.candidates}
        inside = {id(p) for block in self.members.values() for p in block.parameters()}
        output = _output_head(self.model)
        ends = {id(p) for p in output.parameters()} if output is not None else set()
        ties = _tied_weights(self.model)
        wanted = {n for n, p in self.model.named_parameters() if id(p) not in inside | ends}
        tied = {other for pair in ties.items() for other in pair if wanted & set(pair)}
        blocks.fill(self.model, wanted | tied | {n for n, _ in self.model.named_buffers()})
        if blocks.residual is not None:
            blocks.residual.embed_in(self.model)
        for name, planned in blocks.source.plan.packed.items() if packed else ():
            place = self.model.get_submodule(name)._parameters
            weight = place["weight"]
            if weight is not None and weight.device.type != "meta":
                turned = isinstance(self.model.get_submodule(name), Conv1D)
                tensors = quantize_weight(weight.T if turned else weight.data, planned, f"{name}.weight")
                value = planned.format.dequantize(tensors, planned.shape)
                place["weight"] = nn.Parameter(value.T if turned else value, requires_grad=False)
        for target, source in [*ties.items(), *((s, t) for t, s in ties.items())]:
            (owner, _, leaf), found = target.rpartition("."), self.model.get_parameter(source)
            place = self.model.get_submodule(owner)._parameters
            if leaf in place and place[leaf].device.type == "meta" and found.device.type != "meta":
                place[leaf] = found
        for module in self.model.modules():
            for leaf, parameter in module._parameters.items():
                # In blocks nothing is looked at but the dtype; outside they are new, not in the checkpoint.
                if parameter is not None and parameter.device.type == "meta" and id(parameter) not in ends:
                    value = torch.zeros((0,) if id(parameter) in inside else parameter.shape, dtype=torch.float32)
                    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        if output is not None:
            output.register_forward_pre_hook(_stop)
        forward = inspect.signature(self.model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in forward else {}
        for config in (self.model.config, *_parts(self.model.config)):
            config.use_cache = False

    def run(self, call: dict[str, torch.Tensor], play: Play) -> None:
        """Runs the model on ``call``, with ``play`` for the blocks, until it raises :class:`Stop` or all is done.

        ``play`` gets the name of a block, its hidden states and its other arguments; what it returns is its output.
        """

        def player(name):
            def forward(*args, **kwargs):
                given = list(args)
                x = given.pop(0) if given else kwargs.pop("hidden_states", None)
                if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                    raise Unfollowed(f"{name} does not get hidden states first: calibration cannot run through it")
                return play(name, x, given, kwargs)

            return forward

        for name, block in self.members.items():
            block.forward = player(name)
        with contextlib.suppress(Stop):
            self.model(**call, **self.options)


def find_lists(model: nn.Module) -> list[str]:
    """Names of all members of the outermost lists of modules with linear layers in them."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(other + ".") for other in lists):
            inner = [m for member in module for m in member.modules() if isinstance(m, (nn.Linear, Conv1D))]
            if inner and not any(isinstance(member, (nn.Linear, Conv1D)) for member in module):
                lists.append(name)
    return [f"{name}.{i}" for name in lists for i in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def find_order(blocks, call: dict[str, torch.Tensor]) -> Order:
    """Runs the model of ``blocks`` on one sample.

    Raises:
        ValueError: if it cannot run on it, saying why.
    """
    order, known = Order(), dict[Any, Returned]()
    leaves: list[torch.Tensor] = []
    outside, given = Outside(blocks, packed=False), list[torch.Tensor]()

    def play(name, x, args, kwargs):
        if name in order.names:
            raise Unfollowed(f"{name} runs more than once for one input: calibration cannot run through it")
        i = len(leaves)
        following = untouched(x, given) and not order.returned[-1].reshapes
        made_of = _made_of([*tensors_in([args, kwargs]), *([] if following else [x])], leaves)
        if not following or not made_of.isdisjoint(order.rows[-1]):
            made_of |= _made_of([x], leaves)
            order.rows.append(range(i, i))
        order.rows[-1] = range(order.rows[-1].start, i + 1)
        order.needed.update(dict.fromkeys(made_of, len(order.rows) - 1))
        member = blocks.model.get_submodule(name)
        kind = (type(member), *(tuple(p.shape) for p in member.parameters()))
        later = any(isinstance(v, Later) for v in [*args, *kwargs.values()])
        found, y = known.get(kind) or (known.get(type(member)) if later else None), x.detach()
        if found is None or found.reshapes:
            found, y = _returned(name, blocks.read_block(name), x, args, kwargs)
            known[kind] = found
            known.setdefault(type(member), found)
            order.examples[name] = (x.detach(), args, kwargs)
        order.names.append(name)
        order.returned.append(found)
        leaves.append(torch.zeros((), requires_grad=True))
        given[:] = [y + leaves[-1]]  # new, so that it may be changed in place
        return found.with_hidden(i, given[0])

    try:
        with torch.enable_grad():
            outside.run(call, play)
    except Unfollowed:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError, AssertionError) as error:
        inputs = ", ".join(f"{name} {tuple(value.shape)}" for name, value in call.items())
        takes = inspect.signature(blocks.model.forward).parameters
        others = [name for name in DATA if name in takes and name not in call]
        lacks = f" (it also takes {', '.join(others)})" if others else ""
        raise ValueError(
            f"{type(blocks.model).__name__} cannot be calibrated on {inputs}: {error}. Give all that its forward "
            f"needs{lacks}, as its processor or tokenizer returns it"
        ) from error
    return order


def _returned(name: str, block: nn.Module, x, args, kwargs) -> tuple[Returned, torch.Tensor]:
    """What ``block`` returns for its arguments, and its real output."""
    with torch.no_grad():
        output = block(x.detach(), *args, **kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, torch.Tensor):
        raise Unfollowed(f"{name} returns a {type(hidden).__name__}, not hidden states: calibration cannot run through")
    rest = None
    if isinstance(output, tuple):
        rest = tuple(v if isinstance(v, (int, float, str, type(None))) else True for v in output[1:])
    if hidden.shape == x.shape:
        return Returned(rest), x.detach()
    return Returned(rest, reshapes=True), hidden.detach()


def untouched(x: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether ``x`` is the tensor in ``given``, which was new then, and was not changed in place."""
    return bool(given) and x is given[0] and x._version == 0


def _made_of(tensors: list[torch.Tensor], leaves: list[torch.Tensor]) -> set[int]:
    """Numbers of the ``leaves`` that ``tensors`` are made of."""
    numbers = {id(leaf): i for i, leaf in enumerate(leaves)}
    found = {numbers[id(t)] for t in tensors if id(t) in numbers}
    nodes, seen = [t.grad_fn for t in tensors if t.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in numbers:
            found.add(numbers[id(leaf)])
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


def _stop(module, args):
    raise Stop


def _output_head(model) -> nn.Module | None:
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None


def _parts(config) -> list:
    """The configs in a config."""
    return [getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
