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
import re

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..packed import PackedMixin
from .base import note_layer
from .branch import add_low_rank, packed_with_low_rank
from .overflow import OverflowWatch
from .requantize import Cost, Original, requantize

logger = logging.get_logger("transformers.hf_lowbit")
PLAIN_STARTS = (True, False, "gaussian", "eva")
"""Values of ``init_lora_weights`` that do not look at the base weight."""
STATISTICS = {"eigens", "_peft_loraga_grad"}
"""What PEFT's preprocessing functions leave on a base layer, for CorDA and LoRA-GA."""


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
    _original: Original | None = None
    merge_cost: Cost | None = None
    """What the last rounding of this layer cost."""
    keep_factors: bool = False
    """Whether a merge keeps the adapter as the layer's low-rank correction, which costs nothing, and rounds nothing."""

    def __init__(self, base_layer, adapter_name, config, **kwargs):
        self.__dict__["target_name"] = kwargs.get("target_name") or ""  # PEFT's own __init__ adds the adapter
        self.__dict__["_watch"] = OverflowWatch()
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

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

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        """Adds an adapter as PEFT does; see its ``LoraLayer.update_layer``.

        Raises:
            ValueError: for a start that cannot be made from packed weights, naming the layer and what can be done.
        """
        base, start = super().get_base_layer(), config.init_lora_weights
        plain = start in PLAIN_STARTS and self.resolve_lora_variant(config=config) is None
        if isinstance(base, PackedMixin):
            self.check_start(base, r, start, plain)
            if self.target_name and base.weight.device.type != "meta":
                with base.products() as (weight, _):
                    note_layer(config, self.target_name, weight)
        with contextlib.nullcontext() if plain else self.float_view():
            if self._view is not None:
                for name in STATISTICS & vars(base).keys():  # which PEFT consumes
                    setattr(self._view, name, base.__dict__.pop(name))
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        # Not where the parameters of a streamed layer are, which are views of its file.
        streamed = getattr(super().get_base_layer(), "streamed", None)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or (streamed and streamed.device))

    def check_start(self, base: PackedMixin, r: int, start: bool | str, plain: bool) -> None:
        """Refuses, or warns of, a rank or a start that cannot work."""
        name, limit = self.target_name or "a packed layer", min(base.packed_shape)
        if start == "loftq":
            raise ValueError(
                f"{name} is packed, and PEFT's init_lora_weights='loftq' rounds float weights on a grid of its own: "
                "use hf_lowbit.adapters.initialize(..., method='loftq'), or 'eora' or 'apiq', which fit the adapter "
                "to this package's formats. To load an adapter that was made so, set init_lora_weights to true in its "
                "config"
            )
        if start == "corda" and not hasattr(base, "eigens"):
            raise ValueError(
                f"{name} has no statistics for init_lora_weights='corda': run PEFT's preprocess_corda with a "
                "cache_file on the float model (LowBitConfig(dequantize=True) gives it) and then on this one, which "
                "reads that file; or use hf_lowbit.adapters.initialize(..., method='eora')"
            )
        if start == "lora_ga" and not hasattr(base, "_peft_loraga_grad"):
            logger.warning_once(
                "init_lora_weights='lora_ga' needs gradients of float weights, which packed layers do not have: "
                "adapters start as plain LoRA (and are loaded as they were saved)"
            )
        if r > limit:
            rows, columns = base.packed_shape
            message = (
                f"rank {r} is above {limit}, the smaller dimension of {name.rpartition('.')[2]} ({rows}x{columns}), "
                "and cannot add to what it can learn: lower r, or give such layers their own by rank_pattern"
            )
            if not plain:
                raise ValueError(message)
            logger.warning_once(message)

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
        except BaseException:  # Ctrl-C, too: what is half merged is neither
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
                kind = re.sub("^Packed|(Linear|Embedding)?Variant$", "", type(self.lora_variant[name]).__name__)
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
        y, dropout = None, self.lora_dropout[name]
        if isinstance(dropout, nn.Identity):
            y = packed_with_low_rank(self.base_layer, x, a, b, self.scaling[name])
        if y is None:
            y = add_low_rank(self.base_layer(x), dropout(x), a, b, self.scaling[name])
        if y.dtype == torch.float16:
            self._watch(self.target_name, x, a, b, y)
        return y

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
