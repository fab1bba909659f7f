"""The CPU kernels against plain PyTorch: every instruction set that this processor has, every format, odd sizes.

Decoded values are the same bit by bit. Products may differ in the order of the sum only: the error of a float32 sum of
n terms is at most n * 2**-24 of the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 4.2),
one more for each of scale, bias and the rounding of the decoded weight, which a product need not do, and half a unit
of the result's dtype. Where the processor multiplies bfloat16,
many rows are multiplied so, and each decoded weight (each share of a gradient, too) has been rounded once to it.
"""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch

from hf_lowbit import native_backend as native
from hf_lowbit import ops, reference
from hf_lowbit.formats import Quantized, parse_format

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

INT = [
    f"int:bits={bits},group_size={group},symmetric={symmetric},scale_dtype=log8"
    for bits in range(1, 9)
    for group, symmetric in ((16, False), (32, False), (64, True), (256, False), (-1, True))
]
FORMATS = [
    *INT,
    *(f"int:bits={bits},group_size=32,zeros=float,scale_dtype=float16" for bits in (1, 4, 7)),
    *(f"codebook:bits={bits},group_size=64" for bits in range(1, 9)),
    *(f"codebook:bits={bits},group_size=-1,codebook=row" for bits in (2, 4, 6)),
    *("nf:bits=2,group_size=16", "nf:bits=3", "nf:bits=4", "fp4:bits=4", "fp4:bits=4,group_size=16,scale_dtype=e4m3"),
    *("ternary:bits=1.58", "ternary:bits=1.58,group_size=64"),
    *("int:bits=4,scale_dtype=bfloat16", "int:bits=4,scale_dtype=float32"),
]
SHAPES = [(5, 64), (7, 577), (3, 63), (2, 1), (65, 65), (1, 128), (63, 1)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INT4 = "int:bits=4,group_size=32,symmetric=False,scale_dtype=log8"


def isas() -> list[str]:
    return native.library().lowbit_isas().decode().split(",") if native.unavailable() is None else []


@pytest.fixture(params=isas())
def isa(request):
    """Each instruction set of this processor in turn; the best one again afterwards."""
    assert native.library().lowbit_force_isa(request.param.encode()) == 0
    yield request.param
    native.library().lowbit_force_isa(isas()[0].encode())


def packed(spec: str, N: int, K: int, seed: int = 0):
    """(weight, companions, text of the format) of random codes, scales, zero points and levels."""
    format, random = parse_format(spec), torch.Generator().manual_seed(seed)
    highest = 3 if format.name == "ternary" else 2**format.bits
    codes = torch.randint(0, highest, (N, K), dtype=torch.uint8, generator=random)
    scales = torch.rand((N, format.groups(K)), generator=random) + 0.1
    zeros = levels = None
    if format.name == "int" and not format.symmetric:
        zeros = format.storable_zeros(torch.rand(scales.shape, generator=random) * format.max_code)
    if format.name == "codebook":
        tables = N if format.codebook == "row" else 1
        levels = format.storable_levels(torch.randn((tables, highest), generator=random))
    tensors = format.pack(Quantized(codes, format.storable_scales(scales), zeros, levels))
    return tensors.pop(""), [tensors[suffix] for suffix in format.suffixes()], format.spec


def bound(x, weight, bias, dtype, many=False):
    """Largest error of ``x @ weight.T + bias``, elementwise, in float64. ``many``: rows enough for torch's product."""
    magnitudes = x.abs() @ weight.abs().T + bias.abs()
    exact = x @ weight.T + bias
    rounded = 2 * HALF_UNIT[dtype] if many and native._product_dtype(dtype) == dtype else 0
    return ((x.shape[-1] + 3) * 2**-24 + rounded) * magnitudes + HALF_UNIT[dtype] * exact.abs() + 2**-24


@pytest.fixture
def panels(isa, monkeypatch):
    """Any number of rows goes through panels."""
    monkeypatch.setattr(native, "FEW_ROWS", {isa: sys.maxsize})


@pytest.mark.parametrize("few", [2, 64, sys.maxsize])
def test_rows_go_to_panels_or_to_torch(isa, few, monkeypatch):
    monkeypatch.setattr(native, "FEW_ROWS", {isa: few})
    monkeypatch.setattr(native, "CALL_ROWS", 50)
    calls, decoded = [], native._decoded
    monkeypatch.setattr(native, "_decoded", lambda *arguments: calls.append(1) or decoded(*arguments))
    weight, companions, text = packed(INT4, 33, 577)
    exact = reference.dequantize(weight, companions, text, 577, torch.float32).double()
    for M in (1, 2, 63, 64, 150):
        x = torch.randn(M, 577)
        error = (native.linear(x, weight, companions, None, text, 577).double() - x.double() @ exact.T).abs()
        assert (error <= bound(x.double(), exact, torch.zeros(33).double(), torch.float32)).all()
        assert bool(calls) == (few <= M), M
        calls.clear()


@pytest.mark.parametrize("spec", FORMATS)
def test_values_and_products_are_those_of_plain_pytorch(isa, spec, panels):
    for number, (N, K) in enumerate(SHAPES):
        weight, companions, text = packed(spec, N, K, number)
        arguments = (weight, companions, text, K)
        exact = reference.dequantize(*arguments, torch.float32).double()
        dtype = DTYPES[number % 3]
        assert torch.equal(native.dequantize(*arguments, dtype), reference.dequantize(*arguments, dtype))
        index = torch.randint(0, N, (2, 3))
        assert torch.equal(native.embedding(index, *arguments, dtype), reference.embedding(index, *arguments, dtype))
        for M in (1, 2, 5, 7, 65):
            x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
            for given in (bias, None):
                found = native.linear(x, weight, companions, given, text, K)
                offset = torch.zeros(N).double() if given is None else given.double()
                assert found.dtype == dtype
                error = (found.double() - x.double() @ exact.T - offset).abs()
                assert (error <= bound(x.double(), exact, offset, dtype, M == 65)).all(), (N, K, M)
        gradient = torch.randn(4, N).to(dtype)
        error = (native.input_gradient(gradient, *arguments).double() - gradient.double() @ exact).abs()
        assert (error <= bound(gradient.double(), exact.T, torch.zeros(K).double(), dtype, many=True)).all()


@pytest.mark.parametrize("spec", [f"int:bits={bits}" for bits in range(1, 9)] + ["ternary:bits=1.58"])
def test_packing_is_that_of_plain_pytorch(isa, spec):
    library, bits = native.library(), 0 if "ternary" in spec else int(spec[-1])
    for N, K in SHAPES:
        weight, companions, text = packed(spec, N, K)
        tensors = dict(zip(("", *parse_format(text).suffixes()), (weight, *companions), strict=True))
        codes = parse_format(text).unpack(tensors, (N, K)).codes.contiguous()
        lanes, again = torch.empty_like(weight), torch.empty_like(codes)
        rows = (native.ctypes.c_int64(N), native.ctypes.c_int64(K))
        pointers = [native.ctypes.c_void_p(t.data_ptr()) for t in (codes, lanes, again)]
        assert library.lowbit_pack(pointers[0], pointers[1], *rows, bits, 2) == 0
        assert library.lowbit_unpack(pointers[1], pointers[2], *rows, bits, 2) == 0
        assert torch.equal(lanes, weight) and torch.equal(again, codes)


def test_results_do_not_depend_on_the_number_of_threads(isa, panels):
    weight, companions, text = packed(INT4, 513, 1000)
    for M in (1, 6, 40):
        x, results = torch.randn(M, 1000), []
        for threads in (1, 2, 5):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            results.append(native.linear(x, weight, companions, None, text, 1000))
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rows_do_not_depend_on_their_neighbours(isa, panels):
    weight, companions, text = packed("int:bits=3,group_size=32", 70, 200)
    x = torch.randn(63, 200)  # more than are multiplied by a panel at once
    together = native.linear(x, weight, companions, None, text, 200)
    for rows in (slice(2, 8), slice(len(x) - 20, len(x) - 3)):
        assert torch.equal(together[rows], native.linear(x[rows], weight, companions, None, text, 200))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", [INT4, "nf:bits=4", "int:bits=7,group_size=16", "ternary:bits=1.58"])
def test_what_is_not_finite_stays_in_its_row(isa, spec, value):
    weight, companions, text = packed(spec, 17, 100)
    for M in (3, 30):
        x = torch.randn(M, 100)
        clean = native.linear(x, weight, companions, None, text, 100)
        x[1, 50] = value
        found = native.linear(x, weight, companions, None, text, 100)
        expected = reference.linear(x, weight, companions, None, text, 100)
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_unaligned_and_strided_inputs_give_the_same(isa):
    weight, companions, text = packed(INT4, 33, 130)
    moved = torch.empty(weight.numel() + 1, dtype=torch.int16)[1:].view(weight.shape).copy_(weight)
    x = torch.randn(4, 131)[:, 1:]
    expected = native.linear(x.contiguous(), weight, companions, None, text, 130)
    assert torch.equal(native.linear(x, moved, companions, None, text, 130), expected)
    assert torch.equal(native.linear(x.T.contiguous().T, weight, companions, None, text, 130), expected)


def test_nothing_in_gives_nothing_out():
    weight, companions, text = packed(INT4, 6, 64)
    assert native.linear(torch.empty(0, 64), weight, companions, None, text, 64).shape == (0, 6)
    assert native.linear(torch.empty(2, 0, 64), weight, companions, torch.ones(6), text, 64).shape == (2, 0, 6)
    empty = torch.empty(0, dtype=torch.int64)
    assert native.embedding(empty, weight, companions, text, 64, torch.float32).shape == (0, 64)
    assert native.input_gradient(torch.empty(0, 6), weight, companions, text, 64).shape == (0, 64)


def test_a_description_follows_the_tensors():
    weight, companions, text = packed("codebook:bits=4,group_size=64", 8, 64)
    x = torch.randn(2, 64)
    before = native.linear(x, weight, companions, None, text, 64)
    assert native.describe(weight, companions, text, 64) is native.describe(weight, companions, text, 64)
    companions[-1].mul_(2)  # the table, of which the description holds a copy
    torch.testing.assert_close(native.linear(x, weight, companions, None, text, 64), 2 * before)
    other, others, _ = packed("codebook:bits=4,group_size=64", 8, 64, seed=1)
    weight.copy_(other)
    for mine, theirs in zip(companions, others, strict=True):
        mine.copy_(theirs)
    assert torch.equal(
        native.linear(x, weight, companions, None, text, 64), native.linear(x, other, others, None, text, 64)
    )


def test_a_description_does_not_keep_its_weight():
    weight, companions, text = packed(INT4, 8, 64)
    native.linear(torch.randn(1, 64), weight, companions, None, text, 64)
    gone = [weakref.ref(t) for t in (weight, *companions)]
    del weight, companions
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_tensors_of_another_shape_are_refused_before_they_are_read():
    weight, companions, text = packed(INT4, 8, 64)
    with pytest.raises(ValueError, match=r"8 x 128 in int:bits=4.* has `weight` of shape \(8, 32\).*not \(8, 16\)"):
        native.linear(torch.randn(1, 128), weight, companions, None, text, 128)
    short = [t[:, :1].clone() if t.ndim == 2 else t for t in companions]
    with pytest.raises(ValueError, match="has `weight_scales` of shape"):
        native.dequantize(weight.clone(), short, text, 64, torch.float32)
    with pytest.raises(IndexError, match=r"index out of range: -1 to 8 in a table of 8 rows"):
        native.embedding(torch.tensor([8, -1]), weight, companions, text, 64, torch.float32)


def test_the_op_takes_it_on_cpus_and_its_gradient_is_right():
    weight, companions, text = packed(INT4, 40, 96)
    x = torch.randn(3, 96, requires_grad=True)
    ops.linear(x, weight, companions, None, text, 96, "native").sum().backward()
    dense = reference.dequantize(weight, companions, text, 96, torch.float32)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=40 * 2**-24, atol=40 * 2**-22)
    assert copy.deepcopy(weight).equal(weight)


def test_the_pool_of_its_own_gives_the_same():
    """Without torch's OpenMP, in a process of its own: also in its forked child, where no thread of the pool lives."""
    code = (
        "import os, torch, test_native as t; from hf_lowbit import native_backend as n\n"
        "torch.set_num_threads(4); w, c, s = t.packed(t.INT4, 2000, 512); x = torch.randn(2, 512)\n"
        "first = n.linear(x, w, c, None, s, 512); n.library().lowbit_use_openmp(None)\n"
        "assert all(torch.equal(n.linear(x, w, c, None, s, 512), first) for _ in range(200))\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(not torch.equal(n.linear(x, w, c, None, s, 512), first))\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    folder = __file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
