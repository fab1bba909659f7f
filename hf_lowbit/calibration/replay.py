"""What solved parts of a block gave, so that the passes after that need not compute it again.

The inputs of each group of layers are seen with the groups before it solved, so a block runs once for each group and
once more for its outputs; and each time from its beginning. But once all layers of a part (the attention, say) are
solved, the part gives the same each time. Its outputs are kept from the first pass that makes them, batch by batch, and
later passes take them from here: the same bits, in a third less time.

Kept are only outputs that are no larger than the block's inputs, so that an attention costs the memory of the
calibration's activations once more, and the wide inside of an MLP is not kept. A part that another, unsolved one ran
before, or that runs twice in a pass, is computed every time.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .arguments import changed, tensors_in


class Replay:
    """Outputs of parts of the block ``module``.

    Args:
        module: The block as solved so far.
        layers: Its layers by name, with their solutions.
    """

    def __init__(self, module: nn.Module, layers: dict[str, Any]):
        self.module, self.layers = module, layers
        self.parts: dict[str, list[str]] = {}
        for name in layers:
            self.parts.setdefault(_part(module, name), []).append(name)
        self.kept: dict[str, dict[tuple[int, ...], Any]] = {}

    def drop(self) -> None:
        """Forgets all outputs: what was solved has changed."""
        self.kept.clear()

    @contextmanager
    def during(self, windows: torch.Tensor, largest: int, wanted: str | None = None) -> Iterator[None]:
        """Replays parts, and keeps outputs of those solved since, while the block runs on one batch.

        Args:
            windows: The numbers of its windows.
            largest: Values that the outputs of a part may have to be kept.
            wanted: The layer whose input is looked for, so that its part has to run; without one nothing is kept, as
                this is the last pass.
        """
        key, ran, unsolved = tuple(windows.tolist()), set[str](), list[str]()
        undo: list[Callable[[], None]] = []

        def again(part, forward):
            def replayed(*args, **kwargs):
                if part not in ran:
                    ran.add(part)
                    return _copy(self.kept[part][key])
                self._give_up(part)
                return forward(*args, **kwargs)

            return replayed

        def keep(part, names):
            def hook(module, args, output):
                if part in ran:
                    self._give_up(part)
                ran.add(part)
                if any(self.layers[name].solution is None for name in names):
                    unsolved.append(part)
                elif not unsolved and part in self.parts and sum(t.numel() for t in tensors_in([output])) <= largest:
                    self.kept.setdefault(part, {})[key] = _copy(output)

            return hook

        for part, names in list(self.parts.items()):
            module = self.module.get_submodule(part)
            if wanted not in names and key in self.kept.get(part, {}):
                module.forward = again(part, module.forward)
                undo.append(functools.partial(delattr, module, "forward"))
            elif wanted is not None:
                undo.append(module.register_forward_hook(keep(part, names)).remove)
        try:
            yield
        finally:
            for step in undo:
                step()

    def _give_up(self, part: str) -> None:
        """``part`` runs twice in a pass: it is computed every time from now on."""
        self.parts.pop(part, None)
        self.kept.pop(part, None)


def _part(module: nn.Module, layer: str) -> str:
    """The outermost module in the block ``module`` that is called and holds ``layer``."""
    names = layer.split(".")
    for count in range(1, len(names)):
        part = ".".join(names[:count])
        if not isinstance(module.get_submodule(part), nn.ModuleList | nn.ModuleDict):
            return part
    return layer


def _copy(nest: Any) -> Any:
    """A nest of outputs with tensors of its own: a block may write into what a part gives it."""
    return changed(nest, lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
