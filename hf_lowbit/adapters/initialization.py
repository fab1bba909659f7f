"""Packing a model together with a LoRA adapter that makes up for what packing lost, before any training.

:func:`initialize` writes two folders: a packed repo, and a standard PEFT adapter for it. The adapter starts from

- ``zeros``: the usual LoRA start, A random and B zero, which corrects nothing: the baseline;
- ``loftq``: alternating rounding and SVD of the weights, no data (:mod:`.loftq`);
- ``eora``: the best low-rank correction for the layers' inputs, in closed form (:mod:`.eora`);
- ``apiq-lw``, ``apiq-bw``: the adapter and the grid's ranges trained together on activations, layer by layer or block
  by block (:mod:`.apiq`).

Corrected are the packed linear layers in the decoder blocks. What is packed elsewhere, such as an output head, is
packed by its own method and gets no adapter. The model is never loaded whole: see :mod:`hf_lowbit.calibration`.
"""

import dataclasses
import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Calibration, Hook, Run, calibrate
from ..config import LowBitConfig
from ..convert import Source, check_source, fetch, open_source, quantize_folder, write_json
from ..formats.rotated import FOLDED
from ..quantization import find_tokenizer, save_model
from ..storage.content import content_hash
from ..storage.shards import TEMPORARY, sync_folder
from .base import folder_digests

logger = logging.get_logger(__name__)

METHODS = {
    "zeros": (".zeros", "Zeros"),
    "loftq": (".loftq", "LoftQ"),
    "eora": (".eora", "EoRA"),
    "apiq-lw": (".apiq", "ApiQLayerwise"),
    "apiq-bw": (".apiq", "ApiQBlockwise"),
}
ADAPTER_FOLDER, BASE_FILE, BASE_KEY = "adapter", "lowbit_adapter.json", "lowbit_base_hash"


@dataclass(frozen=True)
class Initialized:
    """Where the packed repo and its adapter are."""

    base: Path
    adapter: Path

    def load(self, **kwargs: Any):
        """The packed model with its adapter, a ``PeftModel``; ``kwargs`` go to ``AutoModelForCausalLM``."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base, **kwargs), self.adapter)


def initialize(
    model_or_path: str | os.PathLike | PreTrainedModel,
    config: LowBitConfig,
    *,
    destination: str | os.PathLike,
    method: str = "eora",
    rank: int = 16,
    calibration: Any = None,
    method_options: dict[str, Any] | None = None,
    adapter: str | os.PathLike | None = None,
    base_id: str | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Initialized:
    """Packs a causal language model and initialises a LoRA adapter for it.

    A call that was interrupted goes on when it is made again with the same arguments.

    Args:
        model_or_path: A folder with a float model in safetensors, the id of such a repo, or a loaded float model (which
            is saved beside ``destination`` while this runs, and is not changed).
        config: What to pack, and how.
        destination: Folder for the packed repo; must not exist, or be empty.
        method: "zeros", "loftq", "eora", "apiq-lw" or "apiq-bw".
        rank: Of the adapter; at most the smallest dimension of a packed layer.
        calibration: A :class:`~hf_lowbit.calibration.Calibration`, or what it takes as source: texts, token ids, a
            file. Methods on weights alone ("zeros", "loftq") do not need it.
        method_options: Options of the method, the fields of its class: ``{"iterations": 1}`` for "loftq".
        adapter: Folder for the adapter, by default ``adapter`` inside ``destination``, so that one upload publishes
            both: ``PeftModel.from_pretrained(base, repo, subfolder="adapter")``.
        base_id: What the adapter's config names as its base; by default ``destination``.
        tokenizer: For calibration text; by default the model's own.
        dtype: As in :func:`hf_lowbit.convert.quantize_folder`.
        batch_size: Calibration windows that run together.
        seed: For all random choices.
        device: Where to compute.

    Returns:
        The two folders. The adapter's ``lowbit_adapter.json`` holds the :func:`~hf_lowbit.hub.content_hash` of the base
        (``lowbit_base_hash``).

    Raises:
        ValueError: for an unknown method or option, a rank that does not fit, calibration that is missing, empty or too
            short, or a model that cannot be packed.
        OSError: for a destination that is not empty or not writable.
    """
    hook = make_hook(method, rank, method_options)
    if hook.activations != "none" and calibration is None:
        raise ValueError(
            f"method {method!r} needs calibration data: give calibration=, such as a list of texts, or use 'loftq'"
        )
    destination = Path(destination).absolute()
    adapter = Path(adapter).absolute() if adapter is not None else destination / ADAPTER_FOLDER
    work, saved = (destination.with_name(destination.name + end) for end in (".calibration", ".source"))
    for folder in (destination, adapter):
        if not work.exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not an empty folder: remove it, or choose another name")
    settings = {"adapter_method": method, "adapter_options": dataclasses.asdict(hook)}  # type: ignore[call-overload]
    if isinstance(model_or_path, (str, os.PathLike)):
        folder = fetch(str(model_or_path))
    else:
        folder = save_model(model_or_path, saved)
        settings["model"] = content_hash(folder)
    check_source(folder)
    if config.transform == FOLDED:
        raise ValueError(f"transform={FOLDED!r} does not go with an adapter's start: use transform='hadamard'")
    source = open_source(folder, config, dtype)
    if source.model.config.is_encoder_decoder:
        raise ValueError(f"{type(source.model).__name__} is an encoder-decoder: adapters are made for causal models")
    if not source.model.can_generate():
        raise ValueError(f"{type(source.model).__name__} is not a causal language model: its adapter would have no use")
    tokens = None
    if hook.activations != "none":
        tokens = Calibration.of(calibration).tokens(
            tokenizer if tokenizer is not None else find_tokenizer(model_or_path)
        )
    run = calibrate(source, work, hook, tokens, settings, batch_size=batch_size, seed=seed, device=device)
    if not destination.exists() or not any(destination.iterdir()):
        progress = logging.is_progress_bar_enabled()
        quantize_folder(folder, destination, config, dtype=dtype, solved=run, progress=progress)
    _write_adapter(adapter, run, source, rank, method, base_id or str(destination), destination)
    for folder in (work, saved):
        shutil.rmtree(folder, ignore_errors=True)
    return Initialized(destination, adapter)


def make_hook(method: str, rank: int, options: dict[str, Any] | None = None) -> Hook:
    """The method by name.

    Raises:
        ValueError: for an unknown method or option, listing those that there are.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}")
    module, name = METHODS[method]
    cls = getattr(importlib.import_module(module, __package__), name)
    known = [f.name for f in dataclasses.fields(cls) if f.name != "rank"]
    for option in options or {}:
        if option not in known:
            raise ValueError(f"method {method!r} has no option {option!r}: it takes {', '.join(known) or 'none'}")
    return cls(rank=rank, **(options or {}))


def _write_adapter(folder: Path, run: Run, source: Source, rank: int, method: str, base: str, packed: Path) -> None:
    """Writes the PEFT adapter of a finished ``run``, beside and renamed."""
    from peft import LoraConfig

    tensors = {}
    for name, solution in run.solutions():
        assert solution.lora_a is not None and solution.lora_b is not None
        tensors[f"base_model.model.{name}.lora_A.weight"] = solution.lora_a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = solution.lora_b.contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(source.model, list(run.planned)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    partial = folder.with_name(folder.name + TEMPORARY)
    for place in (partial, folder):
        shutil.rmtree(place, ignore_errors=True)
    partial.mkdir(parents=True)
    config.save_pretrained(str(partial))
    made_for = {BASE_KEY: content_hash(packed), "method": method, "rank": rank, "layers": folder_digests(packed)}
    write_json(partial / BASE_FILE, made_for)
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in partial.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.rename(partial, folder)
    sync_folder(folder.parent)


def _targets(model: torch.nn.Module, names: list[str]) -> list[str]:
    """What PEFT calls the modules ``names``: their last names where that means just these, otherwise whole names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if meant == set(names) else names
