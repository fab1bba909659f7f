"""Kernels whose output runs along the inputs of ``W``: the dequantized weight, rows of it, and ``gradient @ W``.

They walk the packed rows in natural order (:mod:`.decode`), so that they write runs of neighbouring elements.
"""

import triton
import triton.language as tl

from .decode import load_values


@triton.jit
def rows_kernel(
    index,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    out,
    R,
    N,
    K,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(R, BLOCK_R), cdiv(K, BLOCK_K)). ``out`` (R, K) gets the rows ``index`` (R,), or all if it is None.

    A row outside the table is not read; it comes out as NaN.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    if index is None:
        row = r
    else:
        row = tl.load(index + r, mask=r < R, other=0).to(tl.int64)
    inside = (row >= 0) & (row < N)
    value = load_values(weight, scales, scale_range, zeros, levels, row, k, inside & (r < R) & (k < K), K, LAYOUT)
    value = tl.where(inside, value, float("nan"))
    tl.store(out + r * K + k, value.to(out.dtype.element_ty), mask=(r < R) & (k < K))


@triton.jit
def input_gradient_sum(
    gradient_row,
    seen,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    first,
    N,
    k,
    K,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums (BLOCK_M, BLOCK_K) of rows of a gradient (.., N) times rows ``first`` to ``first + N`` of W.

    ``gradient_row`` points at rows, (BLOCK_M, 1), of which those ``seen`` exist; ``k`` (1, BLOCK_K) are inputs.
    """
    total = tl.zeros((gradient_row.shape[0], k.shape[1]), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row = first + n[:, None].to(tl.int64)
        here = (n[:, None] < N) & (k < K)
        value = load_values(weight, scales, scale_range, zeros, levels, row, k, here, K, LAYOUT)
        outputs = tl.load(gradient_row + n[None, :], mask=seen & (n[None, :] < N), other=0)
        total = tl.dot(outputs, value.to(outputs.dtype), total, input_precision="ieee")
    return total


@triton.jit
def input_gradient_kernel(
    gradient,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    out,
    M,
    N,
    K,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)): ``out`` (M, K) = ``gradient`` (M, N) @ W, summed in float32."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    total = input_gradient_sum(
        *(gradient + m * N, m < M, weight, scales, scale_range, zeros, levels, 0, N, k, K, LAYOUT, BLOCK_N),
    )
    tl.store(out + m * K + k, total.to(out.dtype.element_ty), mask=(m < M) & (k < K))
