"""The activations of the calibration on their way through the blocks: of the quantized model, or of the float one."""

from collections.abc import Callable

import torch

from .arguments import Arguments, Handed, tensors_in
from .order import Outside, Stop, Unfollowed, untouched
from .samples import Samples

Hold = Callable[[tuple[int, ...]], torch.Tensor]


class Stream:
    """The inputs of a model's blocks, one after the other.

    Args:
        blocks: The model, a :class:`~hf_lowbit.calibration.blocks.Blocks`.
        samples: What it is run on.
        packed: Whether this is the quantized model: what is outside the blocks is rounded as it will be.
        hold: Makes the float32 tensor for activations from its shape.
        device: Where the blocks are.

    Attributes:
        hidden: (W, L, H), float32: the inputs of the block that :meth:`enter` was called for.
    """

    def __init__(self, blocks, samples: Samples, packed: bool, hold: Hold, device: torch.device | str = "cpu"):
        self.blocks, self.samples, self.packed = blocks, samples, packed
        self.hold, self.device = hold, torch.device(device)
        self.hidden: torch.Tensor = torch.empty(0)
        self._arguments: dict[int, Arguments] = {}
        self._kept: dict[int, tuple[torch.Tensor, Arguments]] = {}
        self._handed: Handed = {}

    def enter(self, index: int) -> Arguments:
        """Makes ``hidden`` the inputs of block ``index``, the one after the last, and returns its other arguments."""
        order = self.blocks.order
        row = next((r for r, blocks in enumerate(order.rows) if blocks.start == index), None)
        if row is not None:
            self._begin(row)
            self._kept = {i: kept for i, kept in self._kept.items() if order.needed[i] > row}
        return self._arguments[index]

    def leave(self, index: int, outputs: torch.Tensor) -> None:
        """Takes the ``outputs`` (W, L, H) of block ``index``, which may lie in ``hidden``."""
        row = next(row for row in self.blocks.order.rows if index in row)
        self.hidden = outputs
        if index in self.blocks.order.needed:
            if index != row[-1]:  # which others pass over
                outputs = self.hold(tuple(outputs.shape)).copy_(outputs)
            self._kept[index] = outputs, self._arguments[index]

    @torch.no_grad()
    def _begin(self, number: int) -> None:
        """Runs what is before row ``number``, and records what its blocks get."""
        order, model = self.blocks.order, type(self.blocks.model).__name__
        row, outside = order.rows[number], Outside(self.blocks, self.packed)
        arguments = {i: Arguments(self._handed) for i in row}
        numbers, given = {name: i for i, name in enumerate(order.names)}, list[torch.Tensor]()
        hidden: torch.Tensor | None = None
        count, last, sample = 0, row.start - 1, 0

        def play(name, x, args, kwargs):
            nonlocal hidden, count, last
            i = numbers.get(name, len(order.names))
            if i < row.start:
                return order.returned[i].with_hidden(i, self._output(i, sample, x))
            if i > row[-1] and last < row.start:
                raise Stop  # this sample has no part in the row
            if i != last + 1 or (i > row.start and not untouched(x, given)):
                raise Unfollowed(
                    f"{model} does something of its own before {name} on calibration input {sample}, which it does not "
                    "on others: calibration cannot follow it. Use a method without it"
                )
            if i == row.start:
                hidden = self._placed(hidden, count, x)
                count += 1
            if any(t.is_floating_point() and t.isnan().any() for t in tensors_in([args, kwargs])):
                raise Unfollowed(_unforeseen(model, name))
            arguments[i].record(x.shape, args, kwargs, sample, len(self.samples))
            last = i
            if i == row[-1]:
                raise Stop
            given[:] = [x.clone()]
            return order.returned[i].with_hidden(i, given[0])

        for sample, call in enumerate(self.samples.calls):
            last = row.start - 1
            outside.run(call, play)
            if last not in (row.start - 1, row[-1]):
                raise Unfollowed(f"{model} ends after {order.names[last]} on calibration input {sample}")
        if hidden is None:
            raise Unfollowed(f"{model} does not run {order.names[row.start]}")
        self.hidden = hidden[:count]
        if self.hidden.isnan().any():
            raise Unfollowed(_unforeseen(model, order.names[row.start]))
        moved: dict = {}
        self._arguments = {i: a.to(self.device, moved) for i, a in arguments.items()}

    def _placed(self, hidden: torch.Tensor | None, count: int, x: torch.Tensor) -> torch.Tensor:
        """``hidden`` with the rows of ``x`` at ``count``; made, or made longer, where it has no room for them."""
        rows = x.reshape(-1, x.shape[-1])
        if hidden is None or hidden.shape[1] < len(rows):
            longer = self.hold((len(self.samples), *rows.shape))
            if hidden is not None:
                longer[:, : hidden.shape[1]] = hidden
                longer[:, hidden.shape[1] :] = 0
            hidden = longer
        hidden[count, : len(rows)] = rows
        hidden[count, len(rows) :] = 0
        return hidden

    def _output(self, index: int, sample: int, x: torch.Tensor) -> torch.Tensor:
        """What block ``index`` gave for a sample; not a number where nobody is known to need it."""
        if index not in self._kept:
            return torch.full_like(x, torch.nan)
        hidden, arguments = self._kept[index]
        window = arguments.samples.index(sample)
        return arguments.output(hidden[window : window + 1], window).to(x.device, x.dtype)


def _unforeseen(model: str, name: str) -> str:
    return (
        f"{model} makes the inputs of {name} of the outputs of an earlier block in a way that calibration cannot "
        "follow, or has weights that are not finite. Use a method without calibration"
    )
