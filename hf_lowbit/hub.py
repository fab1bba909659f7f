"""Publishing a packed model with its card.

``push_to_hub`` publishes weights, config, tokenizer and card in one commit, so that nobody can download a half of it.
It uses ``HfApi.create_commit``: ``HfApi.upload_folder`` may cut an upload into several commits, and transformers' own
``push_to_hub`` overwrites the card. A folder is uploaded from disk, so a model need not fit into memory. Weight files
of an earlier push that this one does not replace are deleted in the same commit, because transformers prefers a stale
``model.safetensors`` to an index.

Left out: models whose class is not part of transformers, since no code of a repo is run to find their layers.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import PLACEHOLDER, card_in, check_repo, check_repo_id, make_model_card, write_model_card
from .config import QUANT_METHOD
from .storage.content import content_hash
from .version import __version__

__all__ = ["content_hash", "push_to_hub", "write_model_card"]

_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_HINTS = {
    401: "log in with `hf auth login`, or pass a token that may write to this repo",
    403: "the token may not write to this repo: use one with write permission, or another namespace",
}


def push_to_hub(
    folder_or_model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    evaluation: Any = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Publishes a packed model with its card in one commit. The repo is created if it does not exist.

    Args:
        folder_or_model: The folder of a complete packed repo, which is not changed, or a packed model, which is saved
            to a temporary folder first.
        repo_id: "name/model", or "model" in the token's own namespace.
        tokenizer: A tokenizer or processor to publish with it; a folder usually has one already.
        base_model: See :func:`write_model_card`. For a model that was quantized while it was loaded, by default what
            it was loaded from.
        evaluation: See :func:`write_model_card`.
        private: Whether a repo that is created is private; by default as the namespace is set up.
        token: A token with write permission; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        commit_message: By default "Upload a model packed by hf_lowbit".

    A card that :func:`write_model_card` wrote into the folder for just these weights is published as it is, with
    whatever was added to it since, unless ``base_model`` or ``evaluation`` is given.

    Raises:
        ValueError: for a repo id that cannot be one, or what is not a complete packed model; nothing is sent then.
        HfHubHTTPError: if the Hub refuses or fails, with what to do about it. Either all of it is published or nothing.
    """
    check_repo_id(repo_id, "repo_id")
    with tempfile.TemporaryDirectory(prefix="hf_lowbit_") as temporary:
        if isinstance(folder_or_model, (str, os.PathLike)):
            folder = Path(folder_or_model)
        else:
            folder, base_model = Path(temporary, "model"), base_model or _loaded_from(folder_or_model)
            folder_or_model.save_pretrained(folder)
        card = _card_of_these_weights(folder) if base_model is None and evaluation is None else None
        card = card or make_model_card(folder, base_model=base_model, evaluation=evaluation, token=token)
        uploads = _files(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(temporary, "tokenizer"))
            uploads.update(_files(Path(temporary, "tokenizer")))
        message = commit_message or "Upload a model packed by hf_lowbit"
        return _commit(repo_id, uploads, card, private, token, message)


def _commit(repo_id: str, uploads: dict[str, Path], card: ModelCard, private, token, message: str) -> CommitInfo:
    """Creates the repo and commits ``uploads``, files by their path in the repo, and ``card`` at once."""
    api = HfApi(token=token, library_name="hf_lowbit", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        stale = [f for f in api.list_repo_files(repo_id) if _WEIGHT_FILE.fullmatch(f) and f not in uploads]
        readme = str(card).replace(PLACEHOLDER, repo_id).encode()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path) for path in stale),
            *(CommitOperationAdd(path, file) for path, file in uploads.items() if path != "README.md"),
            CommitOperationAdd("README.md", readme),
        ]
        return api.create_commit(repo_id, operations, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = _HINTS.get(status, "try again later, or see what the server says above")
        error.append_to_message(f"\nNothing was published to {repo_id} (HTTP {status}): {hint}.")
        raise


def _files(folder: Path) -> dict[str, Path]:
    """Files to publish by their path in the repo: all but hidden ones and an unfinished card."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.parts) and path.suffix != ".unfinished"
    }


def _loaded_from(model) -> str | None:
    """What a model that was quantized on the fly was loaded from, where that is a folder or an id.

    Raises:
        ValueError: if the model is not packed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) != QUANT_METHOD:
        raise ValueError(
            f"this {type(model).__name__} is not packed by hf_lowbit: load it with "
            "quantization_config=LowBitConfig(...) first"
        )
    source = getattr(model, "name_or_path", "")
    if not source or quantizer is None or quantizer.pre_quantized:
        return None
    try:
        if not os.path.isdir(source):
            validate_repo_id(source)
    except HFValidationError:
        return None  # a folder that is gone
    return source


def _card_of_these_weights(folder: Path) -> ModelCard | None:
    card = card_in(folder)
    if card is None or PLACEHOLDER not in card.text:
        return None
    check_repo(folder)
    return card if content_hash(folder) in card.text else None
