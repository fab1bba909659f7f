"""ApiQ: the adapter and the grid's ranges trained together, so that activations survive quantization.

Liao et al., 2024 (arXiv 2402.05147). Where LoftQ approximates weights, ApiQ approximates what layers compute, on inputs
that carry the error of everything quantized before: ``|X W^T - X_q (Q + B A)^T|^2`` for one layer after the other
(:class:`ApiQLayerwise`, "lw"), or the output of a whole block (:class:`ApiQBlockwise`, "bw").

Trained are A, B and, per group, the two ends of the grid: ``high = 2 sigmoid(g) high_0``, ``low = 2 sigmoid(h) low_0``,
from which scale and zero point follow (OmniQuant's learned clipping, arXiv 2308.13137, around the grid that the layer's
own method has chosen, so that training begins exactly there). Rounding passes gradients straight through. Two things
differ from the paper: training begins at EoRA's solution, not at B = 0; and the layer-wise objective is a quadratic
form in second moments (:class:`~hf_lowbit.calibration.Moments`), so that every step sees all tokens at the price of
one. The better of start and end is kept.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..calibration import Block, Hook, Layer, Moments, Solution
from ..formats.base import inverse
from ..formats.integer import IntFormat
from ..plan import Packed
from ..quantizer import quantize_weight
from .factors import LowRankHook, check_rank, correction


class _FakeQuantize(torch.autograd.Function):
    """Values of ``weight`` (N, G, g) on the grid of ``scales`` and ``zeros`` (N, G), with gradients for these two."""

    @staticmethod
    def forward(ctx, weight, scales, zeros, max_code):
        s, z = scales.unsqueeze(-1), zeros.unsqueeze(-1)
        exact = weight * inverse(s) + z
        codes = exact.round()
        inside = (codes >= 0) & (codes <= max_code)
        units = codes.clamp_(0, max_code).sub_(z)
        ctx.save_for_backward(torch.where(inside, units - exact.sub_(z), units), inside, scales)
        return units * s

    @staticmethod
    def backward(ctx, gradient):
        slope, inside, scales = ctx.saved_tensors
        by_scale = (gradient * slope).sum(-1)
        by_zero = -(gradient * ~inside).sum(-1) * scales
        return None, by_scale, by_zero, None


def _straight(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``exact``."""
    return exact + (rounded - exact).detach()


class Trained:
    """What is trained for one layer.

    Attributes:
        a, b: Factors (r, K) and (N, r).
        ranges: One or two tensors (N, G), 0 where the grid is the one it began with.
    """

    def __init__(self, layer: Layer, solution: Solution):
        assert isinstance(layer.planned.format, IntFormat)
        assert solution.lora_a is not None and solution.lora_b is not None
        self.layer, self.format = layer, layer.planned.format
        grid = self.format.unpack(solution.tensors, layer.planned.shape)
        assert grid.scales is not None
        self.scales, self.zeros = grid.scales, grid.zeros
        self.a, self.b = (t.clone().requires_grad_() for t in (solution.lora_a, solution.lora_b))
        count = 1 if self.zeros is None else 2
        self.ranges = [torch.zeros_like(grid.scales).requires_grad_() for _ in range(count)]

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros (N, G) as they will be stored, differentiable."""
        factors = [2 * torch.sigmoid(r) for r in self.ranges]
        if self.zeros is None:
            scales = self.scales * factors[0]
            zeros = torch.full_like(scales, self.format.fixed_zero)
        elif (
            self.format.zeros == "float"
        ):  # may lie outside the grid, where the two ends have one sign: shifted instead
            scales = self.scales * factors[0]
            zeros = self.zeros + self.ranges[1]
            zeros = _straight(zeros, self.format.storable_zeros(zeros.detach()))
        else:
            top = self.format.max_code
            above, below = (top - self.zeros) * factors[0], self.zeros * factors[1]
            scales = self.scales * (above + below) / top
            zeros = top * below / (above + below)
            zeros = _straight(zeros, self.format.storable_zeros(zeros.detach()))
        return _straight(scales, self.format.storable_scales(scales.detach())), zeros

    def value(self) -> torch.Tensor:
        """``Q + B A`` (N, K), differentiable."""
        top = self.format.max_code
        quantized = self.format.by_group(
            lambda w, s, z: _FakeQuantize.apply(w, s, z, top), self.layer.weight, *self.grid()
        )
        return quantized + self.b @ self.a

    @torch.no_grad()
    def solution(self) -> Solution:
        """The layer packed as it is trained now."""
        scales, zeros = self.grid()
        quantized = self.format.encode(self.layer.weight, scales, None if self.zeros is None else zeros)
        return Solution(self.format.pack(quantized), self.a.detach().clone(), self.b.detach().clone())


def _check_format(name: str, planned: Packed) -> None:
    if not isinstance(planned.format, IntFormat):
        raise ValueError(
            f"ApiQ learns the ranges of integer grids, and {name} is planned as {planned.format.name!r}: use "
            "format='int', or method 'eora' or 'loftq'"
        )


def _optimizer(trained: list[Trained], lr: float, range_lr: float, steps: int):
    """AdamW over factors and ranges, with both rates falling to zero in ``steps`` steps."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for t in trained for p in (t.a, t.b)], "lr": lr},
            {"params": [p for t in trained for p in t.ranges], "lr": range_lr},
        ],
        weight_decay=0.0,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def _start(layer: Layer, moments: Moments, rank: int, damping: float) -> Solution:
    """The layer's own rounding and the low-rank correction that is best for the float model's output."""
    tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight")
    square, target = moments.damped(damping), layer.weight
    if moments.cross is not None and moments.tokens:
        # The weight that gives the float model's output on the quantized model's inputs: W' S = W C.
        ridge = damping * moments.square.diagonal().mean()
        cross = layer.weight.double() @ (moments.cross.double() + ridge * torch.eye(len(square), device=square.device))
        target = torch.linalg.solve(square.double(), cross.T).T.float()
    return Solution(tensors, *correction(target - layer.value(Solution(tensors)), square, rank))


@dataclass
class ApiQLayerwise(LowRankHook):
    """ApiQ-lw: each layer is trained on the inputs that the trained ones before it leave.

    Args:
        steps: Steps of AdamW, each over all tokens.
        lr: Learning rate of A and B.
        range_lr: Learning rate of the ranges.
        damping: As in EoRA.
    """

    steps: int = 100
    lr: float = 1e-3
    range_lr: float = 1e-2
    damping: float = 0.01

    activations: ClassVar[str] = "both"

    def check(self, name, planned):
        super().check(name, planned)
        _check_format(name, planned)

    def solve_layer(self, layer: Layer, moments: Moments | None, generator) -> Solution:
        assert moments is not None
        start = _start(layer, moments, self.rank, self.damping)
        if not moments.tokens:
            return start
        assert moments.cross is not None
        square = moments.damped(self.damping)
        ridge = self.damping * moments.square.diagonal().mean()
        target = layer.weight @ moments.cross + ridge * layer.weight
        power = (layer.weight @ square * layer.weight).sum()
        trained = Trained(layer, start)
        optimizer, schedule = _optimizer([trained], self.lr, self.range_lr, self.steps)
        for _ in range(self.steps):
            value = trained.value()
            gradient = (value.detach() @ square - target) * (2 / power)
            optimizer.zero_grad(set_to_none=True)
            value.backward(gradient)
            optimizer.step()
            schedule.step()
        end = trained.solution()
        errors = [moments.output_error(layer.weight, layer.value(s)) for s in (start, end)]
        return end if errors[1] < errors[0] else start


@dataclass
class ApiQBlockwise(Hook):
    """ApiQ-bw: the layers of a block are trained together on the block's output.

    Args:
        rank: r.
        epochs: Passes over the calibration windows.
        lr: Learning rate of A and B.
        range_lr: Learning rate of the ranges.
        damping: As in EoRA, for the start.
    """

    rank: int
    epochs: int = 4
    lr: float = 1e-3
    range_lr: float = 1e-2
    damping: float = 0.01

    activations: ClassVar[str] = "both"

    def check(self, name, planned):
        check_rank(name, planned, self.rank)
        _check_format(name, planned)

    def solve(self, block: Block) -> None:
        for group in block.groups():
            moments = block.moments(group)
            for name in group:
                block.set(name, _start(block.layers[name], moments, self.rank, self.damping))
        assert block.inputs is not None and block.reference_inputs is not None
        target = block.outputs(block.reference, block.reference_inputs)
        starts = {name: layer.solution for name, layer in block.layers.items()}
        before = self.error(block, target)
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
        after = self.error(block, target)
        if not after < before:
            for name, solution in starts.items():
                block.set(name, solution)

    def error(self, block: Block, target: torch.Tensor) -> float:
        """Mean squared error of the block's output (W, L, H) as solved so far."""
        assert block.inputs is not None
        return float((block.outputs(block.module, block.inputs) - target).double().square().mean())
