"""Codes a packed repo, or decodes it, from disk to disk and without loss: ``hf-lowbit compress`` and ``decompress``.

File by file, so that memory holds one tensor. As in :mod:`.convert` the work happens in ``<destination>.partial``, can
be stopped anywhere and goes on after the last finished file; a destination that exists is finished.
"""

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .config import QUANT_METHOD, LowBitConfig
from .convert import begun, check_destination, fingerprint, small_files, write_json
from .plan import make_plan
from .quantizer import LowBitHfQuantizer
from .skeleton import KeyMap, NoSkeleton, build_skeleton, checkpoint_files, read_config, read_json
from .storage.content import places_in
from .storage.layers import by_layer, layer_of, spread
from .storage.recode import store_file
from .storage.stored import Widths
from .swap import replace_modules
from .version import __version__


def compress_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    storage: str = "entropy",
    *,
    fraction: float = 1.0,
    progress: bool = True,
) -> dict:
    """Writes the packed model in ``source`` to the folder ``destination`` with every tensor stored as ``storage`` says.

    Args:
        source: A folder, or the id of a repo on the Hub.
        destination: A folder that does not exist yet, or is empty.
        storage: "entropy", "zstd", or "raw" to decode what is coded.
        fraction: The part of the model's layers that is coded, evenly spread; the others are raw. For a model
            that is streamed from a fast disk, see ``docs/streaming.md``.
        progress: Whether to show a bar, in bytes of the source.

    Returns:
        ``destination``, ``storage``, ``bytes_before`` and ``bytes_after`` of the safetensors files.

    Raises:
        ValueError: for a source that is not packed by hf_lowbit or is damaged, naming file and tensor.
        OSError: for a destination that is not empty, not writable or full.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is not possible: use a number above 0, up to 1")
    destination = Path(destination).absolute()
    check_destination(destination)
    folder = Path(source) if os.path.isdir(source) else Path(snapshot_download(str(source)))
    folder, raw = folder.absolute(), read_config(folder)
    settings = raw.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{folder} is not packed by hf_lowbit: pack it with `hf-lowbit quantize {source} DESTINATION`")
    config = LowBitConfig.from_dict({**settings, "storage": storage})
    files = [Path(file) for file in checkpoint_files(folder)[0]]
    widths, may_code = rules(folder, config)
    layers = list(by_layer(name for file in files for name in places_in(file)))
    left = set(layers) - {layers[i] for i in spread(round(fraction * len(layers)), len(layers))}
    manifest = {
        "source": {f.name: fingerprint(f) for f in [folder / CONFIG_NAME, *files]},
        "settings": {"storage": storage, "version": __version__, **({} if fraction == 1 else {"fraction": fraction})},
    }
    before = sum(file.stat().st_size for file in files)
    with begun(destination, manifest, {file.name for file in files}) as partial:
        with tqdm(total=before, desc="Storing", unit="B", unit_scale=True, disable=not progress) as bar:
            for file in files:
                if not (partial / file.name).is_file():
                    may = (lambda name: may_code(name) and layer_of(name) not in left) if left else may_code
                    store_file(file, partial / file.name, widths, storage, may)
                bar.update(file.stat().st_size)
        after = sum((partial / file.name).stat().st_size for file in files)
        for name in small_files(folder):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": after}
            write_json(partial / SAFE_WEIGHTS_INDEX_NAME, index)
        kept = {k: v for k, v in settings.items() if k != "storage"}
        raw["quantization_config"] = kept if storage == "raw" else {**kept, "storage": storage}
        write_json(partial / CONFIG_NAME, json.loads(json.dumps(raw)))
    return {"destination": str(destination), "storage": storage, "bytes_before": before, "bytes_after": after}


def rules(folder: Path, config: LowBitConfig):
    """Widths of codes by name, and which tensors may be coded: those that transformers takes as they are.

    Without the model's skeleton those are the packed ones alone.
    """
    try:
        model = build_skeleton(folder, None, [], {})
    except NoSkeleton:
        widths = Widths(config.layers or {})
        return widths, lambda name: widths(name) is not None
    replace_modules(model, make_plan(model, config), "auto")
    key_map = KeyMap(model, LowBitHfQuantizer(config))
    return Widths(config.layers or {}, model.base_model_prefix), lambda name: key_map(name)[1] is None
