"""Packed layers for PEFT's tuners besides LoRA: what those that know of quantized layers ask, and a guard for the rest.

BOFT, MiSS, OFT, SHiRA and VeRA read and write the base weight through a ``QuantizationBackend``; ours dequantizes and
rounds again, as merging LoRA does (:mod:`.requantize`), and gives the packed original back when the last adapter is
unmerged. Other tuners that only add to a layer's output train on packed layers as on any other, but their merging would
write float numbers into packed codes: it is refused. So are, when they are attached, tuners that read the base weight
itself (READ_WEIGHTS): they would take codes for weights.
"""

import re

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.quantization_utils import QuantizationBackend

from ..packed import PackedMixin
from .requantize import Original, requantize

READ_WEIGHTS = {"DEFT", "DELORA", "FROD", "HIRA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT", "SUPERTUNING"} | {
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
}
"""Types of adapters of PEFT 0.21 that compute with the base weight, or in its dtype."""


class LowBitBackend(QuantizationBackend):
    """Of one PEFT layer over a packed one."""

    supports_merge = True
    backend_name = "lowbit"
    layer_type = "linear"

    def __init__(self) -> None:
        self.original: Original | None = None

    def get_base_weight(self, base_layer):
        """The weight (N, K), float32 and a new tensor if it was packed."""
        return base_layer.dequantize().clone() if isinstance(base_layer, PackedMixin) else base_layer.weight.data

    def set_base_weight(self, peft_layer, weight_data):
        """Packs ``weight_data`` (N, K) again; after the last unmerge, puts the original back instead."""
        base = peft_layer.get_base_layer()
        if not isinstance(base, PackedMixin):  # dequantized since
            base.weight.data = weight_data
        elif peft_layer.merged_adapters or self.original is None:
            self.original = self.original or Original(base)
            requantize(base, weight_data)
        else:
            self.original.restore(base)
            self.original = None


def check_config(model, config) -> None:
    """Refuses adapters that read the weights of packed layers.

    Raises:
        ValueError: naming the first such layer.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tokens = getattr(config, "trainable_token_indices", None) or kind == "TRAINABLE_TOKENS"
    if tokens and isinstance(embeddings, PackedMixin):
        raise ValueError(
            "the input embedding is packed, and training single tokens writes into its rows: keep it in float by "
            "embeddings='float', or train it by LoRA (target_modules with its name)"
        )
    for part in getattr(config, "modules_to_save", None) or ():
        found = next((n for n, m in model.named_modules() if isinstance(m, PackedMixin) and _within(n, part)), None)
        if found is not None:
            raise ValueError(
                f"modules_to_save has {part!r}, but {found} is packed and cannot be trained whole: train it by LoRA "
                f"(target_modules), or keep it in float by a rule {{'.*{part}.*': None}}"
            )
    if kind not in READ_WEIGHTS:
        return
    targets = getattr(config, "target_modules", None)
    for name, module in model.named_modules():
        if not isinstance(module, PackedMixin) or targets is None:
            continue
        if targets == "all-linear" or check_target_module_exists(config, name):
            raise ValueError(
                f"{name} is packed, and PEFT's {kind} computes with float weights: use LoRA (also DoRA, AdaLoRA, "
                "VeRA, OFT, BOFT, MiSS, SHiRA), or keep its targets in float by a rule {name: None}"
            )


def _within(name: str, part: str) -> bool:
    """Whether the module ``name`` is one called ``part``, or lies in one."""
    return re.match(rf"(^|.*\.){part}($|\..*)", name) is not None


def check_merge(model) -> None:
    """Refuses to merge into packed layers what would damage them.

    Raises:
        ValueError: naming the first such layer.
    """
    from .lora import FloatView

    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, FloatView) or layer.quantization_backend:
            continue
        if isinstance(layer.get_base_layer(), PackedMixin):
            kind = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
            raise ValueError(
                f"{name} is packed, and PEFT's {kind} cannot merge into packed weights: call dequantize() on the base "
                "model first, which makes the merge exact, or use LoRA"
            )
