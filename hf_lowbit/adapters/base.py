"""Which packed base an adapter belongs to: a file beside it, written when it is saved and compared when it is loaded.

PEFT records the name of the base only, and the same name can be packed in many ways. ``lowbit_adapter.json`` holds, for
every packed layer that the adapter changes, a digest of the beginning of its packed weight: cheap enough to make at
every load. An adapter without that file, or one made on a float base, is loaded without a word.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from transformers.utils import logging

from ..storage.content import read_places

FILE, KEY = "lowbit_adapter.json", "layers"
DIGEST_BYTES = 4096
logger = logging.get_logger("transformers.hf_lowbit")


def digest(data: bytes) -> str:
    """Of the beginning of a packed tensor, row by row, as it is stored: 16 hexadecimal digits."""
    return hashlib.sha256(data[:DIGEST_BYTES]).hexdigest()[:16]


def folder_digests(folder: str | os.PathLike) -> dict[str, str]:
    """Digests of all packed weights in the repo ``folder``, by module name."""
    digests = {}
    for name, place in read_places(folder).items():
        if name.endswith(".weight") and place.dtype == "I16":
            with open(place.file, "rb") as handle:
                handle.seek(place.begin)
                data = handle.read(min(DIGEST_BYTES, place.end - place.begin))
            digests[name.removesuffix(".weight")] = digest(data)
    return digests


def note_layer(config, name: str, weight: torch.Tensor) -> None:
    """Notes in ``config``, a ``LoraConfig``, that its adapter changes the packed layer ``name``, and compares.

    Args:
        config: What it learns is kept in attributes of its own, which PEFT does not save.
        name: The layer's name in the base model.
        weight: Its packed tensor (N, lanes), int16.
    """
    rows = -(-DIGEST_BYTES // 2 // weight.shape[1])
    found = digest(weight[:rows].detach().cpu().contiguous().numpy().tobytes())
    config.__dict__.setdefault("lowbit_layers", {})[name] = found
    origin = config.__dict__.get("lowbit_origin")
    if origin is None:
        return
    if "lowbit_expected" not in config.__dict__:
        config.lowbit_expected = _read(*origin)
    expected = (config.lowbit_expected or {}).get(name, found)
    if expected != found:
        config.lowbit_expected = None  # said once
        logger.warning(
            f"the adapter in {origin[0]} belongs to another base: the packed weight of {name} is not the one that it "
            f"was trained beside, and its results will differ. It names {config.base_model_name_or_path!r} as its base"
        )


def write_layers(config, folder: str | os.PathLike) -> None:
    """Writes what :func:`note_layer` noted beside the adapter in ``folder``; nothing for an adapter of a float base."""
    layers = config.__dict__.get("lowbit_layers")
    if layers:
        partial = Path(folder) / (FILE + ".partial")
        partial.write_text(json.dumps({KEY: layers}, indent=1), encoding="utf-8")
        partial.replace(Path(folder) / FILE)


def _read(path: str, subfolder: str | None, options: dict) -> dict[str, str] | None:
    """What the file of the adapter at ``path``, a folder or a repo, holds; None where there is none."""
    file = Path(path, subfolder or "", FILE)
    try:
        if not Path(path).is_dir():
            file = Path(hf_hub_download(str(path), FILE, subfolder=subfolder, **options))
        layers = json.loads(file.read_text(encoding="utf-8")).get(KEY)
    except (OSError, EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
    except (ValueError, AttributeError) as error:
        logger.warning(f"{file} cannot be read ({error}): whether the adapter belongs to this base is not known")
        return None
    return layers if isinstance(layers, dict) else None
