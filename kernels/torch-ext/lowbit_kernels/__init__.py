"""Triton kernels over packed low-bit weights (1 to 8 bits, normal floats, FP4, learned codebooks, ternary).

:func:`linear`, :func:`input_gradient`, :func:`dequantize` and :func:`embedding` take a packed weight as plain tensors:
``weight`` (N, lanes), int16, its ``companions`` in stored order, the text of the ``format`` and ``in_features`` K (a
packed row may be longer than K). :func:`grouped_linear` and :func:`grouped_input_gradient` take those of a layer's
experts, stacked. :mod:`.plain` has the same functions in plain PyTorch; they are the specification.

Activations are float16, bfloat16 or float32; sums are float32, deterministic, in an order that depends on the shape
alone. Nothing here is differentiable by itself: the caller joins :func:`linear` and :func:`input_gradient`.
"""

import functools

import torch
import triton

from . import forms, plain, tuning
from .fast import FastTiles, fast_linear, fast_tiles
from .fast_pairs import has_pairs
from .fast_scaled import in_weights
from .forms import Device
from .grouped import grouped_input_gradient, grouped_linear
from .layout import Layout, even, name_tensors, on_device, parse
from .matmul import add_shares, gemm_kernel, gemv_kernel
from .rows import input_gradient_kernel, rows_kernel
from .tiles import (
    GEMV_ROWS,
    Tiles,
    along,
    along_inputs,
    at_most,
    fast_split,
    gradient_tiles,
    linear_tiles,
    row_tiles,
    wants_registers,
)

__all__ = [
    "DTYPES",
    "Layout",
    "Tiles",
    "dequantize",
    "embedding",
    "grouped_input_gradient",
    "grouped_linear",
    "input_gradient",
    "linear",
    "parse",
    "plain",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UNPACKED_WEIGHTS = 2**25  # of these at most are written out at a time
SHARED_VALUES = 2**24  # of shares of gradients at most are kept at a time, or those of one tile


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    in_features: int,
    tiles: Tiles | None = None,
    form: str | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias``, (..., K) to (..., N), in the dtype of ``x``; the bias (N,) is cast to it first.

    Args:
        tiles: Sizes for the portable form, which is then the one that runs.
        form: Names of :mod:`.forms`, in order of preference, instead of the choice there.

    Raises:
        ValueError: if no form that was asked for can run this, with the reasons; for tiles that do not fit the format.
    """
    layout, N, K = parse(format), weight.shape[0], in_features
    M = x.numel() // max(1, x.shape[-1])
    if M * N == 0:
        return x.new_empty((*x.shape[:-1], N))
    device = forms.describe(x.device)
    name = forms.choose(device, layout, x.dtype, M, "portable" if tiles else form).name
    with on_device(x.device):
        if name == "unpacked":
            return _unpacked(x, weight, companions, bias, format, K)
        if name == "portable":
            return _portable(
                x, weight, companions, bias, layout, K, tiles or _tiles(device, layout, M, N, K, x.dtype), device
            )
        sizes, split = _fast_tiles(device, name, layout, M, N, K)
        return fast_linear(x, weight, companions, bias, format, K, name, sizes, split)


def _tiles(device: Device, layout: Layout, M: int, N: int, K: int, dtype: torch.dtype = torch.float16) -> Tiles:
    """Sizes for the portable form: those of a file, which are for half precision, or those of the rule."""
    if dtype == torch.float32:
        return linear_tiles(M, N, K, layout, device.warp, full=True)
    entry = tuning.find(device.architecture, "portable", layout, M, N, K, device.multiprocessors)
    if entry is None:
        return linear_tiles(M, N, K, layout, device.warp)
    steps = triton.cdiv(layout.row_lanes(K), entry.tiles["inputs"])
    return Tiles(**entry.tiles, split=at_most(entry.split, steps))


@functools.lru_cache(maxsize=4096)
def _ruled(form: str, M: int, N: int, K: int, layout: Layout, multiprocessors: int) -> tuple[FastTiles, int]:
    sizes = fast_tiles(M, layout, form)
    return sizes, fast_split(M, N, K, layout, sizes, multiprocessors)


def _fast_tiles(device: Device, form: str, layout: Layout, M: int, N: int, K: int) -> tuple[FastTiles, int]:
    """Sizes for a fast form, and the programs that share a sum: those of a file, or those of the rules."""
    entry = tuning.find(device.architecture, form, layout, M, N, K, device.multiprocessors)
    if (
        entry is None
        or (entry.tiles.get("scaled") and not in_weights(layout, form))
        or (entry.tiles.get("pairs") and not has_pairs(layout, form))
    ):
        return _ruled(form, M, N, K, layout, device.multiprocessors)
    sizes = FastTiles(**entry.tiles)
    return sizes, at_most(entry.split, triton.cdiv(K, 64 * sizes.blocks * sizes.spans))


def _unpacked(x, weight, companions, bias, format, K) -> torch.Tensor:
    """:func:`linear` by torch, on rows of W written out in the dtype of ``x``; torch decides how it sums."""
    N, step = weight.shape[0], max(1, UNPACKED_WEIGHTS // K)
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    for start in range(0, N, step):
        rows = torch.arange(start, min(N, start + step), device=x.device)
        part = None if bias is None else bias[start : start + step].to(x.dtype)
        values = _rows(rows, weight, companions, format, K, x.dtype, None)
        out[..., start : start + step] = torch.nn.functional.linear(x, values, part)
    return out


def _portable(x, weight, companions, bias, layout, K, tiles, device) -> torch.Tensor:
    if tiles.inputs % layout.step:
        raise ValueError(
            f"tiles take {tiles.inputs} lanes a step, but {layout.name} of {layout.bits} bits needs a multiple of"
            f" {layout.step}: give such a size for inputs"
        )
    N, packed = weight.shape[0], name_tensors(weight, companions, layout)
    rows = x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    target = torch.empty((tiles.split, M, N), dtype=torch.float32, device=x.device) if tiles.split > 1 else out
    apart = even(K, layout, packed.weight.data_ptr())
    across, grid = triton.cdiv(M, tiles.rows), (along(N, tiles.outputs, apart), tiles.split)
    gemv = M <= GEMV_ROWS and across == 1
    kernel, grid = (gemv_kernel, grid) if gemv else (gemm_kernel, (across, *grid))
    kernel[grid](
        *(rows, *packed, bias, target, M, N, K),
        EVEN=apart,
        LAYOUT=layout,
        SPLIT=tiles.split,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.outputs,
        BLOCK_L=tiles.inputs,
        num_warps=tiles.warps,
        **tiles.pipelined,
        **(device.registers if wants_registers(tiles.rows, layout, x.dtype == torch.float32) else {}),
    )
    if tiles.split > 1:
        add_shares(target, bias, out)
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
    device = forms.describe(gradient.device)
    tiles = tiles or gradient_tiles(M, N, K, layout, device.warp, gradient.dtype == torch.float32)
    apart = even(K, layout, packed.weight.data_ptr())
    step = max(tiles.rows, SHARED_VALUES // (apart * K)) if apart > 1 else M
    with on_device(gradient.device):
        for part, target in zip(rows.split(step), out.split(step), strict=True):
            m = part.shape[0]
            shares = torch.empty((apart, m, K), dtype=torch.float32, device=out.device) if apart > 1 else target
            input_gradient_kernel[
                (triton.cdiv(m, tiles.rows), along_inputs(K, tiles.inputs, layout, apart), max(1, apart))
            ](
                *(part, *packed, shares, m, N, K),
                EVEN=apart,
                LAYOUT=layout,
                BLOCK_M=tiles.rows,
                BLOCK_N=tiles.outputs,
                BLOCK_K=tiles.inputs,
                num_warps=tiles.warps,
                **device.registers,
            )
            if apart > 1:
                add_shares(shares, None, target)
    return out.view(*gradient.shape[:-1], K)


def _rows(index, weight, companions, format, K, dtype, tiles) -> torch.Tensor:
    layout, N = parse(format), weight.shape[0]
    packed = name_tensors(weight, companions, layout)
    R = N if index is None else index.numel()
    out = torch.empty((R, K), dtype=dtype, device=weight.device)
    if out.numel():
        device = forms.describe(weight.device)
        place = (device.warp, device.vendor == "nvidia", dtype == torch.float32)
        tiles, apart = tiles or row_tiles(R, K, layout, *place), even(K, layout, packed.weight.data_ptr())
        with on_device(weight.device):
            rows_kernel[(triton.cdiv(R, tiles.rows), along_inputs(K, tiles.inputs, layout, apart))](
                *(index, *packed, out, R, N, K),
                EVEN=apart,
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
