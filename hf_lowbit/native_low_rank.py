"""The low-rank branch of an adapter by the CPU kernels; the plain twin is :mod:`.adapters.branch`.

torch multiplies such thin matrices several times slower than wide ones, and casts what is not float32 beforehand. The
kernels read activations and gradients in their own dtype and keep all that belongs together in registers.
"""

import ctypes

import torch

from . import native_backend as native
from .backends import requested_backend

RANK_TILE = 8  # of the library: ranks are padded to a multiple of it


class _Adapter(ctypes.Structure):
    """``lowbit_adapter`` of ``kernels/cpu/lowbit_cpu.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "rank")),
        ("scaling", ctypes.c_float),
    ]


def serves(result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can run this branch, with products in ``dtype``; arguments as in :func:`add`."""
    return not (
        torch.compiler.is_compiling()  # first: what follows is not for a compiler to see
        or any(tensor.device.type != "cpu" for tensor in (result, x, a, b))
        or any(tensor.dtype != torch.float32 for tensor in (a, b))
        or dtype != torch.float32
        or result.dtype != x.dtype
        or x.dtype not in native.DTYPES
        or torch._C._len_torch_dispatch_stack()
        or requested_backend("auto") not in ("auto", "native")
        or native.unavailable() is not None
    )


def _describe(a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[_Adapter, list[torch.Tensor]]:
    """The factors for the library, and the tensors that must live as long."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return _Adapter(a.data_ptr(), b.data_ptr(), b.shape[0], a.shape[1], a.shape[0], scaling), [a, b]


def add(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``result + scaling * x @ a.T @ b.T`` in the dtype of ``result``, and what :func:`gradients` wants of it.

    Args:
        result: (..., N).
        x: (..., K), in the dtype of ``result``.
        a: (r, K), float32.
        b: (N, r), float32.
        scaling: Factor of the adapter.
        in_place: Whether ``result``, contiguous, is overwritten.

    Returns:
        (..., N), and the hidden values (M, r rounded up to a multiple of :data:`RANK_TILE`) of all M rows, float32.
    """
    adapter, kept = _describe(a, b, scaling)
    result, x = result.contiguous(), x.contiguous()
    rows, ranks = x.numel() // x.shape[-1], -(-a.shape[0] // RANK_TILE) * RANK_TILE
    out, hidden = result if in_place else torch.empty_like(result), torch.empty((rows, ranks))
    pointers = (x.data_ptr(), result.data_ptr(), hidden.data_ptr(), out.data_ptr())
    run = native.library().lowbit_low_rank
    native._check(run(ctypes.addressof(adapter), *pointers, rows, native.DTYPES[x.dtype], native._threads()))
    del kept
    return out, hidden


def gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    wanted: tuple[bool, bool, bool],
    added: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """The gradients of :func:`add` with respect to ``x``, ``a`` and ``b``, those that are ``wanted``.

    Args:
        gradient: (..., N), of the result, in the dtype of ``x``.
        hidden: From :func:`add`.
        added: (..., K), contiguous, or None: what the gradient with respect to ``x`` is added to, in place.
    """
    adapter, kept = _describe(a, b, scaling)
    gradient, x = gradient.contiguous(), x.contiguous()
    found = [torch.empty_like(t) if want else None for t, want in zip((*kept,), wanted[1:], strict=True)]
    found.insert(0, added if added is not None or not wanted[0] else torch.empty_like(x))
    pointers = [*(t.data_ptr() for t in (gradient, x, hidden)), None if added is None else added.data_ptr()]
    pointers += [None if t is None else t.data_ptr() for t in found]
    run, rows = native.library().lowbit_low_rank_gradients, hidden.shape[0]
    native._check(run(ctypes.addressof(adapter), *pointers, rows, native.DTYPES[x.dtype], native._threads()))
    return found
