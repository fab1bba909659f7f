"""What an error of each layer costs at the model's output, and the share of a rate that this leaves it.

To second order, an error ``e`` in a layer's output costs ``e F e^T / 2`` nats of KL per token, with F the Fisher
information there: the mean outer product of the gradients of ``log p(y)`` for labels y that the model itself draws
(Martens, 2020). Its diagonal, the mean squared gradient of each output, comes from one pass there and back:

- there, a block at a time, with the inputs of all blocks kept in a file, and the second moments of each layer's inputs;
- through the head, with one drawn label for each token;
- back, a block at a time.

Memory holds one block, its graph for one batch, and one layer's moments; the file takes blocks x W x L x H floats.
:data:`WINDOWS` of the calibration windows are enough, as one number for a row is asked of them and no matrix.

:func:`divide` then gives every layer its share. At high rates the best steps are the same everywhere in units of what
an error costs (:mod:`hf_lowbit.methods.rate_aware`), so there is one factor for the model, at which the layers' rates,
known as curves over it, sum up to what is wanted.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from ..formats.columns import ColumnsFormat
from ..methods.gptq import inverse_factor
from ..methods.rate_aware import rate_of, row_worth, side_bits
from ..plan import Packed
from ..storage.shards import TEMPORARY, explained, sync_folder

logger = logging.get_logger(__name__)
FILE = "damage.safetensors"
WINDOWS, DAMPING, SAMPLE_WEIGHTS = 16, 0.01, 2**15
EXPONENTS = torch.arange(-6.0, 5.0)  # of 2, where a curve has its points: steps in parts of the weights' magnitude


@dataclass
class LayerShare:
    """What a layer gets: bits in all, and the mean squared gradient at each of its outputs (N,), float32."""

    bits: float
    gradients: torch.Tensor


def bits_stored(planned: Packed) -> float | None:
    """What a planned layer aims at together with the others, or None."""
    aims = isinstance(planned.format.inner, ColumnsFormat) and planned.method is not None
    return getattr(planned.method, "bits_stored", None) if aims else None


def read_damage(work: Path) -> dict[str, torch.Tensor] | None:
    """What :func:`measure_damage` found and kept in ``work``, or None."""
    return load_file(work / FILE) if (work / FILE).is_file() else None


def measure_damage(
    blocks, work: Path, names: list[str], tokens: torch.Tensor, seed: int, *, batch_size: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Runs the float model forth and back, and keeps what is found in ``work``.

    Args:
        blocks: The model.
        work: A folder.
        names: Layers to measure.
        tokens: Calibration windows, int64 (W, L), of which :data:`WINDOWS` are looked at.
        seed: For the labels.
        batch_size: Windows that run together.
        device: Where to compute.

    Returns:
        For each layer ``<name>.gradients`` (N,), the mean squared gradients; ``<name>.curve``, its bits per weight at
        each of :data:`EXPONENTS`; and ``<name>.scale`` (1,), the factor of steps at the exponent 0. All float32.
    """
    from .block import Block, Layer, _weight
    from .pipeline import _hold  # which runs the hooks that import this

    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), WINDOWS)).round().long()]
    inputs, arguments = blocks.capture(tokens)
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(
            f"{type(blocks.model).__name__} is calibrated on dicts of inputs, and bits_stored= with method 'gptq' "
            "divides the bits by what errors do to the next token's probabilities: give text, or use bits= or method "
            "'ecsq'"
        )
    arguments = [a.to(device) for a in arguments]
    states = _hold(work, (len(blocks.names) + 1, *inputs.shape), 0)
    assert states is not None
    states[0], planned, worth = inputs, blocks.source.plan.packed, {}
    for i, prefix in enumerate(logging.tqdm(blocks.names, desc="Measuring, there", unit="block")):
        module = blocks.read(i).to(device)
        layers = {
            name: Layer(f"{prefix}.{name}", planned[f"{prefix}.{name}"], _weight(module.get_submodule(name)))
            for name in blocks.layers[i]
            if f"{prefix}.{name}" in names
        }
        block = Block(prefix, i, module, layers, states[i].to(device), None, arguments[i], None, batch_size)
        for group in block.groups() if layers else ():
            moments = block.moments(group)
            for format in {layers[name].planned.format for name in group}:
                factor = inverse_factor(moments.turned(format).damped(DAMPING)).diagonal().cpu()
                worth.update({layers[n].name: factor for n in group if layers[n].planned.format == format})
        states[i + 1] = block.outputs(module, block.inputs)
    slopes, found = _from_the_head(blocks, tokens, states[-1], seed, device), {}
    for i, prefix in reversed(list(enumerate(logging.tqdm(blocks.names, desc="Measuring, back", unit="block")))):
        module = blocks.read(i).to(device).requires_grad_(False)
        local = [name for name in blocks.layers[i] if f"{prefix}.{name}" in names]
        squares = _pass_back(module, local, states[i], slopes, arguments[i], batch_size, device)
        for name in local:
            full, gradients = f"{prefix}.{name}", squares[name].cpu() / tokens.numel()
            format = planned[full].format
            weight = format.turn(_weight(module.get_submodule(name))).cpu()
            scale, curve = _curve(weight, gradients, worth[full], format.inner)
            found.update({f"{full}.gradients": gradients, f"{full}.curve": curve, f"{full}.scale": scale})
    path = work / FILE
    temporary = path.with_name(f"{path.name}-{os.getpid()}{TEMPORARY}")  # each of several processes has its own
    with explained(path, sum(t.nbytes for t in found.values())):
        save_file(found, temporary)
    os.replace(temporary, path)
    sync_folder(work)
    return found


def _from_the_head(blocks, tokens, output, seed, device) -> torch.Tensor:
    """Gradients (W, L, H) of the summed ``-log p(y)`` by the last block's ``output``, for labels drawn from p."""
    logits, slopes, generator = blocks.head(device), torch.empty_like(output), torch.Generator().manual_seed(seed)
    for w, window in enumerate(tokens):
        x = output[w : w + 1].to(device).requires_grad_()
        with torch.enable_grad():
            scores = logits(window, x).float()
            labels = torch.multinomial(torch.softmax(scores.detach(), -1).cpu(), 1, generator=generator)[:, 0]
            F.cross_entropy(scores, labels.to(device), reduction="sum").backward()
        slopes[w] = x.grad[0]
    return slopes


def _pass_back(module: nn.Module, names, inputs, slopes, arguments, batch_size, device) -> dict[str, torch.Tensor]:
    """Sums over tokens of squared gradients (N,) at the layers ``names``; ``slopes`` (W, L, H) pass on in place."""
    squares: dict[str, torch.Tensor] = {}

    def watch(name):
        def at_output(_, __, output):
            sums = squares.setdefault(name, torch.zeros(output.shape[-1], device=device))

            def add(gradient):
                sums.add_(gradient.square().flatten(0, -2).sum(0))

            output.register_hook(add)

        return at_output

    handles = [module.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    for windows in arguments.batches(batch_size):
        x = inputs[windows].to(device).requires_grad_()
        with torch.enable_grad():
            arguments.run(module, x, windows).backward(slopes[windows].to(device))
        slopes[windows] = x.grad.to(slopes.device)
    for handle in handles:
        handle.remove()
    missing = next((name for name in names if name not in squares), None)
    if missing is not None:
        raise ValueError(f"{missing} never saw a token of the calibration: plan it by a rule without bits_stored=")
    return squares


def _curve(weight, gradients, worth, format) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of steps at which they are as large as weights are, (1,), and the rates around it (points,)."""
    part = slice(None, None, -(-weight.numel() // SAMPLE_WEIGHTS))
    sample, rows = weight[part], row_worth(weight, gradients)[part]
    scale = (sample / rows / worth).square().mean().sqrt().clamp_min(1e-30)
    points = [rate_of(sample, rows * scale * 2**e, worth, format, len(weight)) for e in EXPONENTS]
    return scale.view(1), torch.tensor(points)


def divide(damage: dict[str, torch.Tensor], aimed: dict[str, Packed]) -> dict[str, LayerShare]:
    """The shares of all layers in ``aimed``; those that aim at the same rate have it between them."""
    shares = {}
    for target in sorted({bits_stored(p) or 0.0 for p in aimed.values()}):
        members = {name: p for name, p in aimed.items() if bits_stored(p) == target}
        sizes = np.array([p.shape[0] * p.shape[1] for p in members.values()], float)
        side = np.array([side_bits(p.shape) for p in members.values()], float)
        curves = [damage[f"{name}.curve"].numpy() for name in members]
        scales = [float(damage[f"{name}.scale"]) for name in members]

        def bits(exponent, sizes=sizes, curves=curves, scales=scales):
            at = [np.interp(exponent - np.log2(s), EXPONENTS, c) for s, c in zip(scales, curves, strict=True)]
            return sizes * np.array(at)

        low, high = min(np.log2(scales)) - 10, max(np.log2(scales)) + 10
        for _ in range(60):
            middle = (low + high) / 2
            enough = bits(middle).sum() + side.sum() <= target * sizes.sum()
            low, high = (low, middle) if enough else (middle, high)
        for name, own in zip(members, bits(high) + side, strict=True):
            shares[name] = LayerShare(float(own), damage[f"{name}.gradients"])
    return shares
