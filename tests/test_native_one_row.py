"""One row of activations in integers (AVX512-VBMI): how exact three digits are, and what is left to the other kernels.

With float activations every 32 inputs share a power of two, at most 2**-22 * 1.016 of the largest magnitude among them
(kernels/cpu/one_row.cpp), and are rounded to multiples of it. What follows is exact but for float32 roundings: one
each of a sum of a chunk (64 inputs or more), of its scale, and of every addition of chunks.
"""

import pytest
import torch
from test_native import DTYPES, HALF_UNIT, isa, packed  # noqa: F401

from hf_lowbit import native_backend as native
from hf_lowbit import reference

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

IN_INTEGERS = ("avx512bf16", "avx512vbmi")
GRIDS = [(32, False, "log8"), (64, True, "float16"), (256, False, "bfloat16"), (-1, True, "float32")]
SPECS = [
    f"int:bits={bits},group_size={group},symmetric={symmetric},scale_dtype={scale}"
    for bits in (2, 3, 4)
    for group, symmetric, scale in GRIDS
]


@pytest.fixture
def in_integers(isa):  # noqa: F811
    if isa not in IN_INTEGERS:
        pytest.skip(f"{isa} multiplies one row in float32")


def largest(x: torch.Tensor) -> torch.Tensor:
    """(K) magnitudes: for each input the largest of its 32 neighbours."""
    return torch.nn.functional.pad(x.abs(), (0, -len(x) % 32)).view(-1, 32).amax(1).repeat_interleave(32)[: len(x)]


@pytest.mark.parametrize("spec", SPECS)
def test_errors_are_those_of_24_bits_of_the_largest_neighbour(in_integers, spec):
    for number, (N, K) in enumerate([(1, 1), (6, 63), (4, 577), (9, 4096)]):
        weight, companions, text = packed(spec, N, K, number)
        exact = reference.dequantize(weight, companions, text, K, torch.float32).double()
        for dtype in DTYPES:
            x = torch.randn(K) * torch.exp2(torch.randint(-14, 0, (K,)).float())
            x[:: 1 + K // 5] *= 200  # a few inputs that dwarf the others
            x, bias = x.to(dtype), torch.randn(N).to(dtype)
            found = native.linear(x[None], weight, companions, bias, text, K)[0].double()
            wide, offset = x.double(), bias.double()
            expected = exact @ wide + offset
            digits = 1.016 * 2**-23 * exact.abs() @ largest(wide)
            roundings = (K // 64 + 8) * 2**-24 * (exact.abs() @ (wide.abs() + 2**-22 * largest(wide)) + offset.abs())
            assert ((found - expected).abs() <= digits + roundings + HALF_UNIT[dtype] * expected.abs()).all(), (
                K,
                dtype,
            )


def test_what_is_far_below_a_neighbour_counts_as_nothing_but_not_in_other_groups(in_integers):
    weight, companions, text = packed(SPECS[0], 5, 128)
    alone, beside = torch.zeros(2, 128)
    alone[3] = beside[3] = 1
    beside[4:32] = 2.0**-24
    run = lambda x: native.linear(x[None], weight, companions, None, text, 128)  # noqa: E731
    assert torch.equal(run(beside), run(alone))
    beside[32:] = 2.0**-24
    assert not torch.equal(run(beside), run(alone))


@pytest.mark.parametrize("size", [2.0**-120, float("inf"), float("nan")])
def test_what_digits_cannot_hold_is_left_to_the_other_kernels(in_integers, isa, size):  # noqa: F811
    weight, companions, text = packed(SPECS[0], 33, 577)
    x = torch.randn(1, 577)
    x[0, 320:352] *= size
    found = native.linear(x, weight, companions, None, text, 577)
    assert native.library().lowbit_force_isa(b"avx512vnni") == 0
    expected = native.linear(x, weight, companions, None, text, 577)
    assert torch.equal(found, expected) if size < 1 else torch.equal(found.isnan(), expected.isnan())
    assert not torch.equal(native.linear(x.fill_(1 / 3), weight, companions, None, text, 577), found)


@pytest.mark.parametrize("spec", [*SPECS, "int:bits=8,group_size=32,symmetric=False", "nf:bits=4"])
@pytest.mark.parametrize("run", [native.linear, native.linear_int8])
def test_zeros_give_the_bias_and_threads_do_not_matter(isa, spec, run):  # noqa: F811
    weight, companions, text = packed(spec, 1203, 200)
    bias, x = torch.randn(1203), torch.randn(1, 200)
    assert torch.equal(run(torch.zeros(1, 200), weight, companions, bias, text, 200)[0], bias)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(run(x, weight, companions, bias, text, 200))
    torch.set_num_threads(before)
    assert torch.equal(*found)
