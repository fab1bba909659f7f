"""A fixed rotation of a layer's inputs that spreads what stands out: random signs, then Hadamard matrices.

``R = diag(s) (H_r kron H_b) / sqrt(r b)`` on each block of ``r b`` consecutive inputs. Rounding ``W R`` instead of W,
and multiplying ``x R`` with it, is the same product; but no single weight or input is large any more (incoherence:
QuIP, Chee et al., 2023; QuaRot, Ashkboos et al., 2024). Nothing is stored: signs are a hash of an input's number, and
orders follow from the number of inputs. docs/format.md has both, with test vectors.

``b`` is a power of two (Sylvester, 1867) and r the order of a Paley matrix (1933), 1 where K is a power of two itself;
a dimension that has no such factors, an odd one for instance, is transformed in blocks, of one input if need be. Here
it is a few small products, in plain PyTorch, differentiable; :mod:`hf_lowbit.lowbit_kernels.hadamard`, which cannot
be imported without Triton, has a kernel of the same for GPUs. :func:`hf_lowbit.ops.rotate` chooses.
"""

import functools
import math

import torch

MAX_SMALL = 64
"""Largest r, and largest power of two that is multiplied as one matrix."""
MAX_BLOCK = 4096


@functools.cache
def signs(features: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> torch.Tensor:
    """s (K,): -1 where the lowest bit of a 32-bit hash (MurmurHash3's finalizer) of ``k + 1`` is set, else 1."""
    h = torch.arange(1, features + 1, dtype=torch.int64)
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return (1.0 - 2.0 * (h & 1)).to(device, dtype)


def hadamard_matrix(order: int) -> torch.Tensor | None:
    """A Hadamard matrix of ``order``, float64 with entries +-1, or None where no construction here has one."""
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    found = _paley(order)
    if found is None and (half := hadamard_matrix(order // 2)) is not None:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return found


def _paley(order: int) -> torch.Tensor | None:
    """By Paley's constructions over prime fields, or None; powers of two are Sylvester's."""
    for q in (order - 1, order // 2 - 1):
        prime = q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))
        if not prime or order & (order - 1) == 0 or (q == order - 1) != (q % 4 == 3):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0.0 if i == 0 else 1.0 if i in squares else -1.0 for i in range(q)]).double()
        core = torch.ones(order if q == order - 1 else order // 2, dtype=torch.float64).diag() * 0
        core[0, 1:] = core[1:, 0] = 1
        core[1:, 1:] = character[(torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q]
        if q % 4 == 3:
            core[1:, 0] = -1
            return core + torch.eye(order, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


@functools.cache
def factor(features: int) -> tuple[int, int]:
    """``(r, b)``: the longest block of at most 4096 that divides ``features``, with r = 1 or at most 64, not a power of
    two; among equally long ones that with the smallest r."""
    best = (1, 1)
    for r in (1, *range(12, min(MAX_SMALL, features) + 1, 4)):
        if features % r or (r > 1 and (r & (r - 1) == 0 or hadamard_matrix(r) is None)):
            continue
        b = (features // r) & -(features // r)  # the largest power of two in it
        while r * b > MAX_BLOCK:
            b //= 2
        if b and r * b > best[0] * best[1]:
            best = (r, b)
    return best


@functools.cache
def _matrices(features: int, dtype: torch.dtype, device: torch.device) -> list[tuple[int, int, torch.Tensor]]:
    """The factors of ``H_r kron H_b``, each orthogonal: r's, and those of b's powers of two of at most 64.

    Each with its order and the product of the orders to its right.
    """
    r, b = factor(features)
    orders = [r]
    while b > MAX_SMALL:
        orders, b = [*orders, MAX_SMALL], b // MAX_SMALL
    orders, found = [*orders, b], []
    for i, n in enumerate(orders):
        if n > 1:
            found.append((n, math.prod(orders[i + 1 :]), (hadamard_matrix(n) / n**0.5).to(device, dtype)))
    return found


def rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """``x R``, or ``x R^T``, of (..., K), floating point, in its dtype; sums in float32, or wider for wider x."""
    K = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = signs(K, wide.dtype, wide.device)
    value = (wide if inverse else wide * s).reshape(-1, K)
    for n, right, matrix in _matrices(K, wide.dtype, wide.device):
        matrix = matrix if inverse else matrix.T  # from the left: the transposed one
        value = torch.matmul(matrix, value.reshape(-1, n, right)) if right > 1 else value.reshape(-1, n) @ matrix.T
    value = value.reshape(-1, K)
    return (value * s if inverse else value).reshape(x.shape).to(x.dtype)
