"""Every layer by the method that its plan names: the hook that calibrated methods of :mod:`hf_lowbit.methods` run in.

A plan may mix methods by its rules. Those that need calibration get the moments of their layer's inputs; the others get
the weight alone, as when a model is quantized while it loads.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..compensation import compensated
from ..methods import BlockMethod
from ..methods.rate_aware import Share
from ..plan import Plan
from ..quantizer import quantize_weight
from .block import Block, Layer, Solution
from .damage import LayerShare, bits_stored, divide, measure_damage, read_damage
from .hook import LayerHook
from .statistics import Moments


@dataclass
class Planned(LayerHook):
    """Solves each layer with ``layer.planned.method``."""

    activations: ClassVar[str] = "quantized"

    def solve(self, block):
        for group in block.groups():
            moments = self.fold(block, group, block.moments(group))
            for name in group:
                block.set(name, self.solve_layer(block.layers[name], moments, block.generator))

    def fold(self, block: Block, group: list[str], moments: Moments) -> Moments:
        """Gives the common input of ``group`` the factors that are to be folded; the moments of what it is then.

        A linear layer that takes factors into its rows is rounded again, for the inputs that it was solved for.
        """
        folding = next((f for f in block.folds if f.fold.layers == tuple(group)), None)
        if folding is not None:
            moments = moments.scaled(folding.apply(block, moments))
            if (maker := folding.maker) is not None:
                layer = block.layers[maker]
                block.set(maker, self.solve_layer(layer, block.kept.pop(maker), block.generator))
        block.kept |= {f.maker: moments for f in block.folds if f.maker in group}
        return moments

    def solve_layer(self, layer, moments, generator):
        calibrated = layer.planned.method.needs_calibration
        if not calibrated and layer.planned.low_rank is None:
            return Solution(quantize_weight(layer.weight, layer.planned, layer.name + ".weight"))
        self.check_tokens(layer, moments)
        statistics = moments if calibrated else None
        tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight", statistics)
        return compensated(layer, Solution(tensors, tokens=moments.tokens), moments)

    def check_tokens(self, layer: Layer, moments: Moments) -> None:
        """Raises ``ValueError`` if ``layer`` saw no token."""
        method, name = layer.planned.method, layer.name
        assert method is not None
        who, rule = f"method {method.name!r}", {"method": "rtn"}
        if not method.needs_calibration:
            who, rule = "compensation='eora'", {"compensation": "none"}
        if moments.tokens == 0:
            raise ValueError(
                f"{name} never saw a token of the calibration, so {who} knows nothing of it: give more or other text, "
                f"or plan it without calibration by a rule {{{name!r}: {rule}}}"
            )


@dataclass
class PlannedBlocks(Planned):
    """The same where some methods are a :class:`~hf_lowbit.methods.BlockMethod`."""

    activations: ClassVar[str] = "both"

    def solve(self, block):
        trained: list[tuple[BlockMethod, dict[str, Any]]] = []
        for group in block.groups():
            moments = self.fold(block, group, block.moments(group, cross=False))
            for name in group:
                layer = block.layers[name]
                method, format = layer.planned.method, layer.planned.format
                if not isinstance(method, BlockMethod):
                    block.set(name, self.solve_layer(layer, moments, block.generator))
                    continue
                self.check_tokens(layer, moments)
                turned = moments.turned(format)
                weight = method.prepared(format.turn(layer.weight), format.inner, turned)
                quantized, state = method.begin(weight, format.inner, turned)
                block.set(name, Solution(format.pack(quantized), tokens=moments.tokens))
                alike = (s for m, s in trained if (type(m), vars(m)) == (type(method), vars(method)))
                if (states := next(alike, None)) is None:
                    trained.append((method, states := {}))
                states[name] = state
        for method, states in trained:
            method.train(block, states)
        learned = {name for _, states in trained for name in states if block.layers[name].planned.low_rank is not None}
        for group in block.groups() if learned else ():
            moments = block.moments(group, cross=False)
            for name in learned.intersection(group):
                layer = block.layers[name]
                assert layer.solution is not None
                block.set(name, compensated(layer, layer.solution, moments))


@dataclass
class PlannedRates(Planned):
    """The same where some layers have ``bits_stored`` between them: each gets its share before the first is solved."""

    shares: dict[str, LayerShare] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, blocks, run, tokens, seed, **options):
        aimed = {name: p for name, p in run.planned.items() if bits_stored(p) is not None}
        damage = read_damage(run.work) or measure_damage(blocks, run.work, list(aimed), tokens, seed, **options)
        self.shares = divide(damage, aimed)

    def solve_layer(self, layer, moments, generator):
        share = self.shares.get(layer.name)
        if share is None:
            return super().solve_layer(layer, moments, generator)
        self.check_tokens(layer, moments)
        statistics = Share(moments, share.bits, share.gradients)
        tensors = quantize_weight(layer.weight, layer.planned, layer.name + ".weight", statistics)
        return Solution(tensors, tokens=moments.tokens)


def planned_hook(plan: Plan) -> Planned:
    """The hook for the methods of ``plan``.

    Raises:
        ValueError: for methods that cannot be mixed, naming a layer of each.
    """
    block = next((p.name for p in plan.packed.values() if isinstance(p.method, BlockMethod)), None)
    rate = next((p.name for p in plan.packed.values() if bits_stored(p) is not None), None)
    if block is not None and rate is not None:
        raise ValueError(
            f"{rate} aims at bits_stored=, and {block} is trained a block at a time: a model can have one of the two"
        )
    return PlannedBlocks() if block is not None else PlannedRates() if rate is not None else Planned()
