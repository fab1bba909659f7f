"""Budgets of memory by device: ``max_memory_bytes``, read and checked (:mod:`.placement` decides what stays where), and
``offload_folder``, checked."""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from accelerate.utils import convert_file_size_to_int

HOST = "cpu"
Folder = str | os.PathLike | Literal[False] | None
"""What ``offload_folder=`` takes: a folder's path, False for none, None for the default."""


def read_budgets(wanted: int | str | Mapping[int | str, int | str] | None) -> dict[str, int]:
    """``max_memory_bytes`` in bytes by the name of the device: "cpu", "cuda:0"; nothing for None.

    Raises:
        ValueError: for what is no size or no device, and for a device that is named twice.
    """
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        return {HOST: _size(wanted, f"max_memory_bytes={wanted!r}")}
    found: dict[str, int] = {}
    for key, size in wanted.items():
        name = _device_name(key)
        if name in found:
            raise ValueError(f"max_memory_bytes={dict(wanted)!r} names {name} twice: give each device one size")
        found[name] = _size(size, f"max_memory_bytes={dict(wanted)!r}: {size!r} for {key!r}")
    if not found:
        raise ValueError("max_memory_bytes={} names no device: use a size, or {'cpu': '300MB', 0: '2GB'}")
    return found


def _size(size, where: str) -> int:
    try:
        nbytes = -1 if isinstance(size, bool) else convert_file_size_to_int(size)
    except (ValueError, AttributeError):
        nbytes = -1
    if nbytes <= 0:
        raise ValueError(f"{where} is no size: use bytes, or a text like '300MB'")
    return nbytes


def _device_name(key: int | str) -> str:
    number = key if isinstance(key, int) and not isinstance(key, bool) else None
    if isinstance(key, str) and key.isdecimal():  # as JSON makes of a number
        number = int(key)
    try:
        device = torch.device(str(key)) if number is None else torch.device(_accelerator_type(), number)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise ValueError(
            f"max_memory_bytes= names {key!r}, which is no device: use 'cpu' for the host's memory and numbers, or "
            "names such as 'cuda:0', for accelerators; what fits nowhere is read from disk"
        )
    return HOST if device.type == HOST else f"{device.type}:{device.index or 0}"


def _accelerator_type() -> str:
    here = torch.accelerator.current_accelerator()
    return "cuda" if here is None else here.type


def check_present(names: Sequence[str]) -> None:
    """Refuses budgets for accelerators that are not here.

    Raises:
        ValueError: naming the first of them, and what is here.
    """
    here, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    present = [] if here is None else [f"{here.type}:{index}" for index in range(count)]
    if missing := [name for name in names if name != HOST and name not in present]:
        raise ValueError(
            f"max_memory_bytes= names {missing[0]!r}, and torch finds {', '.join(present) or 'no accelerator'} here: "
            "leave it out, or name one of these"
        )


def torch_device(name: str) -> torch.device:
    """The device that the model's tensors are then on."""
    return torch.device(name)


def check_folder(option: Folder) -> None:
    """Refuses what is no value of ``offload_folder=``.

    Raises:
        ValueError: naming the value.
    """
    if option is not None and option is not False and not (isinstance(option, (str, os.PathLike)) and str(option)):
        raise ValueError(
            f"offload_folder={option!r} is no folder: give the path of one on a disk, False to write nothing, or leave "
            "it out for the default, beside the Hub's cache"
        )
