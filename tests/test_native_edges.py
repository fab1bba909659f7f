"""The edges of the CPU kernels: tight memory, odd sizes, unaligned tensors, numbers that are not finite, many callers.

Every width and every instruction set. What is right in the middle is tested in ``test_native.py``; here it is the same
to the bit, from tensors that end where memory ends.
"""

import ctypes
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from guarded import Guarded
from test_native import DTYPES, INT4, bound, isa, isas, packed, panels  # noqa: F401

import hf_lowbit
from hf_lowbit import native_backend as native
from hf_lowbit import reference
from hf_lowbit.formats import parse_format
from hf_lowbit.native_packing import pack_rows

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

SIZES = (1, 63, 65, 577)
SPECS = [
    *(f"int:bits={bits},group_size=32,symmetric=False,scale_dtype=log8" for bits in range(1, 9)),
    *(f"int:bits={bits},group_size=16,zeros=float,scale_dtype=float16" for bits in (3, 8)),
    *(f"codebook:bits={bits},group_size=64" for bits in (3, 4, 7)),
    *(
        "codebook:bits=5,group_size=-1,codebook=row",
        "nf:bits=4",
        "ternary:bits=1.58",
        "ternary:bits=1.58,group_size=16",
    ),
    *("int:bits=2,scale_dtype=bfloat16", "int:bits=6,symmetric=True,scale_dtype=float32"),
]


def code_bits(spec: str) -> int:
    """How the C interface calls the width of ``spec``."""
    format = parse_format(spec)
    return 0 if format.name == "ternary" else int(format.bits)


def threads(number: int):
    """The number of threads before; now it is ``number``."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    return before


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_outside_of_a_tensor_is_touched(isa, spec, at_end):  # noqa: F811
    sizes = SIZES if at_end else (1, 65)
    for number, (N, K) in enumerate(itertools.product(sizes, sizes)):
        guard, dtype = Guarded(at_end), DTYPES[number % 3]
        weight, companions, text = packed(spec, N, K, number)
        described = native.describe(guard(weight), [guard(t) for t in companions], text, K)

        def call(function, expected, *arguments, described=described, guard=guard, dtype=dtype):
            """The result in memory as tight; `arguments` go before and after its address, where None stands."""
            out = guard(torch.empty_like(expected))
            place = arguments.index("out")
            arguments = (*arguments[:place], out.data_ptr(), *arguments[place + 1 :], native.DTYPES[dtype], 1)
            assert function(described.pointer, *arguments) == 0
            guard.check()
            return out

        library = native.library()
        values = reference.dequantize(weight, companions, text, K, dtype)
        assert torch.equal(call(library.lowbit_dequantize, values, None, 0, N, "out"), values)
        index = guard(torch.tensor([N - 1, 0, N // 2]))
        found = call(library.lowbit_dequantize, values[index], index.data_ptr(), 0, 3, "out")
        assert torch.equal(found, values[index])

        exact = reference.dequantize(weight, companions, text, K, torch.float32).double()
        levels, steps = (None if t is None else guard(t) for t in described.int8_table[:2])
        table = [None if t is None else t.data_ptr() for t in (levels, steps)]
        for M in (1, 3, 7):
            x, bias = guard(torch.randn(M, K).to(dtype)), guard(torch.randn(N).to(dtype))
            given, expected = (x.data_ptr(), bias.data_ptr(), "out", M), torch.empty(M, N, dtype=dtype)
            found = call(library.lowbit_linear, expected, *given).double()
            error = (found - x.double() @ exact.T - bias.double()).abs()
            assert (error <= bound(x.double(), exact, bias.double(), dtype)).all(), (N, K, M)
            expected = native.linear_int8(x.clone(), weight, companions, bias.clone(), text, K)
            assert torch.equal(call(library.lowbit_linear_int8, expected, *table, *given), expected)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("spec", [f"int:bits={bits}" for bits in range(1, 9)] + ["ternary:bits=1.58"])
def test_packing_touches_nothing_else_either(isa, spec, at_end):  # noqa: F811
    format, library = parse_format(spec), native.library()
    for N in (1, 3):
        for K in (*range(1, 24), *range(60, 90), 128, 577):
            guard = Guarded(at_end)
            codes = guard(torch.randint(0, 3 if "ternary" in spec else 2**format.bits, (N, K), dtype=torch.uint8))
            lanes, again = guard(torch.empty(*format.packed_tensor((N, K))[0], dtype=torch.int16)), guard(codes)
            again.zero_()
            assert library.lowbit_pack(codes.data_ptr(), lanes.data_ptr(), N, K, code_bits(spec), 1) == 0
            assert torch.equal(lanes, format.pack_codes(codes))
            assert library.lowbit_unpack(lanes.data_ptr(), again.data_ptr(), N, K, code_bits(spec), 1) == 0
            assert torch.equal(again, codes)
            guard.check()


@pytest.mark.parametrize("spec", ["int:bits=3", "nf:bits=4", "codebook:bits=5", "ternary:bits=1.58"])
def test_formats_pack_by_the_kernels_what_they_pack_themselves(isa, spec, monkeypatch):  # noqa: F811
    format, N, K = parse_format(spec), 300, 577
    codes = torch.randint(0, 3 if "ternary" in spec else 2**format.bits, (K, N), dtype=torch.uint8).T
    lanes = torch.zeros(*format.packed_tensor((N, K))[0], dtype=torch.int16)
    before = threads(2)
    assert pack_rows(format, codes, lanes)
    torch.set_num_threads(before)
    assert torch.equal(lanes, format.pack_codes(codes)) and torch.equal(lanes, format.pack_rows(codes))
    monkeypatch.setenv("HF_LOWBIT_BACKEND", "torch")
    assert not pack_rows(format, codes, lanes)
    assert torch.equal(lanes, format.pack_rows(codes))
    monkeypatch.undo()
    assert not pack_rows(format, codes.to("meta"), lanes.to("meta"))
    assert not pack_rows(format, codes[:0], lanes[:0])


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_one_element_off_give_the_same_bits(isa, spec, panels):  # noqa: F811
    def moved(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    for N, K in ((33, 130), (5, 577)):
        weight, companions, text = packed(spec, N, K)
        others = [moved(t) for t in companions]
        assert moved(weight).data_ptr() % 4 == 2
        for dtype in DTYPES:
            for M in (1, 4):
                x = torch.randn(M, K).to(dtype)
                expected = native.linear(x, weight, companions, None, text, K)
                assert torch.equal(native.linear(moved(x), moved(weight), others, None, text, K), expected)
                assert torch.equal(native.linear(x.T.contiguous().T, weight, companions, None, text, K), expected)
            expected = native.dequantize(weight, companions, text, K, dtype)
            assert torch.equal(native.dequantize(moved(weight), others, text, K, dtype), expected)


def test_a_weight_that_is_not_contiguous_is_read_as_it_is_meant(isa):  # noqa: F811
    weight, companions, text = packed(INT4, 8, 192)
    apart = torch.stack([weight, weight], dim=1)[:, 0]
    columns = [t.T.contiguous().T if t.ndim == 2 else t for t in companions]
    assert not apart.is_contiguous()
    x = torch.randn(2, 3, 192).transpose(0, 1)
    expected = native.linear(x.contiguous(), weight, companions, None, text, 192)
    assert torch.equal(native.linear(x, apart, columns, None, text, 192), expected)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spreads_as_in_plain_pytorch(isa, spec, value):  # noqa: F811
    weight, companions, text = packed(spec, 9, 577)
    for M, dtype, place in ((1, torch.float32, 0), (3, torch.float16, 576), (4, torch.bfloat16, 300)):
        x = torch.randn(M, 577).to(dtype)
        x[-1, place] = value
        found = native.linear(x, weight, companions, None, text, 577)
        expected = reference.linear(x, weight, companions, None, text, 577)
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(found), what(expected))


@pytest.mark.parametrize("spec", ["int:bits=3,group_size=32", "nf:bits=4", "ternary:bits=1.58"])
def test_one_two_and_four_threads_give_the_same_bits(isa, spec, panels):  # noqa: F811
    weight, companions, text = packed(spec, 2100, 320)
    arguments, results = (weight, companions, text, 320), []
    x, index = torch.randn(5, 320), torch.randint(0, 2100, (700,))
    for number in (1, 2, 4):
        before = threads(number)
        results.append(
            [
                *(native.linear(x[:m], weight, companions, None, text, 320) for m in (1, 5)),
                native.dequantize(*arguments, torch.bfloat16),
                native.embedding(index, *arguments, torch.float32),
            ]
        )
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_two_callers_at_once_do_not_disturb_each_other():
    weight, companions, text = packed(INT4, 1500, 256)
    inputs = [torch.randn(m, 256) for m in (1, 4)]
    expected = [native.linear(x, weight, companions, None, text, 256) for x in inputs]
    wrong, start = [], threading.Barrier(2)

    def call(x, result):
        torch.set_num_threads(2)
        start.wait()
        for _ in range(100):
            if not torch.equal(native.linear(x, weight, companions, None, text, 256), result):
                wrong.append(x.shape)

    callers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    before = torch.get_num_threads()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_on_after_threads_were_used():
    """GCC's OpenMP hangs in a child whose parent has had a team, so the child has to do without it."""
    code = (
        f"import hf_lowbit; hf_lowbit.__path__[:] = {list(hf_lowbit.__path__)!r}\n"  # where its library was found here
        "import os, signal, torch, test_native as t; from hf_lowbit import native_backend as n\n"
        "torch.set_num_threads(2); w, c, s = t.packed(t.INT4, 2000, 512); x = torch.randn(2, 512)\n"
        "first = n.linear(x, w, c, None, s, 512)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    os._exit(not all(torch.equal(n.linear(x, w, c, None, s, 512), first) for _ in range(20)))\n"
        "raise SystemExit(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_bad_arguments_are_refused_and_nothing_is_touched():
    library, (weight, companions, text) = native.library(), packed(INT4, 6, 64)
    bad_weight, bad_argument, far = -1, -2, 2**62
    good = native.describe(weight, companions, text, 64)
    x, out, codes = torch.ones(2, 64), torch.full((6, 64), 7.0), torch.zeros(6, 64, dtype=torch.uint8)
    X, OUT, CODES, LANES = (t.data_ptr() for t in (x, out, codes, weight))

    for field, value in [
        *(("codes", None), ("scales", None), ("scale_table", None), ("zeros", None), ("rows", -1), ("inputs", 0)),
        *(("inputs", -64), ("inputs", 2**60), ("rows", 2**60), ("group", 8), ("group", 48), ("group", -32)),
        *(
            ("bits", 9),
            ("bits", -1),
            ("scale", 5),
            ("scale", -1),
            ("zero", 3),
            ("zero", -1),
            ("table", 3),
            ("table", 1),
        ),
    ]:
        record = native._Weight.from_buffer_copy(good.record)
        setattr(record, field, value)
        pointer = ctypes.addressof(record)
        assert library.lowbit_linear(pointer, X, None, OUT, 2, 0, 1) == bad_weight, field
        assert library.lowbit_dequantize(pointer, None, 0, 6, OUT, 0, 1) == bad_weight, field
    assert library.lowbit_linear(None, X, None, OUT, 2, 0, 1) == bad_weight

    for given, m, dtype, count in [
        *(({"x": None}, 2, 0, 1), ({"out": None}, 2, 0, 1), ({}, -1, 0, 1), ({}, 2, 3, 1), ({}, 2, -1, 1)),
        *(({}, 2, 0, 0), ({}, 2, 0, -1), ({}, far, 0, 1)),
    ]:
        pointers = {"x": X, "out": OUT, **given}
        code = library.lowbit_linear(good.pointer, pointers["x"], None, pointers["out"], m, dtype, count)
        assert code == bad_argument, (given, m, dtype, count)

    index, negative = torch.tensor([0, 6]), torch.tensor([-1])
    for rows, first, count, dtype in [
        *((None, -1, 2, 0), (None, 5, 2, 0), (None, 2**63 - 1, 2, 0), (None, 0, -1, 0), (None, 0, 2, 9)),
        *((index.data_ptr(), 0, 2, 0), (negative.data_ptr(), 0, 1, 0)),
    ]:
        assert library.lowbit_dequantize(good.pointer, rows, first, count, OUT, dtype, 1) == bad_argument
    assert library.lowbit_dequantize(good.pointer, None, 0, 6, None, 0, 1) == bad_argument

    for arguments in [
        *((None, LANES, 6, 64, 4, 1), (CODES, None, 6, 64, 4, 1), (CODES, LANES, -1, 64, 4, 1)),
        *((CODES, LANES, 6, 0, 4, 1), (CODES, LANES, 6, 64, 9, 1), (CODES, LANES, 6, 64, -1, 1)),
        *((CODES, LANES, 6, 64, 4, 0), (CODES, LANES, 2**60, 64, 4, 1), (CODES, LANES, 6, 2**60, 4, 1)),
    ]:
        assert library.lowbit_pack(*arguments) == bad_argument, arguments
        swapped = (arguments[1], arguments[0], *arguments[2:])
        assert library.lowbit_unpack(*swapped) == bad_argument, swapped
    library.lowbit_row_lanes.argtypes, library.lowbit_row_lanes.restype = [ctypes.c_int64, ctypes.c_int], ctypes.c_int64
    assert library.lowbit_row_lanes(-1, 4) < 0 and library.lowbit_row_lanes(64, 9) < 0
    assert library.lowbit_force_isa(b"z80") == bad_argument and library.lowbit_force_isa(None) == bad_argument
    assert (out == 7).all() and library.lowbit_isa().decode() == isas()[0]
