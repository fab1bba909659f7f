"""Packing from disk to disk, without ever building the model.

``from_pretrained`` with a :class:`LowBitConfig` needs memory for the whole packed model. Here the same plan is made
from the skeleton, the same weights go through the same method one at a time, and each is written to its place in a
file at once: memory holds one float weight and what packing it takes, whatever the size of the model. (Where
transformers makes one weight out of several tensors of the checkpoint, or several out of one, those are held
together.) The folder that comes out is the one that ``save_pretrained`` would have written: it loads to the same bits.

The work happens in ``<destination>.partial`` beside the destination, and can be stopped anywhere, by ``kill -9`` too.
A shard gets its name once it is complete, so a second start goes on after the last finished one; a manifest holds
what the shards depend on, and a start with other settings or another source is refused. The last step renames the
folder: a destination that exists is finished. Nothing in the source is executed or unpickled.
"""

import copy
import errno
import json
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.utils import WeakFileLock, filter_repo_objects
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, logging

from .config import LowBitConfig
from .pieces import Piece, Solved, make_pieces, produce
from .plan import Plan, make_plan
from .quantizer import LowBitHfQuantizer
from .skeleton import KeyMap, build_skeleton, checkpoint_files, read_config, read_json
from .storage.headers import read_headers
from .storage.recode import store_file
from .storage.shards import TEMPORARY, Layout, Reader, explained, sync_folder
from .storage.stored import Widths
from .swap import replace_modules
from .version import __version__

logger = logging.get_logger(__name__)

MANIFEST, LOCK, RAW = "hf_lowbit_manifest.json", ".hf_lowbit_lock", ".raw"
# What is taken over from a repo besides its weights.
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe", "LICENSE*", "NOTICE*"]
REWRITTEN = [CONFIG_NAME, "*.index.json", MANIFEST]


def quantize_folder(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    config: LowBitConfig,
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
    solved: Solved | None = None,
) -> dict:
    """Packs the model in ``source`` into the folder ``destination``, shard by shard.

    Args:
        source: A folder with ``config.json`` and safetensors files, or the id of such a repo on the Hub.
        destination: A folder that does not exist yet, or is empty. Its parents are created.
        config: What to pack, and how. Loading options in it are ignored.
        max_shard_size: Largest size of a file of packed weights, in bytes or as "5GB"; shards are also the steps after
            which an interrupted run can go on.
        dtype: Dtype into which weights are cast before they are quantized and in which the rest is kept; by default
            that of the checkpoint, as in ``from_pretrained``.
        progress: Whether to show a bar, in bytes of the source.
        solved: Packed tensors of modules that were solved before, see :mod:`hf_lowbit.calibration`; all others are
            quantized by their own methods.

    Returns:
        The coverage, as :meth:`hf_lowbit.plan.Plan.coverage`.

    Raises:
        ValueError: for a source that cannot be packed (quantized already, pickled, damaged, of another shape than its
            config says, with NaN), naming file and tensor, or a run begun with other settings.
        OSError: for a destination that is not empty, not writable or full.
    """
    destination = Path(destination).absolute()
    check_destination(destination)
    folder = fetch(str(source))
    check_source(folder)
    if config.seeks_allocation:
        from .allocation.budget import settle  # which imports this module

        config = settle(folder, config, dtype)
    opened = open_source(folder, config, dtype)
    model, plan, pieces, reader = opened.model, opened.plan, opened.pieces, opened.reader
    parameters, hf_quantizer = opened.parameters, LowBitHfQuantizer(opened.config)
    # The tensors of one piece stay together: as one made-up tensor of all their bytes.
    split = split_torch_state_dict_into_shards(
        {p.target: torch.empty(stored_bytes(p), dtype=torch.uint8, device="meta") for p in pieces},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    by_target = {p.target: p for p in pieces}
    shards = {file: [by_target[t] for t in targets] for file, targets in split.filename_to_tensors.items()}
    _, header = hf_quantizer.get_state_dict_and_metadata(model)
    layouts = {
        file: Layout({n: t for p in members for n, t in p.stored.items()}, {**header, "format": "pt"})
        for file, members in shards.items()
    }
    manifest = {
        "source": {f: fingerprint(Path(f)) for f in [str(folder / CONFIG_NAME), *opened.files]},
        "settings": {
            **opened.config.to_dict(),
            "dtype": str(model.config.dtype).removeprefix("torch."),
            "max_shard_size": max_shard_size,
            "version": __version__,
            **({} if solved is None else {"solved": solved.identity}),
        },
        "shards": {file: layout.size for file, layout in layouts.items()},
    }
    coded = opened.config.storage != "raw"
    with begun(destination, manifest, set(layouts)) as partial:
        write_shards(partial, shards, layouts, reader, plan, model, progress, solved, opened.config)
        with explained(partial, 2**20):
            if split.is_sharded:
                size = {"total_size": sum(os.path.getsize(partial / file) for file in layouts)} if coded else {}
                index = {"metadata": {"total_parameters": parameters, **split.metadata, **size}}
                index["weight_map"] = {name: file for file, layout in layouts.items() for name in layout.tensors}
                write_json(partial / SAFE_WEIGHTS_INDEX_NAME, index)
            for name in small_files(folder):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, partial / name)
            model.config.quantization_config = opened.config
            model.config.save_pretrained(partial)
    logger.info(plan.report())
    return plan.coverage()


# -- the source --------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A float model on disk and what is to be packed of it.

    Attributes:
        folder: Where it is.
        files: Its safetensors files.
        model: Its skeleton on ``meta``, with packed modules in place.
        config: A copy of the user's config, with ``layers``.
        plan: What is packed.
        key_map: Names in the files to names of parameters.
        reader: Of the files.
        pieces: What becomes of every tensor.
        parameters: Number of the float model's parameters.
    """

    folder: Path
    files: list[str]
    model: PreTrainedModel
    config: LowBitConfig
    plan: Plan
    key_map: KeyMap
    reader: Reader
    pieces: list[Piece]
    parameters: int


def open_source(folder: Path, config: LowBitConfig, dtype: torch.dtype | str | None) -> Source:
    """Plans the packing of the float model in ``folder`` from its config and headers; arguments as above.

    Raises:
        ValueError: if there is nothing to pack, or files and config do not fit each other.
    """
    files, metadata = checkpoint_files(folder)
    entries = read_headers(files)
    model = build_skeleton(folder, dtype, files, metadata)
    parameters = model.num_parameters()
    config = copy.deepcopy(config)
    config.layers = config.low_rank = None
    plan = make_plan(model, config)
    if not plan.packed:
        raise ValueError(f"there is nothing to pack in {folder}: {type(model).__name__} has no nn.Linear or Conv1D")
    config.layers, config.low_rank = plan.layers(), plan.low_rank()
    replace_modules(model, plan, "auto")
    key_map, reader = KeyMap(model, LowBitHfQuantizer(config)), Reader(files)
    pieces = make_pieces(model, plan, key_map, entries, reader)
    return Source(folder, files, model, config, plan, key_map, reader, pieces, parameters)


def fetch(source: str) -> Path:
    """The folder of ``source``; a Hub repo is downloaded, its weights only after its config was looked at."""
    if os.path.isdir(source):
        return Path(source).absolute()
    if source.endswith(".gguf"):
        raise ValueError(f"{source} is a GGUF file, which is quantized already: take the original model")
    if os.path.exists(source):
        raise ValueError(f"{source} is a file: give the folder that holds config.json and the safetensors files")
    try:
        folder = Path(snapshot_download(source, allow_patterns=SMALL_FILES))
        check_source(folder)
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        wanted = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else []
        return Path(snapshot_download(source, allow_patterns=[*SMALL_FILES, *(wanted or ["model.safetensors"])]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{source!r} is not a folder, and not a Hub repo that can be fetched: {error}") from error


def check_source(folder: Path) -> None:
    """Refuses a source that is quantized already."""
    raw = read_config(folder)
    for part in (raw, *(v for v in raw.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            raise ValueError(
                f"{folder} is quantized already (quant_method {method!r} in {CONFIG_NAME}): pack the original, "
                "or dequantize this one first and save it"
            )


def small_files(folder: Path) -> list[str]:
    """Relative names of the files to take over: tokenizer, processor and generation settings, licences."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    shown = [n for n in names if not any(part.startswith(".") for part in n.split("/"))]
    return sorted(filter_repo_objects(shown, allow_patterns=SMALL_FILES, ignore_patterns=REWRITTEN))


def fingerprint(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns: enough to notice another source."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


# -- the work ----------------------------------------------------------------------------------------------------------


def stored_bytes(piece: Piece) -> int:
    """Bytes that ``piece`` needs in a file."""
    return sum(t.numel() * t.dtype.itemsize for t in piece.stored.values())


def write_shards(
    partial: Path,
    shards: dict[str, list[Piece]],
    layouts: dict[str, Layout],
    reader: Reader,
    plan: Plan,
    model,
    progress: bool,
    solved: Solved | None,
    config: LowBitConfig,
) -> None:
    """Writes every shard that is not finished; coded ones are written raw first, since their sizes are not known."""
    coded, widths = config.storage != "raw", Widths(config.layers or {}, model.base_model_prefix)
    sizes = {file: sum(reader.nbytes(key) for p in members for key in p.keys) for file, members in shards.items()}
    finished = [
        file
        for file, layout in layouts.items()
        if (partial / file).is_file() and (coded or layout.finished(partial / file))
    ]
    todo = sum(layouts[file].size for file in layouts if file not in finished)
    free = shutil.disk_usage(partial).free
    if free < todo:
        raise OSError(
            errno.ENOSPC, f"{partial} needs {todo / 1e6:.1f} MB, its disk has {free / 1e6:.1f} MB left: free some"
        )
    bar = tqdm(total=sum(sizes.values()), desc="Packing", unit="B", unit_scale=True, disable=not progress)
    with bar:
        bar.update(sum(sizes[file] for file in finished))
        bar.unpause()  # what was finished before says nothing about speed

        def tensors(members):
            for piece in members:
                yield from produce(piece, reader, plan, model, solved)
                bar.update(sum(reader.nbytes(key) for key in piece.keys))

        for file, members in shards.items():
            if file not in finished:
                path = partial / (file + RAW if coded else file)
                layouts[file].write(path, tensors(members))
                if coded:
                    store_file(path, partial / file, widths, config.storage)
            (partial / (file + RAW)).unlink(missing_ok=True)


# -- the partial folder ------------------------------------------------------------------------------------------------


def check_destination(destination: Path) -> None:
    """Refuses a destination that exists and is not an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and is not an empty folder: remove it, or choose another name")


@contextmanager
def begun(destination: Path, manifest: dict, shards: set[str]):
    """Yields the folder in which ``destination`` is made, and gives it its name when all is written.

    ``shards`` are names of files in it that are on disk by then; every other one is made sure of here.
    """
    partial = destination.with_name(destination.name + ".partial")
    with ExitStack() as stack:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(partial / LOCK, timeout=0.1))
        except TimeoutError:
            raise FileExistsError(f"another process is packing into {destination}: it holds {partial / LOCK}") from None
        except OSError as error:
            raise OSError(
                error.errno, f"{destination} cannot be written ({error.strerror}): choose another place"
            ) from error
        resume(partial, manifest)
        yield partial
        for path in partial.rglob("*"):
            if path.is_file() and path.name not in shards:
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
    if destination.exists():
        destination.rmdir()
    os.rename(partial, destination)
    sync_folder(destination.parent)
    for name in (MANIFEST, LOCK):
        (destination / name).unlink(missing_ok=True)


def resume(partial: Path, manifest: dict) -> None:
    """Begins a run in ``partial``, or goes on with one that was begun with the same source and settings.

    Raises:
        FileExistsError: if the folder is not one of ours.
        ValueError: if the source or the settings are others, saying which.
    """
    path = partial / MANIFEST
    if not path.exists():
        others = sorted(p.name for p in partial.iterdir() if p.name != LOCK and not p.name.endswith(TEMPORARY))
        if others:
            raise FileExistsError(f"{partial} is in the way (it holds {others[0]}, but no {MANIFEST}): remove it")
        write_json(path, manifest)
        return
    begun = read_json(path)
    manifest = json.loads(json.dumps(manifest))  # as it would have been read
    if begun == manifest:
        return
    differences = [
        f"{key} ({part.get(key)!r} then, {now.get(key)!r} now)"
        for section in ("settings", "source", "shards")
        for part, now in [(begun.get(section) or {}, manifest.get(section) or {})]
        for key in sorted({*part, *now})
        if part.get(key) != now.get(key)
    ]
    raise ValueError(
        f"{partial} was begun with another source or other settings: {', '.join(differences[:3])}. Use the same ones "
        "to go on, or remove that folder to start over"
    )


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file beside and renames it."""
    temporary = path.with_name(path.name + TEMPORARY)
    with explained(path, len(str(content))), open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)
