"""A packed linear for every expert: rows of x that are sorted by expert, each times the weight of its own.

Mixture-of-experts layers route a row to some of E experts. transformers sorts the rows by expert and hands over where
each expert's rows end, as ``torch.nn.functional.grouped_mm`` takes it; so do these functions. How many rows an expert
got stays on the device: a program finds its expert and its rows by itself, from the ends of all, and the grid has as
many programs as the worst case needs, which depends on shapes alone. The rest return at once. So nothing waits for the
device, graphs can be captured, and the result is the same every time: no atomics, and no split of the sum.

Rows behind the last end belong to no expert (transformers puts there what another process computes); they come out 0.

Weights of all experts are stacked, ``weight`` (E, N, lanes), and so is every companion, (E, ...); a row of W is row
``expert * N + n`` of the stack. The sums are those of :mod:`.matmul` and :mod:`.rows`, in their portable form. Not
here: routing, sorting, and gathering x by token instead of reading sorted rows.
"""

import torch
import triton
import triton.language as tl

from . import forms
from .decode import lanes_before, outputs_of, row_lanes
from .layout import Layout, Packed, even, name_tensors, on_device, parse
from .matmul import add_shares, gemm_sum, gemv_sum
from .rows import input_gradient_sum
from .ternary import store_ternary_gradient
from .tiles import GEMV_ROWS, Tiles, along, along_inputs, grouped_gradient_tiles, grouped_tiles, wants_registers


@triton.jit
def _find(ends, E, R, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of this program, its first row, and the end of its expert's rows; no rows where there is nothing to do.

    Expert E owns the rows behind the last end.
    """
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(ends + expert, mask=expert < E, other=R).to(tl.int32)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= E), other=0).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), R)
    count = tl.where(expert <= E, tl.maximum(tl.minimum(end, R) - begin, 0), 0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(tiles, 0)
    here = tl.program_id(0)
    mine = (here < behind) & (here >= behind - tiles)
    found = tl.sum(tl.where(mine, expert, 0), 0)
    start = tl.sum(tl.where(mine, begin + (here - behind + tiles) * BLOCK_M, 0), 0)
    stop = tl.sum(tl.where(mine, begin + count, 0), 0)
    return found, start, stop


@triton.jit(do_not_specialize=["R"])
def grouped_linear_kernel(
    x,
    ends,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    bias,
    out,
    E,
    R,
    N,
    K,
    RANGE: tl.constexpr,
    TABLE: tl.constexpr,
    GEMV: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Grid (tiles of rows, cdiv(N, BLOCK_N)): ``out`` (R, N); RANGE and TABLE are an expert's share of such tensors."""
    expert, start, stop = _find(ends, E, R, BLOCK_E, BLOCK_M)
    if start < stop:
        m = (start + tl.arange(0, BLOCK_M))[:, None]
        n = outputs_of(tl.program_id(1), BLOCK_N, EVEN, LAYOUT)
        lanes = tl.where(expert < E, row_lanes(K, EVEN, LAYOUT), 0)
        own = tl.minimum(expert, E - 1).to(tl.int64)
        if RANGE > 0:
            scale_range += own * RANGE
        if TABLE > 0:
            levels += own * TABLE
        x_row = x + m.to(tl.int64) * K
        row = (own * N + n)[:, None]
        before = lanes_before(own * N + tl.program_id(1), K, EVEN, LAYOUT)
        if GEMV:
            total = gemv_sum(
                *(x_row, m < stop, weight, scales, scale_range, zeros, levels, row, n[:, None] < N, K),
                *(before, 0, lanes, EVEN, LAYOUT, BLOCK_L, BLOCK_L),
            )
        else:
            total = gemm_sum(
                *(x_row, m < stop, weight, scales, scale_range, zeros, levels, row, n[:, None] < N, K),
                *(before, 0, lanes, EVEN, LAYOUT, BLOCK_L, BLOCK_L),
            )
        n = n[None, :]
        if bias is not None:
            added = tl.load(bias + own * N + n, mask=n < N, other=0).to(tl.float32)
            total += tl.where(expert < E, added, 0.0)
        tl.store(out + m.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=(m < stop) & (n < N))


@triton.jit(do_not_specialize=["R"])
def grouped_input_gradient_kernel(
    gradient,
    ends,
    weight,
    scales,
    scale_range,
    zeros,
    levels,
    out,
    E,
    R,
    N,
    K,
    RANGE: tl.constexpr,
    TABLE: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (tiles of rows, cdiv(K, BLOCK_K)): ``out`` (R, K) from ``gradient`` (R, N)."""
    expert, start, stop = _find(ends, E, R, BLOCK_E, BLOCK_M)
    if start < stop:
        m = (start + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
        k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        own = tl.minimum(expert, E - 1).to(tl.int64)
        if RANGE > 0:
            scale_range += own * RANGE
        if TABLE > 0:
            levels += own * TABLE
        outputs = tl.where(expert < E, N, 0)
        if LAYOUT.ternary:
            store_ternary_gradient(
                *(out, m, gradient + m * N, m < stop, weight, scales, scale_range, levels, own * N, R, outputs, K),
                *(EVEN, LAYOUT, BLOCK_N, BLOCK_K),
            )
        else:
            total = input_gradient_sum(
                *(gradient + m * N, m < stop, weight, scales, scale_range, zeros, levels),
                *(own * N, outputs, tl.program_id(1) * BLOCK_K, K, EVEN, LAYOUT, BLOCK_N, BLOCK_K),
            )
            tl.store(out + m * K + k, total.to(out.dtype.element_ty), mask=(m < stop) & (k < K))


def row_tiles_needed(R: int, E: int, rows: int) -> int:
    """The most tiles of ``rows`` rows that R rows of E experts, and the rows of none, can need.

    Of n groups that have rows, each leaves at most ``rows - 1`` places of its last tile empty.
    """
    groups = min(E + 1, R)
    return (R - groups) // rows + groups


def _shares(packed: Packed, layout: Layout, E: int) -> dict[str, int]:
    """How far apart experts lie in what all rows of an expert share; 0 where all experts share it."""
    ranges = 0 if packed.scale_range is None else packed.scale_range.numel() // E
    own_table = layout.name == "codebook" and layout.table == "tensor"
    return {"RANGE": ranges, "TABLE": 2**layout.bits if own_table else 0}


def _check(rows: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor, companions: list[torch.Tensor], width: int):
    E = weight.shape[0]
    if weight.ndim != 3 or ends.shape != (E,) or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"ends is {ends.dtype} {tuple(ends.shape)} for a weight {tuple(weight.shape)}: give the end of the rows of"
            " each of E experts as int32 or int64 (E,), and the experts' packed weights stacked, (E, N, lanes)"
        )
    if any(c.shape[:1] != (E,) for c in companions):
        raise ValueError(f"companions are {[tuple(c.shape) for c in companions]}: stack those of {E} experts, (E, ...)")
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"rows are {tuple(rows.shape)}, but the weights take (R, {width})")


def grouped_linear(
    x: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    bias: torch.Tensor | None,
    format: str,
    in_features: int,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``x[r] @ W[e].T + bias[e]`` for each row ``r`` of each expert ``e``.

    Args:
        x: (R, K), float16, bfloat16 or float32; rows sorted by expert. The result has its dtype; sums are float32.
        ends: (E,), int32 or int64, never decreasing: expert ``e`` has the rows from ``ends[e - 1]`` (0 for the first)
            to ``ends[e]``. It stays on the device and is not looked at by the host; ends beyond R count as R.
        weight: (E, N, lanes), int16.
        companions: The other stored tensors of the format, each stacked to (E, ...).
        bias: (E, N) or None; cast to the dtype of ``x``.
        format: Text of the format.
        in_features: K.
        tiles: Sizes of a tile; ``rows`` of at most 4 multiply without tensor cores, ``split`` is not used.

    Returns:
        (R, N); 0 in the rows behind the last end.

    Raises:
        ValueError: for tensors of other shapes.
    """
    _check(x, ends, weight, companions, in_features)
    layout, (E, N), R, K = parse(format), weight.shape[:2], x.shape[0], in_features
    packed = name_tensors(weight, companions, layout)
    out = torch.empty((R, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    device = forms.describe(x.device)
    place = (device.warp, device.vendor == "nvidia", x.dtype == torch.float32)
    tiles = tiles or grouped_tiles(triton.cdiv(R, E), N, K, layout, *place)
    apart = even(K, layout, packed.weight.data_ptr())
    with on_device(x.device):
        grouped_linear_kernel[(row_tiles_needed(R, E, tiles.rows), along(N, tiles.outputs, apart))](
            *(x.contiguous(), ends.contiguous(), *packed, bias, out, E, R, N, K),
            **_shares(packed, layout, E),
            GEMV=tiles.rows <= GEMV_ROWS,
            EVEN=apart,
            LAYOUT=layout,
            BLOCK_E=triton.next_power_of_2(E + 1),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.outputs,
            BLOCK_L=tiles.inputs,
            num_warps=tiles.warps,
            **tiles.pipelined,
            **(device.registers if wants_registers(tiles.rows, layout, x.dtype == torch.float32) else {}),
        )
    return out


def grouped_input_gradient(
    gradient: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    companions: list[torch.Tensor],
    format: str,
    in_features: int,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``gradient[r] @ W[e]``, (R, N) to (R, K), from the packed weights; arguments as in :func:`grouped_linear`."""
    _check(gradient, ends, weight, companions, weight.shape[1])
    layout, (E, N), R, K = parse(format), weight.shape[:2], gradient.shape[0], in_features
    packed = name_tensors(weight, companions, layout)
    out = torch.empty((R, K), dtype=gradient.dtype, device=gradient.device)
    if out.numel() == 0:
        return out
    device = forms.describe(gradient.device)
    place = (device.warp, device.vendor == "nvidia", gradient.dtype == torch.float32)
    tiles = tiles or grouped_gradient_tiles(triton.cdiv(R, E), N, K, layout, *place)
    apart = even(K, layout, packed.weight.data_ptr())
    shares = torch.empty((apart, R, K), dtype=torch.float32, device=out.device) if apart > 1 else out
    grid = (row_tiles_needed(R, E, tiles.rows), along_inputs(K, tiles.inputs, layout, apart), max(1, apart))
    with on_device(gradient.device):
        grouped_input_gradient_kernel[grid](
            *(gradient.contiguous(), ends.contiguous(), *packed, shares, E, R, N, K),
            **_shares(packed, layout, E),
            EVEN=apart,
            LAYOUT=layout,
            BLOCK_E=triton.next_power_of_2(E + 1),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.outputs,
            BLOCK_K=tiles.inputs,
            num_warps=tiles.warps,
            **device.registers,
        )
        if apart > 1:
            add_shares(shares, None, out)
    return out
