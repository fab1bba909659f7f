"""Where factors of a layer's inputs can go, so that nothing multiplies them at run time: into what makes these inputs.

``(x f) (W / f)^T`` is the layer again. The factors f of the K inputs disappear where x comes straight from a norm that
nothing else reads, into that norm's weight (and bias), or from another linear layer through what multiplies each of
its outputs (a gate, the weights of an attention), into the rows of its weight. Layers that read the same x share them.

Nothing is known of architectures. A block runs on a sample, with hooks that see which tensor a layer reads and which
module made it, and each guess is tried there: factors on the tensor where it is made, their inverses where it is read.
All of them are powers of two, so every product and sum of floating point is scaled as a whole, and the block's output
has to be **the same, bit by bit**, if the guess is right; what else reads the tensor, or does not just multiply it,
shows. A norm whose weight is kept as an offset from 1 is tried both ways. Inputs that are made of outputs of a linear
layer in another order, or of one output several times (heads that share their values), are matched by factors that
tell the number of the output, digit by digit.

What to fold is found in one block of each kind, before anything is planned, and tried again in every block with its own
weights and activations; where it fails there, the block's layers get no factors.

Left out: projections that are several layers in one weight (as GPT-2's of query, key and value), and inputs that
another block makes.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..formats.columns import ColumnsFormat
from ..methods import BlockMethod, FactorMethod
from ..plan import Plan
from .arguments import changed, tensors_in
from .damage import bits_stored

if TYPE_CHECKING:
    from .block import Block
    from .blocks import Blocks
    from .statistics import Moments

logger = logging.get_logger(__name__)

DIGIT = 4  # bits of the number of an output that one pass tells: factors from 1 to 2^15
NOTHING = 2.0**-100  # what float32 keeps less exactly (below 2^-126) cannot add up to this
EPSILON = 2.0**-24
Run = Callable[[nn.Module], list[torch.Tensor]]
"""Runs a block on a sample and returns all tensors that it gives."""


@dataclass(frozen=True)
class Fold:
    """Where the factors of an input go.

    Attributes:
        layers: The layers that read it, by their names in the block.
        into: The name of what makes it: a norm, or a linear layer.
        index: For a linear layer, the number of the output that each input is, int64 (K,); otherwise None.
        certain: Which inputs the sample had something in, bool (K,); the others get no factors.
        offset: For a norm, what is added to its weight: 0 or 1.
    """

    layers: tuple[str, ...]
    into: str
    index: torch.Tensor | None = None
    certain: torch.Tensor | None = None
    offset: float = 0.0

    def possible(self, factors: torch.Tensor, block: nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """``factors`` (K,), float32, as near as they can be had: rounded with the norm's weight, or one for an output.

        Args:
            factors: The wish.
            block: The block.
            dtype: In which the norm's weight will be stored.
        """
        if self.index is None:
            gain = self.offset + _parameter(block, self.into + ".weight")
            rounded = self.offset + self.weight(factors, block).to(dtype).float()
            found = rounded / gain
            return torch.where(found.isfinite() & (found > 0), found, 1)
        assert self.certain is not None
        each = self.by_output(factors.log(), "mean", int(self.index.max()) + 1).exp()
        return torch.where(self.certain.to(each.device), each[self.index.to(each.device)], 1)

    def weight(self, factors: torch.Tensor, block: nn.Module) -> torch.Tensor:
        """The weight of the norm with ``factors`` (K,)."""
        weight = _parameter(block, self.into + ".weight")
        return (self.offset + weight) * factors - self.offset

    def by_output(self, values: torch.Tensor, reduce: str, count: int) -> torch.Tensor:
        """``values`` (K,) of the inputs for each of ``count`` outputs of the linear layer; 0 where it makes none."""
        assert self.index is not None
        index = self.index.to(values.device)
        return torch.zeros(count, device=values.device).scatter_reduce(0, index, values, reduce, include_self=False)


# -- finding ----------------------------------------------------------------------------------------------------------


@dataclass
class Folding:
    """A fold of a block that is being solved, for a model that is kept in ``dtype``."""

    fold: Fold
    dtype: torch.dtype

    @property
    def maker(self) -> str | None:
        """The linear layer that takes the factors, if it is one."""
        return None if self.fold.index is None else self.fold.into

    def apply(self, block: "Block", moments: "Moments") -> torch.Tensor:
        """Has factors chosen for ``moments`` of the input, divides the layers' weights by them, and puts them where
        they go; a linear layer has to be solved again then. Returns the factors (K,).
        """
        layers, module = [block.layers[name] for name in self.fold.layers], block.module
        method, format = layers[0].planned.method, layers[0].planned.format
        assert isinstance(method, FactorMethod)
        weights = [layer.weight for layer in layers]
        factors = method.factors(weights, format, moments, lambda f: self.fold.possible(f, module, self.dtype))
        for layer in layers:
            layer.weight = layer.weight / factors
        if self.maker is None:
            scales, weight = factors, self.fold.weight(factors, module)
            block.tune(self.fold.into + ".weight", weight.to(self.dtype).float(), upstream=False)
        else:
            maker = block.layers[self.maker]
            scales = self.fold.by_output(factors, "amax", len(maker.weight))
            scales = torch.where(scales > 0, scales, 1)
            maker.weight = maker.weight * scales[:, None]
        bias = getattr(module.get_submodule(self.fold.into), "bias", None)
        if bias is not None:
            block.tune(self.fold.into + ".bias", (bias.detach() * scales).to(self.dtype).float(), upstream=False)
        return factors


@torch.no_grad()
def still_right(block: "Block", folds: list[Fold], dtype: torch.dtype) -> list[Folding]:
    """Those of ``folds``, planned on another block, that ``block`` gives the same output with on its own inputs."""
    if not folds or block.inputs is None:
        return []
    first, inputs = block.batches()[0][:1], block.inputs

    def run(module):
        return tensors_in([block.arguments.call(module, inputs[first].to(block.device), first)])

    outputs = run(block.reference)
    if not unchanged(block.reference, folds, run, outputs):
        right = [fold for fold in folds if unchanged(block.reference, [fold], run, outputs)]
        for fold in (f for f in folds if f not in right):
            logger.warning(
                "%s: the factors of what %s reads cannot go into %s here, as they can in others: it gets none",
                block.name, ", ".join(fold.layers), fold.into,
            )  # fmt: skip
        folds = right
    return [Folding(fold, dtype) for fold in folds]


def plan_folds(blocks: "Blocks") -> dict[str, list[Fold]]:
    """Folds for every block, by its name, that methods of the plan ask for, which is one without any yet."""
    plan, known, found = blocks.source.plan, dict[tuple, list[Fold]](), dict[str, list[Fold]]()
    # Only what is stored under its own name can be changed: a converter makes the others of several tensors.
    stored = {name for piece in blocks.source.pieces for name in piece.outputs}
    for name, layers in zip(blocks.names, blocks.layers, strict=True):
        wishes = tuple(n for n in layers if _wants_folding(plan, f"{name}.{n}"))
        example = _example(blocks, name) if wishes else None
        if example is None:
            continue
        key = (example, wishes, *layers)
        if key not in known:
            run = partial(_run, sample=blocks.order.examples[example])
            known[key] = find_folds(blocks.read_block(example), layers, wishes, run)
        found[name] = [fold for fold in known[key] if _fits(fold, name, plan, stored)]
    return {name: folds for name, folds in found.items() if folds}


def _example(blocks: "Blocks", name: str) -> str | None:
    """A block like ``name`` that was run on a sample when the order of blocks was found, or None."""
    block, found = blocks.model.get_submodule(name), None
    shapes = {n: p.shape for n, p in block.named_parameters()}
    for other in blocks.order.examples:
        like = blocks.model.get_submodule(other)
        others = {n: p.shape for n, p in like.named_parameters()}
        if type(like) is type(block) and others == shapes:
            return other
        if type(like) is type(block) and others.keys() >= shapes.keys():
            found = found or other
    return found


def _wants_folding(plan: Plan, name: str) -> bool:
    """Whether the layer ``name`` has factors of its inputs as they come (and not rotated, or but for outliers)."""
    planned = plan.packed[name]
    folds = isinstance(planned.method, FactorMethod) and bool(planned.method.fold)
    return folds and type(planned.format) is ColumnsFormat


def _fits(fold: Fold, block: str, plan: Plan, stored: set[str]) -> bool:
    """Whether the layers of ``fold`` are planned alike and may share, and what it goes into can be changed."""
    members = [plan.packed[f"{block}.{name}"] for name in fold.layers]
    if len(members) > 1 and getattr(members[0].method, "fold", None) != "all":
        return False
    alike = all((m.format, vars_of(m.method)) == (members[0].format, vars_of(members[0].method)) for m in members)
    into = f"{block}.{fold.into}"
    if fold.index is None:
        return alike and f"{into}.weight" in stored
    maker = plan.packed.get(into)
    return alike and maker is not None and not isinstance(maker.method, BlockMethod) and bits_stored(maker) is None


def vars_of(method: Any) -> dict:
    """Options of a method, comparable."""
    return {key: vars_of(v) if hasattr(v, "__dict__") else v for key, v in vars(method).items()}


def _run(block: nn.Module, sample: tuple[torch.Tensor, list, dict]) -> list[torch.Tensor]:
    """All tensors that ``block`` gives for its arguments, those included that it leaves in them."""
    given = changed([*sample], lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
    output = block(given[0], *given[1], **given[2])
    return tensors_in([output, given])


@torch.no_grad()
def find_folds(block: nn.Module, layers: list[str], wishes: tuple[str, ...], run: Run) -> list[Fold]:
    """Folds of the inputs of those of ``layers`` that are in ``wishes``, found by running the float ``block``.

    Args:
        block: The block, with float32 weights.
        layers: Names of its linear layers that are packed.
        wishes: Of those that have factors.
        run: Runs it on a sample.
    """
    trace, found = _Trace(block, layers, run), list[Fold]()
    for group in trace.groups:
        if not set(group) <= set(wishes) or any(name in trace.twice for name in group):
            continue
        for fold in [*_into_norms(block, trace, group), *_into_linears(block, trace, group, run)]:
            if unchanged(block, [fold], run, trace.outputs):
                found.append(fold)
                break
    # One norm, or one row of a weight, takes one set of factors.
    return [f for i, f in enumerate(found) if all(f.into != other.into for other in found[:i])]


@torch.no_grad()
def unchanged(block: nn.Module, folds: list[Fold], run: Run, outputs: list[torch.Tensor]) -> bool:
    """Whether ``block`` still gives ``outputs``, bit by bit, with factors on what is read through ``folds``."""
    hooks, generator = _Hooks(), torch.Generator().manual_seed(0)
    with hooks:
        for fold in folds:
            maker = block.get_submodule(fold.into)
            device = _parameter(block, fold.into + ".weight").device
            count = len(_parameter(block, fold.into + ".weight")) if fold.index is None else _out_features(maker)
            powers = torch.exp2(torch.randint(0, 4, (count,), generator=generator).float()).to(device)
            if fold.index is not None and fold.certain is not None:
                powers[fold.index[~fold.certain].to(device)] = 1
            inverse = 1 / (powers if fold.index is None else powers[fold.index.to(device)])
            hooks.after(maker, lambda module, args, output, powers=powers: output * powers)
            scaled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # (layers may look whether they get one tensor)
            for name in fold.layers:

                def undo(module, args, scaled=scaled, inverse=inverse):
                    kept = scaled.setdefault(id(args[0]), (args[0], args[0] * inverse))
                    return (kept[1], *args[1:])

                hooks.before(block.get_submodule(name), undo)
        again = run(block)
    return len(again) == len(outputs) and all(map(torch.equal, again, outputs))


class _Trace:
    """What a block's layers read in one run, and which norms made it.

    Attributes:
        outputs: All that the block gave.
        groups: Names of linear layers by the tensor that they read, in the order in which they ran.
        inputs: That tensor, by the name of a layer.
        norms: For modules with a weight for each channel: their arguments, copied, and what they gave.
        twice: Names of all that ran more than once.
    """

    def __init__(self, block: nn.Module, layers: list[str], run: Run):
        self.inputs: dict[str, torch.Tensor] = {}
        self.norms: dict[str, tuple[tuple, dict, torch.Tensor]] = {}
        self.twice: set[str] = set()
        arguments: dict[str, tuple[tuple, dict]] = {}
        shared = [id(p) for _, p in block.named_parameters(remove_duplicate=False)]
        with _Hooks() as hooks:
            for name, module in block.named_modules():
                own = dict(module.named_parameters())
                channels = own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
                if name in layers:
                    hooks.before(module, self._reads(name))
                elif "weight" in own and channels and all(shared.count(id(p)) == 1 for p in own.values()):
                    hooks.before(module, self._keeps(name, arguments), with_kwargs=True)
                    hooks.after(module, self._gives(name, arguments))
            self.outputs = run(block)
        self.groups: list[list[str]] = []
        for name, x in self.inputs.items():
            group = next((g for g in self.groups if self.inputs[g[0]] is x), None)
            if group is None:
                self.groups.append(group := [])
            group.append(name)

    def _reads(self, name):
        def hook(module, args):
            if self.inputs.setdefault(name, args[0]) is not args[0]:
                self.twice.add(name)

        return hook

    def _keeps(self, name, arguments):
        def hook(module, args, kwargs):
            copied = changed([args, kwargs], lambda v: v.clone() if isinstance(v, torch.Tensor) else v)
            arguments[name] = (tuple(copied[0]), copied[1])

        return hook

    def _gives(self, name, arguments):
        def hook(module, args, output):
            if name in self.norms or not isinstance(output, torch.Tensor):
                self.twice.add(name)
            else:
                self.norms[name] = (*arguments[name], output)

        return hook


def _into_norms(block: nn.Module, trace: _Trace, group: list[str]) -> list[Fold]:
    """The norm that made what ``group`` reads, if its weight multiplies each channel."""
    x, found = trace.inputs[group[0]], []
    for name, (args, kwargs, made) in trace.norms.items():
        same = made is x or (made.data_ptr() == x.data_ptr() and made.numel() == x.numel())
        norm = block.get_submodule(name)
        weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
        if not same or name in trace.twice or weight is None or len(weight) != x.shape[-1]:
            continue
        powers = torch.exp2(torch.randint(0, 4, weight.shape, generator=torch.Generator().manual_seed(1)).float())
        powers = powers.to(weight.device)
        before = norm(*args, **kwargs)
        for offset in (0.0, 1.0):
            changes = {"weight": (offset + weight) * powers - offset}
            if bias is not None:
                changes["bias"] = bias * powers
            after = torch.func.functional_call(norm, changes, args, kwargs)
            if torch.equal(after, before * powers):
                found.append(Fold(tuple(group), name, offset=offset))
                break
            if offset and bias is None:
                # Three roundings, of sums of at most 1 + |gain|, in the weight, and one in the norm.
                gain = (1 + weight).abs()
                rounding = 4 * EPSILON * (1 + 2 * gain * powers) * (before.abs() / gain.clamp_min(EPSILON))
                if ((after - before * powers).abs() <= rounding).all():
                    found.append(Fold(tuple(group), name, offset=offset))
    return found


def _into_linears(block: nn.Module, trace: _Trace, group: list[str], run: Run) -> list[Fold]:
    """The linear layers whose outputs, each multiplied by something, are what ``group`` reads."""
    x, found = trace.inputs[group[0]], []
    earlier = list(trace.inputs)[: list(trace.inputs).index(group[0])]
    for name in earlier:
        count = _out_features(block.get_submodule(name))
        if name in trace.twice or x.shape[-1] % count:
            continue
        index, shift, certain = torch.zeros(x.shape[-1], dtype=torch.int64, device=x.device), 0, None
        while (1 << shift) < count:
            digits = (torch.arange(count, device=x.device) >> shift) & (2**DIGIT - 1)
            certain = _digits_of(block, name, group[0], x, digits, index, shift, run)
            if certain is None:
                break
            shift += DIGIT
        else:
            if certain is None:  # a single output: nothing to tell
                continue
            straight = torch.arange(count, device=x.device)
            if not certain.all():
                # Where the sample had nothing, the order of the outputs has to be plain.
                if count != len(index) or not torch.equal(index[certain], straight[certain]):
                    continue
                index = straight
            if int(index.max()) < count:
                found.append(Fold(tuple(group), name, index.cpu(), certain.cpu()))
    return found


def _digits_of(block, maker, reader, x, digits, index, shift, run) -> torch.Tensor | None:
    """Adds to ``index`` a digit of the number of ``maker``'s output that each input of ``reader`` is a multiple of.

    Returns:
        Where that could be seen, bool (K,), or None if some input is no such multiple.
    """
    seen: list[torch.Tensor] = []

    def stop(module, args):
        seen.append(args[0])
        raise _Seen

    with _Hooks() as hooks:
        hooks.after(block.get_submodule(maker), lambda module, args, output: output * torch.exp2(digits.float()))
        hooks.before(block.get_submodule(reader), stop)
        with suppress(_Seen):
            run(block)
    if not seen:
        return None
    before, after = x.flatten(0, -2), seen[0].flatten(0, -2)
    largest, place = before.abs().max(0)
    certain = largest > NOTHING
    ratio = after.gather(0, place[None])[0] / before.gather(0, place[None])[0]
    exponents = torch.where(certain, ratio, 1).log2()
    if not ((exponents >= 0) & (exponents < 2**DIGIT)).all():
        return None
    whole = exponents.round().long()
    if not ((after - before * torch.exp2(whole.float())).abs() <= NOTHING).all():
        return None
    index += whole << shift
    return certain


class _Seen(Exception):
    """Ends a run once a layer's input is known."""


class _Hooks:
    """Hooks that are removed on leaving."""

    def __init__(self):
        self.handles = []

    def before(self, module, hook, with_kwargs=False):
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    def after(self, module, hook):
        self.handles.append(module.register_forward_hook(hook))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def _parameter(block: nn.Module, name: str) -> torch.Tensor:
    return block.get_parameter(name).detach()


def _out_features(linear: nn.Module) -> int:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1]
