"""Kernels whose output runs along the inputs of ``W``: the dequantized weight, rows of it, and ``gradient @ W``.

They walk the packed rows in natural order (:mod:`.decode`), so that they write runs of neighbouring elements; ternary
rows as :mod:`.ternary` says.
"""

import triton
import triton.language as tl

from .decode import load_lanes
from .natural import load_values, values_of
from .ternary import store_ternary_gradient, store_ternary_rows


@triton.jit(do_not_specialize=["R"])
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
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(R, BLOCK_R), cdiv(K, BLOCK_K)). ``out`` (R, K) gets the rows ``index`` (R,), or all if it is None.

    A row outside the table is not read; it comes out as NaN. Of ternary rows, BLOCK_K counts lanes.
    """
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    if index is None:
        row = r
    else:
        row = tl.load(index + r, mask=r < R, other=0).to(tl.int64)
    inside = (row >= 0) & (row < N)
    if LAYOUT.ternary:
        store_ternary_rows(*(out, r, weight, scales, scale_range, levels, row, inside, R, K, EVEN, LAYOUT, BLOCK_K))
    else:
        value = load_values(
            *(weight, scales, scale_range, zeros, levels, row, inside & (r < R), tl.program_id(1) * BLOCK_K, K),
            *(out.dtype.element_ty, EVEN, LAYOUT, BLOCK_K),
        )
        tl.store(out + r * K + k, tl.where(inside, value, float("nan")), mask=(r < R) & (k < K))


@triton.jit
def _quarters(words, weight, K):
    """Four tiles that hold a quarter of the rows of ``words`` (BLOCK_N, lanes) each, every one of them in all threads.

    A load that reads nothing says in which: the compiler else leaves some of the threads without, or copies of others'.
    """
    ROWS: tl.constexpr = words.shape[0] // 4
    LANES: tl.constexpr = words.shape[1]
    even, odd = tl.split(words.reshape(2, 2, ROWS, LANES).permute(2, 3, 0, 1))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    place = weight + (tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :])
    never = tl.arange(0, LANES)[None, :] + K < 0
    return (
        tl.load(place, mask=never, other=first),
        tl.load(place, mask=never, other=second),
        tl.load(place, mask=never, other=third),
        tl.load(place, mask=never, other=fourth),
    )


@triton.jit
def input_gradient_sum(
    gradient_row,
    seen,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    row,
    N,
    first,
    K,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums (BLOCK_M, BLOCK_K) of rows of a gradient (.., N) times N rows of W from ``row``, at BLOCK_K inputs.

    ``gradient_row`` points at rows, (BLOCK_M, 1), of which those ``seen`` exist; ``first`` is the first input. A thread
    that loads 16 bytes of a 1-bit plane has 128 weights, more than it has registers for, and so have fewer in float32:
    they are decoded by quarters, in a loop that turns them around.
    """
    total = tl.zeros((gradient_row.shape[0], BLOCK_K), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        if BLOCK_N < 64 or (LAYOUT.planes[-1] > 1 and gradient_row.dtype.element_ty != tl.float32):
            n = start + tl.arange(0, BLOCK_N)
            outputs = tl.load(gradient_row + n[None, :], mask=seen & (n[None, :] < N), other=0)
            value = load_values(
                *(weight, scales, scale_range, zeros, levels, row + n[:, None].to(tl.int64), n[:, None] < N, first, K),
                *(outputs.dtype, EVEN, LAYOUT, BLOCK_K),
            )
            total = tl.dot(outputs, value, total, input_precision="ieee")
        else:
            PLANES: tl.constexpr = len(LAYOUT.planes)
            n = (start + tl.arange(0, BLOCK_N))[:, None]
            lanes = load_lanes(
                *(weight, row + n.to(tl.int64), first // 64 * LAYOUT.lanes, 0, n < N, K, 0, None),
                *(EVEN, LAYOUT, BLOCK_K // 64 * LAYOUT.lanes, 1),
            )
            words = ()
            for plane in tl.static_range(PLANES):
                words = words + _quarters(lanes[plane], weight, K)
            for quarter in tl.range(4, num_stages=1):
                m = start + quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
                outputs = tl.load(gradient_row + m[None, :], mask=seen & (m[None, :] < N), other=0)
                value = values_of(
                    *(words[0], words[4 % (4 * PLANES)], words[8 % (4 * PLANES)], scales, scale_range, zeros, levels),
                    *(row + m[:, None].to(tl.int64), m[:, None] < N, first, K, outputs.dtype, LAYOUT, BLOCK_K),
                )
                total = tl.dot(outputs, value, total, input_precision="ieee")
                turned = ()
                for i in tl.static_range(4 * PLANES):
                    turned = turned + (words[i // 4 * 4 + (i + 1) % 4],)  # noqa: RUF005
                words = turned
    return total


@triton.jit(do_not_specialize=["M"])
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
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)): ``out`` (M, K) = ``gradient`` (M, N) @ W, summed in float32.

    Of ternary rows, BLOCK_K counts lanes, and where ``EVEN`` is more than 1 the grid's third dimension shares.
    """
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    if LAYOUT.ternary:
        store_ternary_gradient(
            *(out, m, gradient + m * N, m < M, weight, scales, scale_range, levels, 0, M, N, K),
            *(EVEN, LAYOUT, BLOCK_N, BLOCK_K),
        )
    else:
        total = input_gradient_sum(
            *(gradient + m * N, m < M, weight, scales, scale_range, zeros, levels, 0, N),
            *(tl.program_id(1) * BLOCK_K, K, EVEN, LAYOUT, BLOCK_N, BLOCK_K),
        )
        tl.store(out + m * K + k, total.to(out.dtype.element_ty), mask=(m < M) & (k < K))
