"""PEQA: finetuning the scales alone (Kim et al., 2023, https://arxiv.org/abs/2305.14152).

:func:`train_scales` makes the scales of every packed linear layer, and on request its zero points, the only trainable
parameters of a model; the codes stay as they are, bit for bit, so that tasks share them and a task is a small file
of scales (:func:`save_scales`, :func:`load_scales`). 8-bit scales have no gradient: such a layer moves to float32
scales, which hold the same values. Zero points are stored in float16; the parameter that is trained is float32 and is
rounded when it is used and saved, and so are scales where the format stores 16 bits.

With ``D = gradient.T @ x``, the gradient of the dequantized weight, the gradient of a scale is the sum of ``D`` times
the derivative of the weight over its group. It is made a block of rows at a time by differentiating the format's own
``decode``, so that every format works and no dequantized layer is ever alive.

Embeddings and tables of levels (``codebook``) are not trained.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import ops
from ..formats import Format, parse_format
from ..formats.scales import signed
from ..linear import LowBitLinear

KIND = "hf_lowbit scales, version 1"
BLOCK_WEIGHTS = 2**18
"""Weights whose gradient is alive at a time, in float32."""
_TRAINED = ("_scales", "_zeros")


class TrainedScalesLinear(LowBitLinear):
    """A packed linear layer whose float companions are float32 parameters, rounded to the format's dtypes in use."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., K) to (..., N), in the dtype of ``x`` (or of autocast)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = _ScaledProduct.apply(x, self.spec, self.in_features, self.backend, self.weight, *self.companions())
        return y if bias is None else y + bias

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        stored = _as_stored(self.format, self.companions())
        return ops.dequantize(self.weight, stored, self.spec, self.in_features, dtype, self.backend)

    def _restored(self, names):
        return [getattr(self, name) for name in names]  # wider than what is stored, on purpose

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix, tensor in zip(self.format.suffixes(), _as_stored(self.format, self.companions()), strict=True):
            if tensor.dtype != getattr(self, "weight" + suffix).dtype:
                destination[f"{prefix}weight{suffix}"] = tensor if keep_vars else tensor.detach()


def train_scales(model: Any, zeros: bool = False, scale_dtype: str | None = None) -> list[str]:
    """Makes the scales of all packed linear layers the only trainable parameters of ``model``, in place.

    Args:
        model: A packed transformers model. What it computes changes only by the rounding to ``scale_dtype``.
        zeros: Whether zero points are trained too; integer ones become float16.
        scale_dtype: "float32", "float16" or "bfloat16", how scales are stored from now on. By default float scales
            stay as they are and 8-bit ones become float32.

    Returns:
        Names of the layers whose scales are trained.

    Raises:
        ValueError: if there is nothing to train, for an unknown ``scale_dtype`` and for scales that do not fit it.
    """
    if scale_dtype is not None and not signed(scale_dtype):
        raise ValueError(f"scale_dtype={scale_dtype!r} cannot be trained: use 'float32', 'float16' or 'bfloat16'")
    layers = {name: layer for name, layer in _linears(model).items() if "_scales" in layer.format.suffixes()}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no packed linear layer with scales: load it with "
            "quantization_config=LowBitConfig(...), and not with codebook='row'"
        )
    if zeros and not any("_zeros" in layer.format.suffixes() for layer in layers.values()):
        raise ValueError("zeros=True, but no layer has zero points: quantize with symmetric=False, or leave zeros out")
    corrected = [name for name, layer in layers.items() if layer.low_rank is not None]
    if corrected:
        raise ValueError(
            f"{corrected[0]} has a low-rank correction from a merged adapter, beside which scales cannot be trained: "
            "train them before merging, or merge by 'requantize'"
        )
    streamed = [name for name, layer in layers.items() if layer.streamed is not None]
    if streamed:
        raise ValueError(
            f"{streamed[0]} is streamed from disk, where its scales stay as they are: load the model without "
            "max_memory_bytes to train them"
        )
    rotated = [name for name, layer in layers.items() if layer.format.inner is not layer.format]
    if rotated:
        raise ValueError(
            f"{rotated[0]} is stored with {layers[rotated[0]].format.name!r}, beside which scales cannot be trained: "
            "quantize the model without it"
        )
    model.requires_grad_(False)
    for name, layer in layers.items():
        try:
            _adopt(layer, _trainable(layer.format, zeros, scale_dtype))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for suffix in _float_suffixes(layer.format) if zeros else ("_scales",):
            getattr(layer, "weight" + suffix).requires_grad_(True)
    _note_formats(model, layers, trains=True)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # reentrant checkpointing gives no gradients otherwise
    return list(layers)


def save_scales(model: Any, file: str | os.PathLike) -> None:
    """Writes the scales (and float zero points) of a model of :func:`train_scales` to a safetensors file.

    Raises:
        ValueError: if the model has none.
    """
    layers = {name: layer for name, layer in _linears(model).items() if isinstance(layer, TrainedScalesLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no trained scales: call train_scales or load_scales first")
    tensors = {}
    for name, layer in layers.items():
        stored = dict(zip(layer.format.suffixes(), _as_stored(layer.format, layer.companions()), strict=True))
        for suffix in _float_suffixes(layer.format):
            tensors[f"{name}.weight{suffix}"] = stored[suffix].detach().cpu().contiguous()
    formats = {name: layer.spec for name, layer in layers.items()}
    metadata = {"kind": KIND, "codes": codes_hash(model, list(layers)), "layers": json.dumps(formats)}
    file = Path(file)
    partial = file.with_name(file.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(file)


def load_scales(model: Any, file: str | os.PathLike) -> None:
    """Gives ``model`` the scales of a file of :func:`save_scales`: switches it to another task, in place.

    Layers keep being trained, or not, as before. Nothing is changed if anything is wrong with the file.

    Raises:
        ValueError: for a file that is damaged, of another kind, made for other codes or for other layers, naming it.
    """
    file = Path(file)
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("kind") != KIND:
                raise ValueError(f"{file.name} is not a file of scales: its kind is {metadata.get('kind')!r}")
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} cannot be read ({error}): it is missing, truncated or damaged") from error
    layers, formats = _linears(model), _read_formats(metadata, file.name)
    for name, format in formats.items():
        if name not in layers:
            raise ValueError(f"{file.name} has scales of {name}, which is not a packed linear layer of this model")
        same: dict[str, Any] = {"scale_dtype": layers[name].format.scale_dtype}
        if "_zeros" in format.suffixes():
            same["zeros"] = getattr(layers[name].format, "zeros", None)
        if type(format) is not type(layers[name].format) or dataclasses.replace(format, **same) != layers[name].format:
            raise ValueError(f"{file.name} has scales for {name} as {format.spec}, the model has {layers[name].spec}")
        for suffix in _float_suffixes(format):
            shape, dtype = format.tensors(layers[name].packed_shape)[suffix]
            tensor = tensors.get(f"{name}.weight{suffix}")
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{file.name} has {found} for {name}.weight{suffix}, not {dtype} of shape {shape}")
    if codes_hash(model, list(formats)) != metadata.get("codes"):
        raise ValueError(
            f"{file.name} was trained on other codes than this model has: load the base model that it was trained on"
        )
    for name, format in formats.items():
        layer = layers[name]
        if layer.format != format:
            _adopt(layer, format)
        for suffix in _float_suffixes(format):
            getattr(layer, "weight" + suffix).data.copy_(tensors[f"{name}.weight{suffix}"])
    _note_formats(model, {name: layers[name] for name in formats})


def codes_hash(model: Any, names: list[str]) -> str:
    """SHA-256, in hexadecimal, of the packed codes of the layers ``names`` and of their names and shapes.

    Raises:
        ValueError: for a layer that is offloaded, naming it.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        codes = model.get_submodule(name).weight
        if codes.device.type == "meta":
            raise ValueError(f"{name} is offloaded: load the model without offloading to work with its scales")
        digest.update(json.dumps([name, list(codes.shape)]).encode() + b"\n")
        digest.update(codes.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def _linears(model) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowBitLinear)}


def _float_suffixes(format: Format) -> list[str]:
    """Suffixes of the companions that can be trained."""
    tensors = format.tensors((1, 64))
    return [suffix for suffix in _TRAINED if suffix in tensors and tensors[suffix][1].is_floating_point]


def _trainable(format: Format, zeros: bool, scale_dtype: str | None) -> Format:
    """``format`` with scales, and on request zero points, in float."""
    options: dict[str, Any] = {
        "scale_dtype": scale_dtype or (format.scale_dtype if signed(format.scale_dtype) else "float32")
    }
    if zeros and "_zeros" in format.suffixes():
        options["zeros"] = "float"
    return dataclasses.replace(format, **options)


@torch.no_grad()
def _adopt(layer: Any, format: Format) -> None:
    """Changes how the scales of ``layer`` are stored to ``format``, with float32 parameters; the codes are kept."""
    if layer.weight.device.type == "meta":
        raise ValueError("the layer is offloaded: load the model without offloading to train its scales")
    stored = dict(zip(layer.format.suffixes(), _as_stored(layer.format, layer.companions()), strict=True))
    tensors = format.pack(layer.format.unpack({"": layer.weight, **stored}, layer.packed_shape))
    floats = _float_suffixes(format)
    layer.__class__ = TrainedScalesLinear  # hooks, ties and references to the layer stay valid
    for name in layer.packed_names[1:]:
        delattr(layer, name)
    layer.format, layer.spec = format, format.spec
    layer.packed_names = ("weight", *("weight" + suffix for suffix in format.suffixes()))
    del tensors[""]
    layer.set_packed({s: t.to(torch.float32) if s in floats else t for s, t in tensors.items()})


def _note_formats(model, layers: dict[str, LowBitLinear], trains: bool = False) -> None:
    """Tells the model's quantizer, which writes formats into ``config.json`` and answers the Trainer."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    quantizer.trains_scales = quantizer.trains_scales or trains
    for name, layer in layers.items():
        quantizer.plan.packed[name] = dataclasses.replace(quantizer.plan.packed[name], format=layer.format)
    quantizer.quantization_config.layers = model.config.quantization_config.layers = quantizer.plan.layers()


def _as_stored(format: Format, companions: list[torch.Tensor]) -> list[torch.Tensor]:
    """``companions`` in the dtypes of ``format``."""
    dtypes = [dtype for suffix, (_, dtype) in format.tensors((1, 64)).items() if suffix]
    return [tensor.to(dtype) for tensor, dtype in zip(companions, dtypes, strict=True)]


def _read_formats(metadata: dict[str, str], file: str) -> dict[str, Format]:
    try:
        layers = json.loads(metadata["layers"])
        return {name: parse_format(spec) for name, spec in layers.items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not say the formats of its layers: {error}") from error


class _ScaledProduct(torch.autograd.Function):
    """``x @ W.T``, differentiable with respect to ``x`` and to float companions; saves packed tensors and ``x``."""

    @staticmethod
    def forward(ctx, x, spec, in_features, backend, weight, *companions):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5:]) else None, weight, *companions)
        ctx.call = (spec, in_features, backend)
        return ops.linear(x, weight, _as_stored(parse_format(spec), list(companions)), None, *ctx.call)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, *companions = ctx.saved_tensors
        format, needed = parse_format(ctx.call[0]), ctx.needs_input_grad[5:]
        stored = _as_stored(format, companions)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = torch.ops.lowbit.input_gradient(gradient, weight, stored, *ctx.call)
        results: list[torch.Tensor | None] = [None] * len(companions)
        if any(needed):
            wanted = [suffix for suffix, need in zip(format.suffixes(), needed, strict=True) if need]
            tensors = dict(zip(("", *format.suffixes()), (weight, *stored), strict=True))
            found = companion_gradients(format, tensors, x, gradient, wanted)
            results = [found.get(suffix) for suffix in format.suffixes()]
        return x_gradient, None, None, None, None, *results


def companion_gradients(
    format: Format, stored: dict[str, torch.Tensor], x: torch.Tensor, gradient: torch.Tensor, wanted: list[str]
) -> dict[str, torch.Tensor]:
    """Gradients of the companions ``wanted``, by suffix, float32.

    Args:
        format: How the weight (N, K) is stored.
        stored: Its tensors, by suffix.
        x: (..., K), what the weight was multiplied with.
        gradient: (..., N), of the product.
        wanted: Suffixes of float companions with N rows.
    """
    in_features, rows = x.shape[-1], stored[""].shape[0]
    x, gradient = x.reshape(-1, in_features), gradient.reshape(-1, rows)
    results = {suffix: torch.empty_like(stored[suffix], dtype=torch.float32) for suffix in wanted}
    size = max(1, BLOCK_WEIGHTS // in_features)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        block = format.select_rows(stored, part)
        leaves = {suffix: block[suffix].detach().float().requires_grad_() for suffix in wanted}
        with torch.enable_grad():
            values = format.decode(format.unpack({**block, **leaves}, (part.stop - start, in_features)))
        share = (gradient[:, part].T @ x).to(values.dtype)
        for suffix, result in zip(wanted, torch.autograd.grad(values, list(leaves.values()), share), strict=True):
            results[suffix][part] = result
    return results
