"""Packed modules in the place of a model's float ones, and back, with what has to hold around them.

Ties between embedding and head, saving and resizing are rules of transformers about tensors of a float module; here
they are made to hold for packed ones, or refused.
"""

import functools

import torch
from transformers.core_model_loading import WeightRenaming

from .packed import PackedMixin
from .plan import Plan


def replace_modules(model: torch.nn.Module, plan: Plan, backend: str, activations: str = "float") -> None:
    """Puts an empty packed module in the place of every planned one, and extends the model's ties to the companions."""
    from .embedding import LowBitEmbedding
    from .linear import LowBitLinear

    for name, planned in plan.packed.items():
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Embedding):
            packed = LowBitEmbedding.like(module, planned.format, backend)
        else:
            packed = LowBitLinear.like(module, planned.format, backend, activations)
        packed.method = planned.method
        if planned.low_rank is not None:
            packed.register_factors(planned.low_rank, packed.weight.device)
        model.set_submodule(name, packed)
    for name, source in plan.tied.items():
        both = (model.get_submodule(name), model.get_submodule(source))
        like = ["_like"] if all(isinstance(module, LowBitEmbedding) for module in both) else []
        for suffix in (*plan.packed[name].format.suffixes(), *like):
            model.all_tied_weights_keys[f"{name}.weight{suffix}"] = f"{source}.weight{suffix}"


def keep_packed_layout(model: torch.nn.Module) -> None:
    """Makes ``save_pretrained`` write packed tensors as they are, where it would fuse or split float ones.

    A few models rearrange the weights of a checkpoint while loading and put them back for saving. On packed tensors
    that is wrong, and not needed: the model's own names load too.
    """
    names = [name for name, _ in model.named_parameters()]
    packed = [n for n in names if isinstance(model.get_submodule(n.rpartition(".")[0]), PackedMixin)]
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if isinstance(conversion, WeightRenaming)
        or not any(conversion.reverse_transform().rename_source_key(name)[1] for name in packed)
    ]


def refuse_resizing(model: torch.nn.Module) -> None:
    """Makes ``resize_token_embeddings`` say what is wrong, where transformers would take codes for rows."""
    model.__dict__.pop("resize_token_embeddings", None)
    ends = {"input embedding": "get_input_embeddings", "output head": "get_output_embeddings"}
    for what, getter in ends.items():
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # a model without one
            continue
        if isinstance(module, PackedMixin):
            model.resize_token_embeddings = functools.partial(_cannot_resize, what)


def _cannot_resize(what: str, *args, **kwargs):
    raise ValueError(
        f"the {what} of this model is packed and cannot be resized: resize the float model before quantizing it, or "
        "keep embedding and head in float by embeddings='float'"
    )


def forget_broken_ties(model: torch.nn.Module) -> None:
    """Unties packed modules whose weights differ, since an adapter was, or may yet be, merged into one of them.

    Tying them again in float would lose it.
    """
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedMixin)}
    for target, source in list(ties.items()):
        owners = [key.rpartition(".")[0] for key in (target, source)]
        name = target.rpartition(".")[2]
        pair = [packed[owner] for owner in owners if owner in packed]
        adapted = any(f"{owner}.base_layer" in packed for owner in owners)
        shared = len({id(getattr(module, name, module)) for module in pair}) == 1 and len(pair) == 2
        if adapted or (pair and (not shared or any(module.low_rank is not None for module in pair))):
            del ties[target]
            if name == "weight":
                for config in (model.config, model.config.get_text_config()):
                    config.tie_word_embeddings = False


def restore_modules(
    model: torch.nn.Module, dtype: torch.dtype | None = None, names: list[str] | None = None
) -> torch.nn.Module:
    """Puts a plain float module in the place of every packed one (or of those in ``names``), one at a time.

    Raises:
        ValueError: for a module that is offloaded to disk.
    """
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, PackedMixin)]
    forget_broken_ties(model)
    for name in names:
        module = model.get_submodule(name)
        if module.weight.device.type == "meta":
            raise ValueError(f"{name} is offloaded: load the model without offloading to dequantize it")
        plain = module.to_float(dtype)
        if hasattr(module, "_hf_hook"):
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(plain, module._hf_hook)
        model.set_submodule(name, plain)
    ties = getattr(model, "all_tied_weights_keys", None)
    if names and ties:
        for key in [k for k in ties if not k.endswith(".weight") and k.rpartition(".")[0] in names]:
            del ties[key]
        model.tie_weights(recompute_mapping=False)
    refuse_resizing(model)
    return model
