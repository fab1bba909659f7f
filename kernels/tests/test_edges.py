"""What tolerances do not show: numbers that are not finite, shapes at the ends, and gradients of the plain twins."""

import lowbit_kernels
import pytest
import torch
from lowbit_kernels import layout, plain
from problems import FP16, FP32, packed
from support.tolerance import check_sum, weight_error

from hf_lowbit.formats import parse_format

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
FORMATS = ("int:bits=4", "int:bits=3,symmetric=True", "nf:bits=4", "ternary:bits=1.58")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("M", [2, 18])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_stays_in_its_row_and_is_never_lost(format, M, value, device):
    """One such input: its row is what the twin says, NaN, an infinity or not; all other rows do not change."""
    format, N, K = parse_format(format), 24 if "ternary" in format else 17, 70
    weight, companions = packed(format, N, K, device)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device)
    clean = lowbit_kernels.linear(x, weight, companions, None, format.spec, K)
    x[1, K - 1] = value
    result = lowbit_kernels.linear(x, weight, companions, None, format.spec, K)
    twin = plain.linear(x, weight, companions, None, format.spec, K)
    others = [i for i in range(M) if i != 1]
    assert torch.equal(result[others], clean[others])
    assert not result[1].isfinite().any()
    assert torch.equal(result[1].isnan(), twin[1].isnan()) and torch.equal(
        result[1].sign().nan_to_num(), twin[1].sign().nan_to_num()
    )
    gradient = torch.ones(M, N, device=device)
    gradient[1, N - 1] = value
    back = lowbit_kernels.input_gradient(gradient, weight, companions, format.spec, K)
    twin = plain.input_gradient(gradient, weight, companions, format.spec, K)
    assert back[others].isfinite().all() and torch.equal(back.isnan(), twin.isnan())


def test_sums_beyond_float16_become_infinite(device):
    """Sums are float32 inside: only a result that does not fit is lost, and with its sign."""
    format, N, K = parse_format("int:bits=8,symmetric=True,scale_dtype=float32"), 16, 128
    weight, companions = packed(format, N, K, device)
    x = torch.full((2, K), 16384.0, dtype=FP16, device=device)
    result = lowbit_kernels.linear(x, weight, companions, None, format.spec, K)
    exact = x.double() @ plain.dequantize(weight, companions, format.spec, K, FP32).double().T
    beyond = exact.abs() > 65536
    assert beyond.any() and not result.isnan().any()
    assert torch.equal(result[beyond], torch.where(exact[beyond] > 0, torch.inf, -torch.inf).to(FP16))


@pytest.mark.parametrize("format", ["int:bits=4", "codebook:bits=3"])
def test_many_rows(format, device):
    """More rows than any tile has, and not a multiple of one."""
    format, M, N, K = parse_format(format), 521, 18, 65
    weight, companions = packed(format, N, K, device)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(device)
    lay = lowbit_kernels.parse(format.spec)
    named = layout.name_tensors(weight, companions, lay)
    values, error = plain.weight_values(named, lay, K), weight_error(named, lay)
    check_sum(lowbit_kernels.linear(x, weight, companions, None, format.spec, K), x, values.T, FP32, K, error)
    back = lowbit_kernels.input_gradient(x[:, :N].contiguous(), weight, companions, format.spec, K)
    check_sum(back, x[:, :N], values, FP32, N, error)


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_the_plain_twins(format, device):
    format, N, K = parse_format(format), 3, 11
    weight, companions = packed(format, N, K, device)
    x = torch.randn(2, K, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, device=device, requires_grad=True)
    arguments = (weight, companions)
    assert torch.autograd.gradcheck(lambda x, b: plain.linear(x, *arguments, b, format.spec, K), (x, bias))
    gradient = torch.randn(2, N, dtype=torch.float64, device=device)
    plain.linear(x, *arguments, bias, format.spec, K).backward(gradient)
    twin = plain.input_gradient(gradient, *arguments, format.spec, K)
    torch.testing.assert_close(x.grad, twin, rtol=1e-12, atol=1e-12)


def test_tiles_that_cut_a_step_of_a_format_are_refused(device):
    format = parse_format("int:bits=5")
    weight, companions = packed(format, 8, 128, device)
    tiles = lowbit_kernels.Tiles(1, 16, 16)
    with pytest.raises(ValueError, match=r"tiles take 16 lanes a step, but int of 5 bits needs a multiple of 32"):
        lowbit_kernels.linear(torch.ones(1, 128, device=device), weight, companions, None, format.spec, 128, tiles)
