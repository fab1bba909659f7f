"""The model card of a packed repo, made from what lies in its folder.

Everything in it is computed: from the config, the headers of the files, their bytes. What is not known (the base model,
its license, the quality) is said to be unknown; nothing is filled in. The template is ``model_cards/template.md``,
which the wheel carries as ``hf_lowbit/model_cards/template.md``.
"""

import json
import math
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .config import LowBitConfig
from .inspection import inspect_repo
from .methods import method_options
from .plan import _wildcard, make_plan
from .skeleton import NoSkeleton, build_skeleton, checkpoint_files, read_config
from .storage.content import content_hash, read_places
from .storage.headers import check_checkpoint
from .swap import replace_modules
from .version import __version__

logger = logging.get_logger(__name__)

PLACEHOLDER = "REPO_ID_OR_FOLDER"
"""Stands in a card for where the repo lies, until it is pushed."""


def write_model_card(folder: str | os.PathLike, *, base_model: str | None = None, evaluation: Any = None) -> ModelCard:
    """Writes ``README.md`` into the folder of a packed repo, in the place of the one that is there.

    Args:
        folder: A complete packed repo.
        base_model: Hub id of the model that was packed, or the folder that it lies in; only an id is published.
            By default the one that an earlier card of the same folder names, if there is one.
        evaluation: What was measured: an :class:`hf_lowbit.evaluate.Evaluation` or its dict, to which a "text" (the
            name of the text it was measured on) may be added. By default the card says that nothing was measured.

    Returns:
        The card, in which ``REPO_ID_OR_FOLDER`` stands for where the repo lies.

    Raises:
        ValueError: for a folder that is not a complete packed repo, a ``base_model`` that is neither a folder nor an
            id, or an evaluation that is not one.
    """
    card = make_model_card(folder, base_model=base_model, evaluation=evaluation)
    unfinished = Path(folder, "README.md.unfinished")
    card.save(unfinished)
    os.replace(unfinished, Path(folder, "README.md"))
    return card


def make_model_card(
    folder: str | os.PathLike, *, base_model: str | None = None, evaluation: Any = None, token: str | None = None
) -> ModelCard:
    """The card that :func:`write_model_card` writes; ``token`` is used to read the base model's card."""
    report, sizes = check_repo(folder)
    earlier, raw = card_in(folder), read_config(Path(folder))
    measured = None if evaluation is None else _measured(evaluation)
    base_card = None
    if base_model is None and earlier is not None and earlier.data.get("base_model_relation") == "quantized":
        base_model = earlier.data.get("base_model")
    elif base_model is not None and os.path.isdir(base_model):
        base_card, base_model = card_in(base_model), None
    elif base_model is not None:
        check_repo_id(base_model, "base_model")
        base_card = _card_on_hub(base_model, token)
    licensed = next((c.data for c in (base_card, earlier) if c is not None and c.data.get("license")), None)
    config, architecture = (
        LowBitConfig.from_dict(dict(report["config"])),
        (raw.get("architectures") or ["AutoModel"])[0],
    )
    task, auto_class = _task(architecture)
    bits = sorted({layer["bits"] for layer in report["layers"]} | {config.bits})
    name = base_model.split("/")[-1] if isinstance(base_model, str) else architecture
    title = f"{name} in {config.bits:g} bits"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag=task,
        tags=["lowbit", *(f"{b:g}-bit" for b in bits)],
        **{k: licensed.get(k) for k in ("license", "license_name", "license_link") if licensed and licensed.get(k)},
        **_metadata(measured, task, title),
    )
    settings = {k: v for k, v in report["config"].items() if k not in ("layers", "low_rank", "quant_method", "version")}
    defaults = {name: option.default for name, option in method_options(settings["method"]).items()}
    settings["method_options"] = {**defaults, **settings.get("method_options", {})}
    return ModelCard.from_template(
        data,
        template_str=(files("hf_lowbit.model_cards") / "template.md").read_text(encoding="utf-8"),
        title=title,
        base_model=base_model,
        architecture=architecture,
        auto_class=auto_class,
        placeholder=PLACEHOLDER,
        sizes=sizes,
        method=config.method,
        format=config.format,
        bits=f"{config.bits:g}",
        settings=json.dumps(settings, indent=2),
        layers=_layer_rows(report["layers"]),
        layer_count=len(report["layers"]),
        kept_rows=_kept_rows(report["kept"]),
        evaluation=measured,
        packed_by=config.version,
        saved_by=raw.get("transformers_version") or "of a version that was not recorded",
        versions={"hf_lowbit": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        content_hash=content_hash(folder),
    )


def check_repo(folder: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Checks a packed repo from its config and headers, and counts what it stores and what it takes in memory.

    Returns:
        :func:`hf_lowbit.inspection.inspect_repo`'s result; and for the weights that are packed, kept and all: what,
        number of weights, bytes stored and in memory, and both as bits per weight. Shared tensors count once.

    Raises:
        ValueError: if the folder is not a complete repo packed by this package, naming the file or the tensor.
    """
    folder = Path(folder)
    read_places(folder)
    report = inspect_repo(folder)
    try:
        model = build_skeleton(folder, None, [], {})
    except NoSkeleton as error:
        raise ValueError(f"the layers of {folder} cannot be checked without its model class: {error}") from error
    tied = set(model.all_tied_weights_keys)
    weights = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied)
    plan = make_plan(model, LowBitConfig.from_dict(dict(report["config"])))
    replace_modules(model, plan, "auto")
    check_checkpoint(model, plan, checkpoint_files(folder)[0])
    tied, own = set(model.all_tied_weights_keys), {False: 0, True: 0}
    inside = {f"{name}.{tensor}" for name in plan.packed for tensor in model.get_submodule(name).fixed_names()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            own[name in inside] += parameter.nbytes
    totals = report["totals"]
    packed = _size("packed", totals["packed_weights"], totals["packed_bytes"], own[True])
    kept = _size("kept in float", weights - totals["packed_weights"], totals["kept_bytes"], own[False])
    return report, [packed, kept, _size("all", *(packed[k] + kept[k] for k in ("weights", "stored", "memory")))]


def _size(what: str, weights: int, stored: int, memory: int) -> dict[str, Any]:
    per_weight = 8 / weights if weights else 0.0
    return {
        "what": what,
        "weights": weights,
        "stored": stored,
        "stored_bits": stored * per_weight,
        "memory": memory,
        "memory_bits": memory * per_weight,
    }


def _layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The packed modules, layer numbers replaced by ``*``, one row for each format."""
    rows: dict[tuple[str, str], list] = {}
    for layer in layers:
        rows.setdefault((_wildcard(layer["name"]), layer["format"]), []).append(layer)
    return [
        {
            "pattern": pattern,
            "count": len(members),
            "format": spec,
            "bits": 8 * sum(m["bytes"] for m in members) / sum(math.prod(m["shape"]) for m in members),
        }
        for (pattern, spec), members in rows.items()
    ]


def _kept_rows(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], int] = {}
    for entry in kept:
        key = (_wildcard(entry["name"]), entry["reason"])
        rows[key] = rows.get(key, 0) + entry["bytes"]
    # A reason may quote a rule, and a regular expression may hold the character that ends a cell.
    return [{"pattern": p, "reason": r.replace("|", "\\|"), "bytes": b} for (p, r), b in rows.items()]


def _task(architecture: str) -> tuple[str | None, str]:
    """The Hub's name for what a model class does, where transformers has one, and the class to load it with."""
    from transformers.modelcard import TASK_MAPPING
    from transformers.models.auto import modeling_auto

    tasks: dict[str, Any] = TASK_MAPPING
    task = next((task for task, classes in tasks.items() if architecture in classes.values()), None)
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModelFor") and mapping is not None and architecture in mapping._model_mapping.values():
            return task, name
    return task, architecture


def _measured(evaluation: Any) -> dict[str, Any]:
    """What the template says about an evaluation."""
    values = evaluation if isinstance(evaluation, dict) else evaluation.to_dict()
    missing = [key for key in ("perplexity", "perplexity_se", "tokens", "windows") if values.get(key) is None]
    if missing:
        raise ValueError(f"the evaluation has no {missing[0]!r}: pass what hf_lowbit.evaluate.evaluate returns")
    rows = [
        {"name": name, "type": key, "value": values[key], "text": _with_error(values[key], values.get(f"{key}_se"))}
        for key, name in (
            ("perplexity", "perplexity"),
            ("kl", "KL divergence from the unquantized model, nats per token"),
            ("top1", "share of tokens where both models' first choice is the same"),
        )
        if values.get(key) is not None
    ]
    length = values["tokens"] // values["windows"] + 1  # the last token of a window predicts nothing that counts
    return {"rows": rows, "length": length, **{k: values.get(k) for k in ("tokens", "windows", "text")}}


def _with_error(value: float, error: float | None) -> str:
    known = error is not None and math.isfinite(error)
    return f"{value:.4g} ± {error:.2g}" if known else f"{value:.4g}"


def _metadata(measured: dict[str, Any] | None, task: str | None, title: str) -> dict[str, Any]:
    """The evaluation for the card's metadata; a model that gives no finite perplexity has none there."""
    if measured is None or not math.isfinite(measured["rows"][0]["value"]):
        return {}
    text = measured["text"] or "a text whose name was not recorded"
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type="text",
            dataset_name=text,
            dataset_args={"windows": measured["windows"], "window_length": measured["length"]},
            metric_type=row["type"],
            metric_name=row["name"],
            metric_value=row["value"],
        )
        for row in measured["rows"]
    ]
    return {"model_name": title, "eval_results": results}


def card_in(folder: str | os.PathLike) -> ModelCard | None:
    """The card that lies in ``folder``, if there is one."""
    file = Path(folder, "README.md")
    return ModelCard.load(file, ignore_metadata_errors=True) if file.is_file() else None


def _card_on_hub(repo_id: str, token: str | None) -> ModelCard | None:
    try:
        return ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except (HfHubHTTPError, OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("the card of %s cannot be read, so its license is not in the new one: %s", repo_id, error)
        return None


def check_repo_id(repo_id: str, argument: str) -> None:
    """Raises a ``ValueError`` that names ``argument`` where ``repo_id`` cannot be the id of a repo."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{argument}={repo_id!r} is not the id of a repo, such as 'name/model': {error}") from None
