"""LoRA by PEFT on packed layers.

PEFT's own LoRA layers do everything that does not need the base weight: the forward, several adapters, dropout, mixed
batches. Where they do need it (merging, DoRA's norms, the decompositions of PiSSA, OLoRA, CorDA and MiCA) they read
and write ``get_base_layer().weight`` as a float matrix. The layers of this module open a *float view* around those
calls: a plain float layer with the dequantized weight stands in for the packed one, PEFT's code runs on it, and if the
weight has changed it is rounded again by the layer's own method (:mod:`.requantize`) when the view closes. So all of
PEFT's variants follow PEFT's own arithmetic, and only the rounding is ours.

A merge keeps the packed original, so that unmerging gives it back bit for bit; several adapters are merged in one
rounding. Nothing dequantized outlives a view, and autograd keeps none of it.
"""

import contextlib

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.utils import logging

from ..packed import PackedMixin
from .requantize import Cost, requantize

logger = logging.get_logger("transformers.hf_lowbit")


class PackedDora(DoraLinearVariant):
    """DoRA that multiplies by the packed weight when there is dropout; PEFT's would keep a dequantized one alive."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        dropout = module.lora_dropout[active_adapter]
        base_result = result
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base_result = module.base_layer(x)
        return result + module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=base_result,
            adapter_name=active_adapter,
        )


class FloatView:
    """What packed LoRA layers have in common: the float view, and merging through it."""

    _view: nn.Module | None = None
    _packed_original: dict[str, torch.Tensor] | None = None
    merge_cost: Cost | None = None
    """What the last rounding of this layer cost."""

    def get_base_layer(self) -> nn.Module:
        """The base layer, or its float stand-in while a view is open."""
        return super().get_base_layer() if self._view is None else self._view

    @contextlib.contextmanager
    def float_view(self):
        """Lets a plain float layer stand in for the packed one, which is packed again if its weight was changed."""
        base = super().get_base_layer()
        if self._view is not None or not isinstance(base, PackedMixin) or base.weight.device.type == "meta":
            yield
            return
        view = base.to_float(torch.float32).requires_grad_(False)
        self.__dict__["_view"] = view  # past nn.Module: it must not show up in the model
        try:
            yield
        finally:
            self.__dict__["_view"] = None
        if not torch.equal(view.weight, base.dequantize(torch.float32)):
            self.merge_cost = requantize(base, view.weight, self.target_name)
        if getattr(base, "bias", None) is not None:
            base.bias.data = view.bias.to(base.bias.dtype)

    def update_layer(self, adapter_name, *args, **kwargs):
        """Adds an adapter as PEFT does; see its ``LoraLayer.update_layer``."""
        self.target_name = kwargs.get("target_name") or getattr(self, "target_name", "")
        with self.float_view():
            super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the packed weight, which is rounded again once; see PEFT's ``merge``."""
        if self._view is not None or not isinstance(super().get_base_layer(), PackedMixin):
            super().merge(safe_merge, adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base, merged = super().get_base_layer(), list(self.merged_adapters)
        if merged:
            self.unmerge()
        original = {name: p.data for name, p in base.named_parameters(recurse=False)}
        try:
            with self.float_view():
                super().merge(safe_merge, merged + names)
        except Exception:
            self.merged_adapters = []
            raise
        self.__dict__["_packed_original"] = original

    def unmerge(self) -> None:
        """Gives the packed weight back as it was before merging, bit for bit."""
        if self._view is not None or self._packed_original is None:
            super().unmerge()
            return
        base = super().get_base_layer()
        for name, data in self._packed_original.items():
            getattr(base, name).data = data.to(getattr(base, name).device)
        self.__dict__["_packed_original"] = None
        self.merged_adapters.clear()
        self._caches.clear()

    def forward(self, x, *args, **kwargs):
        """As PEFT's; DoRA needs the float weight for its norms."""
        if any(self.use_dora.get(name) for name in self.active_adapters) and not self.merged:
            with self.float_view():
                return super().forward(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)


class LoraLowBitLinear(FloatView, lora.Linear):
    """LoRA on a :class:`~hf_lowbit.linear.LowBitLinear`. A is (r, K) and B (N, r), as on ``nn.Linear``."""

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_dora",): PackedDora}


class LoraLowBitEmbedding(FloatView, lora.Embedding):
    """LoRA on a :class:`~hf_lowbit.embedding.LowBitEmbedding`. A is (r, rows) and B (dimension, r)."""
