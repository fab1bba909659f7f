"""Gradients and bfloat16 by the CPU kernels against plain PyTorch: sizes beyond a panel, tight memory, threads.

Bounds are those of ``test_native.py``. A product in bfloat16 has rounded each decoded weight once.
"""

import ctypes
import sys

import pytest
import torch
from guarded import Guarded
from test_native import DTYPES, INT4, bound, isa, packed, panels  # noqa: F401
from test_native_edges import SPECS, threads

from hf_lowbit import native_backend as native
from hf_lowbit import reference

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

WIDE = (native.FEW_BFLOAT16_ROWS, 270)  # rows multiplied in bfloat16; 270: more than meet a panel at once


@pytest.fixture
def own(isa, panels, monkeypatch):  # noqa: F811
    """Nothing goes to torch's product but bfloat16 where the library has none."""
    monkeypatch.setattr(native, "FEW_GRADIENT_ROWS", {isa: sys.maxsize})
    monkeypatch.setattr(native, "_multiplies_tiles", lambda: False)


def wrong(found, left, right, offset, dtype):
    """Elements of ``found`` that are not ``left @ right.T + offset`` within the bound."""
    exact = left.double() @ right.T + offset
    error = (found.double() - exact).abs()
    return int((~(error <= bound(left.double(), right, offset, dtype, len(left) >= WIDE[0]))).sum())


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_plain_pytorch(isa, own, spec):  # noqa: F811
    for number, (N, K) in enumerate(((1, 1), (33, 700), (300, 65))):
        weight, companions, text = packed(spec, N, K, number)
        exact = reference.dequantize(weight, companions, text, K, torch.float32).double()
        for dtype in DTYPES:
            for M in (1, 7, *(WIDE if number else ())):
                gradient = torch.randn(M, N).to(dtype)
                found = native.input_gradient(gradient, weight, companions, text, K)
                assert found.dtype == dtype and found.shape == (M, K)
                assert not wrong(found, gradient, exact.T, torch.zeros(K), dtype), (N, K, M, dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_many_rows_of_bfloat16_are_multiplied_as_by_plain_pytorch(isa, own, spec):  # noqa: F811
    for number, (N, K) in enumerate(((1, 1), (300, 65), (33, 700))):
        weight, companions, text = packed(spec, N, K, number)
        exact = reference.dequantize(weight, companions, text, K, torch.float32).double()
        for M in WIDE:
            x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
            for given, offset in ((bias, bias.double()), (None, torch.zeros(N).double())):
                found = native.linear(x, weight, companions, given, text, K)
                assert not wrong(found, x, exact, offset, torch.bfloat16), (N, K, M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [INT4, "int:bits=3,group_size=16", "ternary:bits=1.58"])
def test_threads_and_neighbours_change_no_bit(isa, own, spec, dtype):  # noqa: F811
    weight, companions, text = packed(spec, 600, 900)
    x, gradient, results = torch.randn(100, 900).to(dtype), torch.randn(280, 600).to(dtype), []
    for number in (1, 2, 5):
        before = threads(number)
        found = [native.linear(x, weight, companions, None, text, 900)]
        results.append([*found, native.input_gradient(gradient, weight, companions, text, 900)])
        torch.set_num_threads(before)
    if native._product_dtype(dtype) != torch.float32 and (isa != "avx512bf16" or "ternary" in spec):
        return  # torch multiplies, in an order of its own
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    rows = slice(7, 47)
    assert torch.equal(results[0][0][rows], native.linear(x[rows], weight, companions, None, text, 900))
    assert torch.equal(results[0][1][rows], native.input_gradient(gradient[rows], weight, companions, text, 900))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_outside_of_a_tensor_is_touched(isa, spec, at_end):  # noqa: F811
    for number, (N, K) in enumerate(((1, 1), (63, 65), (65, 577), (257, 63))):
        for dtype in DTYPES:
            guard = Guarded(at_end)
            weight, companions, text = packed(spec, N, K, number)
            described = native.describe(guard(weight), [guard(t) for t in companions], text, K)
            exact = reference.dequantize(weight, companions, text, K, torch.float32).double()
            for M in (1, WIDE[0] + 1):
                gradient, x = guard(torch.randn(M, N).to(dtype)), guard(torch.randn(M, K).to(dtype))
                pairs = (
                    (native.library().lowbit_input_gradient, gradient, exact.T, (gradient.data_ptr(),)),
                    (native.library().lowbit_linear, x, exact, (x.data_ptr(), None)),
                )
                for function, left, right, given in pairs:
                    out = guard(torch.empty(M, len(right)).to(dtype))
                    assert function(described.pointer, *given, out.data_ptr(), M, native.DTYPES[dtype], 1) == 0
                    guard.check()
                    assert not wrong(out, left, right, torch.zeros(len(right)), dtype), (N, K, M, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", [INT4, "nf:bits=4", "int:bits=7,group_size=16", "ternary:bits=1.58"])
def test_what_is_not_finite_stays_in_its_row(isa, own, spec, value):  # noqa: F811
    weight, companions, text = packed(spec, 17, 100)
    for M, dtype in ((3, torch.float32), (40, torch.float32), (40, torch.bfloat16)):
        left = {"x": torch.randn(M, 100).to(dtype), "gradient": torch.randn(M, 17).to(dtype)}
        for t in left.values():
            t[1, 16] = value
        found = native.linear(left["x"], weight, companions, None, text, 100)
        expected = reference.linear(left["x"], weight, companions, None, text, 100)
        assert torch.equal(found.isfinite(), expected.isfinite())
        found = native.input_gradient(left["gradient"], weight, companions, text, 100)
        expected = reference.input_gradient(left["gradient"], weight, companions, text, 100)
        assert torch.equal(found.isfinite(), expected.isfinite())


def test_unaligned_and_strided_gradients_give_the_same(isa, own):  # noqa: F811
    weight, companions, text = packed(INT4, 130, 33)
    for dtype in DTYPES:
        gradient = torch.randn(40, 131).to(dtype)[:, 1:]
        expected = native.input_gradient(gradient.contiguous(), weight, companions, text, 33)
        assert torch.equal(native.input_gradient(gradient, weight, companions, text, 33), expected)
        assert torch.equal(native.input_gradient(gradient.T.contiguous().T, weight, companions, text, 33), expected)


@pytest.mark.parametrize(("few", "torch_multiplies"), [(2, True), (sys.maxsize, False)])
def test_gradients_go_to_panels_or_to_torch(isa, monkeypatch, few, torch_multiplies):  # noqa: F811
    calls, decoded = [], native._decoded
    monkeypatch.setattr(native, "FEW_GRADIENT_ROWS", {isa: few})
    monkeypatch.setattr(native, "_decoded", lambda *arguments: calls.append(1) or decoded(*arguments))
    weight, companions, text = packed(INT4, 33, 70)
    native.input_gradient(torch.randn(4, 33), weight, companions, text, 70)
    assert bool(calls) == torch_multiplies


def test_bad_arguments_are_refused_and_nothing_is_touched():
    library, (weight, companions, text) = native.library(), packed(INT4, 6, 64)
    good = native.describe(weight, companions, text, 64)
    gradient, out = torch.ones(2, 6), torch.full((2, 64), 7.0)
    record = native._Weight.from_buffer_copy(good.record)
    record.inputs = 0
    for weight_pointer, given, to, m, dtype, count, error in [
        *((ctypes.addressof(record), gradient, out, 2, 0, 1, -1), (None, gradient, out, 2, 0, 1, -1)),
        *((good.pointer, None, out, 2, 0, 1, -2), (good.pointer, gradient, None, 2, 0, 1, -2)),
        *((good.pointer, gradient, out, -1, 0, 1, -2), (good.pointer, gradient, out, 2**62, 0, 1, -2)),
        *((good.pointer, gradient, out, 2, 3, 1, -2), (good.pointer, gradient, out, 2, 0, 0, -2)),
    ]:
        pointers = [None if t is None else t.data_ptr() for t in (given, to)]
        assert library.lowbit_input_gradient(weight_pointer, *pointers, m, dtype, count) == error
    assert (out == 7).all()
