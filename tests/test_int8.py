"""Activations in 8 bits: their definition, the plain kernel, and the CPU kernels on every instruction set.

Plain PyTorch and the CPU kernels multiply the same integers, so they differ by the rounding of float32 only. A kernel
adds, for each unit of u inputs (an exact integer below 2**23), scale * scale * (sum of codes * x - zero * sum of x);
plain PyTorch adds K products. With S the sum of |scale * x| * (|code| + |zero|) over a row, each is within
(K + 8) * 2**-24 * S of the exact value (Higham, Accuracy and Stability of Numerical Algorithms, 4.2; 8 for the
roundings of a term), and the kernel's scales may be off by a relative 2**-20 (`factors_of` in int8.cpp). Rounding to a
smaller dtype adds half a unit on either side.
"""

import pytest
import torch
from test_native import DTYPES, FORMATS, HALF_UNIT, INT4, SHAPES, isas, packed

from hf_lowbit import native_backend as native
from hf_lowbit import ops, reference
from hf_lowbit.backends import Problem, explain
from hf_lowbit.formats import parse_format
from hf_lowbit.formats.lookup import LookupFormat
from hf_lowbit.int8 import activation_group, dequantize_activations, int8_levels, quantize_activations

needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")
TOKENS = (2, 3, 4, 5, 7, 13)  # some that are multiplied at once, and more


@pytest.fixture(params=isas())
def isa(request):
    """Each instruction set of this processor in turn; the best one again afterwards."""
    assert native.library().lowbit_force_isa(request.param.encode()) == 0
    yield request.param
    native.library().lowbit_force_isa(isas()[0].encode())


def magnitudes(x, weight, companions, spec, K):
    """S of the module's text, (M, N), float64."""
    format = parse_format(spec)
    tensors = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    q = format.unpack(tensors, (weight.shape[0], K))
    if isinstance(format, LookupFormat):
        levels, steps = int8_levels(format.table(q.levels, torch.device("cpu")))
        q.levels = (levels.int().abs() + 256) * steps  # (level + 128) + 128, the zero point
        sizes = format.decode(q)
    elif format.name == "ternary":
        sizes = format.decode(q).abs() + format.decode(type(q)(torch.full_like(q.codes, 3), q.scales))
    else:
        zeros = q.zeros if q.zeros is not None else torch.full_like(q.scales, format.fixed_zero)
        sizes = format.by_group(
            lambda c, s, z: (c + z.unsqueeze(-1)) * s.unsqueeze(-1), q.codes.float(), q.scales, zeros
        )
    return quantized(x, spec).abs() @ sizes.double().abs().T


def quantized(x, spec):
    group = parse_format(spec).group_size
    return dequantize_activations(*quantize_activations(x, group), group).double()


def bound(x, weight, companions, bias, spec, K, exact, dtype):
    size = magnitudes(x, weight, companions, spec, K) + bias.double().abs()
    return (2 * (K + 8) * 2**-24 + 2**-20) * size + 2 * HALF_UNIT[dtype] * (exact.abs() + 2**-14)


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_size", "group"), [(16, 32), (32, 32), (64, 64), (128, 128), (1024, 128), (-1, 128)])
@pytest.mark.parametrize("K", [1, 63, 577])
def test_activations_move_by_half_a_step_at_most(group_size, group, K):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(K))
    codes, scales = quantize_activations(x, group_size)
    assert activation_group(group_size) == group
    assert codes.shape == (3, K) and codes.dtype == torch.int8 and scales.shape == (3, -(-K // group))
    assert codes.abs().amax() == 127  # the largest of a group is the end of its grid
    for g, part in enumerate(x.split(group, dim=1)):
        torch.testing.assert_close(scales[:, g], part.abs().amax(1) / 127, rtol=0, atol=0)
        steps = (part - codes[:, g * group : (g + 1) * group] * scales[:, g : g + 1]).abs() / scales[:, g : g + 1]
        assert (steps <= 0.5 + 127 * 2**-22).all()  # the products are rounded to float32


def test_what_is_not_finite_or_zero_has_codes_of_zero():
    x = torch.ones(3, 64)
    x[0, 3], x[1, 40], x[2, :32] = torch.inf, torch.nan, 0
    codes, scales = quantize_activations(x, 32)
    assert torch.equal(scales.isnan(), torch.tensor([[True, False], [False, True], [False, False]]))
    assert codes[0, :32].count_nonzero() == codes[1, 32:].count_nonzero() == codes[2, :32].count_nonzero() == 0
    assert (codes[0, 32:] == 127).all() and scales[2, 0] == 0


def test_levels_in_8_bits_are_near_the_levels():
    def error(text):
        levels = parse_format(text).levels()
        integers, steps = int8_levels(levels)
        assert integers.dtype == torch.int8 and 64 <= integers.int().abs().max() <= 127
        return ((integers * steps - levels).square().mean().sqrt() / levels.abs().max()).item()

    assert error("fp4:bits=4") == 0
    for bits in (2, 3, 4):
        assert error(f"nf:bits={bits}") < 0.5 / 64 / 3**0.5  # evenly spread errors with the coarsest step
    assert error("nf:bits=4") < 0.002
    integers, steps = int8_levels(torch.zeros(2, 4))
    assert not integers.any() and not (integers * steps).any()


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["int:bits=4,group_size=32", "int:bits=2,group_size=-1", "nf:bits=4", "ternary:bits=1.58"]
)
def test_the_plain_kernel_multiplies_what_was_rounded(spec):
    weight, companions, text = packed(spec, 7, 200)
    x, bias = torch.randn(2, 3, 200), torch.randn(7)
    found = reference.linear_int8(x, weight, companions, bias, text, 200)
    dense = reference.dequantize(weight, companions, text, 200, torch.float32)
    expected = quantized(x, text).float() @ dense.T + bias
    if spec.startswith("nf"):  # its levels are rounded as well: by at most half of the coarsest step
        largest = (quantized(x, text).abs().float() @ dense.abs().T.clamp_min(dense.abs().max())).max()
        assert 0 < (found - expected).abs().max() < largest * 0.5 / 64
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=200 * 2**-24 * 200)
    assert not torch.equal(found, reference.linear(x, weight, companions, bias, text, 200))


@needs_library
@pytest.mark.parametrize("spec", FORMATS)
def test_products_are_those_of_plain_pytorch(spec):
    for number, (N, K) in enumerate([*SHAPES, (40, 1100)]):
        weight, companions, text = packed(spec, N, K, number)
        dtype, many = DTYPES[number % 3], TOKENS[number % len(TOKENS)]
        for M, given in ((1, None), (many, torch.randn(N).to(dtype))):
            x = torch.randn(M, K).to(dtype)
            bias = torch.zeros(N) if given is None else given
            expected = reference.linear_int8(x, weight, companions, given, text, K).double()
            allowed = bound(x, weight, companions, bias, text, K, expected, dtype)
            for isa in isas():
                assert native.library().lowbit_force_isa(isa.encode()) == 0
                found = native.linear_int8(x, weight, companions, given, text, K)
                assert found.dtype == dtype and found.shape == (M, N)
                assert ((found.double() - expected).abs() <= allowed).all(), (isa, N, K, M)
    native.library().lowbit_force_isa(isas()[0].encode())


@needs_library
def test_results_depend_on_neither_threads_nor_neighbours(isa):
    for spec in (INT4, "int:bits=3,group_size=16", "ternary:bits=1.58"):
        weight, companions, text = packed(spec, 513, 1000)
        x, results, before = torch.randn(29, 1000), [], torch.get_num_threads()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.linear_int8(x, weight, companions, None, text, 1000))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        part = native.linear_int8(x[3:17], weight, companions, None, text, 1000)
        assert torch.equal(results[0][3:17], part)


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", [INT4, "nf:bits=4", "int:bits=7,group_size=16", "ternary:bits=1.58"])
def test_a_row_with_what_is_not_finite_is_nan(isa, spec, value):
    weight, companions, text = packed(spec, 17, 100)
    for M in (1, 3):
        x = torch.randn(M, 100)
        clean = native.linear_int8(x, weight, companions, None, text, 100)
        x[M // 2, 50] = value
        found = native.linear_int8(x, weight, companions, None, text, 100)
        others = [m for m in range(M) if m != M // 2]
        assert found[M // 2].isnan().all() and torch.equal(found[others], clean[others])
        assert torch.equal(found.isnan(), reference.linear_int8(x, weight, companions, None, text, 100).isnan())


@needs_library
def test_unaligned_and_strided_inputs_give_the_same(isa):
    weight, companions, text = packed(INT4, 33, 130)
    moved = torch.empty(weight.numel() + 1, dtype=torch.int16)[1:].view(weight.shape).copy_(weight)
    scales = (
        torch.empty(companions[0].numel() + 1, dtype=torch.uint8)[1:].view(companions[0].shape).copy_(companions[0])
    )
    x = torch.randn(4, 131)[:, 1:]
    expected = native.linear_int8(x.contiguous(), weight, companions, None, text, 130)
    assert torch.equal(native.linear_int8(x, moved, [scales, *companions[1:]], None, text, 130), expected)
    assert torch.equal(native.linear_int8(x.T.contiguous().T, weight, companions, None, text, 130), expected)


@needs_library
def test_more_rows_than_share_a_decoded_tile(isa):
    weight, companions, text = packed(INT4, 16, 64)
    x = torch.randn(1029, 64)
    together = native.linear_int8(x, weight, companions, None, text, 64)
    apart = [native.linear_int8(part, weight, companions, None, text, 64) for part in x.split(7)]
    assert torch.equal(together, torch.cat(apart))


@needs_library
def test_nothing_in_gives_nothing_out():
    weight, companions, text = packed(INT4, 6, 64)
    assert native.linear_int8(torch.empty(0, 64), weight, companions, None, text, 64).shape == (0, 6)
    assert native.linear_int8(torch.empty(2, 0, 64), weight, companions, torch.ones(6), text, 64).shape == (2, 0, 6)


@needs_library
def test_a_changed_table_is_seen():
    weight, companions, text = packed("codebook:bits=4,group_size=64", 8, 64)
    x = torch.randn(2, 64)
    before = native.linear_int8(x, weight, companions, None, text, 64)
    companions[-1].mul_(2)
    torch.testing.assert_close(native.linear_int8(x, weight, companions, None, text, 64), 2 * before, rtol=0, atol=0)


# -- the op ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_library)])
def test_the_op_has_a_fake_a_gradient_and_a_choice_of_kernels(backend):
    weight, companions, text = packed(INT4, 40, 96)
    x, bias = torch.randn(2, 3, 96, requires_grad=True), torch.randn(40, requires_grad=True)
    torch.library.opcheck(
        torch.ops.lowbit.linear_int8.default, (x, weight, companions, bias, text, 96, backend), test_utils="test_schema"
    )
    torch.library.opcheck(
        torch.ops.lowbit.linear_int8.default,
        (x, weight, companions, bias, text, 96, backend),
        test_utils="test_faketensor",
    )
    found = ops.linear_int8(x, weight, companions, bias, text, 96, backend)
    found.sum().backward()
    x_gradient, bias_gradient = x.grad, bias.grad
    x.grad = bias.grad = None
    ops.linear(x, weight, companions, bias, text, 96, backend).sum().backward()
    assert torch.equal(x_gradient, x.grad) and torch.equal(bias_gradient, bias.grad)  # straight through
    with torch.no_grad():
        assert torch.equal(ops.linear_int8(x, weight, companions, bias, text, 96, backend), found)
    assert dict(explain(Problem("linear_int8", text, "cpu", torch.float32), backend))[backend] is None
    with pytest.raises(RuntimeError, match="input has 64 features, the weight 96"):
        ops.linear_int8(torch.randn(2, 64), weight, companions, bias, text, 96, backend)
