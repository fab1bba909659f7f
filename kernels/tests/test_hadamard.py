"""The Hadamard transform: its matrices, the kernel against the plain twin, and the twin against the definition."""

import math

import pytest
import torch
from hf_lowbit.lowbit_kernels.hadamard import factor, hadamard, hadamard_matrix, plain_hadamard

from hf_lowbit import backends, ops
from hf_lowbit.transforms.hadamard import rotate


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60])
def test_matrices_are_hadamard(order):
    matrix = hadamard_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=matrix.dtype))


def test_orders_without_a_construction():
    assert all(hadamard_matrix(order) is None for order in (3, 6, 10, 14, 43, 92))


@pytest.mark.parametrize(
    "features, block", [(1, 1), (64, 64), (576, 576), (1536, 1536), (577, 1), (11008, 256), (4096, 4096), (8192, 4096)]
)
def test_factors(features, block):
    r, b = factor(features)
    assert r * b == block and features % block == 0 and b & (b - 1) == 0


def _error_bound(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rounding of log2(block) float32 additions (and at most 64 of the matrix), then once to the dtype of ``x``."""
    depth = math.log2(block) + 64
    norm = x.double().norm(dim=-1, keepdim=True)  # no output exceeds the norm of its block
    return norm * (depth * 2**-24 + torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1), (5, 64), (2, 3, 96), (2, 48), (1, 36), (0, 32), (7, 512), (3, 65)])
def test_kernel_twin_and_definition_agree(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    r, b = factor(shape[-1])
    matrix = torch.kron(hadamard_matrix(r), hadamard_matrix(b)) / math.sqrt(r * b)
    expected = (x.double().reshape(-1, r * b) @ matrix).view(shape)
    for result in (hadamard(x), plain_hadamard(x)):
        assert result.dtype == dtype and result.shape == x.shape
        assert ((result.double() - expected).abs() <= _error_bound(x, r * b)).all()


@pytest.mark.parametrize("features", [32, 36, 576])
def test_the_inverse_undoes_it(features):
    torch.manual_seed(0)
    x = torch.randn(4, features)
    for transform in (hadamard, plain_hadamard):
        again = transform(transform(x), inverse=True)
        assert ((again - x).abs() <= 2 * _error_bound(x, features)).all()


def test_gradients_of_the_twin():
    x = torch.randn(2, 36, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plain_hadamard, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 96), (2, 36), (0, 32), (3, 65)])
def test_rotated_layers_call_the_kernel(shape, dtype, device):
    assert backends.select("rotate", "hadamard", device, dtype).backend == "triton"
    assert backends.select("rotate", "hadamard", device, torch.float64).backend == "torch"
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    bound = 2 * _error_bound(x, shape[-1])
    for inverse in (False, True):
        result = ops.rotate(x, inverse)
        assert result.dtype == dtype and ((result - rotate(x, inverse)).abs() <= bound).all()
        assert torch.equal(ops.rotate(x.detach(), inverse), result)
        direction = torch.randn_like(result)
        (gradient,) = torch.autograd.grad(result, x, direction)
        bound_of_gradient = 2 * _error_bound(direction, shape[-1])
        assert ((gradient - rotate(direction, not inverse)).abs() <= bound_of_gradient).all()
