"""Rounding a packed layer again, after its float weight has been changed, and what that cost.

The layer's own format is kept, and the method is the one that packed it, as the model's config records it. A method
that needs calibration data cannot run here: the best one without data for the same format then takes its place.
"""

import math
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..methods import BEST, make_method
from ..packed import PackedMixin
from ..plan import Packed
from ..quantizer import quantize_weight

logger = logging.get_logger("transformers.hf_lowbit")


@dataclass(frozen=True)
class Cost:
    """What rounding a changed weight again cost, in Frobenius norms over the whole weight.

    Attributes:
        error: The distance of what is now stored from what was wanted, in parts of the norm of what was wanted.
        error_to_change: The same distance in parts of the norm of the change. Above 1 more was lost than was changed.
    """

    error: float
    error_to_change: float


class Original:
    """A packed layer's parameters before a merge, to unmerge it bit for bit."""

    def __init__(self, base: PackedMixin):
        self.low_rank = base.low_rank
        self.parameters = dict(base.named_parameters(recurse=False))
        self.bias = None if getattr(base, "bias", None) is None else base.bias.data.clone()

    def restore(self, base: PackedMixin) -> None:
        """Puts them back, on the device where ``base`` is now."""
        device = base.weight.device
        for name in [name for name, _ in base.named_parameters(recurse=False) if name not in self.parameters]:
            delattr(base, name)
        base.low_rank = self.low_rank
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.to(device)
            setattr(base, name, parameter)
        if self.bias is not None:
            base.bias.data = self.bias.to(device)


@torch.no_grad()
def requantize(base: torch.nn.Module, weight: torch.Tensor, name: str = "") -> Cost:
    """Packs ``weight`` into ``base``, in its own format and by its own method.

    Args:
        base: A packed module. It gets new parameters: a module that shared the old ones (a tied head) keeps them.
        weight: (N, K), floating point, finite; not changed. A low-rank correction of ``base`` stays as it is: what is
            packed is the rest.
        name: The layer's, for messages.

    Raises:
        ValueError: for a weight that is not finite, naming the layer.
    """
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(
            f"merging makes {bad} weights of {name or 'a packed layer'} NaN or infinite: the adapter diverged in "
            "training (or overflowed in float16); nothing was merged into this layer. Go back to an earlier checkpoint"
        )
    before = base.dequantize(torch.float32)
    method = base.method
    if method is None or method.needs_calibration:
        if base.format.inner is not base.format.multiplied:
            raise ValueError(
                f"{name or 'a packed layer'} has a factor for each input, which nothing but calibration can choose "
                "again: merge by 'low_rank', or into the dequantized model"
            )
        method = make_method(BEST[base.format.multiplied.name])
    planned = Packed(name, base.format, method, base.packed_shape)
    rest = weight
    for factor_in, factor_out in [base.factors()] if base.low_rank is not None else []:
        rest = torch.addmm(weight, factor_out.float(), factor_in.float(), alpha=-1)
    tensors = quantize_weight(rest, planned, name or "a packed layer")
    base.set_packed(tensors)
    error = (base.dequantize(torch.float32) - weight).norm()
    change = (before - weight).norm()
    cost = Cost(float(error / weight.norm()), float(error / change) if change else math.inf)
    logger.warning_once(
        "changed weights of packed layers (a merged adapter, or a start that takes a part out of them) are rounded "
        "again, which loses a part of the change. What each layer loses is logged at the level 'info'; "
        "hf_lowbit.adapters.merge sums it up, and has two ways without loss"
    )
    logger.info(
        "%s: rounding the changed weight again moved it by %.2g %%, which is %.0f %% of the change",
        name,
        100 * cost.error,
        100 * cost.error_to_change,
    )
    return cost
