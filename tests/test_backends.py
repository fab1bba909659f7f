"""How a kernel is chosen, and what is said where none can run."""

import pytest
import torch

from hf_lowbit import backends
from hf_lowbit.backends import BACKENDS, ENVIRONMENT_VARIABLE, Kernel, Problem, explain, register_kernel, select

INT4, NF4 = "int:bits=4", "nf:bits=4"
PROBLEM = Problem("linear", INT4, "cpu", torch.float32)


@pytest.fixture
def kernels(monkeypatch):
    """A registry of the test's own: what it registers is forgotten afterwards."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    registered = list(backends.kernels())
    plain = [k for k in registered if k.backend == "torch"]
    monkeypatch.setattr(backends, "KERNELS", plain)
    backends._select.cache_clear()
    yield plain
    backends._select.cache_clear()


def kernel(backend, op="linear", **limits):
    return Kernel(backend=backend, op=op, run=lambda *arguments: backend, **limits)


def test_plain_pytorch_runs_everything(kernels):
    for op in ("linear", "input_gradient", "dequantize", "embedding"):
        for device in ("cpu", "cuda", "mps", "xpu"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                assert select(op, NF4, device, dtype).backend == "torch"


def test_a_faster_kernel_is_preferred_whenever_it_has_no_objection(kernels):
    fast = register_kernel(
        kernel(
            "native",
            formats=frozenset({"int"}),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
        )
    )
    assert select("linear", INT4, "cpu", torch.float32) is fast
    assert select("linear", INT4, "cpu", torch.float32, "torch").backend == "torch"
    for op, format, device, dtype in [
        ("dequantize", INT4, "cpu", torch.float32),
        ("linear", NF4, "cpu", torch.float32),
        ("linear", INT4, "cuda", torch.float32),
        ("linear", INT4, "cpu", torch.float64),
    ]:
        assert select(op, format, device, dtype).backend == "torch"


def test_order_of_preference_is_that_of_the_list(kernels):
    for name in reversed(BACKENDS):
        if name != "torch":
            register_kernel(kernel(name))
    assert select("linear", INT4, "cpu", torch.float32).backend == BACKENDS[0]


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"formats": frozenset({"nf"})}, "does not read format 'int'"),
        ({"devices": frozenset({"cuda"})}, "does not run on 'cpu'"),
        ({"dtypes": frozenset({torch.float16})}, "does not take torch.float32"),
        ({"unavailable": lambda: "no compiler was found"}, "no compiler was found"),
    ],
)
def test_every_backend_passed_over_has_its_reason(kernels, limits, reason):
    register_kernel(kernel("native", **limits))
    assert explain(PROBLEM) == [
        ("triton", "has no kernel for 'linear' in this version"),
        ("native", reason),
        ("torch", None),
    ]
    with pytest.raises(RuntimeError) as caught:
        select("linear", INT4, "cpu", torch.float32, "native")
    message = str(caught.value)
    assert f"native: {reason}" in message
    assert "no backend can run linear of int:bits=4 on cpu in torch.float32" in message
    assert "torch: backend 'native' was asked for" in message


def test_a_forced_backend_is_not_replaced_by_another(kernels):
    with pytest.raises(RuntimeError, match="triton: has no kernel for 'linear' in this version"):
        select("linear", INT4, "cpu", torch.float32, "triton")


def test_the_environment_variable_decides_where_the_option_does_not(kernels, monkeypatch):
    register_kernel(kernel("native"))
    assert select("linear", INT4, "cpu", torch.float32).backend == "native"
    # Read at every call: what was chosen before does not stick.
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert select("linear", INT4, "cpu", torch.float32).backend == "torch"
    assert explain(PROBLEM)[1] == ("native", "backend 'torch' was asked for")
    assert select("linear", INT4, "cpu", torch.float32, "native").backend == "native"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="triton: has no kernel for 'linear'"):
        select("linear", INT4, "cpu", torch.float32)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="HF_LOWBIT_BACKEND='cuda' is unknown: use 'auto' or one of triton, native"):
        select("linear", INT4, "cpu", torch.float32)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend='cuda' is unknown: use one of triton, native, torch"):
        register_kernel(kernel("cuda"))
    with pytest.raises(ValueError, match="backend='cuda' is unknown: use 'auto' or one of triton, native, torch"):
        backends.check_backend("cuda")


def test_an_op_runs_the_chosen_kernel(kernels, monkeypatch):
    from test_ops import packed, random

    from hf_lowbit import ops

    def run(x, weight, companions, bias, format, in_features):
        return torch.full((*x.shape[:-1], weight.shape[0]), 42.0)

    register_kernel(Kernel(backend="native", op="linear", run=run))
    weight, companions, spec, columns = packed(INT4)
    assert (ops.linear(random(2, columns), weight, companions, None, spec, columns) == 42).all()
    assert (ops.linear(random(2, columns), weight, companions, None, spec, columns, "torch") != 42).any()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert (ops.linear(random(2, columns), weight, companions, None, spec, columns) != 42).any()
