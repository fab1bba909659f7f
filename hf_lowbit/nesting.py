"""Loading a nested repo at one of its widths (``load_bits=``): only the planes of that width are read.

While it loads, a nested module has just the tensors of the asked width (a nested format of fewer bits has the same
ones, fewer of them: :mod:`.formats.nested`); what else is in the file has no place in the model and is never read. Then
each becomes an ordinary ``codebook`` module, the one that kernels run and ``save_pretrained`` writes, and the config
says so.
"""

from dataclasses import replace

import torch
from torch import nn

from .config import LowBitConfig
from .formats import CodebookFormat, Format, parse_format
from .formats.nested import NestedFormat
from .methods import make_method
from .packed import PackedMixin
from .plan import Plan


def check_load_bits(config: LowBitConfig, pre_quantized: bool) -> None:
    """Refuses a ``load_bits`` that the repo cannot give.

    Raises:
        ValueError: for a model that is not packed, a repo that is not nested, or one of fewer bits; and for a nested
            one under ``max_memory_bytes``.
    """
    formats = [parse_format(text) for text in (config.layers or {}).values()]
    stored = [format.bits for format in formats if isinstance(format, NestedFormat)]
    if stored and config.max_memory_bytes is not None:
        raise ValueError(
            "max_memory_bytes= reads layers from disk as they run, and nested planes are put together first: load the "
            "repo with load_bits= once, save_pretrained() it, and stream that"
        )
    if config.load_bits is None:
        return
    if not pre_quantized:
        raise ValueError(
            f"load_bits={config.load_bits} is for repos that are nested already: to pack this float model use bits=, "
            "or make a nested one by format='nested' and load that"
        )
    if not stored:
        held = ", ".join(sorted({f"{f.name} of {f.bits} bits" for f in formats}))
        raise ValueError(
            f"load_bits={config.load_bits} needs a nested repo, and this one holds {held}: load it without load_bits, "
            "or pack the original model with format='nested'"
        )
    if config.load_bits > max(stored):
        raise ValueError(
            f"load_bits={config.load_bits} is more than this repo has: it holds {max(stored)} bits. Use at most that, "
            "or pack the original model with more bits"
        )


def runs_as(format: Format) -> Format:
    """The format in which a packed module of ``format`` runs after loading."""
    return format.codebook if isinstance(format, NestedFormat) else format


def leave_unread(model, plan: Plan) -> None:
    """Tells transformers that planes which are not wanted are no surprise in the checkpoint."""
    widest = max((p.format.bits for p in plan.packed.values() if isinstance(p.format, NestedFormat)), default=None)
    if widest is not None and widest < 8:
        known = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*known, rf"\.weight_(bit|levels)[{widest + 1}-8]$"}


@torch.no_grad()
def unnest(model, plan: Plan, config: LowBitConfig) -> None:
    """Turns every nested module of a loaded model into an ordinary one, and changes ``plan`` and ``config`` to match.

    Raises:
        ValueError: for a module that is offloaded to disk.
    """
    nested = {name: p for name, p in plan.packed.items() if isinstance(p.format, NestedFormat)}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    for name in sorted(nested, key=lambda n: n in plan.tied):  # sources before what shares their tensors
        module, planned = model.get_submodule(name), nested[name]
        format, source = planned.format, plan.tied.get(name)
        assert isinstance(module, PackedMixin) and isinstance(format, NestedFormat)
        if module.stored()[""].device.type == "meta":
            raise ValueError(
                f"{name} is offloaded to disk, where a nested repo cannot be unpacked: load it without offloading, "
                "save_pretrained() it, and load that"
            )
        if source is None:
            tensors = format.to_codebook(module.stored(), planned.shape)
        else:
            tensors = model.get_submodule(source).stored()
            for suffix in format.suffixes():
                ties.pop(f"{name}.weight{suffix}", None)
            for suffix in format.codebook.suffixes():
                ties[f"{name}.weight{suffix}"] = f"{source}.weight{suffix}"
        for parameter in module.packed_names:
            delattr(module, parameter)
        module.register_packed(format.codebook, planned.shape, module.backend, "meta")
        for suffix, tensor in tensors.items():
            shared = isinstance(tensor, nn.Parameter)
            setattr(module, "weight" + suffix, tensor if shared else nn.Parameter(tensor, requires_grad=False))
        module.method = make_method("lloyd")
        plan.packed[name] = replace(planned, format=format.codebook, method=module.method)
    if nested:
        _settle(config)
        config.layers = plan.layers()


def _settle(config: LowBitConfig) -> None:
    """Makes the options of ``config`` those of an ordinary repo."""
    for options in (vars(config), *(rule for rule in config.rules.values() if rule is not None)):
        if options.get("format") == NestedFormat.name:
            options.update(format=CodebookFormat.name, method="lloyd", method_options={})
            options["bits"] = min(options.get("bits") or 8, config.load_bits or 8)
    config.load_bits = None
