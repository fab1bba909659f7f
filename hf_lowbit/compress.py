"""Codes a packed repo, or decodes it, from disk to disk and without loss: ``hf-lowbit compress`` and ``decompress``.

File by file, so that memory holds one tensor. As in :mod:`.convert` the work happens in ``<destination>.partial``, can
be stopped anywhere and goes on after the last finished file; a destination that exists is finished.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .config import QUANT_METHOD, LowBitConfig
from .convert import begun, check_destination, fingerprint, small_files, write_json
from .placement import TooSmall
from .plan import make_plan
from .quantizer import LowBitHfQuantizer
from .skeleton import KeyMap, NoSkeleton, build_skeleton, checkpoint_files, read_config, read_json
from .storage.content import places_in
from .storage.layers import by_layer, layer_of, spread
from .storage.recode import store_file
from .storage.stored import Widths
from .storage.worth import Choice, choose, disk_speed, find_kinds
from .swap import replace_modules
from .version import __version__

logger = logging.get_logger(__name__)
CHOICE = "hf_lowbit_choice.json"
TOKENS = 4


def compress_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    storage: str = "entropy",
    *,
    fraction: float | str = 1.0,
    progress: bool = True,
) -> dict:
    """Writes the packed model in ``source`` to the folder ``destination`` with every tensor stored as ``storage`` says.

    Args:
        source: A folder, or the id of a repo on the Hub.
        destination: A folder that does not exist yet, or is empty.
        storage: "entropy", "zstd", or "raw" to decode what is coded.
        fraction: The part of the model's layers that is coded, evenly spread; the others are raw. For a model
            that is streamed from a fast disk, see ``docs/streaming.md``. "auto" measures the disk of ``destination``,
            decoding and computing, and codes what pays there (:mod:`.storage.worth`).
        progress: Whether to show bars: in bytes of the source, and of loading it for "auto".

    Returns:
        ``destination``, ``storage``, ``bytes_before`` and ``bytes_after`` of the safetensors files; for "auto" also
        ``fraction``, ``disk`` and ``decoding`` in bytes a second, and ``computing_s`` for a token.

    Raises:
        ValueError: for a source that is not packed by hf_lowbit or is damaged, naming file and tensor.
        OSError: for a destination that is not empty, not writable or full.
    """
    if fraction != "auto" and (isinstance(fraction, str) or not 0 < fraction <= 1):
        raise ValueError(f"fraction={fraction} is not possible: use a number above 0, up to 1, or 'auto'")
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
    manifest = {
        "source": {f.name: fingerprint(f) for f in [folder / CONFIG_NAME, *files]},
        "settings": {"storage": storage, "version": __version__, **({} if fraction == 1 else {"fraction": fraction})},
    }
    before = sum(file.stat().st_size for file in files)
    found: dict = {}
    with begun(destination, manifest, {file.name for file in files}) as partial:
        if fraction == "auto":
            with _bars(progress):
                choice = _choice(partial, folder, files, widths, may_code, storage)
            found = {k: v for k, v in dataclasses.asdict(choice).items() if k != "names"}
            may = _only(set(choice.names), widths, may_code)
        else:
            may = _some_layers(float(fraction), files, may_code)
        with tqdm(total=before, desc="Storing", unit="B", unit_scale=True, disable=not progress) as bar:
            for file in files:
                if not (partial / file.name).is_file():
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
        (partial / CHOICE).unlink(missing_ok=True)
    sizes = {"bytes_before": before, "bytes_after": after}
    return {"destination": str(destination), "storage": storage, **sizes, **found}


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Keeps transformers from showing bars, unless ``shown``."""
    hides = not shown and logging.is_progress_bar_enabled()
    if hides:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            logging.enable_progress_bar()


def _some_layers(fraction: float, files: list[Path], may_code: Callable[[str], bool]) -> Callable[[str], bool]:
    """``may_code``, but not for the layers that are left out."""
    layers = list(by_layer(name for file in files for name in places_in(file)))
    left = set(layers) - {layers[i] for i in spread(round(fraction * len(layers)), len(layers))}
    return (lambda name: may_code(name) and layer_of(name) not in left) if left else may_code


def _only(names: set[str], widths: Widths, may_code: Callable[[str], bool]) -> Callable[[str], bool]:
    """``may_code``, but of packed weights in layers for ``names`` alone."""
    return lambda name: name in names or (may_code(name) and (layer_of(name) is None or widths(name) is None))


def _choice(
    partial: Path, folder: Path, files: list[Path], widths: Widths, may_code: Callable[[str], bool], storage: str
) -> Choice:
    """What pays, measured once for ``partial``: a run that is started again goes on with what it found."""
    if (partial / CHOICE).is_file():
        return Choice(**read_json(partial / CHOICE))
    places = {name: place for file in files for name, place in places_in(file).items()}
    kinds, nbytes = find_kinds(places, widths, may_code, storage)
    disk = disk_speed(partial, max(files, key=lambda file: file.stat().st_size))
    # Without anything to decode, or time for it, the model need not run.
    idle = not any(choose([kind], nbytes, disk, 0.0).names for kind in kinds)
    choice = choose(kinds, nbytes, disk, 0.0 if idle else token_seconds(folder))
    write_json(partial / CHOICE, dataclasses.asdict(choice))
    return choice


def token_seconds(folder: Path) -> float:
    """What computing one token takes with the model's layers streamed under the least budget, without waiting, in s.

    The least of a few times; 0, with a warning, for a model that reads no tokens or needs code of its own.
    """
    try:
        model_class = type(build_skeleton(folder, None, [], {}))
    except NoSkeleton:
        model_class = None
    if model_class is None or model_class.main_input_name != "input_ids":
        logger.warning("fraction='auto': computing is left out, since this model cannot be run on tokens here")
        return 0.0
    least = LowBitConfig(max_memory_bytes=1, offload_folder=False)
    try:
        model = model_class.from_pretrained(folder, quantization_config=least)
    except TooSmall as error:
        least = LowBitConfig(max_memory_bytes=error.least, offload_folder=False)
        model = model_class.from_pretrained(folder, quantization_config=least)
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    streaming, seconds = model.hf_quantizer.streaming, []
    with torch.no_grad():
        for _ in range(TOKENS):
            streaming.reset()
            start = time.perf_counter()
            model(**inputs)
            seconds.append(time.perf_counter() - start - streaming.report().waiting_s)
    return min(seconds)


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
