"""ApiQ: the adapter and the grid's ranges trained together, so that activations survive quantization.

Liao et al., 2024 (arXiv 2402.05147). Where LoftQ approximates weights, ApiQ approximates what layers compute, on inputs
that carry the error of everything quantized before: the output of one layer after the other
(:class:`ApiQLayerwise`, "lw"), or the output of a whole block (:class:`ApiQBlockwise`, "bw").

Trained are A, B and the range of every group, ``scale = 2 sigmoid(g) scale_0``, beginning with g = 0 at the grid that
the layer's own method has chosen. Four things differ from the paper:

- Codes stay those of the start, which makes the gradient exact. Rounded again in every step, with gradients passed
  straight through rounding, blocks of a real model ended 7 % further from the float model at 2 bits (at a smaller
  learning rate of the ranges, so the comparison is not clean).
- Training begins at the best low-rank correction, not at B = 0: at EoRA's layer by layer, towards the float model's
  output (with a high damping) block by block.
- Layer by layer, each layer is trained to compute what its float weight would on the same inputs, ``|X_q W^T - X_q (Q +
  B A)^T|^2``, as EoRA is. Trained towards its output in the float model, as in the paper, the first six blocks came
  18 % closer to it than with EoRA, and the model as a whole hardly (figures in docs/methods.md). Least squares on
  inputs with errors shrink what they fit, which may be why.
- The layer-wise objective is a quadratic form in second moments (:class:`~hf_lowbit.calibration.Moments`), so that
  every step sees all tokens at the price of one product of the weight's size.

The layer-wise form holds out some calibration windows and keeps what was best on them, EoRA's start included; the
block-wise one keeps the better of start and end.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration import Block, Hook, Layer, Moments, Solution
from ..formats.base import Quantized
from ..formats.integer import IntFormat
from ..low_rank import correction
from ..plan import Packed
from ..quantizer import quantize_weight
from .eora import EoRA
from .factors import LowRankHook, check_rank

HOLD_OUT = 8
"""Every eighth batch of calibration windows is held out."""
LOOKS = 5
"""Training steps between two looks at what is held out."""


class Trained:
    """What is trained for one layer.

    Attributes:
        a, b: Factors (r, K) and (N, r).
        ranges: (N, G), 0 where the range is the one that it began with.
    """

    def __init__(self, layer: Layer, start: Solution):
        assert isinstance(layer.planned.format, IntFormat)
        assert start.lora_a is not None and start.lora_b is not None
        self.format, self.grid = layer.planned.format, layer.planned.format.unpack(start.tensors, layer.planned.shape)
        assert self.grid.scales is not None
        self.first = self.grid.scales
        self.a, self.b = (t.clone().requires_grad_() for t in (start.lora_a, start.lora_b))
        self.ranges = torch.zeros_like(self.first).requires_grad_()
        ones = torch.ones_like(self.first)
        self.units = self.format.decode(Quantized(self.grid.codes, ones, self.grid.zeros))

    def scales(self) -> torch.Tensor:
        """Scales (N, G) as they will be stored, differentiable as if they were stored exactly."""
        exact = self.first * (2 * torch.sigmoid(self.ranges))
        return exact + (self.format.storable_scales(exact.detach()) - exact).detach()

    def value(self) -> torch.Tensor:
        """``Q + B A`` (N, K), differentiable."""
        quantized = self.format.by_group(lambda u, s: u * s.unsqueeze(-1), self.units, self.scales())
        return torch.addmm(quantized, self.b, self.a)

    @torch.no_grad()
    def solution(self) -> Solution:
        """The layer packed as it is trained now."""
        quantized = Quantized(self.grid.codes, self.scales(), self.grid.zeros)
        return Solution(self.format.pack(quantized), self.a.detach().clone(), self.b.detach().clone())


def _check_format(name: str, planned: Packed) -> None:
    if not isinstance(planned.format, IntFormat):
        raise ValueError(
            f"ApiQ learns the ranges of integer grids, and {name} is planned as {planned.format.name!r}: use "
            "format='int', or method 'eora' or 'loftq'"
        )


def _optimizer(trained: list[Trained], lr: float, range_lr: float, steps: int):
    """AdamW over factors and ranges, with all rates falling to zero in ``steps`` steps.

    Adam moves every number by about its rate in a step, whatever the gradient. So rates of factors are in parts of each
    one's root mean square, which differs tenfold between layers.
    """
    factors = [p for t in trained for p in (t.a, t.b)]
    groups = [{"params": [p], "lr": lr * float(p.detach().square().mean().sqrt())} for p in factors]
    groups.append({"params": [t.ranges for t in trained], "lr": range_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))


def _start(layer: Layer, moments: Moments, rank: int, damping: float) -> Solution:
    """The layer's own rounding and the low-rank correction that is best for the float model's output."""
    tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight")
    square, target = moments.damped(damping), layer.weight
    if moments.cross is not None and moments.tokens:
        # The weight that gives the float model's output on the quantized model's inputs: W' S = W C.
        ridge = damping * moments.square.diagonal().mean()
        cross = layer.weight.double() @ (moments.cross.double() + ridge * torch.eye(len(square), device=square.device))
        target = torch.cholesky_solve(cross.T, torch.linalg.cholesky(square.double())).T.float()
    return Solution(tensors, *correction(target - layer.value(Solution(tensors)), square, rank))


@dataclass
class ApiQLayerwise(LowRankHook):
    """ApiQ-lw: each layer is trained on the inputs that the trained ones before it leave.

    Args:
        steps: Steps of AdamW at most, each over all tokens but those held out.
        lr: Learning rate of A and B, in parts of the root mean square of each.
        range_lr: Learning rate of the ranges' logits.
        damping: As in EoRA.
    """

    steps: int = 20
    lr: float = 0.03
    range_lr: float = 3e-2
    damping: float = EoRA.damping

    activations: ClassVar[str] = "quantized"

    def check(self, name, planned):
        super().check(name, planned)
        _check_format(name, planned)

    def solve(self, block: Block) -> None:
        batches = block.batches()
        held = batches[HOLD_OUT - 1 :: HOLD_OUT]
        seen = [b for i, b in enumerate(batches) if i % HOLD_OUT != HOLD_OUT - 1]
        for group in block.groups():
            moments = block.moments(group, seen)
            held_out = block.moments(group, held) if held else moments
            for name in group:
                block.set(name, self.solve_layer(block.layers[name], moments, block.generator, held_out))

    @torch.enable_grad()
    def solve_layer(
        self, layer: Layer, moments: Moments | None, generator, held_out: Moments | None = None
    ) -> Solution:
        """The solution from the ``moments`` of the layer's inputs; those ``held_out`` say when training was best."""
        assert moments is not None
        weight, judge = layer.weight, held_out if held_out is not None and held_out.tokens else moments
        best = EoRA(self.rank, self.damping).solve_layer(layer, moments, generator)
        if not moments.tokens:
            return best
        lowest, square = judge.output_error(weight, layer.value(best)), moments.damped(self.damping)
        power = (weight @ square * weight).sum()
        trained = Trained(layer, best)
        optimizer, schedule = _optimizer([trained], self.lr, self.range_lr, self.steps)
        for step in range(1, self.steps + 1):
            value = trained.value()
            optimizer.zero_grad(set_to_none=True)
            value.backward((value.detach() - weight) @ square * (2 / power))
            optimizer.step()
            schedule.step()
            if step % LOOKS == 0 or step == self.steps:
                found = trained.solution()
                error = judge.output_error(weight, layer.value(found))
                if error < lowest:
                    lowest, best = error, found
        return best


@dataclass
class ApiQBlockwise(Hook):
    """ApiQ-bw: the layers of a block are trained together on the block's output.

    Args:
        rank: r.
        epochs: Passes over the calibration windows.
        lr: Learning rate of A and B, in parts of the root mean square of each.
        range_lr: Learning rate of the ranges' logits.
        damping: As in EoRA, for the start. Much higher there: what is fitted is the float model's output, with as many
            numbers as the weight has, which few tokens do not determine.
    """

    rank: int
    epochs: int = 2
    lr: float = 0.03
    range_lr: float = 1e-2
    damping: float = 1.0

    activations: ClassVar[str] = "both"

    def check(self, name, planned):
        check_rank(name, planned, self.rank)
        _check_format(name, planned)

    @torch.enable_grad()
    def solve(self, block: Block) -> None:
        for group in block.groups():
            moments = block.moments(group)
            for name in group:
                block.set(name, _start(block.layers[name], moments, self.rank, self.damping))
        assert block.inputs is not None and block.reference_inputs is not None
        target = block.outputs(block.reference, block.reference_inputs)
        starts = {name: layer.solution for name, layer in block.layers.items()}
        before = block.error(target)
        trained = {name: Trained(block.layers[name], s) for name, s in starts.items() if s is not None}
        batches = block.batches()
        power = (target - block.reference_inputs).square().mean()
        optimizer, schedule = _optimizer(list(trained.values()), self.lr, self.range_lr, self.epochs * len(batches))
        for _ in range(self.epochs):
            for i in torch.randperm(len(batches), generator=block.generator).tolist():
                windows = batches[i]
                weights: dict[str, torch.Tensor] = {}
                for name, t in trained.items():
                    weights |= block.as_parameter(name, t.value())
                output = block.arguments.run(block.module, block.inputs[windows], windows, weights)
                loss = (output - target[windows]).square().mean() / power
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        for name, t in trained.items():
            block.set(name, t.solution())
        after = block.error(target)
        if not after < before:
            for name, solution in starts.items():
                block.set(name, solution)
