"""Quantizing a whole model with calibration: :func:`quantize` from disk to disk, and what ``from_pretrained`` uses.

Both run the same pipeline (:mod:`hf_lowbit.calibration`) over the checkpoint's files, a block at a time; the model is
never in memory as a whole. ``from_pretrained(..., quantization_config=LowBitConfig(method="gptq", calibration=...))``
runs it before the weights are read, in a folder of the cache that the source, the settings and the text name, and then
takes the packed layers from there instead of quantizing what is read. That folder stays: loading the same model in the
same way again costs no second calibration, and a run that was stopped goes on. ``HF_LOWBIT_CACHE`` says where it is.

Packed layers outside the blocks that calibration runs through (an adapter between towers, say) get no inputs. They are
planned without calibration instead, as a rule in the config that is saved says.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import logging

from .calibration import Calibration, Run, calibrate, planned_hook
from .calibration.blocks import Blocks
from .calibration.folding import Fold, plan_folds
from .calibration.processes import Processes
from .calibration.residual import plan_rotation
from .config import LowBitConfig
from .convert import check_destination, check_source, fetch, open_source, quantize_folder
from .formats.rotated import FOLDED
from .methods import BEST
from .plan import Plan, _compress, _matching_rule, _pattern, _wildcard, make_plan, names
from .skeleton import model_class
from .storage.content import content_hash
from .storage.shards import TEMPORARY

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class QuantizedRepo:
    """A packed repo that was just written.

    Attributes:
        folder: Where it is.
        coverage: Totals of what was packed and kept, as :meth:`hf_lowbit.plan.Plan.coverage`.
        tokens: For each calibrated layer, how many tokens of the calibration it saw; empty without calibration.
    """

    folder: Path
    coverage: dict[str, Any]
    tokens: dict[str, int]

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """The packed model, of the class that its config names; ``kwargs`` go to its ``from_pretrained``."""
        return model_class(AutoConfig.from_pretrained(self.folder)).from_pretrained(self.folder, **kwargs)


def quantize(
    model_or_path: str | os.PathLike | PreTrainedModel,
    config: LowBitConfig,
    *,
    output: str | os.PathLike,
    calibration: Any = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    batch_size: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    max_activation_bytes: int | None = None,
) -> QuantizedRepo:
    """Quantizes a model into the folder ``output``, with calibration where the config's methods need it.

    A call that was interrupted goes on when it is made again with the same arguments, and ends with the same bits.

    Args:
        model_or_path: A folder with a float model in safetensors, the id of such a repo, or a loaded float model (which
            is saved beside ``output`` while this runs, and is not changed).
        config: What to pack, and how.
        output: Folder for the packed repo; must not exist, or be empty.
        calibration: A :class:`~hf_lowbit.calibration.Calibration`, or what it takes as source: texts, token ids, a
            file, the name of a data set. By default the config's own.
        tokenizer: For calibration text; by default the model's own.
        dtype, max_shard_size: As in :func:`hf_lowbit.convert.quantize_folder`.
        batch_size: Calibration windows that run together.
        seed: For all random choices of methods; the calibration has its own.
        device: Where to compute.
        max_activation_bytes: Above this, the activations between two blocks lie in a file beside ``output`` instead of
            in memory. By default they stay in memory.

    Returns:
        Where it is and what it is made of.

    Raises:
        ValueError: for calibration that is missing, not needed, empty or too short, a layer that never saw a token of
            it, or a model that cannot be packed.
        OSError: for an output that is not empty, not writable or full.
    """
    output, config = Path(output).absolute(), copy.deepcopy(config)
    work, saved = (output.with_name(output.name + end) for end in (".calibration", ".source"))
    processes = Processes.current()
    processes.first(lambda: check_destination(output))
    if calibration is not None:
        config.calibration = Calibration.of(calibration)
    config.check_calibration()
    if isinstance(model_or_path, (str, os.PathLike)):
        folder, settings = processes.each(lambda: fetch(str(model_or_path))), {}
    else:
        folder = processes.first(lambda: save_model(model_or_path, saved))
        settings = {"model": content_hash(folder)}
    if config.seeks_allocation:
        from .allocation.budget import settle

        given = tokenizer if tokenizer is not None else find_tokenizer(model_or_path)
        config = processes.each(lambda: settle(folder, config, dtype, given))
    run = None
    if config.needs_calibration:
        check_source(folder)
        tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model_or_path)
        run = solve(
            folder, config, dtype, work, tokenizer, settings,
            batch_size=batch_size, seed=seed, device=device, max_activation_bytes=max_activation_bytes,
        )  # fmt: skip
    tokens = {} if run is None else run.tokens()

    def write():
        coverage = quantize_folder(
            folder, output, config, max_shard_size=max_shard_size, dtype=dtype, solved=run,
            progress=logging.is_progress_bar_enabled(),
        )  # fmt: skip
        for place in (work, saved):
            shutil.rmtree(place, ignore_errors=True)
        return coverage

    return QuantizedRepo(output, processes.first(write), tokens)


def solve(
    folder: Path,
    config: LowBitConfig,
    dtype: torch.dtype | str | None,
    work: Path | None,
    tokenizer: Any,
    settings: dict,
    **options: Any,
) -> Run:
    """Runs the calibration of ``config`` over the float model in ``folder``.

    Afterwards the config holds the record of the calibration in the place of its source, and the rules for what could
    not be calibrated.

    Args:
        folder: The model.
        config: The config, which is changed.
        dtype: As in :func:`hf_lowbit.convert.open_source`.
        work: The folder of the run, or None for one in the cache.
        tokenizer: For calibration text.
        settings: Further ones that the result depends on.
        options: Of :func:`hf_lowbit.calibration.calibrate`.
    """
    assert isinstance(config.calibration, Calibration)
    config.folded = None
    source = open_source(folder, config, dtype)
    samples = config.calibration.samples(source.model, tokenizer)
    samples.check(source.model)
    blocks = Blocks(source, samples)
    reached = {f"{block}.{name}" for block, layers in zip(blocks.names, blocks.layers, strict=True) for name in layers}
    rules = uncalibrated(source.model, source.plan, reached, config)
    if rules:
        logger.warning("calibration does not reach %s: quantized without it", ", ".join(rules))
        config.rules = {**as_rules(rules), **config.rules}
        source = open_source(folder, config, dtype)
        blocks.use(source)
    if config.transform == FOLDED:
        blocks.residual = plan_rotation(blocks)
        into = blocks.residual.folded()
    else:
        blocks.folds = plan_folds(blocks)
        into = folded(blocks.folds)
    into = {name: where for name, where in into.items() if name in source.plan.packed}
    config.folded = _compress(into, [name for name in source.plan.packed if name not in into]) or None
    if config.folded:
        source = open_source(folder, config, dtype)
        blocks.use(source)
    hook, place = planned_hook(source.plan), work or cache_folder()
    run = calibrate(source, place, hook, samples, settings, blocks=blocks, shared=work is None, **options)
    config.calibration = config.calibration.record(samples)
    few = {name: count for name, count in run.tokens().items() if count < run.planned[name].shape[1]}
    if few:
        name = max(few, key=lambda name: run.planned[name].shape[1] / few[name])
        logger.warning(
            "%d layers saw fewer tokens of the calibration than they have inputs, such as %s: %d tokens, %d inputs. "
            "Give more text",
            len(few), name, few[name], run.planned[name].shape[1],
        )  # fmt: skip
    return run


def solve_checkpoint(
    model: PreTrainedModel, files: list[str] | None, device_map: Any, config: LowBitConfig
) -> tuple[Callable[[str], dict[str, torch.Tensor] | None], dict[str, torch.Tensor]]:
    """What ``from_pretrained`` runs: the calibration of the checkpoint that it is about to load.

    Args:
        model: The model to load, on ``meta``, before anything in it is replaced.
        files: Its checkpoint.
        device_map: As given to ``from_pretrained``; calibration computes on its one device, or on the first GPU.
        config: The quantizer's config. Afterwards it holds the record of the calibration in the place of its source,
            and rules for the layers of ``model`` that were not reached.

    Returns:
        A function from the name of a module of ``model`` to its packed tensors, or None for one that was not solved,
        and the new values of parameters that are not packed, by the model's names.
    """
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise ValueError(
            f"method {config.method!r} reads the float model from safetensors files, and there are none: save it "
            "by save_pretrained, and load that folder"
        )
    folder, place = Path(files[0]).parent, model.config._name_or_path or Path(files[0]).parent
    own = copy.deepcopy(config)
    # The caller is building a model: on the meta device, in the dtype of its weights.
    with torch.device("cpu"), local_torch_dtype(torch.float32, "the calibration"):
        run = solve(folder, own, model.config.dtype, None, find_tokenizer(place), {}, device=_device(device_map))
    config.calibration, config.folded = own.calibration, own.folded
    prefix = getattr(model, "base_model_prefix", "")

    def solved(name: str) -> dict[str, torch.Tensor] | None:
        return next((found for n in names(name, prefix) if (found := run(n)) is not None), None)

    plan = make_plan(model, config)
    reached = {name for name in plan.packed if any(n in run.planned for n in names(name, prefix))}
    config.rules = {**as_rules(uncalibrated(model, plan, reached, config)), **config.rules}
    known = dict(model.named_parameters())
    tuned = {next(n for n in names(name, prefix) if n in known): value for name, value in run.parameters.items()}
    return solved, tuned


def _device(device_map: Any) -> torch.device:
    """Where to calibrate a model that goes to ``device_map``."""
    places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    for place in places:
        if isinstance(place, int) or (place is not None and str(place).split(":")[0] in ("cuda", "xpu", "mps")):
            return torch.device(place)
    return torch.device("cuda" if torch.cuda.is_available() and "auto" in places else "cpu")


def uncalibrated(
    model: PreTrainedModel, plan: Plan, reached: set[str], config: LowBitConfig
) -> dict[str, dict[str, Any]]:
    """What a rule has to say of those in the ``plan`` of ``model`` that calibration has not ``reached``, by their names
    with ``*`` for numbers.
    """
    prefix, options = getattr(model, "base_model_prefix", ""), {}
    for name, planned in plan.packed.items():
        if name not in reached and planned.looks_at_inputs:
            rule = dict(_matching_rule(config, name, prefix)[1] or {})
            if planned.low_rank is not None:
                rule["compensation"] = "none"
                rule.pop("compensation_rank", None)
            if planned.method is not None and planned.method.needs_calibration:
                rule |= {"method": BEST[planned.format.multiplied.name], "method_options": {}}
                rule |= {"preprocess": "none"} if planned.method.preprocess else {}
            options[name] = json.dumps(rule)
    found = _compress(options, [name for name in plan.packed if name not in options])
    return {key: json.loads(rule) for key, rule in found.items()}


def folded(folds: dict[str, list[Fold]]) -> dict[str, str]:
    """For every layer of ``folds``, by its full name, what its factors go into, with ``*`` for numbers."""
    return {f"{b}.{n}": _wildcard(f"{b}.{fold.into}") for b, own in folds.items() for fold in own for n in fold.layers}


def as_rules(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same with patterns for names."""
    return {_pattern(key).pattern: rule for key, rule in found.items()}


def cache_folder() -> Path:
    """Where ``from_pretrained`` keeps the runs of calibrations."""
    return Path(os.environ.get("HF_LOWBIT_CACHE") or Path(constants.HF_HOME, "hf_lowbit")) / "calibration"


def find_tokenizer(model_or_path) -> Any:
    """The tokenizer that belongs to the model, or None where it has none."""
    place = model_or_path if isinstance(model_or_path, (str, os.PathLike)) else model_or_path.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        logger.info("no tokenizer in %s: %s", place, error)
        return None


def save_model(model: Any, folder: Path) -> Path:
    """Saves a loaded float model to ``folder``, so that it can be read a block at a time.

    Raises:
        ValueError: for anything but a plain transformers model.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"a {type(model).__name__} cannot be packed: give a folder, a repo id or a plain transformers model; merge "
            "an adapter into its model first"
        )
    partial = folder.with_name(folder.name + TEMPORARY)
    for place in (partial, folder):
        shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(partial)
    for file in partial.iterdir():
        os.utime(file, (0, 0))  # a run that goes on knows the same weights by their hash, not by when they were saved
    os.rename(partial, folder)
    return folder
