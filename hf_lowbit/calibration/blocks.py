"""A model as rows of blocks, of which one is in memory in float at a time.

Blocks are the members of the model's outermost lists of modules: those of a decoder, of an encoder, of a vision tower.
Which of them run, and in which order, is found by one run on one sample (:mod:`.order`). The skeleton has no weights:
what is outside the blocks (embeddings, projectors) is read when the inputs of a row are wanted (:mod:`.stream`), and
the blocks themselves when their turn comes.

Everything is computed in float32, from weights that were cast to the dtype in which the model will be kept.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.modeling_utils import local_torch_dtype

from ..convert import Source
from ..pieces import Piece, realize
from ..plan import _tied_weights
from ..skeleton import model_class
from .arguments import Arguments
from .folding import Fold
from .order import Order, find_lists, find_order
from .residual import Residual
from .samples import Samples, samples_of
from .stream import Stream


class Blocks:
    """The blocks of the model that ``source`` describes.

    Args:
        source: The float model.
        samples: What it will be run on; without it, only names and weights of blocks are known, those of the decoder.

    Attributes:
        candidates: Names of everything that is a block if it runs, read a block at a time.
        names: Names of the blocks, "model.layers.0" and so on, in the order in which they run.
        layers: For each block, the names in it of the linear layers that the plan packs, "self_attn.q_proj" and so on.
        order: How they follow each other.
        folds: For blocks by name, where factors of inputs are to go (:mod:`.folding`).
        residual: How the residual stream is rotated (:mod:`.residual`), in every block that is read after this is set,
            or None.

    Raises:
        ValueError: for a model without blocks, with nothing in them that is packed, or that cannot run on ``samples``.
    """

    def __init__(self, source: Source, samples: Samples | torch.Tensor | None = None):
        self.model, self.order = _skeleton(source), Order()
        self.folds: dict[str, list[Fold]] = {}
        self.residual: Residual | None = None
        self.candidates = find_lists(self.model)
        if not self.candidates:
            raise ValueError(f"{type(self.model).__name__} has no list of blocks: calibration cannot run through it")
        self.use(source)
        if samples is None:
            decoder = {id(module) for module in self.model.get_decoder().modules()}
            self.order = Order([n for n in self.candidates if id(self.model.get_submodule(n)) in decoder])
        else:
            self.order = find_order(self, samples_of(samples, self.model).fullest())
        self.use(source)
        if not any(self.layers):
            where = f"{self.names[0]} to {self.names[-1]}" if self.names else "that run"
            raise ValueError(
                f"nothing is packed in the blocks {where} of {type(self.model).__name__}: calibration has nothing to do"
            )

    @property
    def names(self) -> list[str]:
        return self.order.names

    def use(self, source: Source) -> None:
        """Takes another plan for the same model."""
        self.source, packed = source, source.plan.packed
        self.layers = [[n.removeprefix(b + ".") for n in packed if n.startswith(b + ".")] for b in self.names]
        self._owners: dict[str, list[Piece]] = {}
        for piece in source.pieces:
            for name in piece.made:
                owner = next((b for b in self.candidates if name.startswith(b + ".")), "")
                owned = self._owners.setdefault(owner, [])
                if not any(other is piece for other in owned):
                    owned.append(piece)

    def read(self, index: int) -> nn.Module:
        """A new float32 copy of block ``index`` with its weights, rotated if the residual stream is."""
        block = self.read_block(self.names[index])
        if self.residual is not None:
            self.residual.turns[self.names[index]].apply(block)
        return block

    def changes(self, index: int) -> bool:
        """Whether anything in block ``index`` will not be what it was."""
        return bool(self.layers[index]) or self.residual is not None

    def turned(self, index: int, block: nn.Module) -> dict[str, torch.Tensor]:
        """Parameters of ``block``, from :meth:`read`, that are not packed and were changed, by name in it."""
        if self.residual is None:
            return {}
        known = dict(block.named_parameters())
        names = self.residual.turns[self.names[index]].changed(self.layers[index])
        return {name: known[name].detach() for name in names if name in known}

    def read_block(self, name: str) -> nn.Module:
        """A new float32 copy of the block ``name`` with its weights."""
        block = copy.deepcopy(self.model.get_submodule(name))
        _fill(block, self._parameters(name), name + ".")
        return block.eval()

    def fill(self, model: nn.Module, wanted: set[str]) -> None:
        """Gives ``model`` those of the ``wanted`` parameters and buffers that are in no block, by full name."""
        _fill(model, self._parameters("", wanted), "")

    def capture(
        self, tokens: torch.Tensor, hold: Callable[[tuple[int, ...]], torch.Tensor] = torch.empty, packed: bool = False
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """The first block's inputs, float32 (W, L, H), for ``tokens`` (W, L), and every block's other arguments.

        Args:
            tokens: int64.
            hold: Makes the float32 tensor for the inputs from its shape.
            packed: Whether embeddings that will be packed are rounded as they will be.

        Raises:
            ValueError: for a model that does something of its own between blocks.
        """
        samples = samples_of(tokens, self.model)
        if not self.order.rows:
            self.order = find_order(self, samples.fullest())
            self.use(self.source)
        if len(self.order.rows) != 1:
            second = self.names[self.order.rows[1].start]
            raise ValueError(
                f"{type(self.model).__name__} does something of its own before {second}: a search for bits, and "
                "bits_stored=, follow a model only where its blocks follow each other directly"
            )
        stream = Stream(self, samples, packed, hold)
        arguments = [stream.enter(i) for i in range(len(self.names))]
        return stream.hidden, arguments

    def head(self, device: torch.device) -> "Head":
        """The model after its last block."""
        head = copy.deepcopy(self.model)
        _fill(head, self._parameters(""), "")
        for name, source in _tied_weights(head).items():
            owner, _, leaf = name.rpartition(".")
            head.get_submodule(owner)._parameters[leaf] = head.get_parameter(source)
        given: list[torch.Tensor] = []
        for name in self.candidates:
            last = name == self.names[-1]
            head.get_submodule(name).forward = lambda x, *_, last=last, **__: given.pop() if last else x
            for module in head.get_submodule(name).modules():
                module._parameters.clear()  # which were never read
        nn.Module.to(head, device)

        return Head(head, given)

    def _parameters(self, owner: str, wanted: set[str] | None = None):
        """Parameters (and buffers) of a block, or of what is in none (""), by full name, read one piece at a time."""
        for piece in self._owners.get(owner, []):
            if not piece.keys or (wanted is not None and wanted.isdisjoint(piece.made)):
                continue
            pattern = piece.patterns[0]
            if pattern and piece.converter is None:  # kept as in the source for loading to convert: done here
                converter = self.source.key_map.by_pattern[pattern]
                piece = dataclasses.replace(piece, converter=converter, outputs={})
            yield from realize(piece, self.source.reader.read, self.source.model).items()


class Head:
    """The model after its last block: a function from a window (L,) and that block's output (1, L, H) to logits.

    It can be differentiated by the output. The logits are (L, vocabulary).

    Attributes:
        model: The model, whose last block gives what was put into ``given``.
    """

    def __init__(self, model: PreTrainedModel, given: list[torch.Tensor]):
        self.model, self.given = model, given

    def __call__(self, window: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self.given.append(output)
        return self.model(input_ids=window[None].to(self.model.device), use_cache=False).logits[0]


def _skeleton(source: Source) -> PreTrainedModel:
    """The float model without weights, but with its buffers, in float32."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    cls = model_class(config)
    with local_torch_dtype(torch.float32, cls.__name__), no_init_weights(), no_tie_weights(), init_empty_weights(False):
        config.dtype = torch.float32
        model = cls(config)
    return model.eval()


def _fill(module: nn.Module, parameters, prefix: str) -> None:
    """Puts ``parameters``, pairs of full name and tensor, into ``module``, whose own name is ``prefix``, in float32."""
    for name, tensor in parameters:
        owner, _, leaf = name.removeprefix(prefix).rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            place._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
        else:
            place._buffers[leaf] = tensor.float() if tensor.is_floating_point() else tensor
