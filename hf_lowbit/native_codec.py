"""Coding and decoding by the CPU kernels: the same bytes as :mod:`hf_lowbit.storage.entropy_plain`.

Each function says by its result whether the kernels did it; where they are missing, or another backend is asked for by
the environment variable, plain NumPy serves. The interpreter's lock is released while they run.
"""

import ctypes

import numpy as np
import torch

from . import native_backend
from .backends import requested_backend


def serves() -> bool:
    """Whether the kernels are there and wanted."""
    return requested_backend("auto") in ("auto", "native") and native_backend.unavailable() is None


def decode(coded: torch.Tensor | memoryview, out: torch.Tensor, threads: int) -> bool:
    """Decodes ``coded``, uint8 (n), to ``out``, contiguous; False if that is for plain NumPy to do, or to refuse.

    Raises:
        ValueError: for a damaged block, naming it.
        MemoryError: if the library finds none.
    """
    if not serves():
        return False
    if isinstance(coded, torch.Tensor):
        coded = coded.contiguous()
        address, size = coded.data_ptr(), coded.numel()
    else:
        view = np.frombuffer(coded, np.uint8)
        address, size = view.ctypes.data, view.size
    result = native_backend.library().lowbit_decode(address, size, out.data_ptr(), out.nbytes, threads)
    if result > 0:
        raise ValueError(f"block {result - 1} is damaged: its checksum, its words or its end is wrong")
    if result == -3:
        raise MemoryError("no memory to decode a tensor")
    return result == 0  # a head that is refused is read again by read_head, which says why


def count_symbols(raw: np.ndarray, symbols: int) -> np.ndarray | None:
    """How often each symbol occurs in ``raw``, uint8 (N, R), contiguous; None if the kernels cannot say."""
    counts = np.empty(256, np.int64)
    if not serves():
        return None
    rows, width = raw.shape
    refused = native_backend.library().lowbit_count_symbols(raw.ctypes.data, rows, width, symbols, counts.ctypes.data)
    return None if refused else counts


def encode(
    raw: np.ndarray, step: int, symbols: int, frequencies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Blocks of ``step`` rows of ``raw``, uint8 (N, R): all of them, sizes with raw flags, and checksums, or None."""
    if not serves():
        return None
    rows, width = raw.shape
    out, index = np.empty(raw.size, np.uint8), np.empty((-(-rows // step), 2), np.uint32)
    table = frequencies.astype(np.uint16)
    written = native_backend.library().lowbit_encode(
        raw.ctypes.data, rows, width, step, symbols, table.ctypes.data, out.ctypes.data, index.ctypes.data,
        torch.get_num_threads(),
    )  # fmt: skip
    if written < 0:
        return None
    return out[:written], index[:, 0].astype(np.int64), index[:, 1].astype(np.int64)


def declare(library: ctypes.CDLL) -> None:
    """Tells ``ctypes`` what the library's functions take."""
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.lowbit_decode.argtypes = [pointer, number, pointer, number, flag]
    library.lowbit_encode.argtypes = [pointer, number, number, number, flag, pointer, pointer, pointer, flag]
    library.lowbit_count_symbols.argtypes = [pointer, number, number, flag, pointer]
    library.lowbit_decode.restype = library.lowbit_encode.restype = number
