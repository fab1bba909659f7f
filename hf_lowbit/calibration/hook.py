"""The contract of a calibrated method: :class:`Hook` for one that works on a block, :class:`LayerHook` for one that
takes layer after layer.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from ..plan import Packed
from .block import Block, Layer, Solution
from .blocks import Blocks
from .run import Run
from .samples import Samples
from .statistics import Moments


class Hook(ABC):
    """A method that works on a whole block. Its fields (a dataclass) are its options, and part of the manifest.

    Attributes:
        activations: What it needs: "none", "quantized" (what the block gets in the quantized model), or "both" (the
            float model's too).
    """

    activations: ClassVar[str] = "quantized"

    def check(self, name: str, planned: Packed) -> None:  # noqa: B027  (most have nothing to check)
        """Raises ``ValueError`` if the layer ``name`` cannot be solved as it is planned; asked before any work."""

    def prepare(  # noqa: B027  (most have nothing to prepare)
        self, blocks: Blocks, run: Run, tokens: torch.Tensor | Samples | None, seed: int, **options: Any
    ) -> None:
        """What has to be known of the whole float model before its first block is solved.

        It is called whenever a run begins or goes on, and may keep files in the folder of ``run``.

        Args:
            blocks: The model.
            run: The run.
            tokens: The calibration windows (W, L), or other calls of the model.
            seed: For random choices.
            options: ``batch_size`` and ``device``, as in :func:`calibrate`.
        """

    @abstractmethod
    def solve(self, block: Block) -> None:
        """Calls :meth:`Block.set` for every layer of ``block``. The result must depend on the block alone."""


class LayerHook(Hook):
    """A method that works on one layer after the other, each with the inputs that the solved ones before it leave."""

    @abstractmethod
    def solve_layer(self, layer: Layer, moments: Moments | None, generator: torch.Generator) -> Solution:
        """The solution for ``layer`` from the ``moments`` of its inputs (None without activations)."""

    def solve(self, block: Block) -> None:
        for group in block.groups():
            moments = None if self.activations == "none" else block.moments(group)
            for name in group:
                block.set(name, self.solve_layer(block.layers[name], moments, block.generator))
