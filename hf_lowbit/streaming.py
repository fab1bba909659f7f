"""Running a packed model that is larger than the memory it may have: ``LowBitConfig(max_memory_bytes="300MB")``.

What is outside of numbered layers (embedding, head), norms, biases and whatever is not packed stays in memory. Of the
layers' packed weights, as many layers as fit stay there too, spread evenly over the model, so that the disk is busy
while they are computed (:mod:`.placement` decides). The others are read when their turn comes, by
:mod:`.storage.stream`: two or three buffers of one layer each count as part of the budget, and so do those that coded
tensors are decoded from. Where a coded layer still fits as it is stored, it stays in memory like that. Activations and
the cache of keys and values do not count.

Parameters of a streamed layer are views of the mapped file, which take no memory: the packed tensors, or the coded ones
as they are stored, which ``save_pretrained`` writes as they are. Whatever computes asks the stream for the layer.
Autograd saves nothing of it: the backward asks the stream again, which learns that order too.

With budgets for accelerators the model computes there. A layer that is not in the accelerator's memory arrives in the
host's buffers as above and is copied from there to one buffer of the accelerator, in the order of what it computes, so
that nothing has to be waited for twice: the disk is what limits such a model, not the copy.

Left out: merging adapters into streamed layers and training their scales (both refused), and weights of layers that are
not packed, such as fused experts, which stay in memory.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

from . import budgets, ops
from .linear import LowBitLinear
from .placement import Placement, mb, place
from .plan import names
from .storage.content import places_in
from .storage.headers import Entry, read_headers
from .storage.laid import Laid, as_decoded, lay, read_decoded
from .storage.layers import Layer, Stored, by_layer, lay_out_layer, layer_of
from .storage.laying import WORTH, pass_seconds
from .storage.reading import Counts, Speeds, allocate, decoders, measure, read_layer
from .storage.stream import LayerStream
from .streamed import DeviceBuffer, StreamedWeight

logger = logging.get_logger("transformers.hf_lowbit")


@dataclasses.dataclass
class StreamingReport(Counts):
    """What streaming has done since loading or :meth:`Streaming.reset`, and what it holds.

    Attributes:
        budget_bytes: What was allowed, on all devices together.
        held_bytes: What is held on the devices with a budget: parameters in memory, layers in memory, buffers.
        held: The same by device; where the CPU has no budget, its buffers too.
        layers_kept: Layers in the memory of the device that computes them.
        layers_coded: Layers in the host's memory as they are stored, which are decoded, or copied to the device that
            computes them, in each pass.
        layers_streamed: Layers read from disk in each pass.
        layers_laid: Of these, coded layers that are read decoded, from a scratch file.
        pass_bytes: Bytes that one pass over the streamed layers reads, less than they have where parts of them are in
            memory.
        coded_ratio: Of layers with coded tensors, their bytes as stored over those in a buffer.
    """

    budget_bytes: int = 0
    held_bytes: int = 0
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    layers_kept: int = 0
    layers_coded: int = 0
    layers_streamed: int = 0
    layers_laid: int = 0
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
        devices = f" ({', '.join(f'{name} {mb(held)}' for name, held in self.held.items())})"
        return (
            f"{self.layers_kept} layers in memory, {self.layers_coded} there as stored, {self.layers_streamed} read in "
            f"each pass ({mb(self.pass_bytes)}), {self.layers_laid} of them laid decoded; "
            f"held {mb(self.held_bytes)} of {mb(self.budget_bytes)}"
            f"{devices if len(self.held) > 1 else ''}; read "
            f"{mb(self.bytes_read)} in {self.reading_s:.2f} s ({mb(self.wasted_bytes)} for nothing), decoded "
            f"{mb(self.bytes_decoded)} in {self.decoding_s:.2f} s, wrote "
            f"{mb(self.bytes_written)} in {self.writing_s:.2f} s, waited {self.waiting_s:.2f} s in {self.waits} waits"
        )


class Streaming:
    """The streamed layers of a model: made on its skeleton, so that what cannot work is said before loading.

    Args:
        model: With packed modules in place, possibly on ``meta``.
        files: The checkpoint's files.
        limits: Bytes by device, as :func:`.budgets.read_budgets` gives them.
        folder: For decoded layers (:mod:`.storage.laying`), or None to have none.

    Attributes:
        layers: Every layer with packed linears, in order.
        placed: Where they are.
        stream: That reads those that are not in memory, or None.
        fields: Names of all their tensors.

    Raises:
        ValueError: for files that are not safetensors, modules that are not in them, and a budget that is too small,
            with the least that would do.
    """

    def __init__(
        self, model: nn.Module, files: Iterable[str] | None, limits: dict[str, int], folder: Path | None = None
    ):
        self.limits, self.folder = limits, folder
        files = list(files or ())
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"max_memory_bytes= streams safetensors files, and {file} is none")
        entries = read_headers(files)
        self._decoded = {name for name, entry in entries.items() if entry.coded_bytes is not None}
        self._modules = by_layer(name for name, m in model.named_modules() if isinstance(m, LowBitLinear))
        self.layers = [
            lay_out_layer(layer, _stored(model, modules, entries)) for layer, modules in self._modules.items()
        ]
        self.fields = {name for layer in self.layers for name in layer.fields}
        self.stream: LayerStream | None = None
        self.placed = place(self.layers, _other_bytes(model, self.fields), limits)

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Puts what stays into memory, and the stream behind the other layers of the loaded ``model``."""
        speeds, laid, forms = self._place(model)
        placed = self.placed
        devices = {layer.name: budgets.torch_device(d) for layer, d in zip(self.layers, placed.devices, strict=True)}
        first = budgets.torch_device(placed.first)
        owners = _owners(model)
        for name in [name for name, _ in model.named_parameters() if name not in self.fields]:
            mapped = self._decoded.isdisjoint(names(name, str(model.base_model_prefix)))  # a view of its file
            data = model.get_parameter(name).data.to(devices.get(layer_of(name) or "", first), copy=mapped)
            _put(owners, model.get_parameter(name), data)
        if placed.first != budgets.HOST:
            _move_buffers(model, devices, first)
        for index in sorted(placed.kept):
            layer = forms[index]
            buffer = allocate(layer.nbytes)
            if layer is self.layers[index]:
                read_layer(layer, buffer)
            else:
                read_decoded(self.layers[index], memory := allocate(self.layers[index].nbytes))
                buffer[:] = memory[: layer.nbytes]
            if placed.first != budgets.HOST:
                buffer = buffer.to(devices[layer.name], copy=True)
            for name, field in layer.fields.items():
                _put(owners, model.get_parameter(name), field.view(buffer))
        if len(set(placed.devices)) > 1:
            _align_inputs(model, devices, first)
        streamed = [i for i in range(len(self.layers)) if i not in placed.kept]
        if not streamed:
            return
        stored = [number for number, i in enumerate(streamed) if i in placed.stored]
        extents = [(streamed.index(i), number) for i, number in placed.extents]
        layers, as_stored = [forms[i] for i in streamed], [self.layers[i] for i in streamed]
        self.stream = LayerStream(
            layers, placed.slots, stored, extents, placed.buffers, self.folder, speeds, laid, as_stored
        )
        _map(model, as_stored)
        targets = self._targets(placed, streamed)
        for number, index in enumerate(streamed):
            layer, target = forms[index], targets.get(placed.devices[index])
            for name in self._modules[layer.name]:
                module = model.get_submodule(name)
                assert isinstance(module, LowBitLinear)
                fields = [layer.fields[f"{name}.{tensor}"] for tensor in module.packed_names]
                buffers = self.stream.buffers if target is None else [target.buffer]
                views = [[field.view(buffer) for field in fields] for buffer in buffers]
                module.streamed = StreamedWeight(self.stream, number, views, target)
                if target is not None:
                    module.qweight = views[0][0]  # PEFT asks this name first where a quantized layer's adapter goes
        homes = list(dict.fromkeys([first, *devices.values()]))
        apply = functools.partial(_apply_streamed, weakref.ref(model), homes)
        model._apply = apply  # type: ignore[method-assign]
        logger.info("streaming: %s", self.report())

    def _place(self, model: nn.Module) -> tuple[Speeds | None, Laid | None, list[Layer]]:
        """Decides again what stays where: a tie that the checkpoint does not have makes a model larger.

        Returns:
            The speeds that this was decided by, if by any; what layers were laid in, if they were; and the layers in
            the form in which they are read.
        """
        host, coded = self.placed.first == budgets.HOST, any(layer.coded for layer in self.layers)
        others, lays = _other_bytes(model, self.fields), self.folder is not None
        speeds = None
        if (host or coded) and len(self.placed.kept) < len(self.layers):
            speeds = measure(self.layers)
            if host and coded and lays:
                speeds = dataclasses.replace(speeds, computing_s=self._computing_seconds(model))
        self.placed = place(self.layers, others, self.limits, speeds, lays)
        if speeds is None or not coded or self.folder is None:
            return speeds, None, self.layers
        forms = [as_decoded(layer) if layer.coded else layer for layer in self.layers]
        placed = place(forms, others, self.limits, speeds)

        def pays(disk: float) -> bool:
            found = dataclasses.replace(speeds, disk=disk)
            return _pass_seconds(forms, placed, found) <= WORTH * _pass_seconds(self.layers, self.placed, found)

        laid, some = None, [i for i, layer in enumerate(self.layers) if i not in placed.kept and layer.coded]
        if not pays(speeds.disk) or (some and (laid := lay([self.layers[i] for i in some], self.folder, pays)) is None):
            return speeds, None, self.layers
        for i, layer in zip(some, laid.layers if laid is not None else (), strict=True):
            forms[i] = layer
        self.placed = placed
        return speeds, laid, forms

    def _computing_seconds(self, model: nn.Module) -> float:
        """What the packed products of all layers take for one token, about: those of one layer, as often."""
        layer = next(layer for layer in self.layers if layer.coded)
        buffer, times, dtype = allocate(layer.nbytes), [], getattr(model, "dtype", torch.float32)
        read_layer(layer, buffer)
        for _ in range(3):  # the first may load the CPU kernels
            start = time.perf_counter()
            for name in self._modules[layer.name]:
                module = model.get_submodule(name)
                assert isinstance(module, LowBitLinear)
                weight, *companions = (layer.fields[f"{name}.{tensor}"].view(buffer) for tensor in module.packed_names)
                x = torch.zeros(1, module.in_features, dtype=dtype)
                ops.linear(x, weight, companions, None, module.spec, module.in_features, module.backend)
            times.append(time.perf_counter() - start)
        return len(self.layers) * min(times)

    def _targets(self, placed: Placement, streamed: list[int]) -> dict[str, DeviceBuffer]:
        """The buffer of each accelerator that has layers of ``streamed``."""
        sizes: dict[str, int] = {}
        for i in streamed:
            name = placed.devices[i]
            if placed.first != budgets.HOST:
                sizes[name] = max(sizes.get(name, 0), self.layers[i].nbytes)
        return {name: DeviceBuffer(nbytes, budgets.torch_device(name)) for name, nbytes in sizes.items()}

    @property
    def as_stored(self) -> set[str]:
        """Names of parameters that are coded, as their file has them."""
        return {name for i, layer in enumerate(self.layers) if i not in self.placed.kept for name in layer.coded}

    @property
    def streams(self) -> bool:
        """Whether any layer is streamed."""
        return self.stream is not None

    def placeholder(self, name: str) -> Tensor:
        """What loading puts in the place of the layers' coded tensor ``name``: its shape and dtype without memory."""
        field = next(layer.fields[name] for layer in self.layers if name in layer.fields)
        return torch.zeros(1, dtype=field.dtype, device="cpu").expand(field.shape)

    def report(self) -> StreamingReport:
        """Counts and sizes so far."""
        counts = Counts() if self.stream is None else self.stream.counts
        placed = self.placed
        streamed = [layer for i, layer in enumerate(self.layers) if i not in placed.kept and i not in placed.stored]
        coded = [layer for layer in self.layers if layer.coded]
        return StreamingReport(
            **dataclasses.asdict(counts),
            budget_bytes=sum(self.limits.values()),
            held_bytes=sum(nbytes for name, nbytes in placed.held.items() if name in self.limits),
            held=dict(placed.held),
            layers_kept=len(placed.kept),
            layers_coded=len(placed.stored),
            layers_streamed=len(streamed),
            layers_laid=0 if self.stream is None else self.stream.layers_laid,
            pass_bytes=0 if self.stream is None else self.stream.pass_bytes,
            coded_ratio=sum(layer.read_bytes for layer in coded) / sum(layer.nbytes for layer in coded)
            if coded
            else 1.0,
        )

    def reset(self) -> None:
        """Sets the counts to zero."""
        if self.stream is not None:
            self.stream.reset()


def _pass_seconds(layers: Sequence[Layer], placed: Placement, speeds: Speeds) -> float:
    """What a pass takes by ``speeds`` where ``layers`` are placed so."""
    streamed = [i for i in range(len(layers)) if i not in placed.kept]
    kept = {(i, number) for i in placed.stored for number in range(len(layers[i].extents))} | placed.extents
    kept = {(streamed.index(i), number) for i, number in kept}
    return pass_seconds([layers[i] for i in streamed], kept, speeds)


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


def _other_bytes(model: nn.Module, without: set[str]) -> dict[str | None, int]:
    """Bytes of all parameters and buffers by layer, tied ones once, but those in ``without``."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str | None, int] = {}
    seen = set()
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if name in without or id(tensor) in seen or (name in tied and tensor.device.type == "meta"):
                continue
            seen.add(id(tensor))
            found[layer_of(name)] = found.get(layer_of(name), 0) + tensor.nbytes
    return found


_Owners = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def _owners(model: nn.Module) -> _Owners:
    """The modules that have each parameter, and its names there; tied ones have several."""
    found: _Owners = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


def _put(owners: _Owners, parameter: nn.Parameter, data: Tensor) -> None:
    """Puts ``data``, on any device, in the place of ``parameter`` wherever it is."""
    made = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for module, name in owners.pop(parameter):  # the memory of the old one is free by then
        module._parameters[name] = made


def _move_buffers(model: nn.Module, devices: dict[str, torch.device], first: torch.device) -> None:
    """Moves the model's buffers to the device of their layer, or to the first one."""
    for name, buffer in list(model.named_buffers()):
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(devices.get(layer_of(name) or "", first))


def _align_inputs(model: nn.Module, devices: dict[str, torch.device], first: torch.device) -> None:
    """Makes layers, and modules outside of them, move what they are given to their device, as a ``device_map`` does."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    skipped = getattr(model, "_skip_keys_device_placement", None)
    for name, module in model.named_modules():
        inside = layer_of(f"{name}.")
        if name in devices or (inside is None and any(True for _ in module.parameters(recurse=False))):
            hook = AlignDevicesHook(execution_device=devices.get(name, first), skip_keys=skipped)
            add_hook_to_module(module, hook)


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


def _apply_streamed(model_ref, homes: list[torch.device], fn: Callable[[Tensor], Tensor], recurse: bool = True):
    for home in homes:
        device = fn(torch.empty(0, device=home)).device
        if device != home:
            places = "the CPU" if homes == [torch.device("cpu")] else ", ".join(map(str, homes))
            raise ValueError(
                f"this model streams its layers from disk for {places} and cannot be moved to {device}: load it "
                "without max_memory_bytes for that, or with other budgets"
            )
    model = model_ref()
    on_host = torch.device("cpu") in homes  # else what is there are views of files, and stays
    return type(model)._apply(model, fn if on_host else lambda t: t if t.device.type == "cpu" else fn(t), recurse)
