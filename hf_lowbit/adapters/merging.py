"""Merging an adapter into a packed model, with what each way costs said and, if wanted, measured.

- ``how="requantize"``, which is also what PEFT's own ``merge_and_unload`` does on packed layers: the changed weight is
  rounded again, in the layer's format and by its method. The model stays as small as it was, and a part of what was
  learnt is lost, all of it where a change is smaller than half a step of the grid.
- ``how="dequantize"``: the model becomes a float one first. Exact up to one rounding to its dtype, and large.
- ``how="low_rank"``: the adapter stays as the layers' own correction of low rank (:mod:`hf_lowbit.low_rank`). Nothing
  is lost; it costs the adapter's bytes, and the two thin products that the adapter cost.

The result of each is an ordinary model: ``save_pretrained`` writes it, and ``from_pretrained`` alone reads it back.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import logging

from ..evaluate import Evaluation, evaluate
from ..packed import PackedMixin
from ..swap import restore_modules
from .lora import FloatView
from .requantize import Cost

WAYS = ("requantize", "dequantize", "low_rank")
logger = logging.get_logger("transformers.hf_lowbit")


@dataclass(frozen=True)
class MergeReport:
    """What merging cost.

    Attributes:
        how: The way of merging.
        costs: What rounding cost each packed layer that was rounded again, by name.
        bytes_added: Of the factors that were kept, with ``how="low_rank"``.
        before: The model with its adapter on the windows, compared with the reference if there is one.
        after: The merged model, likewise.
        kl: Mean KL(with the adapter || merged) per position, in nats: what merging alone changed.
        kl_se: Its standard error over windows.
    """

    how: str
    costs: dict[str, Cost] = field(default_factory=dict)
    bytes_added: int = 0
    before: Evaluation | None = None
    after: Evaluation | None = None
    kl: float | None = None
    kl_se: float | None = None

    def __str__(self) -> str:
        lines = [f"merged by {self.how!r}"]
        if self.costs:
            name, worst = max(self.costs.items(), key=lambda item: item[1].error_to_change)
            lost = sorted(cost.error_to_change for cost in self.costs.values())[len(self.costs) // 2]
            lines.append(
                f"rounding {len(self.costs)} layers again moved their weights by {100 * lost:.0f} % of what the "
                f"adapter changed (median; at most {100 * worst.error_to_change:.0f} %, in {name})"
            )
        if self.bytes_added:
            lines.append(f"kept {self.bytes_added / 1e6:.2f} MB of factors beside the packed weights")
        if self.kl is not None and self.before is not None and self.after is not None:
            lines.append(f"KL(with the adapter || merged) is {self.kl:.3g} ± {self.kl_se:.1g} nats per token")
            for label, result in (("before", self.before), ("after", self.after)):
                against = "" if result.kl is None else f", KL to the reference {result.kl:.4g} ± {result.kl_se:.1g}"
                lines.append(f"  {label}: perplexity {result.perplexity:.4g} ± {result.perplexity_se:.1g}{against}")
        return "\n".join(lines)


def merge(
    model: PeftModel,
    how: str = "requantize",
    *,
    adapter_names: list[str] | None = None,
    dtype: torch.dtype | None = None,
    windows: torch.Tensor | None = None,
    reference=None,
    progress: bool = True,
):
    """Merges the LoRA adapters of ``model`` and takes PEFT's layers out of it.

    Args:
        model: A ``PeftModel`` over a packed model. It is used up, unless ``windows`` are given.
        how: "requantize", "dequantize" or "low_rank", see above.
        adapter_names: Names of the adapters to merge; the active ones by default.
        dtype: Of the float model that ``how="dequantize"`` gives; the model's own by default.
        windows: int64 (W, L) from :func:`hf_lowbit.evaluate.make_windows`, to measure the cost on. A copy of the model
            is merged then, since both are needed.
        reference: What :func:`hf_lowbit.evaluate.evaluate` takes, the float model for example: the KL divergence from
            it is then given before and after.
        progress: Whether to show progress bars.

    Returns:
        The merged model, a plain transformers one, and a :class:`MergeReport`, which is logged too.

    Raises:
        ValueError: for an unknown way, a model without packed LoRA layers, or an adapter that this way cannot merge,
            naming it.
    """
    if how not in WAYS:
        raise ValueError(f"how={how!r} is unknown: use {', '.join(map(repr, WAYS))}")
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"merge needs a PeftModel, not {type(model).__name__}: load the adapter by "
            "PeftModel.from_pretrained(model, adapter)"
        )
    if dtype is not None and how != "dequantize":
        raise ValueError(f"dtype={dtype} has no meaning for how={how!r}: only 'dequantize' gives a float model")
    adapted = model
    if windows is not None:
        model = copy.deepcopy(model)
    layers: dict[str, Any] = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, FloatView)}
    if not layers:
        raise ValueError("the model has no LoRA layer on a packed one: use PEFT's merge_and_unload")
    for name, layer in layers.items():
        names = layer.active_adapters if adapter_names is None else adapter_names
        if how == "low_rank":
            layer.check_factors(names)
        bad = [key for key, p in layer.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
        if bad:
            raise ValueError(
                f"{name}.{bad[0]} has NaN or infinite values: the adapter diverged in training, or overflowed in "
                "float16. Nothing was merged; go back to an earlier checkpoint"
            )
    base = model.get_base_model()
    own_dtype = base.dtype
    if how == "dequantize":
        restore_modules(base, torch.float32, [f"{name}.base_layer" for name in layers])
    for layer in layers.values():
        layer.keep_factors = how == "low_rank"
    merged = model.merge_and_unload(progressbar=progress, safe_merge=True, adapter_names=adapter_names)
    costs = {name: layer.merge_cost for name, layer in layers.items() if layer.merge_cost is not None}
    added = 0
    if how == "dequantize":
        merged.dequantize(torch.float32)
        merged.to(dtype or own_dtype)
    elif how == "low_rank":
        added = record_factors(merged)
    report = MergeReport(how, costs, added)
    if windows is not None:
        adapted.eval(), merged.eval()
        change = evaluate(merged, windows, adapted, progress)
        before = evaluate(adapted, windows, reference, progress)
        after = change if reference is None else evaluate(merged, windows, reference, progress)
        if reference is None:
            after = replace(after, kl=None, kl_se=None, top1=None, top1_se=None)
        report = replace(report, before=before, after=after, kl=change.kl, kl_se=change.kl_se)
    logger.warning(str(report)) if how == "requantize" else logger.info(str(report))
    return merged, report


def record_factors(model) -> int:
    """Writes the corrections of ``model``'s packed layers into its config, so that it saves whole; their bytes."""
    quantizer = model.hf_quantizer
    total = 0
    for name, planned in quantizer.plan.packed.items():
        module = model.get_submodule(name)
        if isinstance(module, PackedMixin) and module.low_rank != planned.low_rank:
            quantizer.plan.packed[name] = replace(planned, low_rank=module.low_rank)
            total += quantizer.plan.packed[name].nbytes - planned.nbytes
    low_rank = quantizer.plan.low_rank()
    for config in (quantizer.quantization_config, model.config.quantization_config):
        config.low_rank = low_rank
    return total
