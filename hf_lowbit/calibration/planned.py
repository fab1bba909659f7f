"""Every layer by the method that its plan names: the hook that calibrated methods of :mod:`hf_lowbit.methods` run in.

A plan may mix methods by its rules. Those that need calibration get the moments of their layer's inputs; the others get
the weight alone, as when a model is quantized while it loads.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers.utils import logging

from ..quantizer import quantize_weight
from .pipeline import LayerHook, Solution

logger = logging.get_logger(__name__)


@dataclass
class Planned(LayerHook):
    """Solves each layer with ``layer.planned.method``."""

    activations: ClassVar[str] = "quantized"

    def solve_layer(self, layer, moments, generator):
        method, name = layer.planned.method, layer.name
        if not method.needs_calibration:
            return Solution(quantize_weight(layer.weight, layer.planned, name + ".weight"))
        if moments.tokens == 0:
            raise ValueError(
                f"{name} never saw a token of the calibration, so method {method.name!r} knows nothing of it: give "
                f"more or other text, or plan it without calibration by a rule {{{name!r}: {{'method': 'rtn'}}}}"
            )
        if moments.tokens < layer.weight.shape[1]:
            logger.warning(
                "%s saw %d tokens of the calibration, fewer than its %d inputs: give more text",
                name, moments.tokens, layer.weight.shape[1],
            )  # fmt: skip
        return Solution(quantize_weight(layer.weight, layer.planned, name + ".weight", moments), tokens=moments.tokens)
