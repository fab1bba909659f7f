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
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..packed import PackedMixin
from .branch import add_low_rank
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


class Original:
    """A packed layer's parameters before a merge, to unmerge it bit for bit."""

    def __init__(self, base: PackedMixin):
        self.low_rank = base.low_rank
        self.data = {name: p.data for name, p in base.named_parameters(recurse=False)}

    def restore(self, base: PackedMixin) -> None:
        """Puts them back, on the device where ``base`` is now."""
        device = base.weight.device
        for name in [name for name, _ in base.named_parameters(recurse=False) if name not in self.data]:
            delattr(base, name)
        base.low_rank = self.low_rank
        for name, data in self.data.items():
            getattr(base, name).data = data.to(device)


class FloatView:
    """What packed LoRA layers have in common: the float view, and merging through it."""

    _view: nn.Module | None = None
    _original: Original | None = None
    merge_cost: Cost | None = None
    """What the last rounding of this layer cost."""
    keep_factors: bool = False
    """Whether a merge keeps the adapter as the layer's low-rank correction, which costs nothing, and rounds nothing."""

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
        weight = view.weight.T if isinstance(view, Conv1D) else view.weight
        if not torch.equal(weight, base.dequantize(torch.float32)):
            self.merge_cost = requantize(base, weight, self.target_name)
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
        original = Original(base)
        try:
            if self.keep_factors:
                self.merge_factors(base, merged + names)
            else:
                with self.float_view():
                    super().merge(safe_merge, merged + names)
                self.report()
        except Exception:
            original.restore(base)
            self.merged_adapters = []
            raise
        self.__dict__["_original"] = original

    def check_factors(self, names: list[str]) -> None:
        """Refuses adapters that are not the product of two factors alone.

        Raises:
            ValueError: naming the first.
        """
        for name in names:
            if name in self.lora_variant:
                kind = type(self.lora_variant[name]).__name__.removeprefix("Packed").removesuffix("LinearVariant")
                raise ValueError(
                    f"adapter {name!r} uses {kind}, which is more than a product of two factors: it cannot be kept as "
                    "a low-rank correction. Merge by 'dequantize', or by 'requantize'"
                )

    def merge_factors(self, base, names: list[str]) -> None:
        """Adds the adapters ``names`` to the low-rank correction of ``base``."""
        self.check_factors(names)
        found = [(f.float(), g.float()) for f, g in [self.factors(name) for name in names if name in self.r]]
        dtypes = {self.factors(name)[0].dtype for name in names if name in self.r}
        if not found:
            return
        if base.low_rank is not None:
            found.insert(0, tuple(base.factors()))
            dtypes.add(base.low_rank.dtype)
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        base.set_factors(torch.cat([f.to(dtype) for f, _ in found]), torch.cat([g.to(dtype) for _, g in found], dim=1))
        for name in names:
            if self.lora_bias.get(name):
                base.bias.data = base.bias.data + (self.lora_B[name].bias * self.scaling[name]).to(base.bias.dtype)
        self.merged_adapters.extend(names)

    def report(self) -> None:
        """Logs what rounding cost: every layer at the level "info", and once that it costs something."""
        if self.merge_cost is None:
            return
        logger.warning_once(
            "merging an adapter into packed weights rounds them again, which loses a part of what it learnt. What "
            "each layer loses is logged at the level 'info'; hf_lowbit.adapters.merge sums it up, and has two ways "
            "without loss"
        )
        logger.info(
            "%s: rounding the merged weight again moved it by %.2g %%, which is %.0f %% of what the adapter changed",
            self.target_name,
            100 * self.merge_cost.error,
            100 * self.merge_cost.error_to_change,
        )

    def unmerge(self) -> None:
        """Gives the packed weight back as it was before merging, bit for bit."""
        if self._view is not None or self._original is None:
            super().unmerge()
            return
        self._original.restore(super().get_base_layer())
        self.__dict__["_original"] = None
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
    def fan_in_fan_out(self) -> bool:
        """Whether the float weight is (K, N), whatever the config says: a packed one is not, its float view may be."""
        return isinstance(self.get_base_layer(), Conv1D)

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    def forward(self, x, *args, **kwargs):
        """As PEFT's; one plain adapter in training keeps less for the backward pass, see :mod:`.branch`."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        special = len(names) != 1 or self.merged or self.disable_adapters or names[0] in self.lora_variant
        if special or not self.training or kwargs or self.lora_B[names[0]].bias is not None:
            return super().forward(x, *args, **kwargs)
        name = names[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return add_low_rank(self.base_layer(x), self.lora_dropout[name](x), a, b, self.scaling[name])

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_dora",): PackedDora}

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors (r, K) and (N, r) of adapter ``name``, with its scaling."""
        return self.lora_A[name].weight, self.lora_B[name].weight * self.scaling[name]


class LoraLowBitEmbedding(FloatView, lora.Embedding):
    """LoRA on a :class:`~hf_lowbit.embedding.LowBitEmbedding`. A is (r, rows) and B (dimension, r)."""

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors (r, dimension) and (rows, r) of adapter ``name``, with its scaling."""
        return self.lora_embedding_B[name].T * self.scaling[name], self.lora_embedding_A[name].T
