"""What a block gets besides hidden states, for every window, and how it is called with that.

A window is what one call of the model makes of one sample; for a block, its hidden state may have any shape: (1, L, H)
in a language model, (tiles, L, H) in a vision tower. It is held as the rows (L, H) of all its tokens, so that the
windows of every block are one tensor (W, L, H); where they differ in length, shorter ones are filled up with zeros,
which no block ever sees.

Some blocks hand on more than hidden states (T5's first block makes the relative positions that all others add). A
model's forward pass is recorded before the blocks run, so what comes from an earlier block is recorded as
:class:`Later` and looked up when its turn has come.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .processes import Processes

Handed = dict["Later", list[Any]]  # for each, what every sample got


@dataclass(frozen=True)
class Later:
    """What the block of this number returns at this place of its tuple, not known yet."""

    block: int
    place: int

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(
            f"the model computes with what a block hands on besides hidden states ({function.__name__}): calibration "
            "cannot follow it. Use a method without it"
        )


class Arguments:
    """The arguments of one block; kept once where they are the same for all windows.

    Attributes:
        samples: The number of each window's sample.
        shapes: The shape of its hidden state.
        windows: The other arguments.
        shared: Whether these are the same for all.
        handed: Where values for :class:`Later` are found, and put.
        after: The shape of each window's output, once it has been computed.
    """

    def __init__(self, handed: Handed | None = None):
        self.windows: list[tuple[list, dict]] = []
        self.shapes: list[torch.Size] = []
        self.samples: list[int] = []
        self.shared = True
        self.handed = {} if handed is None else handed
        self.after: dict[int, torch.Size] = {}

    def record(self, shape: torch.Size, args: list, kwargs: dict, sample: int, count: int) -> None:
        """Notes the shape of the hidden state and the arguments for the next window, of ``sample`` out of ``count``."""
        found = (args, kwargs)
        for later in _later(found):
            self.handed.setdefault(later, [None] * count)
        if self.windows:
            found = _merged(self.windows[0], found)
            self.shared = self.shared and found is self.windows[0]
        self.windows.append(found)
        self.shapes.append(shape)
        self.samples.append(sample)

    @property
    def even(self) -> bool:
        """Whether all windows have the same shape."""
        return all(shape == self.shapes[0] for shape in self.shapes)

    def to(self, device: torch.device, moved: dict[int, Any] | None = None) -> "Arguments":
        """The same on ``device``; ``moved`` knows what was moved before."""
        other, moved = Arguments(self.handed), {} if moved is None else moved
        other.shared, other.shapes, other.samples = self.shared, self.shapes, self.samples
        other.windows = [_moved(window, device, moved) for window in self.windows]
        return other

    def batches(self, size: int) -> list[torch.Tensor]:
        """Numbers of windows that can run together, at most ``size``; one by one where their arguments differ."""
        alike = self.shared and self.even and all(shape[0] == 1 for shape in self.shapes[:1])
        for values in map(self.handed.get, _later(self.windows[:1])) if alike else ():
            alike = alike and values is not None and all(values[i] is values[self.samples[0]] for i in self.samples)
        return list(torch.arange(len(self.windows)).split(size if alike else 1))

    def run(self, block: nn.Module, hidden: torch.Tensor, windows: torch.Tensor, weights: dict | None = None):
        """Output (b, L, H) of ``block`` for ``hidden`` (b, L, H) of ``windows`` (b,).

        Args:
            block: The block.
            hidden: Its input.
            windows: Numbers of the windows, one batch of :meth:`batches`, or some of one.
            weights: Parameters to use instead of the block's own, by name.
        """
        return self.folded(self.call(block, hidden, windows, weights)[0], hidden.shape[1])

    def call(self, block: nn.Module, hidden: torch.Tensor, windows: torch.Tensor, weights: dict | None = None) -> tuple:
        """All that ``block`` returns; the first is its output in its own shape."""
        first = int(windows[0])
        args, kwargs = _looked_up(self.windows[first], self.handed, self.samples[first])
        x = self.unfolded(hidden, first)
        if weights is None:
            output = block(x, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, weights, (x, *args), kwargs)
        output = output if isinstance(output, tuple) else (output,)
        for i in windows.tolist():
            self.after[i] = output[0].shape if len(windows) == 1 else torch.Size((1, *output[0].shape[1:]))
        return output

    def unfolded(self, hidden: torch.Tensor, window: int) -> torch.Tensor:
        """Hidden states (b, L, H) in the shape in which the model has them."""
        return _in_shape(hidden, self.shapes[window])

    def output(self, hidden: torch.Tensor, window: int) -> torch.Tensor:
        """The block's outputs (b, L, H) in the shape in which the model has them."""
        return _in_shape(hidden, self.after[window])

    def folded(self, output: torch.Tensor, rows: int) -> torch.Tensor:
        """``output`` of a block as (b, L, H); filled up to L = ``rows`` with zeros where windows differ in shape."""
        count = len(output) if self.even and self.shapes[0][0] == 1 else 1
        flat = output.reshape(count, -1, output.shape[-1])
        missing = 0 if self.even else rows - flat.shape[1]
        return nn.functional.pad(flat, (0, 0, 0, missing)) if missing > 0 else flat

    def hand_on(self, index: int, windows: torch.Tensor, output: tuple) -> None:
        """Keeps what block ``index`` returned for ``windows`` and a later one asks for."""
        for later, values in self.handed.items():
            if later.block != index:
                continue
            value = output[later.place]
            own = isinstance(value, torch.Tensor) and len(windows) > 1 and len(value) == len(windows)
            for j, window in enumerate(windows.tolist()):
                part = value[j : j + 1] if own else value
                known = next((v for v in values if v is not None), part)
                values[self.samples[window]] = known if same(known, part) else part

    def exchange(self, index: int, processes: Processes, batches: list[torch.Tensor], shape: tuple[int, ...]):
        """Tells the other processes what block ``index`` gave here for this one's share of ``batches``, besides hidden
        states, and takes over what it gave there.

        Returns ``shape``, that of all outputs (W, L, H), of the main process, which has some at any rate.
        """
        if processes.count == 1:
            return shape
        own = [window for windows in processes.share(batches) for window in windows.tolist()]
        handed = {
            later: {self.samples[window]: values[self.samples[window]] for window in own}
            for later, values in self.handed.items()
            if later.block == index
        }
        found = processes.gather((shape, {window: self.after[window] for window in own}, handed))
        for _, after, theirs in found:
            self.after.update(after)
            for later, by_sample in theirs.items():
                values = self.handed[later]
                for sample, value in by_sample.items():
                    known = values[self.samples[0]]
                    values[sample] = known if same(known, value) else value
        return found[0][0]


def same(first: Any, second: Any) -> bool:
    """Whether two nests of arguments hold the same values; objects that are not data count as different."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.shape == second.shape
            and first.dtype == second.dtype
            and torch.equal(first, second)
        )
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return isinstance(first, (int, float, str, type(None), Later)) and type(first) is type(second) and first == second


def tensors_in(nest: Any) -> list[torch.Tensor]:
    """All tensors in a nest of arguments."""
    return [leaf for leaf in _leaves(nest) if isinstance(leaf, torch.Tensor)]


def _later(nest: Any) -> list[Later]:
    return [leaf for leaf in _leaves(nest) if isinstance(leaf, Later)]


def _leaves(nest: Any) -> list[Any]:
    if isinstance(nest, dict):
        nest = list(nest.values())
    return [leaf for part in nest for leaf in _leaves(part)] if isinstance(nest, (list, tuple)) else [nest]


def _merged(first: Any, second: Any) -> Any:
    """``second`` with what equals its counterpart in ``first`` taken from there; ``first`` itself if all does."""
    if same(first, second):
        return first
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {k: _merged(first[k], second[k]) for k in second}
    if type(first) is type(second) and type(first) in (list, tuple) and len(first) == len(second):
        return type(first)(map(_merged, first, second))
    return second


def changed(nest: Any, change) -> Any:
    """A nest of arguments with every leaf put through ``change``."""
    if isinstance(nest, dict):
        return {k: changed(v, change) for k, v in nest.items()}
    return type(nest)(changed(v, change) for v in nest) if type(nest) in (list, tuple) else change(nest)


def _moved(nest: Any, device: torch.device, moved: dict[int, Any]) -> Any:
    """A nest of arguments with its tensors on ``device``; what was the same object before is so after."""

    def move(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return moved.setdefault(id(leaf), (leaf, leaf.to(device)))[1]

    if id(nest) not in moved:
        moved[id(nest)] = (nest, changed(nest, move))
    return moved[id(nest)][1]


def _looked_up(nest: Any, handed: Handed, sample: int) -> Any:
    return changed(nest, lambda leaf: handed[leaf][sample] if isinstance(leaf, Later) else leaf)


def _in_shape(hidden: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``hidden`` (b, L, H), for b > 1 with one item for each, in the ``shape`` that it has for one window."""
    hidden = hidden[:, : math.prod(shape[:-1])]
    return hidden.reshape((len(hidden), *shape[1:]) if shape[0] == 1 else shape)
