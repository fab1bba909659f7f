"""A model's skeleton and the names of its tensors, from a folder, without its weights.

Packing from disk to disk and inspection both need what ``from_pretrained`` knows before it reads a weight: the model
class, the dtype, every module (on the ``meta`` device), and how the names in a checkpoint become names of parameters.
All of it comes from transformers, so that a packed folder is what loading would have made. Code in a repo is never run.
"""

import json
import os
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.modeling_utils import _get_dtype
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.generic import ContextManagers


class NoSkeleton(ValueError):
    """The installed transformers has no class for a model, or only code in the repo has."""


def read_config(folder: Path) -> dict:
    """The raw ``config.json`` of ``folder``.

    Raises:
        ValueError: if there is none or it is not JSON.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is not the folder of a transformers model")
    return read_json(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it is truncated or damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: it is damaged")
    return content


def checkpoint_files(folder: Path) -> tuple[list[str], dict | None]:
    """The safetensors files of a model, and the metadata of its index if it is sharded.

    Raises:
        ValueError: if there are none, or the index names one that is not there.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        if (folder / SAFE_WEIGHTS_NAME).is_file():
            return [str(folder / SAFE_WEIGHTS_NAME)], None
        others = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5")
        )
        found = f" (there is {', '.join(others[:3])}, which is not read: pickles can run code)" if others else ""
        if any(name.endswith(".gguf") for name in others):
            found = f" (GGUF files such as {others[0]} are quantized already: take the original model)"
        raise ValueError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}{found}; save it as safetensors "
            "with save_pretrained() first"
        )
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index} has no 'weight_map' of tensors to files: it is damaged")
    files = sorted(set(names.values()))
    for name in files:
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, which is not a safetensors file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: {index.name} lists it. Download the repo again")
    return [str(folder / name) for name in files], content.get("metadata") or {}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that ``config.architectures`` names, or the base model of its type.

    Raises:
        NoSkeleton: if the installed transformers has neither.
    """
    name = (config.architectures or [""])[0]
    cls = getattr(transformers, name, None) if name else None
    if cls is None and type(config) in MODEL_MAPPING:
        cls = MODEL_MAPPING[type(config)]
        cls = cls[0] if isinstance(cls, (list, tuple)) else cls
    if cls is None:
        raise NoSkeleton(
            f"transformers {transformers.__version__} has no model class for architectures={config.architectures} of "
            f"type {config.model_type!r}"
        )
    return cls


def build_skeleton(folder: Path, dtype: torch.dtype | str | None, files: list[str], metadata: dict | None):
    """The float model of ``folder`` on the ``meta`` device, in the dtype that ``from_pretrained`` would choose.

    Args:
        folder: Holds ``config.json``; its ``quantization_config``, if any, is left aside.
        dtype: Dtype to load in; None or "auto" for the one in the config, or else of the files.
        files: The checkpoint, read for its dtype if the config has none.
        metadata: Of the checkpoint's index, or None.

    Raises:
        NoSkeleton: for a model that needs code from the repo, or a class that does not exist here.
    """
    raw = read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "auto_map" not in raw:
            raise NoSkeleton(f"{folder}: {error}") from error
        raise NoSkeleton(
            f"{folder} needs code of its own (auto_map in {CONFIG_NAME}), which is not run here: load it with "
            "AutoModel.from_pretrained(..., trust_remote_code=True, quantization_config=...) and save_pretrained()"
        ) from error
    for part in (config, config.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    cls = model_class(config)
    config.__dict__.pop("auto_map", None)  # the class is transformers' own
    config, dtype = _get_dtype(dtype or "auto", files, config, metadata, None, True)
    with ContextManagers(cls.get_init_context(dtype, True, False, None)):
        model = cls(deepcopy(config))
    model.config.architectures = [cls.__name__]
    return model


class KeyMap:
    """How names in a checkpoint become names of parameters, as in transformers' loading.

    Args:
        model: The skeleton, with packed modules in place.
        hf_quantizer: Adds the companions of packed weights to the rules.
    """

    def __init__(self, model: PreTrainedModel, hf_quantizer):
        rules = get_model_conversion_mapping(model, hf_quantizer=hf_quantizer)
        self.renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self.converters = [r for r in rules if isinstance(r, WeightConverter)]
        self.by_pattern = {p: c for c in self.converters for p in c.source_patterns}
        self.prefix, self.known = model.base_model_prefix, model.state_dict()
        self.dtype = model.config.dtype
        self.dtype_plan = model._get_dtype_plan(self.dtype)
        self.dtype_patterns = build_glob_alternation(list(self.dtype_plan)) if self.dtype_plan else None

    def __call__(self, key: str) -> tuple[str, str | None]:
        """The parameter that ``key`` is for, and the pattern of the converter that takes it, or None."""
        target, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.known)
        if target not in self.known and key in self.known:
            target, pattern = rename_source_key(key, [], [], self.prefix, self.known)
        return target, pattern

    def cast(self, target: str, packed: bool) -> torch.dtype:
        """The dtype to which loading casts a checkpoint's tensor for ``target``."""
        found = self.dtype_patterns and self.dtype_patterns[0].search(target)
        if found:
            return self.dtype_plan[self.dtype_patterns[1][found.lastgroup]]
        return self.dtype if packed or target not in self.known else self.known[target].dtype
