"""``transform="hadamard-folded"``: the residual stream of a decoder rotated once and for all, at no cost at run time.

With R orthogonal, ``rms(x R) = rms(x)``, so a norm that only divides by that gives ``y R`` for ``x R``: what comes
before each reader of the stream can stay rotated if its weight is, and the norm's own weight goes into the readers
(SliceGPT, Ashkboos et al., 2024; R1 of QuaRot and SpinQuant). With g the weight of the norm before it, a reader
W becomes ``W diag(g) R``, a writer ``R^T W``, the embedding ``E R``, the head ``W diag(g) R`` and every norm 1: the
same function, and each reader sees inputs in which nothing stands out. R is that of :mod:`..transforms.hadamard`,
fixed by the width of the stream; so what becomes of a block depends on that block alone. Layers that do not read the
stream (output and down projections) rotate their inputs online, as with ``transform="hadamard"``.

No architecture is known here. Readers are the layers that a norm can hand factors to (:mod:`.folding`), writers all
other layers that are as wide as the stream. Then block after block, and both ends of the model, have to give for
``x R`` what they gave for x, times R. A model that does not is refused, naming the place: norms that subtract the mean
(GPT-2), norms behind a writer (Gemma 3), experts that are no linear layers, an embedding that is the head as well.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..formats.rotated import FOLDED
from ..plan import STREAM, Plan, _tied_weights
from ..quantizer import quantize_weight
from ..transforms.hadamard import rotate
from .arguments import Arguments
from .block import Solution
from .folding import EPSILON, Fold, _example, _run, find_folds
from .order import Outside, Stop

if TYPE_CHECKING:
    from .blocks import Blocks

CURE = "use transform='hadamard', which rotates inputs as the model runs"


@dataclass
class Turn:
    """What is to be done in a block: its norms with their readers, and its writers, by their names in it."""

    norms: list[Fold]
    writers: list[str]

    @property
    def readers(self) -> list[str]:
        return [name for norm in self.norms for name in norm.layers]

    @torch.no_grad()
    def apply(self, block: nn.Module) -> None:
        """Rotates the stream of ``block``, float32, in place."""
        for norm in self.norms:
            weight = block.get_parameter(norm.into + ".weight")
            gain = norm.offset + weight
            for name in norm.layers:
                _change(block.get_submodule(name), lambda w, gain=gain: rotate(w * gain))
            weight.copy_(torch.full_like(weight, 1 - norm.offset))
        for name in self.writers:
            module = block.get_submodule(name)
            _change(module, lambda w: rotate(w.T).T)
            bias = module._parameters["bias"]
            if bias is not None:
                bias.copy_(rotate(bias))

    def changed(self, packed: list[str]) -> list[str]:
        """Names of the parameters that :meth:`apply` changes, but for the weights of ``packed`` layers."""
        names = [f"{norm.into}.weight" for norm in self.norms]
        names += [f"{name}.weight" for name in [*self.readers, *self.writers] if name not in packed]
        return names + [f"{name}.bias" for name in self.writers]


@dataclass
class Residual:
    """A model whose residual stream is rotated.

    Attributes:
        embedding, head: Names of the input embedding and the output head.
        norm: The norm before the head, as a fold into it.
        turns: What is to be done in every block, by name.
    """

    embedding: str
    head: str
    norm: Fold
    turns: dict[str, Turn] = field(default_factory=dict)

    def embed_in(self, model: nn.Module) -> None:
        """Rotates the embedding of ``model``, float32, in place."""
        weight = model.get_parameter(f"{self.embedding}.weight")
        weight.data = rotate(weight.data)

    def folded(self) -> dict[str, str]:
        """Full names of the readers, with what their rotation went into."""
        return {f"{block}.{name}": STREAM for block, turn in self.turns.items() for name in turn.readers}

    def packed_ends(self, plan: Plan) -> list[str]:
        """Names of embedding and head, as far as they are packed."""
        return [name for name in (self.embedding, self.head) if name in plan.packed]

    def ends(self, blocks: "Blocks") -> tuple[dict[str, Solution], dict[str, torch.Tensor]]:
        """What embedding, head and the norm before it become: packed ones by module, others by parameter, float32."""
        plan, packed, others = blocks.source.plan.packed, dict[str, Solution](), dict[str, torch.Tensor]()
        dtype = blocks.source.model.config.dtype
        gain_of = f"{self.norm.into}.weight"
        for name in (self.embedding, self.head):
            model = copy.deepcopy(blocks.model)
            blocks.fill(model, {f"{name}.weight", gain_of})
            weight, gain = model.get_parameter(f"{name}.weight"), self.norm.offset + model.get_parameter(gain_of)
            value = rotate(weight.data if name == self.embedding else weight.data * gain.data)
            others[gain_of] = torch.full_like(gain.data, 1 - self.norm.offset)
            if name in plan:
                packed[name] = Solution(quantize_weight(value, plan[name], f"{name}.weight"))
            else:
                others[f"{name}.weight"] = value
        return packed, {name: value.to(dtype).float() for name, value in others.items()}


def plan_rotation(blocks: "Blocks") -> Residual:
    """What rotating the residual stream of the model of ``blocks`` takes, found and tried on its first sample.

    Raises:
        ValueError: for a model that is not the same with a rotated stream, naming the place.
    """
    model, kind = blocks.model, type(blocks.model).__name__
    if len(blocks.order.rows) != 1:
        raise ValueError(f"{kind} has several rows of blocks, and {FOLDED!r} is for decoders alone: {CURE}")
    names = {id(module): name for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(id(module) not in names or not isinstance(module, nn.Embedding | nn.Linear) for module in ends):
        raise ValueError(f"{kind} has no embedding or no head that could be rotated, as {FOLDED!r} has to: {CURE}")
    embedding, head = (names[id(module)] for module in ends)
    if {f"{embedding}.weight", f"{head}.weight"} & {n for tie in _tied_weights(model).items() for n in tie}:
        raise ValueError(
            f"{kind} has one weight for {embedding} and {head}, and {FOLDED!r} changes each in its own way: untie them "
            f"(save the model with config.tie_word_embeddings=False and a copy of the weight), or {CURE}"
        )
    found = Residual(embedding, head, _try_head(blocks, head))
    _try_embedding(blocks, found)
    turns: dict[str, Turn] = {}
    for name in blocks.names:
        example = _example(blocks, name)
        if example is None:
            raise ValueError(f"{name} cannot be tried on a sample before the others ran, as {FOLDED!r} has to: {CURE}")
        if example not in turns:
            block, run = blocks.read_block(example), partial(_run, sample=blocks.order.examples[example])
            turns[example] = find_turn(block, run)
            check_turn(example, block, turns[example], *blocks.order.examples[example])
        found.turns[name] = turns[example]
    stored = {name for piece in blocks.source.pieces for name in piece.outputs}
    for name, layers in zip(blocks.names, blocks.layers, strict=True):
        known = {parameter for parameter, _ in blocks.model.get_submodule(name).named_parameters()}
        for parameter in known.intersection(found.turns[name].changed(layers)):
            if f"{name}.{parameter}" not in stored:
                raise ValueError(f"{name}.{parameter} is made of several tensors when it is loaded: {CURE}")
    return found


def find_turn(block: nn.Module, run: Any) -> Turn:
    """Norms, readers and writers of the stream in ``block``, a guess for :func:`check_turn`."""
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    folds = [fold for fold in find_folds(block, linears, tuple(linears), run) if fold.index is None]
    outputs = run(block)
    width = outputs[0].shape[-1]
    norms = [fold for fold in folds if len(block.get_parameter(fold.into + ".weight")) == width]
    readers = {name for fold in norms for name in fold.layers}
    writers = [n for n in linears if n not in readers and _rows(block.get_submodule(n)) == width]
    return Turn(norms, writers)


@torch.no_grad()
def check_turn(name: str, block: nn.Module, turn: Turn, x: torch.Tensor, args: list, kwargs: dict) -> None:
    """Raises ``ValueError`` unless ``block`` as ``turn`` changes it gives for ``x R`` what it gives for x, times R."""
    turned = copy.deepcopy(block)
    turn.apply(turned)
    _compare(name, block, _run(turned, (rotate(x), args, kwargs))[0], _run(block, (x, args, kwargs))[0])


@torch.no_grad()
def check_block(blocks: "Blocks", index: int, turned: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> None:
    """The same for block ``index``, read and ``turned``, on the first of its inputs (W, L, H), which are rotated."""
    first, device = arguments.batches(1)[0], next(turned.parameters()).device
    x, block = hidden[first].to(device), blocks.read_block(blocks.names[index]).to(device)
    before = arguments.call(block, rotate(x, inverse=True), first)[0]
    _compare(blocks.names[index], block, arguments.call(turned, x, first)[0], before)


def _compare(name: str, block: nn.Module, after: torch.Tensor, before: torch.Tensor) -> None:
    error = _distance(after, rotate(before))
    if not error <= tolerance(block):
        raise ValueError(
            f"{name} does not give the same with a rotated residual stream (relative error {error:.1e}), as {FOLDED!r} "
            f"needs: it has norms that do more than divide, or weights that are no linear layers. {CURE.capitalize()}"
        )


def tolerance(block: nn.Module) -> float:
    """Relative error that rounding may make: for float32 sums as long as all inputs of its layers, ``8 sqrt(n) u``.

    (Higham and Mary, 2019: sums of n products stay within that, but for odds of 2 exp(-32).)
    """
    return 8 * EPSILON * sum(p.numel() / len(p) for p in block.parameters() if p.ndim > 1) ** 0.5


@torch.no_grad()
def _try_embedding(blocks: "Blocks", residual: Residual) -> None:
    """Checks that the first block gets ``x R`` of a rotated embedding."""
    call, seen = {"input_ids": torch.arange(1, 17)[None]}, list[torch.Tensor]()

    def play(name, x, args, kwargs):
        seen.append(x.detach().clone())
        raise Stop

    outside = Outside(blocks, packed=False)
    outside.run(call, play)
    residual.embed_in(outside.model)
    outside.run(call, play)
    error = _distance(seen[1], rotate(seen[0])) if len(seen) == 2 else float("inf")
    if not error <= 8 * EPSILON * seen[0].shape[-1] ** 0.5:
        raise ValueError(
            f"the first block of {type(blocks.model).__name__} gets more than its embedding (relative error "
            f"{error:.1e} with a rotated one), such as positions or another norm, as {FOLDED!r} cannot have: {CURE}"
        )


@torch.no_grad()
def _try_head(blocks: "Blocks", head: str) -> Fold:
    """The norm before the output head, tried with a rotated stream."""
    logits = blocks.head(torch.device("cpu"))
    width = blocks.model.get_submodule(head).get_parameter("weight").shape[1]
    window = torch.arange(1, 17)
    x = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0))
    found = find_folds(logits.model, [head], (head,), lambda _: [logits(window, x)])
    norm = next((fold for fold in found if fold.index is None), None)
    if norm is not None:
        before = logits(window, x)
        Turn([norm], []).apply(logits.model)
        if _distance(logits(window, rotate(x)), before) <= 8 * EPSILON * (2 * width) ** 0.5:
            return norm
    raise ValueError(
        f"{type(blocks.model).__name__} has no norm before {head} that can be rotated, as {FOLDED!r} needs: {CURE}"
    )


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of ``first`` from ``second``, relative to that."""
    return float((first - second).norm() / second.norm())


def _rows(linear: nn.Module) -> int:
    weight = linear.get_parameter("weight")
    return weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1]


def _change(linear: nn.Module, change) -> None:
    """Puts ``change`` of its weight (N, K) in the place of it."""
    weight, plain = linear.get_parameter("weight"), isinstance(linear, nn.Linear)
    changed = change(weight.data if plain else weight.data.T)
    weight.data = (changed if plain else changed.T).contiguous()
