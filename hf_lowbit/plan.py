"""Which modules of a model are packed, in which format, and why the others are not.

The same plan serves loading, conversion from disk to disk, and inspection. It is made from the model's skeleton
(which may lie on the ``meta`` device) and the config. What it decided is written into the config as ``layers``, with
layer numbers replaced by ``*``, so that a packed repo says itself what is packed and does not depend on how defaults
are resolved later.
"""

import functools
import inspect
import re
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .compensation import check_compensation
from .config import LowBitConfig
from .formats import Format, OutlierFormat, RotatedFormat, parse_format
from .formats.nested import NestedFormat
from .low_rank import SUFFIXES, LowRank, parse_low_rank
from .methods import Method

STREAM = "the residual stream"  # in `folded`, for rotations


@dataclass(frozen=True)
class Packed:
    """One module to pack: its format, its method (for a packed repo: as its config records it) and its float (N, K)."""

    name: str
    format: Format
    method: Method | None
    shape: tuple[int, int]
    low_rank: LowRank | None = None

    @property
    def looks_at_inputs(self) -> bool:
        """Whether it cannot be packed without calibration."""
        return self.low_rank is not None or (self.method is not None and self.method.needs_calibration)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of all that is stored for it, by suffix of ``weight``."""
        found = dict(self.format.tensors(self.shape))
        if self.low_rank is not None:
            shapes = self.low_rank.shapes(self.shape).values()
            found |= {suffix: (s, self.low_rank.dtype) for suffix, s in zip(SUFFIXES, shapes, strict=True)}
        return found

    @property
    def nbytes(self) -> int:
        """Of all that is stored for it."""
        return self.format.nbytes(self.shape) + (self.low_rank.nbytes(self.shape) if self.low_rank else 0)


@dataclass(frozen=True)
class Kept:
    """One module or parameter that stays in float: its bytes and the reason."""

    name: str
    nbytes: int
    reason: str
    expected: bool = True


@dataclass
class Plan:
    """The decision for a whole model."""

    packed: dict[str, Packed] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    """Packed modules whose tensors are another one's: ``{module: source module}``."""
    replayed: bool = False
    """Whether this is the plan of a repo that is packed already."""

    def layers(self) -> dict[str, str]:
        """Formats by module name, numbers replaced by ``*`` where all that match agree."""
        return _compress({name: p.format.spec for name, p in self.packed.items()}, [k.name for k in self.kept])

    def low_rank(self) -> dict[str, str] | None:
        """Low-rank corrections by module name, likewise; None without any."""
        found = {name: p.low_rank.spec for name, p in self.packed.items() if p.low_rank is not None}
        return _compress(found, [name for name in self.packed if name not in found]) or None

    def coverage(self) -> dict:
        """Totals: packed weights, bytes and bits per weight, and every kept module with its bytes and reason."""
        own = [p for name, p in self.packed.items() if name not in self.tied]
        weights = sum(p.shape[0] * p.shape[1] for p in own)
        packed_bytes = sum(p.nbytes for p in own)
        kept = [k for k in self.kept if k.nbytes]
        return {
            "packed_modules": len(self.packed),
            "packed_weights": weights,
            "packed_bytes": packed_bytes,
            "bits_per_packed_weight": 8 * packed_bytes / weights if weights else 0.0,
            "kept_bytes": sum(k.nbytes for k in kept),
            "kept": [{"name": k.name, "bytes": k.nbytes, "reason": k.reason} for k in kept],
        }

    def report(self) -> str:
        """The coverage as text, kept modules grouped by reason."""
        c = self.coverage()
        lines = [
            f"packed {c['packed_modules']} modules: {c['packed_weights'] / 1e6:.1f} M weights in "
            f"{c['packed_bytes'] / 1e6:.1f} MB ({c['bits_per_packed_weight']:.2f} bits per weight); kept "
            f"{c['kept_bytes'] / 1e6:.1f} MB in float:"
        ]
        reasons: dict[str, list[dict]] = {}
        for entry in c["kept"]:
            reasons.setdefault(entry["reason"], []).append(entry)
        for reason, entries in sorted(reasons.items(), key=lambda item: -sum(e["bytes"] for e in item[1])):
            names = ", ".join(dict.fromkeys(_wildcard(e["name"]) for e in entries))
            lines.append(f"  {sum(e['bytes'] for e in entries) / 1e6:.1f} MB, {reason}: {names}")
        return "\n".join(lines)


@dataclass
class _Choice:
    """What was decided for one module alone; ``by_default``: nobody asked for it, so a partner in a tie may differ."""

    decision: Packed | Kept
    nbytes: int
    obstacle: str | None
    by_default: bool


def make_plan(model: nn.Module, config: LowBitConfig) -> Plan:
    """The plan for ``model`` (a ``PreTrainedModel``, float, possibly on ``meta``).

    Raises:
        ValueError: for a rule that matches nothing or asks for what cannot be packed, naming the module and the cure.
    """
    if config.layers is not None:
        return _replay_plan(model, config)
    plan, used = Plan(), set()
    prefix = getattr(model, "base_model_prefix", "")
    skipped, ends = _default_skips(model, config), ends_of(model)
    choices: dict[str, _Choice] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        pattern, options = _matching_rule(config, name, prefix)
        used.add(pattern)
        shape = tuple(module.weight.shape) if kind != "conv1d" else tuple(reversed(module.weight.shape))
        nbytes = module.weight.numel() * module.weight.element_size()
        obstacle, asked = _obstacle(model, name, module), pattern is not None and options is not None
        by_default = not asked and (name in ends or kind == "embedding")
        decision: Packed | Kept
        budgeted = pattern is None and not by_default and not (obstacle or name in skipped)
        if budgeted and (config.allocation is not None or config.seeks_allocation):
            options = {"bits": _allocated(config, name, prefix)}
        if pattern is not None and options is None:
            decision, by_default = Kept(name, nbytes, f"rule {pattern!r}"), False
        elif obstacle is not None:
            if asked:
                raise ValueError(f"rule {pattern!r} asks to pack {name!r}, which is not possible: {obstacle}")
            decision = Kept(name, nbytes, obstacle, expected=by_default)
        elif name in skipped and not asked:
            decision, by_default = Kept(name, nbytes, skipped[name]), False
        elif by_default and name not in ends:
            decision = Kept(name, nbytes, "embedding; pack it by a rule")
        elif by_default and config.embeddings == "float":
            decision = Kept(name, nbytes, "embeddings='float'")
        else:
            options = config.embedding_options() if by_default else options
            low_rank = config.resolve_compensation(options) if kind != "embedding" else None
            format, method = config.resolve(options)
            into = _folded_into(config, name, prefix)
            if into is not None:
                format = _unrotated(format) if into == STREAM else format.multiplied
            decision = Packed(name, format, method, shape, low_rank)
            if low_rank is not None:
                check_compensation(name, low_rank, shape)
            if decision.nbytes >= 2 * shape[0] * shape[1]:
                reason = f"packing {shape[0]}x{shape[1]} would not make it smaller than 16 bits"
                decision = Kept(name, nbytes, reason)
        choices[name] = _Choice(decision, nbytes, obstacle, by_default)
    tied = {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in _tied_weights(model).items()}
    plan.tied = _agree_on_ties(choices, tied)
    decisions = {name: choice.decision for name, choice in choices.items()}
    for name, decision in decisions.items():
        if isinstance(decision, Packed):
            plan.packed[name] = decision
        elif name not in tied:
            plan.kept.append(decision)
    unused = [p for p in config.rules if p not in used]
    if unused:
        names = ", ".join(dict.fromkeys(_wildcard(n) for n in decisions)) or "none at all"
        raise ValueError(f"rule {unused[0]!r} matches no module that could be packed. There are: {names}")
    _keep_the_rest(model, plan, decisions)
    return plan


def _folded_into(config: LowBitConfig, name: str, prefix: str) -> str | None:
    """What the factors, or the rotation, of the inputs of the module ``name`` go into, or None."""
    folded = (config.folded or {}).items()
    return next((into for key, into in folded for n in names(name, prefix) if _pattern(key).fullmatch(n)), None)


def _unrotated(format: Format) -> Format:
    """``format`` for inputs that are rotated already."""
    if isinstance(format, OutlierFormat):
        return replace(format, stored=_unrotated(format.rest))
    return format.inner if isinstance(format, RotatedFormat) else format


def _allocated(config: LowBitConfig, name: str, prefix: str) -> int:
    """The width that a budget gave to the module ``name``."""
    if config.allocation is None:
        raise ValueError(
            f"bits={config.bits} is a budget, which is not searched here: make a plan by `hf-lowbit plan`, and give "
            "its file as bits="
        )
    widths = config.allocation
    found = next((widths[n] for n in names(name, prefix) if n in widths), None)
    if found is None:
        raise ValueError(
            f"bits={config.bits} is a budget, and there is no width for {name!r}: the plan was made for another model, "
            "or with other rules. Make one for this model by `hf-lowbit plan`"
        )
    return found


def _agree_on_ties(choices: dict[str, _Choice], tied: dict[str, str]) -> dict[str, str]:
    """Makes one decision for modules that share a tensor: what was asked for, else what is the default.

    Returns:
        ``{module: source}`` of those that are packed.

    Raises:
        ValueError: where packing was asked for and one of them cannot be packed, naming it.
    """
    sharing: dict[str, list[str]] = {}
    for name, source in tied.items():
        if name in choices and source in choices:
            sharing.setdefault(source, []).append(name)
    packed = {}
    for source, names in sharing.items():
        members = [*names, source]
        wishes = [n for n in members if isinstance(choices[n].decision, Packed)]
        if not wishes:
            continue
        wish = min(wishes, key=lambda n: choices[n].by_default)
        hindered = next((n for n in members if choices[n].obstacle is not None), None)
        kept = next((n for n in members if n not in wishes and not choices[n].by_default), hindered)
        if hindered is not None and not choices[wish].by_default:
            raise ValueError(
                f"{wish!r} cannot be packed: it shares its weight with {hindered!r}, and {choices[hindered].obstacle}"
            )
        if kept is not None and choices[wish].by_default:
            for name in wishes:
                reason = f"shares its weight with {kept}: {choices[kept].decision.reason}"
                choices[name].decision = Kept(name, choices[name].nbytes, reason)
            continue
        chosen = choices[wish].decision
        for name in members:
            choices[name].decision = replace(chosen, name=name)
        packed.update(dict.fromkeys(names, source))
    return packed


def _replay_plan(model: nn.Module, config: LowBitConfig) -> Plan:
    """The plan that a packed repo's ``layers`` describe, for this model class."""
    plan = Plan(replayed=True)
    prefix = getattr(model, "base_model_prefix", "")
    formats = [(_pattern(key), parse_format(spec)) for key, spec in config.layers.items()]
    corrections = [(_pattern(key), parse_low_rank(spec)) for key, spec in (config.low_rank or {}).items()]
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        found = next((f for p, f in formats if any(p.fullmatch(n) for n in names(name, prefix))), None)
        if isinstance(found, NestedFormat):
            found = found.at(min(found.bits, config.load_bits or found.bits))
        if found is None:
            plan.kept.append(
                Kept(name, module.weight.numel() * module.weight.element_size(), "kept when it was packed")
            )
        else:
            shape = tuple(module.weight.shape) if kind != "conv1d" else tuple(reversed(module.weight.shape))
            _, options = _matching_rule(config, name, prefix)
            low_rank = next((f for p, f in corrections if any(p.fullmatch(n) for n in names(name, prefix))), None)
            plan.packed[name] = Packed(name, found, config.resolve(options)[1], shape, low_rank)
    for name, source in _tied_weights(model).items():
        name, source = name.removesuffix(".weight"), source.removesuffix(".weight")
        if name in plan.packed and source in plan.packed:
            plan.tied[name] = source
        plan.kept = [k for k in plan.kept if k.name != name]
    _keep_the_rest(model, plan, {**plan.packed, **{k.name: k for k in plan.kept}})
    return plan


def _keep_the_rest(model, plan, decisions):
    """Adds every other parameter to the kept ones: fused experts by name, the small ones as one entry."""
    seen, small = {id(p) for n in decisions for p in [model.get_submodule(n).weight]}, 0
    tied = _tied_weights(model)  # on the meta device, tied parameters are still two
    for name, parameter in model.named_parameters():
        if id(parameter) in seen or name in tied:
            continue
        nbytes = parameter.numel() * parameter.element_size()
        if parameter.ndim == 3 and "expert" in name:
            plan.kept.append(Kept(name, nbytes, "fused experts are not packed yet", expected=False))
        elif parameter.ndim >= 2 and nbytes >= 2**16:
            plan.kept.append(Kept(name, nbytes, "not a linear layer"))
        else:
            small += nbytes
    if small:
        plan.kept.append(Kept("norms, biases and other small parameters", small, "small"))


def _kind(module: nn.Module) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def names(name: str, prefix: str) -> tuple[str, ...]:
    """A module's name as it is, with and without the base model's prefix."""
    return (name, name.removeprefix(prefix + "."), f"{prefix}.{name}") if prefix else (name,)


def _matching_rule(config: LowBitConfig, name: str, prefix: str):
    for pattern, options in config.rules.items():
        if any(re.fullmatch(pattern, n) for n in names(name, prefix)):
            return pattern, options
    return None, None


def _tied_weights(model) -> dict[str, str]:
    """``{target: source}`` of tied weights, by full parameter name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _default_skips(model, config: LowBitConfig) -> dict[str, str]:
    """Module names that stay in float unless a rule asks for them, with the reason."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = {}
    for patterns in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        for word in getattr(model, patterns, None) or ():
            for name, _ in model.named_modules():
                if re.search(rf"(^|\.){word}(\.|$)", name):
                    skipped[name] = "the model keeps it in float32"
    if config.modules_to_not_convert is not None:
        wanted, reason = config.modules_to_not_convert, "modules_to_not_convert"
    else:
        heads = set(get_keys_to_not_convert(model)) if hasattr(model, "get_output_embeddings") else set()
        wanted, reason = (
            [re.escape(head) for head in heads - ends_of(model)],
            "output head or tied weight; pack it by a rule",
        )
    for name, _ in model.named_modules():
        if name and not should_convert_module(name, wanted):
            skipped.setdefault(name, reason)
    return skipped


def ends_of(model) -> set[str]:
    """Names of the input embedding, of the output head, and of what shares its weight with one of them."""
    ends = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.add(id(getattr(model, getter)()))
        except (AttributeError, NotImplementedError):  # a model without one
            continue
    names = {name for name, module in model.named_modules() if id(module) in ends}
    ties = [{k.removesuffix(".weight") for k in tie} for tie in _tied_weights(model).items()]
    for _ in ties:  # a tie may join others
        names.update(*(tie for tie in ties if tie & names))
    return names


def _obstacle(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why ``module`` cannot be packed at all, or None."""
    kind = _kind(module)
    if kind == "embedding":
        own = type(module).forward is not nn.Embedding.forward
        if own and "super().forward" not in _source(type(module).forward):
            return f"{type(module).__name__} looks its rows up in its own way"
        if module.max_norm is not None or module.sparse:
            return "the embedding renormalises rows or has sparse gradients"
        return None
    if kind == "linear" and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    parts = name.split(".")
    for depth in range(len(parts)):
        owner = model.get_submodule(".".join(parts[:depth]))
        if isinstance(owner, nn.MultiheadAttention) or _reads_weight(type(owner), tuple(parts[depth:])):
            return f"{type(owner).__name__} reads its weight directly"
    return None


@functools.cache
def _source(thing) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


@functools.cache
def _reads_weight(owner: type, path: tuple[str, ...]) -> bool:
    """Whether the class of a module uses ``self.<path>.weight``, which is packed codes then."""
    # A check that spares integer weights, as T5's, is harmless only for int8: count every use.
    steps = "".join(r"\[[^\]]*\]" if part.isdigit() else rf"\.{re.escape(part)}" for part in path)
    pattern = re.compile(rf"self{steps}\.weight\b")
    own = (c for c in owner.__mro__ if not c.__module__.startswith(("torch.", "builtins", "transformers.modeling_")))
    return any(pattern.search(_source(c)) for c in own)


def _pattern(key: str) -> re.Pattern:
    """A key of ``layers`` or ``low_rank``, where ``*`` stands for digits, as an expression."""
    return re.compile(r"\d+".join(map(re.escape, key.split("*"))))


def _wildcard(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _compress(specs: dict[str, str], others: list[str]) -> dict[str, str]:
    """Replaces numbers in the keys of ``specs`` by ``*`` where that stays true of ``specs`` and ``others``."""
    groups: dict[str, dict[str, str]] = {}
    for name, spec in specs.items():
        groups.setdefault(_wildcard(name), {})[name] = spec
    mixed = {_wildcard(name) for name in others}
    result = {}
    for pattern, members in groups.items():
        if len(set(members.values())) == 1 and pattern not in mixed:
            result[pattern] = next(iter(members.values()))
        else:
            result.update(members)
    return result
