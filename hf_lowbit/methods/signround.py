"""``method="signround"``: rounding and ranges learned by the sign of the gradient, a block at a time.

Cheng et al., 2023 (arXiv 2309.05516). The codes of a block's layers are

    code = clip(round(p + v), 0, 2**bits - 1),    |v| <= 1/2,

with p the place of the weight on its group's grid, in steps, and the scale of every group is ``(1 + r)`` times that of
the start. v and r are trained so that the block gives what the float model's block gives, gradients passing straight
through the rounding; each number moves by the learning rate in the direction of its gradient's sign, at a rate that
falls to zero.

It differs from the paper in where it starts: at GPTQ's codes. p is then the place where a weight would do least harm
given all the others' codes, half a step from its own code at most, so that training begins with no loss against GPTQ
and v decides again about every rounding that was close. Zero points stay those of the start. Trained is a block's
output on the quantized model's inputs, towards the float model's output on its own. A block keeps its start if training
did not bring it closer.

Two options learn more:

- ``lwc`` (learnable weight clipping, OmniQuant, arXiv 2308.13137): both ends of every group's range move by themselves,
  so that zero points move too, and weights are rounded and clipped anew on the grid that the ends give:
  :class:`LearnedClipping`.
- ``tune_norms`` (norm tweaking, arXiv 2309.02784): weights and biases of the block's norms are trained with the rest.
  There each channel's mean and variance are what is compared, after quantizing; here it is the output itself, and all
  is learned at once. They stay in float, in the dtype of the model.

Not learned: biases of linear layers, and anything of layers that the plan keeps or gives to other methods.
"""

import torch
from torch import nn

from ..formats.base import Format, Quantized, inverse
from ..formats.integer import IntFormat
from .base import BlockMethod
from .gptq import Gptq

MAX_RANGE_CHANGE = 0.5
NEAREST = 0.499  # a little less than half a step, so that a place rounds to its code


class SignRound(BlockMethod):
    """Learned rounding.

    Args:
        steps: Training steps for a block, each on one batch of calibration windows.
        lr: Learning rate of v, in steps of the grid; ``1 / steps`` by default, with which v just reaches its limits.
        range_lr: Learning rate of r; ``0.2 / steps`` by default. With ``lwc``, of both ends, in parts of the range.
        lwc: Whether both ends of ranges are learned, and not scales alone.
        tune_norms: Whether the block's norms are trained too.
        norm_lr: Their learning rate, in parts of the mean magnitude of each; ``0.02 / steps`` by default.
        damping: As in "gptq".
        act_order: As in "gptq".
        range: As in "gptq", of the start.
    """

    name = "signround"
    formats = ("int",)

    def __init__(
        self,
        steps: int = 64,
        lr: float | None = None,
        range_lr: float | None = None,
        lwc: bool = False,
        tune_norms: bool = False,
        norm_lr: float | None = None,
        damping: float = 0.01,
        act_order: bool = True,
        range: str | None = None,
    ):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not possible: method 'signround' takes a whole number from 1")
        for option, switch in (("lwc", lwc), ("tune_norms", tune_norms)):
            if not isinstance(switch, bool):
                raise ValueError(f"{option}={switch!r} is not possible: method 'signround' takes True or False")
        if norm_lr is not None and not tune_norms:
            raise ValueError(f"norm_lr={norm_lr!r} is of no use without tune_norms=True")
        for option, value in (("lr", lr), ("range_lr", range_lr), ("norm_lr", norm_lr)):
            if value is not None and not value >= 0:
                raise ValueError(
                    f"{option}={value!r} is not possible: method 'signround' takes a number from 0, or None"
                )
        Gptq(damping, act_order, range=range)  # which checks them
        self.steps, self.damping, self.act_order, self.range = steps, damping, act_order, range
        self.lr = 1 / steps if lr is None else lr
        self.range_lr = 0.2 / steps if range_lr is None else range_lr
        self.lwc, self.tune_norms = lwc, tune_norms
        self.norm_lr = 0.02 / steps if norm_lr is None else norm_lr

    @torch.no_grad()
    def begin(self, weight, format, statistics):
        start = Gptq(self.damping, self.act_order, range=self.range)
        grid, H = start.quantize(weight, format, statistics), statistics.damped(self.damping)
        kind = LearnedClipping if self.lwc else Learned
        return grid, kind(format, grid, places(weight.to(torch.float32), format.decode(grid), H))

    @torch.enable_grad()
    def train(self, block, states):
        from ..calibration import Solution

        assert block.inputs is not None and block.reference_inputs is not None
        target = block.outputs(block.reference, block.reference_inputs)
        starts = {name: block.layers[name].solution for name in states}
        before = block.error(target)
        power = block.power(target)
        batches, order = block.batches(), []
        norms = find_norms(block.module) if self.tune_norms else {}
        for step in range(self.steps):
            order = order or torch.randperm(len(batches), generator=block.generator).tolist()
            windows = batches[order.pop()]
            weights: dict[str, torch.Tensor] = {name: norm.value() for name, norm in norms.items()}
            for name, learned in states.items():
                value = block.layers[name].planned.format.turn_back(learned.value())
                weights |= block.as_parameter(name, value)
            output = block.arguments.run(block.module, block.inputs[windows], windows, weights)
            ((output - target[windows]).square().mean() / power).backward()
            for learned in states.values():
                learned.step(self.lr, self.range_lr, 1 - step / self.steps)
            for norm in norms.values():
                norm.step(self.norm_lr * (1 - step / self.steps))
        for name, norm in norms.items():
            block.tune(name, norm.value())
        for name, learned in states.items():
            layer = block.layers[name]
            block.set(name, Solution(layer.planned.format.pack(learned.quantized()), tokens=starts[name].tokens))
        if not block.error(target) < before:
            for name, solution in starts.items():
                block.set(name, solution)
            for name, norm in norms.items():
                block.tune(name, norm.first)


class Norm:
    """A weight or bias of a norm that is trained: ``first + change * size``, with size the mean magnitude of first."""

    def __init__(self, first: torch.Tensor):
        self.first, self.change = first.detach(), torch.zeros_like(first).requires_grad_()
        self.size = float(first.abs().mean()) or 1.0

    def value(self) -> torch.Tensor:
        return self.first + self.change * self.size

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves by ``lr`` against the sign of the gradient, and forgets it; a norm that did not run stays."""
        if self.change.grad is not None:
            self.change.add_(self.change.grad.sign_(), alpha=-lr)
            self.change.grad = None


def find_norms(module: nn.Module) -> dict[str, Norm]:
    """The weights and biases of all norms in ``module``, by name: of modules whose class is named after one."""
    owners = [(n, m) for n, m in module.named_modules() if "norm" in type(m).__name__.lower()]
    return {f"{n}.{leaf}": Norm(p) for n, m in owners for leaf, p in m.named_parameters(recurse=False) if p.ndim == 1}


class Learned:
    """What is learned for one layer.

    Attributes:
        place: p (N, K), in steps, inside the grid.
        offset: v (N, K).
        change: r (N, G).
    """

    def __init__(self, format: Format, grid: Quantized, places: torch.Tensor):
        assert isinstance(format, IntFormat) and grid.scales is not None
        self.format, self.grid, self.first = format, grid, grid.scales
        self.zeros = torch.full_like(grid.scales, format.fixed_zero) if grid.zeros is None else grid.zeros
        place = format.by_group(
            lambda w, s, z: w * inverse(s).unsqueeze(-1) + z.unsqueeze(-1), places, self.first, self.zeros
        )
        self.place = place.clamp_(grid.codes - NEAREST, grid.codes + NEAREST)
        self.offset = torch.zeros_like(place).requires_grad_()
        self.change = torch.zeros_like(self.first).requires_grad_()

    def scales(self) -> torch.Tensor:
        """Scales (N, G) as they will be stored, differentiable as if they were stored exactly."""
        exact = self.first * (1 + self.change)
        return exact + (self.format.storable_scales(exact.detach()) - exact).detach()

    def codes(self) -> torch.Tensor:
        """(N, K), float32."""
        return (self.place + self.offset.detach()).round_().clamp_(0, self.format.max_code)

    def value(self) -> torch.Tensor:
        """The weight (N, K), differentiable as if nothing were rounded or clipped."""
        codes = self.codes() + self.offset - self.offset.detach()
        return self.format.by_group(
            lambda c, s, z: (c - z.unsqueeze(-1)) * s.unsqueeze(-1), codes, self.scales(), self.zeros
        )

    @torch.no_grad()
    def step(self, lr: float, range_lr: float, fraction: float) -> None:
        """Moves v and r by ``fraction`` of their rates against the signs of their gradients, and forgets those."""
        assert self.offset.grad is not None and self.change.grad is not None
        self.offset.add_(self.offset.grad.sign_(), alpha=-lr * fraction).clamp_(-0.5, 0.5)
        self.change.add_(self.change.grad.sign_(), alpha=-range_lr * fraction)
        self.change.clamp_(-MAX_RANGE_CHANGE, MAX_RANGE_CHANGE)
        self.offset.grad = self.change.grad = None

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Codes and scales as learned so far."""
        return Quantized(self.codes().to(torch.uint8), self.scales(), self.grid.zeros)


class LearnedClipping(Learned):
    """The same with ranges whose ends move apart from each other, by r (upper) and t (lower) times the first range.

    Scales are then ``first * (1 + r - t)``, and zero points ``(z - t * max_code) / (1 + r - t)``, rounded as they are
    stored. A symmetric grid has no lower end to move. Codes are ``clip(round(w / scale + zero + v))``, w being where
    the start had the weight; the gradient passes through the rounding, and not where codes are clipped.

    Attributes:
        weight: w (N, K).
        lower: t (N, G).
    """

    def __init__(self, format: Format, grid: Quantized, places: torch.Tensor):
        super().__init__(format, grid, places)
        self.weight = self.format.by_group(
            lambda p, s, z: (p - z.unsqueeze(-1)) * s.unsqueeze(-1), self.place, self.first, self.zeros
        )
        self.lower = torch.zeros_like(self.first).requires_grad_(not self.format.symmetric)

    def scales(self):
        exact = self.first * (1 + self.change - self.lower)
        return exact + (self.format.storable_scales(exact.detach()) - exact).detach()

    def moved_zeros(self) -> torch.Tensor:
        """Zero points (N, G) as they will be stored, differentiable like scales."""
        if self.format.symmetric:
            return self.zeros
        exact = (self.zeros - self.lower * self.format.max_code) / (1 + self.change - self.lower)
        return exact + (self.format.storable_zeros(exact.detach()) - exact).detach()

    def _places(self) -> torch.Tensor:
        """Where the weights lie on the grid as it is, in steps, (N, K), v included."""
        found = self.format.by_group(
            lambda w, s, z: w / torch.where(s == 0, 1, s).unsqueeze(-1) + z.unsqueeze(-1),
            self.weight, self.scales(), self.moved_zeros(),
        )  # fmt: skip
        return found + self.offset

    def codes(self):
        return self._places().detach().round_().clamp_(0, self.format.max_code)

    def value(self):
        exact = self._places().clamp(0, self.format.max_code)
        codes = exact + (exact.detach().round() - exact.detach())
        return self.format.by_group(
            lambda c, s, z: (c - z.unsqueeze(-1)) * s.unsqueeze(-1), codes, self.scales(), self.moved_zeros()
        )

    @torch.no_grad()
    def step(self, lr, range_lr, fraction):
        super().step(lr, range_lr, fraction)
        if self.lower.grad is not None:
            self.lower.add_(self.lower.grad.sign_(), alpha=-range_lr * fraction)
            self.lower.clamp_(-MAX_RANGE_CHANGE / 2, MAX_RANGE_CHANGE / 2)
            self.lower.grad = None
        self.change.clamp_(-MAX_RANGE_CHANGE / 2, MAX_RANGE_CHANGE / 2)

    @torch.no_grad()
    def quantized(self):
        zeros = None if self.format.symmetric else self.moved_zeros()
        return Quantized(self.codes().to(torch.uint8), self.scales(), zeros)


def places(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Where each weight would do least harm if all the others of its row stay at Q, (N, K).

    With E = Q - W the error ``E H E^T`` of a row is least in weight k at ``q_k - (E H)_k / H_kk``, the step of
    coordinate descent.

    Args:
        W, Q: The weight and what it was rounded to (N, K), float32.
        H: Damped moments (K, K).
    """
    return Q - (Q - W) @ H / H.diagonal()
