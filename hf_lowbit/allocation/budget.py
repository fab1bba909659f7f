"""The search for widths under a budget: candidates, what each costs and harms, and the exact choice among them.

A budget is what all layers that no rule speaks of, embedding and head aside, may take on average, in bits per weight
with everything counted: codes, scales, zero points, padding. Candidates are the config's format at each of
:data:`WIDTHS`. Layers with the same input (:mod:`.groups`) are one unit of one width. What a unit harms at a width is
measured on calibration data (:mod:`.sensitivity`); the widths that do the least harm in sum are then found exactly
(:mod:`.search`).

What was measured is kept in a file that the model, the candidates and the text name, so that another budget costs only
the search, and a run that was stopped goes on.
"""

import copy
import hashlib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import logging

from ..calibration import Calibration
from ..calibration.data import digest
from ..config import LowBitConfig
from ..convert import Source, check_source, fetch, fingerprint, open_source, write_json
from ..methods import BEST
from ..pieces import realize, transposed
from ..plan import _matching_rule, ends_of
from ..version import __version__
from .allocation import Allocation
from .groups import tie
from .search import choose
from .sensitivity import POSITIONS, PROBE, Candidates, Probes, errors, probe

logger = logging.get_logger(__name__)
WIDTHS = tuple(range(2, 9))
WINDOWS = 4  # of the calibration's: each costs as much as all the others


def allocate(
    source: str | os.PathLike,
    config: LowBitConfig,
    *,
    bits: float | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    measured: str | os.PathLike | None = None,
) -> Allocation:
    """Searches a width for each layer of the float model in ``source``.

    Args:
        source: A folder with ``config.json`` and safetensors files, or the id of such a repo.
        config: Format, method and rules; its ``bits`` is the budget if it is no whole number.
        bits: The budget in bits per weight, everything counted.
        calibration: Text to measure on, as in :func:`hf_lowbit.quantization.quantize`; by default the config's. Of its
            windows :data:`WINDOWS` are taken.
        tokenizer: For it; by default the model's own.
        dtype: Dtype into which weights are cast before, as in :func:`hf_lowbit.convert.quantize_folder`.
        measured: The file for what was measured; by default one in the cache (``HF_LOWBIT_CACHE``).

    Raises:
        ValueError: without calibration, for a budget that no choice can meet, a format with one width, or a model
            without layers to choose for.
    """
    budget = config.bits if bits is None else bits
    data = calibration if calibration is not None else config.calibration
    if data is None:
        raise ValueError(
            f"bits={budget} is a budget, for which a search measures what each layer harms: give calibration=, such as "
            "a list of texts, or the file of a plan as bits=. Weights alone choose worse than one width for all"
        )
    folder = fetch(str(source))
    check_source(folder)
    base = copy.deepcopy(config)
    base.bits, base.allocation, base.calibration = 4, None, None  # type: ignore[assignment]
    opened = open_source(folder, base, dtype)
    candidates = _candidates(opened, base)
    units = tie(list(candidates))
    weights = sum(opened.plan.packed[name].shape[0] * opened.plan.packed[name].shape[1] for name in candidates)
    costs = {unit[0]: {b: _bytes(opened, candidates, unit, b) for b in _widths(candidates, unit)} for unit in units}
    allowed = int(budget * weights / 8)
    _check_budget(budget, costs, weights, allowed)
    if opened.model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(opened.model).__name__} takes {opened.model.main_input_name}, not text, and a search for bits runs "
            "on text: use a whole number of bits, or the file of a plan as bits="
        )
    data = Calibration.of(data)
    tokens = data.tokens(tokenizer if tokenizer is not None else _tokenizer(source))
    tokens = tokens[torch.linspace(0, len(tokens) - 1, min(WINDOWS, len(tokens))).round().long()]
    found = _measure(opened, candidates, units, tokens, None if measured is None else Path(measured))
    harm = _harm(found, units, candidates)
    options = [list(costs[unit[0]]) for unit in units]
    taken = choose(
        [[costs[unit[0]][b] for b in widths] for unit, widths in zip(units, options, strict=True)],
        [[harm[unit[0]][b] for b in widths] for unit, widths in zip(units, options, strict=True)],
        allowed,
    )
    chosen = {unit[0]: widths[i] for unit, widths, i in zip(units, options, taken, strict=True)}
    shared = [b for b in WIDTHS if all(b in widths for widths in options)]
    return Allocation(
        layers={name: chosen[unit[0]] for unit in units for name in unit},
        budget=budget,
        bits_per_weight=8 * sum(costs[name][b] for name, b in chosen.items()) / weights,
        calibration=data.record(tokens),
        damage=sum(harm[name][b] for name, b in chosen.items()),
        uniform={
            str(b): [8 * sum(c[b] for c in costs.values()) / weights, sum(h[b] for h in harm.values())] for b in shared
        },
    )


def settle(
    source: str | os.PathLike, config: LowBitConfig, dtype: torch.dtype | str | None = None, tokenizer: Any = None
) -> LowBitConfig:
    """``config``, or where its ``bits`` is a budget a copy with the widths that :func:`allocate` finds."""
    if not config.seeks_allocation:
        return config
    # The caller may be building a model: on the meta device, in the dtype of its weights.
    with torch.device("cpu"), local_torch_dtype(torch.float32, "the search"):
        found = allocate(source, config, dtype=dtype, tokenizer=tokenizer)
    config = copy.deepcopy(config)
    config.allocation = found.layers
    if not config.needs_calibration:
        config.calibration = found.calibration  # the record: nobody looks at the data again
    counts = {b: list(found.layers.values()).count(b) for b in sorted(set(found.layers.values()))}
    widths = ", ".join(f"{count} of {bits} bits" for bits, count in counts.items())
    logger.info("bits=%s: %s, %.3f bits per weight", config.bits, widths, found.bits_per_weight)
    return config


def _candidates(source: Source, config: LowBitConfig) -> Candidates:
    """Format and method of every width for each layer that the budget is for; the method is one that needs no data."""
    prefix, ends = getattr(source.model, "base_model_prefix", ""), ends_of(source.model)
    method = config.resolve()[1]
    fallback: dict[str, Any] = (
        {"method": BEST[config.format], "method_options": {}, "preprocess": None} if method.needs_calibration else {}
    )
    choices = {}
    for bits in WIDTHS:
        try:
            choices[bits] = config.resolve({"bits": bits})[0], config.resolve({"bits": bits, **fallback})[1]
        except ValueError:  # the format has no such width
            continue
    if len(choices) < 2:
        raise ValueError(f"format {config.format!r} has one width: a budget needs 'int', 'nf' or 'codebook'")
    layers = [n for n in source.plan.packed if n not in ends and _matching_rule(config, n, prefix)[0] is None]
    if not layers:
        raise ValueError("every layer has a rule: there is none left that a budget could choose for")
    return {
        name: {
            b: c for b, c in choices.items() if c[0].nbytes(source.plan.packed[name].shape) < _float_bytes(source, name)
        }
        for name in layers
    }


def _float_bytes(source: Source, name: str) -> int:
    rows, columns = source.plan.packed[name].shape
    return 2 * rows * columns


def _widths(candidates: Candidates, unit: list[str]) -> list[int]:
    return [b for b in WIDTHS if all(b in candidates[name] for name in unit)]


def _bytes(source: Source, candidates: Candidates, unit: list[str], bits: int) -> int:
    return sum(candidates[name][bits][0].nbytes(source.plan.packed[name].shape) for name in unit)


def _check_budget(budget: float, costs: dict[str, dict[int, int]], weights: int, allowed: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"the budget {budget!r} is not a number: use bits per weight, such as 2.6")
    least = sum(min(c.values()) for c in costs.values())
    if allowed < least:
        raise ValueError(
            f"bits={budget} is below the least that this format takes, {8 * least / weights + 0.005:.2f} bits per "
            "weight with everything counted: give more, or use larger groups (group_size=)"
        )


# -- what is measured --------------------------------------------------------------------------------------------------


def _measure(source: Source, candidates: Candidates, units, tokens: torch.Tensor, path: Path | None) -> dict[str, dict]:
    """Weight errors by layer and width (as text), and divergences by the first layer of a unit."""
    identity = {
        "source": {Path(f).name: fingerprint(Path(f)) for f in source.files},
        "candidates": {
            name: {bits: [format.spec, type(method).__name__, vars(method)] for bits, (format, method) in by.items()}
            for name, by in candidates.items()
        },
        "dtype": str(source.model.config.dtype),
        "tokens": digest(tokens),
        "probes": [PROBE, POSITIONS],
        "version": __version__,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    path = path or cache_folder() / f"{name[:32]}.json"
    found: dict[str, Any] = {"identity": name, "errors": {}, "divergences": {}}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or kept.get("identity") != name:
            raise ValueError(f"{path} was measured on another model, format or text: remove it, or name another file")
        found = kept

    def keep():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)

    missing = {name for name in candidates if name not in found["errors"]}
    for count, (layer, weight) in enumerate(_weights(source, missing), 1):
        found["errors"][layer] = errors(weight, candidates[layer])
        if count % 32 == 0 or count == len(missing):
            keep()
    probes = Probes(source, tokens, candidates)
    measured = [unit for unit in units if all(name in probes.reached for name in unit)]
    probes.divergences(measured, found["divergences"], keep)
    return found


def _weights(source: Source, wanted: set[str]):
    """Names and float weights (N, K) of layers, one at a time."""
    bar = logging.tqdm(total=len(wanted), desc="Estimating sensitivity", unit="layer")
    for piece in source.pieces:
        names = {name.removesuffix(".weight") for name in piece.made if name.endswith(".weight")} & wanted
        if not names:
            continue
        for name, weight in realize(piece, source.reader.read, source.model).items():
            if name.removesuffix(".weight") in names:
                yield name.removesuffix(".weight"), weight.T if transposed(source.model, name) else weight
                bar.update()
    bar.close()


def _harm(found: dict[str, dict], units: list[list[str]], candidates: Candidates) -> dict[str, dict[int, float]]:
    """What each unit harms at each of its widths, by its first layer; never more at a wider one.

    Errors count by what they turned out to be worth; those of a unit outside the decoder blocks, which was not
    measured, as much as those of the most sensitive unit.
    """
    errors, worth, harm = {}, {}, {}
    for unit in units:
        by = {int(b): sum(found["errors"][name][b] for name in unit) for b in found["errors"][unit[0]]}
        top = max(by)
        errors[unit[0]] = {b: by[b] if b in by else by[top] * 4.0 ** (top - b) for b in _widths(candidates, unit)}
        if unit[0] in found["divergences"]:
            error = errors[unit[0]][probe(candidates[unit[0]])]
            worth[unit[0]] = found["divergences"][unit[0]] / error if error else 0.0
    most = max(worth.values(), default=1.0)
    for name, by in errors.items():
        harm[name] = {b: worth.get(name, most) * error for b, error in by.items()}
        for narrow, wide in pairwise(sorted(by)):
            harm[name][wide] = min(harm[name][wide], harm[name][narrow])
    return harm


def cache_folder() -> Path:
    """Where measurements are kept."""
    return Path(os.environ.get("HF_LOWBIT_CACHE") or Path(constants.HF_HOME, "hf_lowbit")) / "allocation"


def _tokenizer(source) -> Any:
    from ..quantization import find_tokenizer

    return find_tokenizer(str(source))
