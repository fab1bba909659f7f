"""A causal language model as a row of decoder blocks, of which one is in memory in float at a time.

The skeleton has no weights. Its part before the first block (embeddings) is read once, to get the first block's inputs.
For that, one forward pass per window runs with every block replaced by a recorder that hands its input on, so that the
masks, rotations and whatever else the model gives to each block are known for each block (models with several kinds
of attention give them different ones). The blocks themselves are then read from the checkpoint when their turn comes.

Everything is computed in float32, from weights that were cast to the dtype in which the model will be kept.

Left out: encoders, and models that do something between two blocks; both are refused.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights, no_tie_weights
from transformers.modeling_utils import local_torch_dtype

from ..convert import Source
from ..pieces import Piece, realize
from ..plan import _tied_weights
from ..quantizer import quantize_weight
from ..skeleton import model_class


class _Recorded(Exception):
    """Stops a forward pass after the last block."""


class Blocks:
    """The decoder blocks of the model that ``source`` describes.

    Attributes:
        names: Names of the blocks, "model.layers.0" and so on.
        layers: For each block, the names in it of the linear layers that the plan packs, "self_attn.q_proj" and so on.

    Raises:
        ValueError: for a model without decoder blocks, or with nothing in them that is packed.
    """

    def __init__(self, source: Source):
        self.source = source
        self.model = _skeleton(source)
        self.decoder = self.model.get_decoder()
        self.names = _find_blocks(self.model, self.decoder)
        self._blocks = [self.model.get_submodule(name) for name in self.names]
        self.layers = [
            [name.removeprefix(block + ".") for name in source.plan.packed if name.startswith(block + ".")]
            for block in self.names
        ]
        if not any(self.layers):
            raise ValueError(
                f"nothing is packed in the decoder blocks {self.names[0]} to {self.names[-1]} of "
                f"{type(self.model).__name__}: calibration has nothing to do"
            )
        self._owners: dict[str, list[Piece]] = {}
        for piece in source.pieces:
            for name in piece.made:
                owner = next((b for b in self.names if name.startswith(b + ".")), "")
                owned = self._owners.setdefault(owner, [])
                if not any(other is piece for other in owned):
                    owned.append(piece)

    def read(self, index: int) -> nn.Module:
        """A new float32 copy of block ``index`` with its weights."""
        block = copy.deepcopy(self._blocks[index])
        _fill(block, self._parameters(self.names[index]), self.names[index] + ".")
        return block.eval()

    @torch.no_grad()
    def capture(
        self, tokens: torch.Tensor, hold: Callable[[tuple[int, ...]], torch.Tensor] = torch.empty, packed: bool = False
    ) -> tuple[torch.Tensor, list["Arguments"]]:
        """The first block's inputs, float32 (W, L, H), for ``tokens`` (W, L), and every block's other arguments.

        Args:
            tokens: int64.
            hold: Makes the float32 tensor for the inputs from its shape.
            packed: Whether embeddings that will be packed are rounded as they will be.
        """
        head, prefix = copy.deepcopy(self.model), _name_of(self.model, self.decoder)
        decoder, blocks = head.get_submodule(prefix), [head.get_submodule(name) for name in self.names]
        names = [n for n, _ in decoder.named_parameters()] + [n for n, _ in decoder.named_buffers()]
        wanted = {f"{prefix}.{n}" if prefix else n for n in names}
        _fill(head, self._parameters("", wanted), "")
        for name, planned in self.source.plan.packed.items() if packed else ():
            place = head.get_submodule(name)._parameters
            weight = place["weight"]
            if weight is not None and weight.device.type != "meta":  # that is, outside the blocks and the output head
                tensors = quantize_weight(weight.data, planned, f"{name}.weight")
                value = planned.format.dequantize(tensors, planned.shape)
                place["weight"] = nn.Parameter(value, requires_grad=False)
        hidden: torch.Tensor | None = None
        arguments = [Arguments() for _ in blocks]
        last: list[Any] = [None, -1]

        def recorder(i):
            def forward(*args, **kwargs):
                nonlocal hidden
                args = list(args)
                x = args.pop(0) if args else kwargs.pop("hidden_states")
                if i != last[1] + 1 or (i and x is not last[0]):
                    raise ValueError(
                        f"{type(self.model).__name__} does something of its own before {self.names[i]}: its blocks do "
                        "not follow each other directly, which calibration cannot follow. Use a method without it"
                    )
                if i == 0:
                    hidden = hold((len(tokens), *x.shape[1:])) if hidden is None else hidden
                    hidden[len(arguments[0].windows)] = x[0]
                arguments[i].record(args, kwargs)
                last[:] = [x, i]
                if i == len(blocks) - 1:
                    raise _Recorded
                return x

            return forward

        for i, block in enumerate(blocks):
            block.forward = recorder(i)
        for window in tokens:
            last[:] = [None, -1]
            try:
                decoder(input_ids=window[None], use_cache=False)
            except _Recorded:
                continue
            raise ValueError(f"{type(self.model).__name__} does not run its blocks {self.names[0]} to {self.names[-1]}")
        assert hidden is not None
        return hidden, arguments

    def head(self, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The model after its last block: a function from a window (L,) and that block's output (1, L, H) to logits.

        It can be differentiated by the output. The logits are (L, vocabulary).
        """
        head = copy.deepcopy(self.model)
        _fill(head, self._parameters(""), "")
        for name, source in _tied_weights(head).items():
            owner, _, leaf = name.rpartition(".")
            head.get_submodule(owner)._parameters[leaf] = head.get_parameter(source)
        given: list[torch.Tensor] = []
        for name in self.names:
            last = name == self.names[-1]
            head.get_submodule(name).forward = lambda x, *_, last=last, **__: given.pop() if last else x
            for module in head.get_submodule(name).modules():
                module._parameters.clear()  # which were never read
        nn.Module.to(head, device)

        def logits(window: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            given.append(output)
            return head(input_ids=window[None].to(device), use_cache=False).logits[0]

        return logits

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


class Arguments:
    """What a block gets besides hidden states, for every window; kept once where it is the same for all."""

    def __init__(self):
        self.windows: list[tuple[list, dict]] = []
        self.shared = True

    def record(self, args: list, kwargs: dict) -> None:
        """Notes the arguments for the next window."""
        found = (args, kwargs)
        if self.windows:
            if _same(self.windows[0], found):
                found = self.windows[0]
            else:
                self.shared = False
        self.windows.append(found)

    def to(self, device: torch.device) -> "Arguments":
        """The same on ``device``."""
        moved = Arguments()
        moved.shared = self.shared
        if self.windows:
            first = _moved(self.windows[0], device)
            moved.windows = [first if w is self.windows[0] else _moved(w, device) for w in self.windows]
        return moved

    def batches(self, size: int) -> list[torch.Tensor]:
        """Numbers of windows that can run together, at most ``size``; one by one where their arguments differ."""
        return list(torch.arange(len(self.windows)).split(size if self.shared else 1))

    def run(self, block: nn.Module, hidden: torch.Tensor, windows: torch.Tensor, weights: dict | None = None):
        """Output (b, L, H) of ``block`` for ``hidden`` (b, L, H) of ``windows`` (b,).

        Args:
            block: The block.
            hidden: Its input.
            windows: Numbers of the windows, one batch of :meth:`batches`, or some of one.
            weights: Parameters to use instead of the block's own, by name.
        """
        args, kwargs = self.windows[int(windows[0])]
        if weights is None:
            output = block(hidden, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, weights, (hidden, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output


def _moved(nest: Any, device: torch.device) -> Any:
    """A nest of arguments with its tensors on ``device``."""
    if isinstance(nest, torch.Tensor):
        return nest.to(device)
    if isinstance(nest, dict):
        return {k: _moved(v, device) for k, v in nest.items()}
    return type(nest)(_moved(v, device) for v in nest) if type(nest) in (list, tuple) else nest


def _same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments hold the same values; objects that are not data count as different."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.shape == second.shape
            and first.dtype == second.dtype
            and torch.equal(first, second)
        )
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(_same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(_same, first, second))
    return isinstance(first, (int, float, str, type(None))) and type(first) is type(second) and first == second


def _skeleton(source: Source) -> PreTrainedModel:
    """The float model without weights, but with its buffers, in float32."""
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    cls = model_class(config)
    with local_torch_dtype(torch.float32, cls.__name__), no_init_weights(), no_tie_weights(), init_empty_weights(False):
        config.dtype = torch.float32
        model = cls(config)
    return model.eval()


def _find_blocks(model: PreTrainedModel, decoder: nn.Module) -> list[str]:
    """Names of the decoder's blocks: the members of its outermost ``ModuleList`` with the most parameters."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: calibration runs through the blocks of a causal language "
            "model. Use a method that needs no calibration"
        )
    prefix = _name_of(model, decoder)
    lists: dict[str, int] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(other + ".") for other in lists):
            lists[name] = sum(p.numel() for p in module.parameters())
    if not lists or not max(lists.values()):
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks: calibration cannot run through it")
    chosen = max(lists, key=lambda name: lists[name])
    count = len(decoder.get_submodule(chosen))  # type: ignore[arg-type]
    return [".".join(part for part in (prefix, chosen, str(i)) if part) for i in range(count)]


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _fill(module: nn.Module, parameters, prefix: str) -> None:
    """Puts ``parameters``, pairs of full name and tensor, into ``module``, whose own name is ``prefix``, in float32."""
    for name, tensor in parameters:
        owner, _, leaf = name.removeprefix(prefix).rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            place._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
        else:
            place._buffers[leaf] = tensor.float() if tensor.is_floating_point() else tensor
