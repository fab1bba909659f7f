"""Headers of safetensors files: names, shapes and dtypes without reading a weight.

The header is parsed by the safetensors library, which checks that its offsets are ordered, dense and inside the file.
The head of a coded tensor (:mod:`.entropy`) is read, too: it is described as what it stands for.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ..low_rank import described
from ..packed import PackedMixin
from ..plan import Plan, names
from . import entropy

DTYPE_NAMES = {
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.uint8": "U8",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
}

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape and dtype, and its bytes in the file where it is coded."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    coded_bytes: int | None = None


def read_headers(files: Iterable[str]) -> dict[str, Entry]:
    """Every tensor in ``files``, by name.

    Raises:
        ValueError: for a file that is missing, truncated or whose header contradicts its size, naming the file.
    """
    entries = {}
    for file in files:
        try:
            # While transformers builds a model, what is made is on `meta` unless it says otherwise.
            with torch.device("cpu"), safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    entries[name] = _entry(str(file), name, handle.get_slice(name))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{os.path.basename(str(file))} cannot be read ({error}): it is missing, truncated or damaged"
            ) from error
    return entries


def _entry(file: str, name: str, view) -> Entry:
    """What ``view``, a slice of safetensors, is or stands for."""
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if dtype == "U8" and len(shape) == 1 and entropy.is_coded(view[: entropy.HEAD.size]):
        try:
            kind, logical = entropy.describe(view[: entropy.HEAD.size + 8 * 255])
        except ValueError as error:
            raise ValueError(f"{name} in {os.path.basename(file)}: {error}") from None
        return Entry(file, logical, DTYPE_NAMES[str(kind)], shape[0])
    return Entry(file, shape, dtype)


def check_float(entries: dict[str, Entry], plan: Plan, prefix: str) -> None:
    """Refuses to quantize a checkpoint that holds codes, whatever its config says.

    Raises:
        ValueError: for a tensor of a module to be packed that is not floating point, naming it.
    """
    modules = {alias for name in plan.packed for alias in names(name, prefix)}
    for name, entry in entries.items():
        if name.rpartition(".")[0] in modules and entry.dtype not in FLOATS:
            raise ValueError(
                f"{name} in {os.path.basename(entry.file)} is {entry.dtype}: this repo is quantized already, by "
                "something else. Quantize the original model"
            )


def check_checkpoint(model, plan: Plan, files: Iterable[str] | None) -> bool:
    """Reads the checkpoint's headers and compares the packed modules of ``model`` with them.

    Returns:
        Whether any tensor is coded, as far as can be seen.

    Raises:
        ValueError: for a file that cannot be read, and for a packed tensor that is missing or has another shape or
            dtype, naming it. Modules that the checkpoint knows by another name are checked after loading.
    """
    if not files or not all(str(f).endswith(".safetensors") for f in files):
        return False
    entries, prefix = read_headers(files), getattr(model, "base_model_prefix", "")
    coded = any(entry.coded_bytes is not None for entry in entries.values())
    if not plan.replayed:
        check_float(entries, plan, prefix)
        return coded
    for name in plan.packed:
        module = model.get_submodule(name)
        assert isinstance(module, PackedMixin)
        for alias in (*names(name, prefix), plan.tied.get(name, name)):
            if f"{alias}.weight" in entries:
                break
        else:
            if (
                name not in plan.tied
                and name not in plan.tied.values()
                and any(k.startswith(name + ".") for k in entries)
            ):
                raise ValueError(f"the checkpoint has no tensor {name}.weight: it is incomplete")
            continue
        for tensor in module.fixed_names():
            parameter, entry = getattr(module, tensor), entries.get(f"{alias}.{tensor}")
            if entry is None:
                raise ValueError(f"the checkpoint has no tensor {alias}.{tensor}: it is incomplete")
            expected = (tuple(parameter.shape), DTYPE_NAMES[str(parameter.dtype)])
            if (entry.shape, entry.dtype) != expected:
                raise ValueError(
                    f"{alias}.{tensor} is {entry.dtype} of shape {entry.shape} in {os.path.basename(entry.file)}, but "
                    f"the config says {described(module.spec, module.low_rank)}, which needs {expected[1]} of shape "
                    f"{expected[0]}"
                )
    return coded
