"""The branch of an adapter by the CPU kernels, alone and joined to its packed layer, against plain PyTorch.

Errors are bounded as in ``test_native.py``: two products one after the other err by at most the number of terms of
both, and of what is done to their result, times 2**-24 of the sum of magnitudes; then the dtype rounds.
"""

import ctypes

import pytest
import torch
from guarded import Guarded
from test_native import DTYPES, HALF_UNIT, INT4, isa, packed  # noqa: F401
from test_native_edges import threads
from torch import nn

from hf_lowbit import native_backend as native
from hf_lowbit import native_low_rank
from hf_lowbit.adapters import branch
from hf_lowbit.formats import parse_format
from hf_lowbit.linear import LowBitLinear

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

SIZES = [(1, 1, 1, 1), (5, 17, 33, 3), (49, 64, 100, 8), (7, 577, 65, 16), (100, 200, 7, 9)]  # M, K, N, r
SCALING = -0.7


def tensors(M, K, N, r, dtype):
    """result, x, a, b and the gradient of the sum."""
    shapes = ((M, N), (M, K), (r, K), (N, r), (M, N))
    return [torch.randn(s).to(torch.float32 if i in (2, 3) else dtype) for i, s in enumerate(shapes)]


def expected(result, x, a, b, gradient):
    """Exact values of the sum and of the gradients of x, a and b, each with the bound of its error before rounding."""
    result, x, a, b, g = (t.double() for t in (result, x, a, b, gradient))
    (M, K), (N, r) = x.shape, b.shape

    def chain(terms, *factors):
        value = SCALING * torch.linalg.multi_dot(factors)
        return value, (terms + 5) * 2**-24 * abs(SCALING) * torch.linalg.multi_dot([f.abs() for f in factors])

    value, error = chain(K + r, x, a.T, b.T)
    found = [(value + result, error + 2**-24 * result.abs())]
    return [*found, chain(N + r, g, b, a), chain(N + M, b.T, g.T, x), chain(K + M, g.T, x, a.T)]


def check(found, exact, dtype):
    (value, error), half = exact, HALF_UNIT[dtype]
    assert found.dtype == dtype
    assert ((found.double() - value).abs() <= (1 + half) * error + half * value.abs() + 2**-25).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_branch_and_gradients_are_those_of_plain_pytorch(isa, dtype):  # noqa: F811
    for size in SIZES:
        result, x, a, b, gradient = tensors(*size, dtype)
        exact = expected(result, x, a, b, gradient)
        assert native_low_rank.serves(result, x, a, b, torch.float32)
        out, hidden = native_low_rank.add(result, x, a, b, SCALING)
        found = native_low_rank.gradients(gradient, x, hidden, a, b, SCALING, (True, True, True))
        for tensor, value, kind in zip((out, *found), exact, (dtype, dtype, torch.float32, torch.float32), strict=True):
            check(tensor, value, kind)
        base = torch.randn_like(x)
        joined = (exact[1][0] + base.double(), exact[1][1] + 2**-24 * base.double().abs())
        found = native_low_rank.gradients(gradient, x, hidden, a, b, SCALING, (True, False, False), base)
        assert found[0] is base and found[1] is None and found[2] is None
        check(base, joined, dtype)
        again, _ = native_low_rank.add(result, x, a, b, SCALING, in_place=True)
        assert again is result and torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa, dtype):  # noqa: F811
    result, x, a, b, gradient = tensors(200, 300, 400, 8, dtype)
    results = []
    for number in (1, 2, 5):
        before = threads(number)
        out, hidden = native_low_rank.add(result, x, a, b, SCALING)
        results.append([out, *native_low_rank.gradients(gradient, x, hidden, a, b, SCALING, (True, True, True))])
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], others, strict=True))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_of_a_tensor_is_touched(isa, dtype, at_end):  # noqa: F811
    library, kind = native.library(), native.DTYPES[dtype]
    for M, K, N, r in SIZES:
        guard = Guarded(at_end)
        given = tensors(M, K, N, r, dtype)
        exact = expected(*given)
        result, x, a, b, gradient = (guard(t) for t in given)
        hidden, out = guard(torch.empty(M, -(-r // 8) * 8)), guard(torch.empty_like(result))
        found = [guard(torch.empty_like(t)) for t in (x, a, b)]
        adapter = native_low_rank._Adapter(a.data_ptr(), b.data_ptr(), N, K, r, SCALING)
        forward = [t.data_ptr() for t in (x, result, hidden, out)]
        backward = [*(t.data_ptr() for t in (gradient, x, hidden)), None, *(t.data_ptr() for t in found)]
        assert library.lowbit_low_rank(ctypes.addressof(adapter), *forward, M, kind, 1) == 0
        assert library.lowbit_low_rank_gradients(ctypes.addressof(adapter), *backward, M, kind, 1) == 0
        guard.check()
        kinds = (dtype, dtype, torch.float32, torch.float32)
        for tensor, value, each in zip((out, *found), exact, kinds, strict=True):
            check(tensor, value, each)


def test_bad_arguments_are_refused():
    library, (result, x, a, b, _) = native.library(), tensors(2, 3, 4, 1, torch.float32)
    hidden, bad = torch.empty(2, 8), -2
    pointers = [t.data_ptr() for t in (x, result, hidden, result)]
    for change in ({"a": None}, {"b": None}, {"rank": 0}, {"rows": -1}, {"inputs": 2**60}):
        adapter = native_low_rank._Adapter(a.data_ptr(), b.data_ptr(), 4, 3, 1, SCALING)
        for field, value in change.items():
            setattr(adapter, field, value)
        assert library.lowbit_low_rank(ctypes.addressof(adapter), *pointers, 2, 0, 1) == bad
    adapter = native_low_rank._Adapter(a.data_ptr(), b.data_ptr(), 4, 3, 1, SCALING)
    for m, dtype, count in ((-1, 0, 1), (2, 3, 1), (2, 0, 0)):
        assert library.lowbit_low_rank(ctypes.addressof(adapter), *pointers, m, dtype, count) == bad
    assert library.lowbit_low_rank(None, *pointers, 2, 0, 1) == bad
    none = [None] * 7
    assert library.lowbit_low_rank_gradients(ctypes.addressof(adapter), *none, 2, 0, 1) == bad


def layer(bias=False) -> LowBitLinear:
    made = LowBitLinear(96, 40, bias, parse_format(INT4))
    weight, companions, _ = packed(INT4, 40, 96)
    for name, tensor in zip(made.packed_names, (weight, *companions), strict=True):
        getattr(made, name).data = tensor
    if bias:
        made.bias.data = torch.randn(40)
        made.bias.requires_grad_(False)
    return made


def run(base, x, a, b, joined):
    """Result and gradients of a layer with its branch, joined or one after the other."""
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    if joined:
        y = branch.packed_with_low_rank(base, x, a, b, SCALING)
    else:
        y = branch.add_low_rank(base(x), x, a, b, SCALING)
    y.square().sum().backward()
    return [y.detach(), x.grad, a.grad, b.grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_joined_to_its_branch_gives_what_both_give_in_turn(dtype, bias):
    base = layer(bias)
    x, a, b = torch.randn(2, 20, 96).to(dtype), torch.randn(8, 96) / 8, torch.randn(40, 8)
    for mine, plain in zip(run(base, x, a, b, True), run(base, x, a, b, False), strict=True):
        assert mine.dtype == plain.dtype and mine.shape == plain.shape
        # In turn, result and gradient are rounded to the dtype once more before the branch is added.
        error = 8 * HALF_UNIT[dtype] * plain.double().abs().max() + 1e3 * 2**-24
        assert ((mine.double() - plain.double()).abs() <= error).all()


def test_a_joined_layer_keeps_packed_tensors_alone():
    base, kept = layer(), []
    x, a, b = torch.randn(20, 96, requires_grad=True), torch.randn(8, 96, requires_grad=True), torch.randn(40, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        branch.packed_with_low_rank(base, x, a, b, SCALING)
    known = {t.data_ptr() for t in (x, a, b, *base.parameters())}
    others = [t for t in kept if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in others] == [(20, 8)]  # hidden values


def test_what_is_put_around_a_layer_is_not_passed_by():
    base, x, a, b = layer(), torch.randn(4, 96, requires_grad=True), torch.randn(8, 96), torch.randn(40, 8)
    assert branch.packed_with_low_rank(base, x, a, b, 1.0) is not None
    handle = base.register_forward_hook(lambda *_: None)
    assert branch.packed_with_low_rank(base, x, a, b, 1.0) is None
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert branch.packed_with_low_rank(base, x, a, b, 1.0) is None
    for changed in ({"activations": "int8"}, {"streamed": object()}, {"backend": "torch"}, {"forward": base.forward}):
        base.__dict__.update(changed)
        assert branch.packed_with_low_rank(base, x, a, b, 1.0) is None, changed
        for name in changed:
            base.__dict__.pop(name)
        base.activations, base.backend = "float", "auto"
    assert branch.packed_with_low_rank(nn.Linear(96, 40), x, a, b, 1.0) is None
    assert branch.packed_with_low_rank(base, x, a.half(), b, 1.0) is None
    assert branch.packed_with_low_rank(base, x, a, b, 1.0) is not None


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_backend_that_was_asked_for_runs_the_branch(monkeypatch, backend):
    monkeypatch.setenv("HF_LOWBIT_BACKEND", backend)
    result, x, a, b, _ = tensors(2, 3, 4, 1, torch.float32)
    assert native_low_rank.serves(result, x, a, b, torch.float32) == (backend == "native")
    assert not native_low_rank.serves(result, x, a, b, torch.bfloat16)  # the dtype of products under autocast
