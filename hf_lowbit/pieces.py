"""What becomes of every tensor of a checkpoint when it is packed from disk to disk.

A :class:`Piece` stands for one tensor of the source, or for those that a converter of transformers takes together
(experts that are fused, a fused projection that is split). All pieces are made, and checked against the plan and the
config, from headers alone; :func:`produce` then makes the tensors of one piece.

A packed weight is stored under the name that it has in the source where loading finds its companions under that name
too, and under the name of its parameter otherwise. What a converter makes only into float is stored as it was.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers.core_model_loading import WeightConverter, dot_natural_key
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

from .plan import Plan
from .quantizer import quantize_weight
from .skeleton import KeyMap
from .storage.headers import Entry
from .storage.shards import Reader

logger = logging.get_logger(__name__)


class Solved(Protocol):
    """Modules that were packed before: their tensors, by suffix, by the module's name, or None for another module."""

    identity: str
    """Text that differs for other tensors."""

    def __call__(self, name: str) -> dict[str, torch.Tensor] | None: ...

    def parameter(self, name: str) -> torch.Tensor | None:
        """The new value of a parameter that is not packed, by its full name, or None where it stays."""


@dataclass
class Piece:
    """What becomes of some tensors of the source.

    Attributes:
        target: The (first) parameter made.
        keys: Names in the source, with the converter's ``patterns`` that they match (None without a converter).
        dtype: What they are cast to.
        converter: The transformers rule that makes parameters of them, or None for one tensor that stays one.
        made: Parameters made.
        outputs: For each of them (or, kept as in the source, for each key) the tensors to store: stored name to a
            tensor on ``meta``.
    """

    target: str
    keys: list[str]
    patterns: list[str | None]
    dtype: torch.dtype
    converter: WeightConverter | None = None
    made: list[str] = field(default_factory=list)
    outputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors to store, on ``meta``, by stored name."""
        return {name: tensor for tensors in self.outputs.values() for name, tensor in tensors.items()}


def make_pieces(model, plan: Plan, key_map: KeyMap, entries: dict[str, Entry], reader: Reader) -> list[Piece]:
    """Everything to store, in the order of the source's names, checked against the plan and the config."""
    pieces: dict[str, Piece] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(entries, key=dot_natural_key):
        target, pattern = key_map(key)
        if target not in key_map.known:
            unexpected[target] = key
            continue
        converter = key_map.by_pattern[pattern] if pattern else None
        packed = target.removesuffix(".weight") in plan.packed and target.endswith(".weight")
        piece = pieces.setdefault(target, Piece(target, [], [], key_map.cast(target, packed), converter))
        if converter is None and piece.keys:
            continue  # two names for one parameter: loading takes the first
        piece.keys.append(key)
        piece.patterns.append(pattern)
    drop_tied(model, pieces, entries, reader)
    for piece in pieces.values():
        lay_out(piece, plan, key_map, entries, model)
    check_complete(model, plan, pieces, unexpected)
    for target, key in unexpected.items():
        like = on_meta(entries[key], key)
        pieces[target] = Piece(target, [key], [None], like.dtype, outputs={target: {key: like}})
    for name in [n for n in key_map.known if n.endswith(".weight_like")]:
        like = torch.empty(0, dtype=key_map.cast(name.removesuffix("_like"), True), device="meta")
        owner = pieces.get(name.removesuffix("_like"))
        stored = next(iter(owner.outputs[owner.target])) + "_like" if owner else name
        pieces[name] = Piece(name, [], [], like.dtype, outputs={name: {stored: like}})
    return list(pieces.values())


def drop_tied(model, pieces: dict[str, Piece], entries: dict[str, Entry], reader: Reader) -> None:
    """Drops the second copy of a tied weight, unless it differs: then transformers does not tie the two."""
    for target, source in model.all_tied_weights_keys.items():
        if target in pieces and source in pieces:
            (first, *_), (second, *_) = pieces[source].keys, pieces[target].keys
            same = (entries[first].shape, entries[first].dtype) == (entries[second].shape, entries[second].dtype)
            if same and reader.equal(first, second):
                del pieces[target]


def on_meta(entry: Entry, key: str) -> torch.Tensor:
    """A tensor on ``meta`` like the one that ``entry`` describes."""
    if entry.dtype not in str_to_torch_dtype:
        known = ", ".join(str_to_torch_dtype)
        raise ValueError(f"{os.path.basename(entry.file)}: {key} has dtype {entry.dtype}, which is none of {known}")
    return torch.empty(entry.shape, dtype=str_to_torch_dtype[entry.dtype], device="meta")


def lay_out(piece: Piece, plan: Plan, key_map: KeyMap, entries: dict[str, Entry], model) -> None:
    """Fills in what ``piece`` stores, and checks that loading will find it again."""
    made = realize(piece, lambda key: on_meta(entries[key], key), model)
    piece.made = list(made)
    packed = {name for name in made if name.removesuffix(".weight") in plan.packed and name.endswith(".weight")}
    file = os.path.basename(entries[piece.keys[0]].file)
    if piece.converter is not None and not packed:
        # Loading converts what is kept in float again: it is stored as it is.
        for key in piece.keys:
            piece.outputs[key] = {key: on_meta(entries[key], key).to(piece.dtype)}
        piece.converter = None
        return
    for name, tensor in made.items():
        if name in packed:
            for key in piece.keys:
                if not on_meta(entries[key], key).is_floating_point():
                    raise ValueError(
                        f"{file}: {key} is {entries[key].dtype}, not floating point: is this repo quantized already, "
                        "by something else?"
                    )
            planned = plan.packed[name.removesuffix(".weight")]
            expected = planned.shape[::-1] if transposed(model, name) else planned.shape
            tensors = {s: torch.empty(shape, dtype=d, device="meta") for s, (shape, d) in planned.tensors().items()}
        else:
            expected, tensors = key_map.known[name].shape, {"": tensor}
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(
                f"{file}: {piece.keys[0]} has shape {tuple(tensor.shape)}, but the config says {tuple(expected)}: "
                "weights and config do not belong together"
            )
        candidates = [name] if piece.converter is not None else [piece.keys[0], name]
        for stored in candidates:
            if all(key_map(stored + suffix) == (name + suffix, None) for suffix in tensors):
                piece.outputs[name] = {stored + suffix: t for suffix, t in tensors.items()}
                break
        else:
            raise ValueError(
                f"{file}: {piece.keys[0]} cannot be packed from disk to disk: transformers would convert {name} again "
                "when it is loaded. Keep it in float by a rule {" + repr(name.removesuffix(".weight")) + ": None}"
            )


def transposed(model, name: str) -> bool:
    """Whether the packed module of the weight ``name`` holds the transpose of the checkpoint's."""
    return getattr(model.get_submodule(name.removesuffix(".weight")), "transposed", False)


def check_complete(model, plan: Plan, pieces: dict[str, Piece], unexpected: dict[str, str]) -> None:
    """Refuses a checkpoint that lacks a weight to pack; warns of others; forgets what the model class ignores."""
    made = {name for piece in pieces.values() for name in piece.made}
    ties = model.all_tied_weights_keys
    found = made | {t for t, s in ties.items() if s in made} | {s for t, s in ties.items() if t in made}
    for name in plan.packed:
        if f"{name}.weight" not in found:
            raise ValueError(
                f"the checkpoint has no tensor {name}.weight: it is incomplete. If the module is to be new, keep it in "
                "float by a rule {" + repr(name) + ": None}"
            )
    missing = {n for n in model.state_dict() if n.rpartition(".")[0] not in plan.packed or n.endswith(".bias")} - found
    info = LoadStateDictInfo(missing, set(unexpected), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        logger.warning("the checkpoint lacks %s: loading will initialise it at random", ", ".join(info.missing_keys))
    for target in set(unexpected) - info.unexpected_keys:
        del unexpected[target]
    if unexpected:
        logger.warning("%s does not know, copied as is: %s", type(model).__name__, ", ".join(unexpected.values()))


def realize(piece: Piece, read, model) -> dict[str, torch.Tensor]:
    """The parameters that ``piece`` becomes, in float, by full name; ``read`` gives a tensor of the source."""
    if piece.converter is None:
        if piece.outputs and piece.target not in piece.outputs:  # kept for a converter to take when loading
            return {key: read(key).to(piece.dtype) for key in piece.keys}
        return {piece.target: read(piece.keys[0]).to(piece.dtype)}
    converter = copy.deepcopy(piece.converter)
    for key, pattern in zip(piece.keys, piece.patterns, strict=True):
        converter.add_tensor(piece.target, key, pattern, lambda key=key: read(key).to(piece.dtype))
    made = converter.convert(piece.target, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def produce(
    piece: Piece, reader: Reader, plan: Plan, model, solved: Solved | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors to store for ``piece``, by stored name; ``solved`` as in ``quantize_folder``."""
    if not piece.keys:
        for made in piece.outputs.values():
            for stored, tensor in made.items():
                yield stored, torch.empty(tensor.shape, dtype=tensor.dtype)
        return
    for name, tensor in realize(piece, reader.read, model).items():
        planned = plan.packed.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        tensors = {"": tensor}
        found = solved(planned.name) if solved is not None and planned is not None else None
        tuned = solved.parameter(name) if solved is not None and planned is None else None
        if found is not None:
            tensors = found
        elif tuned is not None:
            tensors = {"": tuned.to(tensor.dtype)}
        elif planned is not None:
            try:
                tensors = quantize_weight(tensor.T if transposed(model, name) else tensor, planned, name)
            except ValueError as error:
                raise ValueError(f"{reader.files[piece.keys[0]]}: {error}") from error
        yield from zip(piece.outputs[name], tensors.values(), strict=True)
