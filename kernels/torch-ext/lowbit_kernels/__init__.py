"""Triton kernels over packed low-bit weights (1 to 8 bits, normal floats, FP4, learned codebooks, ternary).

:func:`linear`, :func:`input_gradient`, :func:`dequantize` and :func:`embedding` take a packed weight as plain tensors:
``weight`` (N, lanes), int16, its ``companions`` in stored order, the text of the ``format`` and ``in_features`` K (a
packed row may be longer than K). :mod:`.plain` has the same functions in plain PyTorch; they are the specification.

Activations are float16, bfloat16 or float32; sums are float32, deterministic, in an order that depends on the shape
alone. Nothing here is differentiable by itself: the caller joins :func:`linear` and :func:`input_gradient`.
"""

import contextlib

import torch
import triton

from . import plain
from .layout import Layout, name_tensors, parse
from .matmul import add_kernel, gemm_kernel, gemv_kernel
from .rows import input_gradient_kernel, rows_kernel
from .tiles import GEMV_ROWS, Tiles, gradient_tiles, linear_tiles, row_tiles

__all__ = ["DTYPES", "Layout", "Tiles", "dequantize", "embedding", "input_gradient", "linear", "parse", "plain"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ADD_BLOCK = 1024


def _on(device: torch.device):
    """Triton launches on the current device: makes ``device`` that."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    in_features: int,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias``, (..., K) to (..., N), in the dtype of ``x``; the bias (N,) is cast to it first."""
    layout, N, K = parse(format), weight.shape[0], in_features
    packed = name_tensors(weight, companions, layout)
    rows = x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out.view(*x.shape[:-1], N)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    tiles = tiles or linear_tiles(M, N, K, layout)
    target = torch.empty((tiles.split, M, N), dtype=torch.float32, device=x.device) if tiles.split > 1 else out
    across, along = triton.cdiv(M, tiles.rows), triton.cdiv(N, tiles.outputs)
    gemv = M <= GEMV_ROWS and across == 1
    kernel, grid = (gemv_kernel, (along, tiles.split)) if gemv else (gemm_kernel, (across, along, tiles.split))
    with _on(x.device):
        kernel[grid](
            *(rows, *packed, bias, target, M, N, K),
            LAYOUT=layout,
            SPLIT=tiles.split,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.outputs,
            BLOCK_L=tiles.inputs,
            num_warps=tiles.warps,
        )
        if tiles.split > 1:
            grid = (triton.cdiv(M * N, _ADD_BLOCK),)
            add_kernel[grid](target, bias, out, M, N, SPLIT=tiles.split, BLOCK=_ADD_BLOCK)
    return out.view(*x.shape[:-1], N)


def input_gradient(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    format: str,
    in_features: int,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``gradient @ W``, (..., N) to (..., K), in the dtype of ``gradient``, straight from the packed weight."""
    layout, N, K = parse(format), weight.shape[0], in_features
    packed = name_tensors(weight, companions, layout)
    rows = gradient.reshape(-1, N).contiguous()
    M = rows.shape[0]
    out = torch.empty((M, K), dtype=gradient.dtype, device=gradient.device)
    if out.numel() == 0:
        return out.view(*gradient.shape[:-1], K)
    tiles = tiles or gradient_tiles(M, N, K)
    with _on(gradient.device):
        input_gradient_kernel[(triton.cdiv(M, tiles.rows), triton.cdiv(K, tiles.inputs))](
            *(rows, *packed, out, M, N, K),
            LAYOUT=layout,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.outputs,
            BLOCK_K=tiles.inputs,
            num_warps=tiles.warps,
        )
    return out.view(*gradient.shape[:-1], K)


def _rows(index, weight, companions, format, K, dtype, tiles) -> torch.Tensor:
    layout, N = parse(format), weight.shape[0]
    packed = name_tensors(weight, companions, layout)
    R = N if index is None else index.numel()
    out = torch.empty((R, K), dtype=dtype, device=weight.device)
    if out.numel():
        tiles = tiles or row_tiles(R, K)
        with _on(weight.device):
            rows_kernel[(triton.cdiv(R, tiles.rows), triton.cdiv(K, tiles.inputs))](
                *(index, *packed, out, R, N, K),
                LAYOUT=layout,
                BLOCK_R=tiles.rows,
                BLOCK_K=tiles.inputs,
                num_warps=tiles.warps,
            )
    return out


def dequantize(
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    format: str,
    in_features: int,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``W`` (N, K), computed in float32 and rounded to ``dtype`` once."""
    return _rows(None, weight, companions, format, in_features, dtype, tiles)


def embedding(
    index: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    format: str,
    in_features: int,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``W[index]`` (..., K) in ``dtype`` for ``index`` (...), integer.

    Raises:
        RuntimeError: for an index outside the table; on a GPU as an asynchronous device assertion.
    """
    flat = index.reshape(-1).contiguous()
    torch._assert_async(((flat >= 0) & (flat < weight.shape[0])).all(), "index out of range")
    return _rows(flat, weight, companions, format, in_features, dtype, tiles).view(*index.shape, in_features)
