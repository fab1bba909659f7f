"""Orthogonal Hadamard transforms of the last dimension, for incoherence processing (QuIP, QuaRot).

A Hadamard matrix ``H`` of order ``n`` has entries +-1 and ``H @ H.T = n I``; the transform is ``x @ H / sqrt(n)``, its
own inverse up to a transposition. Orders that are built here:

- powers of two, recursively (Sylvester, 1867): symmetric, computed by butterflies without a matrix;
- ``q + 1`` for primes ``q = 3 mod 4`` and ``2 (q + 1)`` for primes ``q = 1 mod 4`` (Paley, 1933): 12, 20, 28, 36, ...;
- Kronecker products of these: ``n = r * 2**p`` takes a matrix of the small order ``r`` and butterflies of ``2**p``.

A dimension with no such order (or a very long one) is transformed in blocks. :func:`factor` says what a dimension gets.
"""

import functools

import torch
import triton
import triton.language as tl

from .forms import describe
from .layout import on_device

MAX_SMALL = 64
"""Largest order ``r`` that is multiplied as a matrix."""
WARPS = 4


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of ``order`` by Paley's constructions over prime fields, float64, or None."""
    for q in (order - 1, order // 2 - 1):
        if not _is_prime(q) or q % 2 == 0 or (q == order - 1) != (q % 4 == 3):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0 if i == 0 else 1 if i in squares else -1 for i in range(q)], dtype=torch.float64)
        index = (torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q
        border = torch.ones(q + 1, q + 1, dtype=torch.float64)
        border[0, 0] = 0
        border[1:, 1:] = character[index]
        if q % 4 == 3:
            border[1:, 0] = -1
            return border + torch.eye(q + 1, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(border, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


@functools.cache
def hadamard_matrix(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of ``order``, float64 with entries +-1, or None where no construction here has one."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4:
        return None
    found = None if order & (order - 1) == 0 else _paley(order)
    if found is None and (half := hadamard_matrix(order // 2)) is not None:
        found = torch.kron(hadamard_matrix(2), half)
    return found


@functools.cache
def factor(features: int, max_block: int = 4096) -> tuple[int, int]:
    """``(r, b)``: a dimension of ``features`` is transformed in blocks of ``r * b``, with ``b`` a power of two.

    ``r`` is 1 or the order of a Paley matrix, at most :data:`MAX_SMALL`; the block is the longest of at most
    ``max_block`` that divides ``features``.
    """
    best = (1, 1)
    for r in range(1, min(MAX_SMALL, features) + 1):
        if features % r or (r > 1 and (r % 4 or r & (r - 1) == 0 or hadamard_matrix(r) is None)):
            continue
        rest = features // r
        b = rest & -rest  # the largest power of two in it
        while r * b > max_block:
            b //= 2
        if b and r * b > best[0] * best[1]:
            best = (r, b)
    return best


@triton.jit
def _stage(value, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sums and differences of the values that lie STEP apart, of ``value`` (BLOCK_R, BLOCK)."""
    pairs = tl.reshape(value, (BLOCK_R, BLOCK // (2 * STEP), 2, STEP))
    low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    mixed = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(mixed, (BLOCK_R, BLOCK))


@triton.jit(do_not_specialize=["rows"])
def butterfly_kernel(x, out, rows, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr, BLOCK_R: tl.constexpr):
    """Transforms each of ``rows`` runs of BLOCK = 2**STAGES values; grid (cdiv(rows, BLOCK_R),)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    place = r * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + place, mask=r < rows, other=0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        value = _stage(value, BLOCK_R, BLOCK, 1 << stage)
    tl.store(out + place, (value * scale).to(out.dtype.element_ty), mask=r < rows)


def sizes(block: int, warp: int = 32) -> dict[str, int]:
    """Constants of :func:`butterfly_kernel` for runs of ``block`` values: 8 values or more for each thread to load."""
    return {"BLOCK": block, "STAGES": block.bit_length() - 1, "BLOCK_R": max(1, 8 * WARPS * warp // block)}


def plain_hadamard(x: torch.Tensor, inverse: bool = False, max_block: int = 4096) -> torch.Tensor:
    """:func:`hadamard` in plain PyTorch: the specification, differentiable, on any device."""
    r, b = factor(x.shape[-1], max_block)
    value = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, r, b)
    step = 1
    while step < b:
        pairs = value.reshape(-1, r, b // (2 * step), 2, step)
        low, high = pairs.unbind(3)
        value = torch.stack([low + high, low - high], dim=3).reshape(-1, r, b)
        step *= 2
    if r > 1:
        value = _mix(value, r, inverse)
    return (value * (r * b) ** -0.5).reshape(x.shape).to(x.dtype)


def _mix(value: torch.Tensor, r: int, inverse: bool) -> torch.Tensor:
    """Multiplies the middle dimension of ``value`` (R, r, b) by the matrix of order ``r``, or its transpose."""
    matrix = hadamard_matrix(r).to(value.dtype).to(value.device)
    return torch.einsum("Rib,ij->Rjb", value, matrix.T if inverse else matrix)


def hadamard(x: torch.Tensor, inverse: bool = False, max_block: int = 4096) -> torch.Tensor:
    """``x @ (H_r kron H_b) / sqrt(r b)`` on each block of ``r * b`` values of the last dimension, see :func:`factor`.

    Args:
        x: (..., K), float16, bfloat16 or float32; the result has its dtype, sums are float32.
        inverse: Whether to undo the transform; the same for powers of two.
        max_block: Longest block.

    Returns:
        (..., K).
    """
    r, b = factor(x.shape[-1], max_block)
    runs = x.contiguous().view(-1, b)
    # The butterflies' sums stay in float32 where a matrix follows.
    out = torch.empty(runs.shape, dtype=x.dtype if r == 1 else torch.float32, device=x.device)
    constants = sizes(b, describe(x.device).warp)
    if out.numel():
        with on_device(x.device):
            butterfly_kernel[(triton.cdiv(runs.shape[0], constants["BLOCK_R"]),)](
                *(runs, out, runs.shape[0], (r * b) ** -0.5), **constants, num_warps=WARPS
            )
    if r > 1:
        out = _mix(out.view(-1, r, b), r, inverse)
    return out.reshape(x.shape).to(x.dtype)
