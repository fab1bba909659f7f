"""Running a packed model that is larger than the memory it may have: ``LowBitConfig(max_memory_bytes="300MB")``.

What is outside of numbered layers (embedding, head), norms, biases and whatever is not packed stays in memory. Of the
layers' packed weights, as many layers as fit stay there too, spread evenly over the model, so that the disk is busy
while they are computed. The others are read when their turn comes, by :mod:`.storage.stream`: two buffers of one layer
each count as part of the budget, and so do those that coded tensors are decoded from. Where a coded layer still fits
as it is stored, it stays in memory like that. Activations and the cache of keys and values do not count.

Parameters of a streamed layer are views of the mapped file, which take no memory: the packed tensors, or the coded ones
as they are stored, which ``save_pretrained`` writes as they are. Whatever computes asks the stream for the layer.
Autograd saves nothing of it: the backward asks the stream again, which learns that order too.

Left out: devices other than the CPU, merging adapters into streamed layers and training their scales (all refused),
and weights of layers that are not packed, such as fused experts, which stay in memory.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from .linear import LowBitLinear
from .ops import input_gradient
from .plan import names
from .storage.content import places_in
from .storage.headers import Entry, read_headers
from .storage.layers import Layer, Stored, by_layer, lay_out_layer, spread
from .storage.stream import Counts, LayerStream, allocate, decoders, read_layer, staging_bytes

logger = logging.get_logger("transformers.hf_lowbit")
SLOTS = 2


@dataclasses.dataclass
class StreamingReport(Counts):
    """What streaming has done since loading or :meth:`Streaming.reset`, and what it holds.

    Attributes:
        budget_bytes: What was allowed.
        held_bytes: What is held: parameters in memory, layers in memory, buffers.
        layers_kept: Layers in memory.
        layers_coded: Layers in memory as they are stored, which are decoded in each pass.
        layers_streamed: Layers read from disk in each pass.
        pass_bytes: Bytes of one pass over the streamed layers.
        coded_ratio: Of layers with coded tensors, their bytes as stored over those in a buffer.
    """

    budget_bytes: int = 0
    held_bytes: int = 0
    layers_kept: int = 0
    layers_coded: int = 0
    layers_streamed: int = 0
    pass_bytes: int = 0
    coded_ratio: float = 1.0

    @property
    def coded_fraction(self) -> float | None:
        """The part of the layers that should be coded, by the speeds that were measured; None without coded ones.

        With a disk of D bytes a second, n decoders of V each and coded layers of r times their size, reading and
        decoding take equally long where the coded part is ``f = 1 / ((1 - r) + D / (n V))``, and at most 1.
        """
        if not (self.bytes_decoded and self.reading_s):
            return None
        disk, decoding = self.bytes_read / self.reading_s, decoders() * self.bytes_decoded / self.decoding_s
        return min(1.0, 1 / ((1 - self.coded_ratio) + disk / decoding))

    def __str__(self) -> str:
        return (
            f"{self.layers_kept} layers in memory, {self.layers_coded} there as stored, {self.layers_streamed} read in "
            f"each pass ({_mb(self.pass_bytes)}); held {_mb(self.held_bytes)} of {_mb(self.budget_bytes)}; read "
            f"{_mb(self.bytes_read)} in {self.reading_s:.2f} s ({_mb(self.wasted_bytes)} for nothing), decoded "
            f"{_mb(self.bytes_decoded)} in {self.decoding_s:.2f} s, waited {self.waiting_s:.2f} s in {self.waits} waits"
        )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


class Streaming:
    """The streamed layers of a model: made on its skeleton, so that what cannot work is said before loading.

    Args:
        model: With packed modules in place, possibly on ``meta``.
        files: The checkpoint's files.
        budget: Bytes.

    Attributes:
        layers: Every layer with packed linears, in order.
        kept: Numbers of those that stay in memory.
        coded: Numbers of those that stay in memory as they are stored.
        fields: Names of all their tensors.

    Raises:
        ValueError: for files that are not safetensors, modules that are not in them, and a budget that is too small,
            with the least that would do.
    """

    def __init__(self, model: nn.Module, files: Iterable[str] | None, budget: int):
        self.budget = budget
        files = list(files or ())
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"max_memory_bytes= streams safetensors files, and {file} is none")
        entries = read_headers(files)
        self._modules = by_layer(name for name, m in model.named_modules() if isinstance(m, LowBitLinear))
        self.layers = [
            lay_out_layer(layer, _stored(model, modules, entries)) for layer, modules in self._modules.items()
        ]
        self.fields = {name for layer in self.layers for name in layer.fields}
        self._stream: LayerStream | None = None
        self.fit(model)

    def fit(self, model: nn.Module) -> None:
        """Decides which layers stay in memory."""
        self.other_bytes = _nbytes(model, self.fields)
        sizes, least = [layer.nbytes for layer in self.layers], self.other_bytes
        for count in range(len(sizes), -1, -1):
            self.kept, self.coded = spread(count, len(sizes)), set[int]()
            streamed = [i for i in range(len(sizes)) if i not in self.kept]
            buffers = min(SLOTS, len(streamed)) * max((sizes[i] for i in streamed), default=0)
            buffers += staging_bytes([self.layers[i] for i in streamed])
            self.held_bytes = least = self.other_bytes + sum(sizes[i] for i in self.kept) + buffers
            if least > self.budget:
                continue
            for i in streamed:
                stored = self.layers[i].read_bytes
                if self.layers[i].coded and self.held_bytes + stored <= self.budget:
                    self.coded.add(i)
                    self.held_bytes += stored
            return
        raise ValueError(
            f"max_memory_bytes={self.budget} ({_mb(self.budget)}) is too small: what is outside of this model's "
            f"{len(sizes)} layers needs {_mb(self.other_bytes)}, and buffers for {min(SLOTS, len(sizes))} of them "
            f"{_mb(least - self.other_bytes)}; the least that would do is {least}"
        )

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Puts what stays into memory, and the stream behind the other layers of the loaded ``model``."""
        self.fit(model)  # again: a tie that the checkpoint does not have makes a model larger
        for name, parameter in model.named_parameters():
            if name not in self.fields:
                parameter.data = parameter.data.clone()  # out of the mapped file
        for index in sorted(self.kept):
            layer = self.layers[index]
            buffer = allocate(layer.nbytes)
            read_layer(layer, buffer)
            for name, field in layer.fields.items():
                model.get_parameter(name).data = field.view(buffer)
        streamed = [i for i in range(len(self.layers)) if i not in self.kept]
        if not streamed:
            return
        _map(model, [self.layers[i] for i in streamed])
        coded = [number for number, i in enumerate(streamed) if i in self.coded]
        self._stream = LayerStream([self.layers[i] for i in streamed], SLOTS, coded)
        for number, index in enumerate(streamed):
            layer = self.layers[index]
            for name in self._modules[layer.name]:
                module = model.get_submodule(name)
                assert isinstance(module, LowBitLinear)
                fields = [layer.fields[f"{name}.{tensor}"] for tensor in module.packed_names]
                views = [[field.view(buffer) for field in fields] for buffer in self._stream.buffers]
                module.streamed = StreamedWeight(self._stream, number, views)
        model._apply = functools.partial(_apply_streamed, weakref.ref(model))  # type: ignore[method-assign]
        logger.info("streaming: %s", self.report())

    @property
    def as_stored(self) -> set[str]:
        """Names of parameters that are coded, as their file has them."""
        return {name for i, layer in enumerate(self.layers) if i not in self.kept for name in layer.coded}

    @property
    def streams(self) -> bool:
        """Whether any layer is streamed."""
        return self._stream is not None

    def placeholder(self, name: str) -> Tensor:
        """What loading puts in the place of the layers' coded tensor ``name``: its shape and dtype without memory."""
        field = next(layer.fields[name] for layer in self.layers if name in layer.fields)
        return torch.zeros(1, dtype=field.dtype, device="cpu").expand(field.shape)

    def report(self) -> StreamingReport:
        """Counts and sizes so far."""
        counts = Counts() if self._stream is None else self._stream.counts
        streamed = [layer for i, layer in enumerate(self.layers) if i not in self.kept and i not in self.coded]
        coded = [layer for layer in self.layers if layer.coded]
        return StreamingReport(
            **dataclasses.asdict(counts),
            budget_bytes=self.budget,
            held_bytes=self.held_bytes,
            layers_kept=len(self.kept),
            layers_coded=len(self.coded),
            layers_streamed=len(streamed),
            pass_bytes=sum(layer.read_bytes for layer in streamed),
            coded_ratio=sum(layer.read_bytes for layer in coded) / sum(layer.nbytes for layer in coded)
            if coded
            else 1.0,
        )

    def reset(self) -> None:
        """Sets the counts to zero."""
        if self._stream is not None:
            self._stream.reset()


def _stored(model: nn.Module, modules: list[str], entries: dict[str, Entry]) -> dict[str, Stored]:
    """Where the packed tensors of ``modules`` lie, by the names of their parameters."""
    found, places = {}, functools.cache(places_in)
    for name in modules:
        aliases = names(name, str(getattr(model, "base_model_prefix", "")))
        alias = next((alias for alias in aliases if f"{alias}.weight" in entries), None)
        if alias is None:
            raise ValueError(
                f"{name} has another name in this repo's files, so that its layer cannot be streamed: load the model "
                "without max_memory_bytes and save it, which writes it under its own name"
            )
        module = model.get_submodule(name)
        assert isinstance(module, LowBitLinear)
        for tensor in module.packed_names:
            parameter, entry = module.get_parameter(tensor), entries[f"{alias}.{tensor}"]
            place = places(Path(entry.file))[f"{alias}.{tensor}"]
            coded = entry.coded_bytes is not None
            found[f"{name}.{tensor}"] = Stored(place, tuple(parameter.shape), parameter.dtype, coded)
    return found


def _nbytes(model: nn.Module, without: set[str]) -> int:
    """Bytes of all parameters and buffers, tied ones once, but those in ``without``."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {
        id(tensor): tensor.nbytes
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
        if name not in without and not (name in tied and tensor.device.type == "meta")
    }
    return sum(tensors.values())


def _map(model: nn.Module, layers: list[Layer]) -> None:
    """Makes the parameters of ``layers`` what is stored, as views of its files."""
    fields = [name for layer in layers for name in layer.fields]
    for file in dict.fromkeys(extent.file for layer in layers for extent in layer.extents):
        with safe_open(file, framework="pt") as handle:
            stored = set(handle.keys())
            for name in fields:
                alias = next((a for a in names(name, str(model.base_model_prefix)) if a in stored), None)
                if alias is not None:
                    model.get_parameter(name).data = handle.get_tensor(alias)


def _apply_streamed(model_ref, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    device = fn(torch.empty(0)).device
    if device.type != "cpu":
        raise ValueError(
            f"this model streams its layers from disk for the CPU and cannot be moved to {device}: load it without "
            "max_memory_bytes for that"
        )
    model = model_ref()
    return type(model)._apply(model, fn, recurse)


class StreamedWeight:
    """The packed weight of one module, which is in memory only while it is used.

    Args:
        stream: Of its layer.
        layer: The layer's number there.
        views: For each buffer of the stream, the packed tensors in it, in the order of the format.
    """

    def __init__(self, stream: LayerStream, layer: int, views: list[list[Tensor]]):
        self.stream, self.layer, self.views = stream, layer, views

    @contextmanager
    def use(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The weight and its companions, for as long as the context lasts."""
        with self.stream.use(self.layer) as slot:
            weight, *companions = self.views[slot]
            yield weight, companions

    def linear(self, module: LowBitLinear, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """``run``, an op of :mod:`.ops`, with the packed weight of ``module``; differentiable."""
        if x.device.type != "cpu":
            raise ValueError(f"this model's layers are streamed for the CPU, and its input is on {x.device}")
        bias = module.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _StreamedLinear.apply(x, bias, module, run)
        with self.use() as (weight, companions):
            return run(x, weight, companions, bias, module.spec, module.in_features, module.backend)


class _StreamedLinear(torch.autograd.Function):
    """The product with a streamed weight, of which nothing is saved: the backward reads it again."""

    @staticmethod
    def forward(ctx, x, bias, module, run):
        ctx.module, ctx.bias_dtype = module, None if bias is None else bias.dtype
        with module.streamed.use() as (weight, companions):
            return run(x, weight, companions, bias, module.spec, module.in_features, module.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x_gradient = bias_gradient = None
        module = ctx.module
        if ctx.needs_input_grad[0]:
            with module.streamed.use() as (weight, companions):
                x_gradient = input_gradient(
                    gradient, weight, companions, module.spec, module.in_features, module.backend
                )
        if ctx.needs_input_grad[1]:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return x_gradient, bias_gradient, None, None
