"""What a layer at a width costs the model.

:func:`errors`: the squared error of the packed weight relative to the weight's own square. For small errors the
divergence of a model is a sum over layers of these, each times a constant of the layer ("linearity theorem",
Malinovskii et al., 2024, arXiv 2411.17525). The constants differ by a factor of 100: taking them all to be the same is
worse than the same width everywhere (docs/methods.md).

:class:`Probes` measures the constants: one unit of layers is packed at :data:`PROBE` bits, everything else stays in
float, and KL(float ‖ that) is taken at the model's output, at every fourth position of a few windows. What lies before
the unit's block is computed once. From there each unit is a batch of hidden states of its own, and all units of a
*wave* of blocks go through the model together: it is read once a wave, one block at a time. A wave is as large as
:data:`WAVE_BYTES` of hidden states allow, an eighth of the model at most; after each, what was measured is written
down, so that a search which was stopped goes on there.

Errors are computed at :data:`WIDTHS`; above, a bit more halves the step and quarters the squared error.
"""

import copy
import inspect
import math
from collections.abc import Callable

import torch
from transformers.utils import logging

from ..calibration.blocks import Blocks, _fill
from ..convert import Source
from ..formats import Format
from ..methods import Method

PROBE, WIDTHS = 3, (2, 3, 4)
POSITIONS = 4  # every so many positions of a window are compared
WAVE_BYTES = 2**30
Candidates = dict[str, dict[int, tuple[Format, Method]]]  # by layer and width


def probe(candidates: dict[int, tuple[Format, Method]]) -> int:
    """The width at which a layer is measured."""
    return min(candidates, key=lambda bits: abs(bits - PROBE))


def errors(weight: torch.Tensor, candidates: dict[int, tuple[Format, Method]]) -> dict[str, float]:
    """Relative squared error of ``weight`` (N, K) at each of its :data:`WIDTHS`, by width as text."""
    weight = weight.to(torch.float32)
    power = float(weight.square().sum(dtype=torch.float64)) or 1.0
    found = {}
    for bits in [bits for bits in candidates if bits in WIDTHS] or [probe(candidates)]:
        format, method = candidates[bits]
        error = format.decode(method.quantize(weight, format)) - weight
        found[str(bits)] = float(error.square_().sum(dtype=torch.float64)) / power
    return found


class Probes:
    """The model of ``source``, to be run with some of its layers packed.

    Args:
        source: A float model.
        tokens: Windows, int64 (W, L).
        candidates: What there is for each layer.
    """

    def __init__(self, source: Source, tokens: torch.Tensor, candidates: Candidates):
        self.blocks, self.tokens, self.candidates = Blocks(source, tokens), tokens, candidates
        self.hidden, self.arguments = self.blocks.capture(tokens)
        self.reached = {
            f"{block}.{name}": (i, name)
            for i, (block, names) in enumerate(zip(self.blocks.names, self.blocks.layers, strict=True))
            for name in names
        }

    @torch.no_grad()
    def divergences(self, units: list[list[str]], known: dict[str, float], keep: Callable[[], None]) -> None:
        """Measures the ``units`` that ``known`` lacks, by their first name, and calls ``keep`` after each wave."""
        todo: list[list[list[str]]] = [[] for _ in self.blocks.names]
        for unit in units:
            if unit[0] not in known:
                todo[self.reached[unit[0]][0]].append(unit)
        count, largest = len(todo), max(1, math.ceil(len(todo) / 8))
        bar = logging.tqdm(total=sum(map(len, todo)), desc="Measuring sensitivity", unit="unit")
        state, first = self.hidden, 0
        output, expected = None, torch.empty(0)
        while any(todo[first:]):
            last, size = first, 0
            while last < count and (last == first or (last - first < largest and size <= WAVE_BYTES)):
                size += len(todo[last]) * state.nbytes
                last += 1
            if not any(todo[first:last]):
                state = self._through(range(first, last), state)
                first = last
                continue
            if output is None:
                output = _Output(self.blocks, self.tokens)
                expected = output(self._through(range(first, count), state))
            running: dict[str, torch.Tensor] = {}
            for i in range(first, count):
                block = self.blocks.read(i)
                running = {name: self._run(i, block, x) for name, x in running.items()}
                if i < last:
                    for unit in todo[i]:
                        running[unit[0]] = self._run(i, block, state, self._packed(block, unit))
                    state = self._run(i, block, state)
            for name, x in running.items():
                known[name] = max(0.0, _divergence(expected, output(x)))
                bar.update()
            keep()
            first = last
        bar.close()

    def _through(self, indices: range, state: torch.Tensor) -> torch.Tensor:
        for i in indices:
            state = self._run(i, self.blocks.read(i), state)
        return state

    def _run(self, index: int, block, hidden: torch.Tensor, weights: dict | None = None) -> torch.Tensor:
        result = torch.empty_like(hidden)
        for windows in self.arguments[index].batches(2):
            result[windows] = self.arguments[index].run(block, hidden[windows], windows, weights)
        return result

    def _packed(self, block, unit: list[str]) -> dict[str, torch.Tensor]:
        """The parameters of ``block`` that packing ``unit`` changes."""
        weights = {}
        for name in unit:
            local, choices = self.reached[name][1], self.candidates[name]
            format, method = choices[probe(choices)]
            module = block.get_submodule(local)
            weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
            value = format.decode(method.quantize(weight, format))
            weights[local + ".weight"] = value if isinstance(module, torch.nn.Linear) else value.T
        return weights


class _Output:
    """From the last block's output to log-probabilities, with all that is outside the blocks in memory."""

    def __init__(self, blocks: Blocks, tokens: torch.Tensor):
        self.model, self.tokens = copy.deepcopy(blocks.model), tokens
        _fill(self.model, blocks._parameters(""), "")
        for target, source in (blocks.source.model.all_tied_weights_keys or {}).items():
            (owner, _, leaf), (other, _, name) = target.rpartition("."), source.rpartition(".")
            shared = getattr(self.model.get_submodule(other), name, None)
            if leaf in self.model.get_submodule(owner)._parameters and isinstance(shared, torch.nn.Parameter):
                self.model.get_submodule(owner)._parameters[leaf] = shared
        self.positions = torch.arange(POSITIONS - 1, tokens.shape[1], POSITIONS)
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.hidden = tokens
        for name in blocks.names:
            self.model.get_submodule(name).forward = lambda *args, **kwargs: self.hidden

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 (W, P, V) at every fourth position, for ``hidden`` (W, L, H)."""
        result = []
        for window, state in zip(self.tokens, hidden, strict=True):
            self.hidden = state[None]
            options = {"logits_to_keep": self.positions} if self.keeps else {}
            logits = self.model(input_ids=window[None], use_cache=False, **options).logits[0]
            result.append(torch.log_softmax(logits if self.keeps else logits[self.positions], dim=-1))
        return torch.stack(result)


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL over positions of log-probabilities (W, P, V), in nats."""
    return sum(float(((e - f) * e.exp()).sum(-1).mean()) for e, f in zip(expected, found, strict=True)) / len(expected)
