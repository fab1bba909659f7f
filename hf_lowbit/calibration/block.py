"""One block with its activations, as a method sees it: what its layers get, what it gives, and the solutions so far."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..plan import Packed
from .arguments import Arguments
from .processes import Processes
from .replay import Replay
from .statistics import Moments

if TYPE_CHECKING:
    from .folding import Folding


@dataclass
class Solution:
    """What a method decided for one layer.

    Attributes:
        tensors: The packed weight, by suffix, as :meth:`Format.pack` returns it.
        lora_a: A (r, K), float32, or None.
        lora_b: B (N, r), float32: the layer computes ``x (Q + B A)^T``.
        tokens: How many tokens of the calibration its choice rests on, or None where it looked at none.
    """

    tensors: dict[str, torch.Tensor]
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    tokens: int | None = None


@dataclass
class Layer:
    """One linear layer to solve: its name in the model, its format and method, its float32 weight (N, K)."""

    name: str
    planned: Packed
    weight: torch.Tensor
    solution: Solution | None = None

    def value(self, solution: Solution) -> torch.Tensor:
        """``Q + B A``, float32 (N, K)."""
        weight = self.planned.format.dequantize(solution.tensors, self.planned.shape)
        if solution.lora_a is not None and solution.lora_b is not None:
            weight = torch.addmm(weight, solution.lora_b, solution.lora_a)
        return weight


class Block:
    """One decoder block with its activations, as a hook sees it.

    Attributes:
        name, index: Which one.
        layers: Layers to solve by their name in the block, in the model's order.
        module: The block as solved so far, float32.
        reference: The float block.
        inputs: (W, L, H) what the block gets in the quantized model, or None without activations. On the CPU where it
            is spilled to a file, otherwise on ``device``, where the block is.
        reference_inputs: (W, L, H) what it gets in the float model, or None.
        arguments: What else it gets.
        reference_arguments: What else it gets in the float model.
        tuned: New values of parameters that are not packed, by name in the block, float32.
        generator: For all random choices in this block.
        batch_size: Windows that run together.
        folds: Where factors of inputs go, tried on this block.
        kept: Moments of the inputs of layers that will be solved again, by name.
        replay: Outputs of solved parts, where they are kept in memory (``keep``), or None.
    """

    def __init__(
        self, name, index, reference, layers, inputs, reference_inputs, arguments, generator, batch_size, others=None,
        keep=False,
    ):  # fmt: skip
        self.name, self.index, self.reference, self.layers = name, index, reference, layers
        self.inputs, self.reference_inputs, self.arguments = inputs, reference_inputs, arguments
        self.reference_arguments = arguments if others is None else others
        self.processes = Processes.current()
        self.generator, self.batch_size = generator, batch_size
        self.device = next((p.device for p in reference.parameters()), torch.device("cpu"))
        # Parameters that nobody changes are shared with the float block.
        shared = {id(p): p for p in reference.parameters()}
        self.module = copy.deepcopy(reference, shared)
        self.tuned: dict[str, torch.Tensor] = {}
        self.folds: list[Folding] = []
        self.kept: dict[str, Moments] = {}
        self.replay = Replay(self.module, layers) if keep else None

    def set(self, name: str, solution: Solution) -> None:
        """Takes ``solution`` for the layer ``name`` and puts its value into the solved block."""
        layer, module = self.layers[name], self.module.get_submodule(name)
        weight = self.as_parameter(name, layer.value(solution))[name + ".weight"].contiguous()
        if self.replay is not None and layer.solution is not None and not torch.equal(weight, _parameter(module)):
            self.replay.drop()
        layer.solution = solution
        module.weight = nn.Parameter(weight, requires_grad=False)

    def tune(self, name: str, value: torch.Tensor, upstream: bool = True) -> None:
        """Takes ``value`` for the parameter ``name`` of the block, which is not packed.

        ``upstream``: whether any solved part depends on it.
        """
        owner, _, leaf = name.rpartition(".")
        self.tuned[name] = value.detach()
        if self.replay is not None and upstream:
            self.replay.drop()
        setattr(self.module.get_submodule(owner), leaf, nn.Parameter(value.detach().clone(), requires_grad=False))

    def as_parameter(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """``value`` (N, K) for the layer ``name`` as its module keeps it, by the parameter's name."""
        return {name + ".weight": value if _is_linear(self.module.get_submodule(name)) else value.T}

    def batches(self) -> list[torch.Tensor]:
        """Numbers of the windows that run together."""
        found = [a.batches(self.batch_size) for a in (self.arguments, self.reference_arguments)]
        return max(found, key=len)

    @torch.no_grad()
    def outputs(self, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (W, L, H) of ``module`` for ``inputs`` (W, L, H)."""
        return self._through(module, inputs, None)

    @torch.no_grad()
    def advance(self) -> list[torch.Tensor]:
        """The outputs of the solved block and, where its inputs are there, of the float one, in place of the inputs.

        Raises:
            ValueError: if the solved block's outputs are not finite.
        """
        assert self.inputs is not None
        self.inputs = self._through(self.module, self.inputs, self.inputs)
        if self.replay is not None:
            self.replay.drop()
        if not all(torch.isfinite(self.inputs[windows]).all() for windows in self.batches()):
            raise ValueError(
                f"the activations after {self.name} are not finite: the model is damaged, or too few bits broke it"
            )
        if self.reference_inputs is None:
            return [self.inputs]
        self.reference_inputs = self._through(self.reference, self.reference_inputs, self.reference_inputs)
        return [self.inputs, self.reference_inputs]

    def _through(self, module: nn.Module, inputs: torch.Tensor, result: torch.Tensor | None) -> torch.Tensor:
        """Outputs for ``inputs``, in ``result`` where that is given and has their shape."""
        arguments, batches = self._arguments(module), self.batches()
        for windows in self.processes.share(batches):
            with self._replayed(module, inputs, windows):
                output = arguments.call(module, inputs[windows].to(self.device), windows)
            arguments.hand_on(self.index, windows, output)
            folded = arguments.folded(output[0], inputs.shape[1])
            if result is None or result.shape[1:] != folded.shape[1:]:
                result = inputs.new_empty(len(inputs), *folded.shape[1:])
            result[windows] = folded.to(result.device)
        shape = arguments.exchange(self.index, self.processes, batches, () if result is None else tuple(result.shape))
        if result is None or tuple(result.shape) != shape:
            result = inputs.new_empty(shape)
        self.processes.spread(result, batches)
        return result

    def _arguments(self, module: nn.Module) -> Arguments:
        return self.reference_arguments if module is self.reference else self.arguments

    def _replayed(self, module, inputs, windows, wanted=None):
        """A context in which ``module`` runs with what its solved parts are known to give for these ``inputs``."""
        if self.replay is None or module is not self.module or inputs is not self.inputs:
            return nullcontext()
        return self.replay.during(windows, len(windows) * inputs[0].numel(), wanted)

    def _run(self, module, inputs, windows) -> torch.Tensor:
        """Outputs (b, L, H) of ``module`` for some windows of ``inputs``, which may lie on another device."""
        return self._arguments(module).run(module, inputs[windows].to(self.device), windows)

    def power(self, target: torch.Tensor) -> float:
        """What an error at the output is to be measured by: the mean square of what the float block, which gives
        ``target`` (W, L, H), adds to its inputs, or of all that it gives where that has another shape.
        """
        assert self.reference_inputs is not None
        alike = target.shape == self.reference_inputs.shape
        return float((target - self.reference_inputs if alike else target).square().mean())

    def error(self, target: torch.Tensor) -> float:
        """Mean squared error of the output (W, L, H) of the block as solved so far, from ``target`` (W, L, H)."""
        assert self.inputs is not None
        return float((self.outputs(self.module, self.inputs) - target).double().square().mean())

    @torch.no_grad()
    def groups(self) -> list[list[str]]:
        """Names of the layers in the order in which they run, those with the same input together.

        Without activations, or where a layer did not run in the first window, it is a group of its own.
        """
        if self.inputs is None:
            return [[name] for name in self.layers]
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name):
            def hook(module, args):
                group = next((names for x, names in seen if x is args[0]), None)
                if group is None:
                    seen.append((args[0], [name]))
                else:
                    group.append(name)

            return hook

        with _hooks(self.module, {name: note(name) for name in self.layers}):
            first = self.batches()[0][:1]
            self._run(self.module, self.inputs, first)
        ran = [names for _, names in seen]
        return ran + [[name] for name in self.layers if not any(name in names for names in ran)]

    @torch.no_grad()
    def moments(
        self, group: list[str], batches: list[torch.Tensor] | None = None, cross: bool | None = None
    ) -> Moments:
        """The moments of the common input of ``group``.

        Args:
            group: Names of layers.
            batches: Some of :meth:`batches`; all by default.
            cross: Whether cross moments too; by default where the float activations are there.
        """
        name = group[0]
        cross = self.reference_inputs is not None if cross is None else cross
        assert self.inputs is not None
        moments = Moments(self.layers[name].weight.shape[1], cross, self.device)
        for windows in self.processes.share(self.batches() if batches is None else batches):
            x = self._input_of(name, self.module, self.inputs, windows)
            r = self._input_of(name, self.reference, self.reference_inputs, windows) if cross else None
            if x is not None and (not cross or r is not None):
                moments.add(x, r)
        moments.add_others(self.processes)
        return moments

    def _input_of(self, name, module, inputs, windows) -> torch.Tensor | None:
        """What the layer ``name`` gets; the forward pass ends there. None if it does not run."""

        def catch(module, args):
            raise _Caught(args[0])

        try:
            with self._replayed(module, inputs, windows, name), _hooks(module, {name: catch}):
                self._run(module, inputs, windows)
        except _Caught as caught:
            return caught.x
        return None


class _Caught(Exception):
    def __init__(self, x):
        self.x = x


class _hooks:
    """Forward pre-hooks on modules of ``module`` by name, removed on leaving."""

    def __init__(self, module, by_name):
        self.handles = [module.get_submodule(n).register_forward_pre_hook(hook) for n, hook in by_name.items()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _parameter(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _weight(module: nn.Module) -> torch.Tensor:
    weight = _parameter(module)
    return (weight if _is_linear(module) else weight.T).detach()
