"""What is in a packed repo: format, bits and bytes of every layer, and what was kept in float, and why.

Read from ``config.json`` and the headers of the safetensors files alone. The reasons are those of the plan, made again
from the settings in the config on the model's skeleton. Where there is no skeleton (the model needs code of its own, or
a class that this transformers lacks) modules are known by their names in the files only, and a padded row's length is
not known: shapes and bits per weight are then None, with a note.
"""

import copy
import math
import os
import re
from pathlib import Path

import numpy as np
from huggingface_hub import get_hf_file_metadata, get_safetensors_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import CONFIG_NAME

from .config import QUANT_METHOD, LowBitConfig
from .formats import parse_format
from .low_rank import described
from .plan import make_plan
from .quantizer import LowBitHfQuantizer
from .skeleton import KeyMap, NoSkeleton, build_skeleton, checkpoint_files, read_config
from .storage import entropy as coder
from .storage.headers import Entry, read_headers
from .storage.shards import Reader
from .swap import replace_modules


def inspect_repo(path: str | os.PathLike, entropy: bool = False) -> dict:
    """Describes the packed repo ``path``, a folder or the id of a repo on the Hub.

    Args:
        path: Where it is.
        entropy: Read the weights of a folder, too, and add to each layer what :func:`measure` says.

    Returns:
        A dict that can be written as JSON:

        - ``config``: the ``quantization_config``;
        - ``layers``: for each packed module ``name``, ``format`` (and its low-rank correction), ``bits``,
          ``bits_per_weight`` (whole, with scales), ``shape`` (N, K), ``bytes`` in memory and ``stored_bytes`` in the
          files, fewer where it is coded; tied modules once;
        - ``kept``: ``name``, ``bytes`` and ``reason`` of what is in float;
        - ``totals``: ``packed_weights``, ``packed_bytes``, ``bits_per_packed_weight``, ``stored_bytes`` (of what is
          packed), ``kept_bytes`` and ``file_bytes``;
        - ``note``: what could not be found out, or None.

    Raises:
        ValueError: for a repo that is not packed by hf_lowbit, or damaged, naming the file, and for ``entropy`` of one
            whose weights are not on this machine.
    """
    folder, entries, file_bytes = _headers(str(path))
    raw = read_config(folder).get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        found = f"quantized by {raw.get('quant_method')!r}" if isinstance(raw, dict) else "in float"
        raise ValueError(
            f"{folder} is not packed by hf_lowbit, it is {found}: pack it with `hf-lowbit quantize {path} DESTINATION`"
        )
    config = LowBitConfig.from_dict(copy.deepcopy(raw))
    if not config.layers:
        raise ValueError(f"{folder / CONFIG_NAME} has no 'layers' in its quantization_config: it is damaged")
    note = None
    try:
        layers, kept = _by_skeleton(build_skeleton(folder, None, [], {}), config, entries)
    except NoSkeleton as error:
        note = f"without the model's skeleton ({error})"
        layers, kept = _by_name(config, entries)
    if entropy:
        measure(layers, entries)
    weights = None if note else sum(math.prod(layer["shape"]) for layer in layers)
    packed_bytes = sum(layer["bytes"] for layer in layers)
    return {
        "config": raw,
        "layers": layers,
        "kept": kept,
        "totals": {
            "packed_weights": weights,
            "packed_bytes": packed_bytes,
            "bits_per_packed_weight": 8 * packed_bytes / weights if weights else None,
            "stored_bytes": sum(layer["stored_bytes"] for layer in layers),
            "kept_bytes": sum(entry["bytes"] for entry in kept),
            "file_bytes": file_bytes,
        },
        "note": note,
    }


def _headers(path: str) -> tuple[Path, dict[str, Entry], int]:
    """The folder with the config, every tensor of the weights by name, and the bytes of their files."""
    if os.path.isdir(path):
        return _local_headers(Path(path).absolute())
    try:
        folder = Path(snapshot_download(path, allow_patterns=[CONFIG_NAME]))
        files = get_safetensors_metadata(path).files_metadata
        sizes = [get_hf_file_metadata(hf_hub_url(path, file)).size or 0 for file in files]
    except OfflineModeIsEnabled:
        return _local_headers(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} is not a folder, and not a Hub repo that can be read: {error}") from error
    entries = {n: Entry(f, tuple(t.shape), t.dtype) for f, content in files.items() for n, t in content.tensors.items()}
    return folder, entries, sum(sizes)


def _local_headers(folder: Path) -> tuple[Path, dict[str, Entry], int]:
    read_config(folder)
    files, _ = checkpoint_files(folder)
    return folder, read_headers(files), sum(os.path.getsize(file) for file in files)


def _nbytes(entry: Entry) -> int:
    return math.prod(entry.shape) * str_to_torch_dtype[entry.dtype].itemsize


def _stored(entry: Entry) -> int:
    return _nbytes(entry) if entry.coded_bytes is None else entry.coded_bytes


def measure(layers: list[dict], entries: dict[str, Entry]) -> None:
    """Adds to ``layers`` what their codes hold, and what the entropy coder makes of them; reads every weight.

    ``entropy``: Shannon's order-0 entropy of the codes, in bits a code: no coder that looks at one code after the other
    takes fewer. ``coded_bits``: what the coder of ``storage="entropy"`` takes, whole, in bits a code: as it is in the
    files, or else as it would be. ``above_entropy``: the ratio of the two, less one.

    Raises:
        ValueError: for a weight that is damaged or not on this machine, naming it.
    """
    reader = Reader(sorted({entry.file for entry in entries.values()}))
    for layer in layers:
        tensor = reader.read(layer["tensor"])
        try:
            packed = coder.decode_tensor(tensor) if coder.is_coded(tensor) else tensor
        except ValueError as error:
            raise ValueError(f"{layer['tensor']} cannot be decoded: {error}") from error
        format = parse_format(layer["format"].partition(" with ")[0]).inner
        columns = layer["shape"][1] if layer["shape"] else None
        codes = format.unpack_codes(packed, columns) if columns else None
        symbols = coder.symbols_for("", packed.dtype, format.bits)
        if codes is None or not coder.is_coded(tensor) or coder.read_head(tensor).codec != coder.ENTROPY:
            tensor = coder.encode(packed, symbols)
        count = packed.shape[0] * columns if columns else None
        counts = np.bincount(codes.reshape(-1).numpy(), minlength=1) if codes is not None else None
        layer["entropy"] = coder.entropy(counts) if counts is not None else None
        layer["coded_bits"] = 8 * tensor.nbytes / count if count else None
        layer["above_entropy"] = layer["coded_bits"] / layer["entropy"] - 1 if layer["entropy"] else None


def _by_skeleton(model, config: LowBitConfig, entries: dict[str, Entry]) -> tuple[list[dict], list[dict]]:
    """Layers and kept modules as this transformers' model sees them."""
    fresh = copy.deepcopy(config)
    fresh.layers = None
    reasons = {kept.name: kept.reason for kept in make_plan(model, fresh).kept}
    plan = make_plan(model, config)
    replace_modules(model, plan, "auto")
    key_map = KeyMap(model, LowBitHfQuantizer(config))
    sizes: dict[str, int] = {}
    stored: dict[str, int] = {}
    tensors: dict[str, str] = {}
    for key, entry in entries.items():
        target, _ = key_map(key)
        module, _, tensor = target.rpartition(".")
        name = module if module in plan.packed and tensor.startswith("weight") else target
        name = plan.tied.get(name, name)
        sizes[name] = sizes.get(name, 0) + _nbytes(entry)
        stored[name] = stored.get(name, 0) + _stored(entry)
        if tensor == "weight":
            tensors[name] = key
    for name, packed in plan.packed.items():
        found, needed = sizes.get(name, 0), packed.nbytes
        if name not in plan.tied and found != needed:
            raise ValueError(
                f"the files hold {found} bytes of {name}, and {packed.format.spec} needs {needed} for {packed.shape}: "
                "the repo is incomplete or damaged"
            )
    layers = [
        {
            "name": name,
            "format": described(packed.format.spec, packed.low_rank),
            "bits": packed.format.bits,
            "bits_per_weight": 8 * sizes[name] / math.prod(packed.shape),
            "shape": list(packed.shape),
            "bytes": sizes[name],
            "stored_bytes": stored[name],
            "tensor": tensors.get(name),
        }
        for name, packed in plan.packed.items()
        if name in sizes
    ]
    kept, small = [], 0
    for name, size in sizes.items():
        reason = reasons.get(name, reasons.get(name.removesuffix(".weight")))
        if name in plan.packed:
            continue
        if reason is None and name in key_map.known:
            small += size
        else:
            kept.append({"name": name, "bytes": size, "reason": reason or "not known to the model class"})
    if small:
        kept.append({"name": "norms, biases and other small parameters", "bytes": small, "reason": "small"})
    return layers, kept


def _by_name(config: LowBitConfig, entries: dict[str, Entry]) -> tuple[list[dict], list[dict]]:
    """Layers and kept tensors as the files name them."""
    patterns = [
        (re.compile(r"\d+".join(map(re.escape, p.split("*")))), parse_format(spec))
        for p, spec in (config.layers or {}).items()
    ]
    layers: dict[str, dict] = {}
    kept = []
    for key, entry in entries.items():
        name, _, tensor = key.rpartition(".")
        format = next((f for pattern, f in patterns if pattern.fullmatch(name)), None)
        if format is None or not tensor.startswith("weight"):
            kept.append({"name": key, "bytes": _nbytes(entry), "reason": "kept when it was packed"})
            continue
        layer = {"name": name, "format": format.spec, "bits": format.bits, "bits_per_weight": None, "shape": None}
        found = layers.setdefault(name, {**layer, "bytes": 0, "stored_bytes": 0, "tensor": f"{name}.weight"})
        found["bytes"] += _nbytes(entry)
        found["stored_bytes"] += _stored(entry)
    return list(layers.values()), kept
