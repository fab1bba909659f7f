"""The four ops: opcheck, gradients, values against the dequantized weight, what autograd keeps, and torch.compile."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from hf_lowbit import ops, reference
from hf_lowbit.formats import parse_format
from hf_lowbit.linear import LowBitLinear
from hf_lowbit.methods import BEST, make_method

FORMATS = [
    "int:bits=4",
    "int:bits=3,group_size=32,zeros=float",
    "int:bits=8,group_size=-1,symmetric=True,scale_dtype=bfloat16",
    "int:bits=1,symmetric=True",
    "nf:bits=3",
    "fp4:bits=4",
    "fp4:bits=4,group_size=16,scale_dtype=e4m3",
    "codebook:bits=5",
    "codebook:bits=2,group_size=-1,codebook=row",
    "ternary:bits=1.58",
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1, 1), (5, 63), (7, 65), (33, 130)]


def packed(text, rows=7, columns=65, seed=0):
    """``(weight, companions, format text, in_features)`` of a random packed weight, as the ops take them."""
    format = parse_format(text)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    stored = format.pack(make_method(BEST[format.name]).quantize(weight, format))
    return stored[""], [stored[s] for s in format.suffixes()], format.spec, columns


def values(weight, companions, text, columns):
    """The weight (N, K), float32, that the packed tensors mean, by the format itself."""
    format = parse_format(text)
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    return format.dequantize(stored, (weight.shape[0], columns))


def random(*shape, dtype=torch.float32, seed=1, requires_grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(requires_grad)


# -- schema, fake and autograd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_opcheck(text):
    weight, companions, spec, columns = packed(text)
    bias, index = random(7, requires_grad=True), torch.tensor([[0, 6], [3, 3]])
    lowbit = torch.ops.lowbit
    x, gradient = random(2, 3, columns, requires_grad=True), random(2, 3, 7, requires_grad=True)
    rest = (spec, columns, "auto")
    torch.library.opcheck(lowbit.linear.default, (x, weight, companions, bias, *rest))
    torch.library.opcheck(lowbit.linear.default, (x[0], weight, companions, None, *rest))
    torch.library.opcheck(lowbit.input_gradient.default, (gradient, weight, companions, *rest))
    torch.library.opcheck(lowbit.dequantize.default, (weight, companions, spec, columns, torch.bfloat16, "auto"))
    torch.library.opcheck(lowbit.embedding.default, (index, weight, companions, spec, columns, torch.half, "auto"))


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_of_input_and_bias(text):
    weight, companions, spec, columns = packed(text, rows=3, columns=19)
    x = random(2, columns, dtype=torch.float64, requires_grad=True)
    bias = random(3, dtype=torch.float64, seed=2, requires_grad=True)

    def linear(x, bias):
        return ops.linear(x, weight, companions, bias, spec, columns)

    assert torch.autograd.gradcheck(linear, (x, bias))
    assert torch.autograd.gradgradcheck(linear, (x, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype):
    weight, companions, spec, columns = packed("int:bits=4")
    x = random(2, 3, columns, dtype=dtype, requires_grad=True)
    bias = random(7, dtype=torch.bfloat16, requires_grad=True)
    y = ops.linear(x, weight, companions, bias, spec, columns)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype and bias.grad.dtype == torch.bfloat16
    assert torch.equal(bias.grad, torch.full((7,), 6.0, dtype=torch.bfloat16))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_dequantized_weight(text, dtype):
    for rows, columns in SHAPES:
        arguments = packed(text, rows, columns)
        weight, companions, spec, _ = arguments
        meant = values(*arguments)
        dequantized = ops.dequantize(*arguments, dtype)
        assert dequantized.dtype == dtype and torch.equal(dequantized, meant.to(dtype))

        index = torch.tensor([[0, rows - 1, rows // 2]])
        looked_up = ops.embedding(index, *arguments, dtype)
        assert looked_up.shape == (1, 3, columns) and torch.equal(looked_up, meant.to(dtype)[index])

        bias = random(rows, seed=2)
        for leading in ((), (4,), (2, 3), (0,), (2, 0)):
            x = random(*leading, columns, dtype=dtype)
            y = ops.linear(x, weight, companions, bias, spec, columns, "torch")
            assert y.shape == (*leading, rows) and y.dtype == dtype
            torch.testing.assert_close(y, F.linear(x, meant.to(dtype), bias.to(dtype)))
            gradient = random(*leading, rows, dtype=dtype)
            back = torch.ops.lowbit.input_gradient(gradient, weight, companions, spec, columns, "torch")
            assert back.shape == (*leading, columns) and back.dtype == dtype
            torch.testing.assert_close(back, gradient @ meant.to(dtype))


@pytest.mark.parametrize("text", FORMATS)
def test_chunks_of_rows_give_the_same(monkeypatch, text):
    arguments = packed(text, rows=23, columns=70)
    weight, companions, spec, columns = arguments
    x, bias, gradient = random(3, columns), random(23, seed=2), random(3, 23, seed=3)

    def run():
        return (
            ops.linear(x, weight, companions, bias, spec, columns, "torch"),
            torch.ops.lowbit.input_gradient(gradient, weight, companions, spec, columns, "torch"),
            ops.dequantize(*arguments, torch.float32, "torch"),
        )

    whole = run()
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 5 * columns)
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", 2 * columns)
    seen = []
    original = type(parse_format(spec)).dequantize

    def dequantize(self, stored, shape, dtype=torch.float32):
        seen.append(shape)
        return original(self, stored, shape, dtype)

    monkeypatch.setattr(type(parse_format(spec)), "dequantize", dequantize)
    chunked = run()
    by_chunk = [2, 2, 1] * 4 + [2, 1]
    assert seen == [(rows, 70) for rows in 2 * by_chunk + [2] * 11 + [1]]
    assert torch.equal(chunked[2], whole[2])
    for first, other in zip(whole[:2], chunked[:2], strict=True):  # sums in another order
        torch.testing.assert_close(other, first)


def test_the_gradient_of_many_chunks_is_added_in_float32(monkeypatch):
    """Rounding to bfloat16 after each of 512 chunks would lose most of the small shares."""
    rows, columns = 512, 64
    weight, companions, spec, _ = packed("int:bits=8,symmetric=True", rows, columns)
    gradient = torch.ones(1, rows, dtype=torch.bfloat16)
    exact = gradient.double() @ ops.dequantize(weight, companions, spec, columns, torch.bfloat16).double()
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", columns)
    got = torch.ops.lowbit.input_gradient(gradient, weight, companions, spec, columns, "auto")
    # Half a unit of bfloat16, and the float32 sums of at most 512 numbers below 8.
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 512 * 8 * 2**-15).all()


def test_input_that_is_not_contiguous():
    weight, companions, spec, columns = packed("int:bits=4")
    x = random(columns, 5).T
    expected = F.linear(x, values(weight, companions, spec, columns))
    torch.testing.assert_close(ops.linear(x, weight, companions, None, spec, columns), expected)


@pytest.mark.parametrize("row", [-1, 7])
def test_an_index_outside_the_table_is_an_error(row):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        ops.embedding(torch.tensor([0, row]), *packed("int:bits=4"), torch.float32)


def test_a_wrong_number_of_features_is_an_error():
    weight, companions, spec, columns = packed("int:bits=4")
    with pytest.raises(RuntimeError, match="input has 64 features, the weight 65"):
        ops.linear(random(2, 64), weight, companions, None, spec, columns)


# -- autograd keeps packed tensors only --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_autograd_saves_packed_tensors_only(text):
    rows, columns = 64, 192
    weight, companions, spec, _ = packed(text, rows, columns)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    x, bias = random(2, columns, requires_grad=True), random(rows, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ops.linear(x, weight, companions, bias, spec, columns)
    known = {t.data_ptr() for t in (weight, *companions)}
    assert saved and all(t.data_ptr() in known for t in saved)
    assert not any(t.is_floating_point() and t.numel() >= rows * columns for t in saved)
    y.sum().backward()
    torch.testing.assert_close(x.grad, values(weight, companions, spec, columns).sum(0).expand(2, columns))


# -- the module --------------------------------------------------------------------------------------------------------


def packed_linear(text, rows=48, columns=130, bias=True):
    format = parse_format(text)
    module = LowBitLinear(columns, rows, bias, format)
    weight = random(rows, columns, seed=5)
    module.set_packed(format.pack(make_method(BEST[format.name]).quantize(weight, format)))
    if bias:
        torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(6))
    return module


@pytest.mark.parametrize("text", FORMATS[:1] + FORMATS[4:])
def test_compile_without_graph_breaks(text):
    module = packed_linear(text)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = random(3, 130, requires_grad=True)
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compile_with_other_batch_sizes_and_inductor():
    module = packed_linear("int:bits=3")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch in (3, 8, 17):
        x = random(batch, 130)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(dtype):
    module = packed_linear("int:bits=4")
    with torch.autocast("cpu", dtype=dtype):
        y = module(random(2, 130))
    assert y.dtype == dtype
    torch.testing.assert_close(y, module(random(2, 130).to(dtype)))


# -- past the dispatcher -----------------------------------------------------------------------------------------------


def _traced(call, x):
    return torch.jit.trace(call, x, check_trace=False)(2 * x)


def _proxied(call, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(call)(x)(2 * x)


def _faked(call, x):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call(mode.from_tensor(x))


@pytest.mark.parametrize("watch", [_traced, _proxied, _faked, lambda call, x: torch.vmap(call)(x[None])])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_who_traces_or_transforms_sees_the_op(watch):
    weight, companions, spec, columns = packed("int:bits=4")
    called, x = [], random(2, columns)

    def call(x):
        called.append(ops._direct(x, None))
        return ops.linear(x, weight, companions, None, spec, columns)

    direct = call(x)
    try:
        result = watch(call, x)
    except RuntimeError as error:  # there is no rule to batch the op, and torch says so
        assert "Batching rule" in str(error) or "vmap" in str(error)
        result = direct[None]
    assert called == [True, False]
    assert result.shape[-2:] == direct.shape
    if watch in (_traced, _proxied):
        torch.testing.assert_close(result, 2 * direct)


def test_a_call_that_needs_gradients_goes_through_autograd():
    weight, companions, spec, columns = packed("int:bits=4")
    x, bias = random(2, columns), random(7, requires_grad=True)
    assert not ops._direct(x, bias) and not ops._direct(random(2, columns, requires_grad=True), None)
    assert ops._direct(x, None)
    with torch.no_grad():
        assert ops._direct(x, bias)
    assert ops.linear(x, weight, companions, bias, spec, columns).requires_grad
    with pytest.raises(RuntimeError, match=f"input has 64 features, the weight {columns}"):
        ops.linear(random(2, 64), weight, companions, None, spec, columns)
