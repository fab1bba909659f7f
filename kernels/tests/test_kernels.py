"""Every kernel against its plain twin, on every problem of the list; :mod:`support.tolerance` says how far off."""

import lowbit_kernels
import pytest
import torch
from lowbit_kernels import forms, layout, plain
from lowbit_kernels.tiles import GEMV_ROWS, Tiles
from problems import FP16, FP32, PROBLEMS, PRODUCT, Problem, guard, intact, packed
from support.fast_tolerance import fast_bound
from support.tolerance import check_sum, flip, random, weight_error

from hf_lowbit.formats import parse_format


@pytest.mark.parametrize(
    "problem",
    [*PROBLEMS, *(pytest.param(p, marks=pytest.mark.slow) for p in PRODUCT)],
    ids=lambda p: p.id,
)
def test_a_kernel_computes_what_its_twin_does(problem: Problem, device, buffers):
    format, (M, N, K), dtype = parse_format(problem.format), (problem.M, problem.N, problem.K), problem.dtype
    weight, companions = packed(format, N, K, device)
    lay = lowbit_kernels.parse(format.spec)
    named = layout.name_tensors(weight, companions, lay)
    values = plain.weight_values(named, lay, K)
    error = weight_error(named, lay)
    given = [weight, *companions]
    if problem.op == "linear":
        x, bias = random(M, K, dtype=dtype, device=device), random(N, dtype=FP32, device=device, seed=2)
        given += [x]
        result = lowbit_kernels.linear(x, weight, companions, bias, format.spec, K)
        assert result.shape == (M, N) and result.dtype == dtype
        if (form := forms.choose(forms.describe(x.device), lay, dtype, M)) in forms.FAST:  # on a GPU
            expected, bound = fast_bound(x, weight, companions, bias, format.spec, K, form.name)
            assert ((result.double() - expected).abs() <= bound).all()
            assert buffers and all(intact(b) for b in (*buffers, *given))
            return
        tiled = M > GEMV_ROWS
        right = values.to(dtype).float() if tiled else values
        check_sum(result, x.float(), right.T, dtype, K + 1, flip(error, dtype) if tiled else error, bias.to(dtype))
    elif problem.op == "input_gradient":
        gradient = random(M, N, dtype=dtype, device=device)
        given += [gradient]
        result = lowbit_kernels.input_gradient(gradient, weight, companions, format.spec, K)
        assert result.shape == (M, K) and result.dtype == dtype
        check_sum(result, gradient.float(), values.to(dtype).float(), dtype, N, flip(error, dtype))
    else:
        if problem.op == "dequantize":
            result, expected = lowbit_kernels.dequantize(weight, companions, format.spec, K, dtype), values
        else:
            index = guard((torch.arange(M, device=device) * 7 + 3) % N)
            given += [index]
            result, expected = lowbit_kernels.embedding(index, weight, companions, format.spec, K, dtype), values[index]
        assert result.shape == expected.shape and result.dtype == dtype
        expected = expected.to(dtype).float()
        assert ((result.float() - expected).abs() <= flip(error, dtype) * expected.abs()).all()
    assert buffers and all(intact(b) for b in (*buffers, *given))


@pytest.mark.parametrize("M", [2, 20])
@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("format", ["int:bits=3,group_size=32", "ternary:bits=1.58"])
def test_programs_that_share_the_inputs_add_up(format, split, M, device, buffers):
    """Any number of splits, more than there are steps included, gives the sum, and the same bits every time."""
    format, N, K = parse_format(format), 34, 340
    weight, companions = packed(format, N, K, device)
    x, bias = random(M, K, dtype=FP32, device=device), random(N, dtype=FP32, device=device, seed=2)
    buffers.clear()
    tiles = Tiles(2, 16, 32, split) if M == 2 else Tiles(16, 32, 16, split)
    first, again = (lowbit_kernels.linear(x, weight, companions, bias, format.spec, K, tiles) for _ in range(2))
    assert torch.equal(first, again)
    lay = lowbit_kernels.parse(format.spec)
    named = layout.name_tensors(weight, companions, lay)
    values = plain.weight_values(named, lay, K)
    check_sum(first, x, values.T, FP32, K + 1, weight_error(named, lay), bias)
    assert len(buffers) == 2 * (1 + (split > 1)) and all(intact(b) for b in buffers)


def test_shapes_without_rows_or_with_many_dimensions(device):
    format = parse_format("int:bits=4")
    weight, companions = packed(format, 7, 65, device)
    for leading in ((), (0,), (2, 0), (2, 3)):
        x = torch.ones(*leading, 65, device=device)
        y = lowbit_kernels.linear(x, weight, companions, None, format.spec, 65)
        assert y.shape == (*leading, 7)
        assert lowbit_kernels.input_gradient(y, weight, companions, format.spec, 65).shape == x.shape
        index = torch.zeros(leading, dtype=torch.long, device=device)
        assert lowbit_kernels.embedding(index, weight, companions, format.spec, 65, FP16).shape == x.shape


def test_input_that_is_not_contiguous(device):
    format = parse_format("int:bits=4")
    weight, companions = packed(format, 7, 65, device)
    x = random(65, 3, dtype=FP32, device=device).T
    expected = lowbit_kernels.linear(x.contiguous(), weight, companions, None, format.spec, 65)
    assert torch.equal(lowbit_kernels.linear(x, weight, companions, None, format.spec, 65), expected)


@pytest.mark.parametrize("row", [-1, 7])
def test_an_index_outside_the_table_is_an_error(row, device):
    if device != "cpu":
        pytest.skip("a device assertion ends the process")
    format = parse_format("int:bits=4")
    with pytest.raises(RuntimeError, match="index out of range"):
        lowbit_kernels.embedding(torch.tensor([row]), *packed(format, 7, 65, device), format.spec, 65, FP32)


@pytest.mark.parametrize("format", ["int:bits=4", "ternary:bits=1.58"])
def test_rows_outside_the_table_are_nan_and_others_are_whole(format, device, buffers):
    """What a GPU computes before its assertion is seen: nothing outside is read, and all is written."""
    format, K = parse_format(format), 121
    weight, companions = packed(format, 16, K, device)
    index = torch.tensor([-1, 5, 16, -3, 15], device=device)
    found = lowbit_kernels._rows(index, weight, companions, format.spec, K, FP32, None)
    whole = lowbit_kernels.dequantize(weight, companions, format.spec, K, FP32)
    assert found[[0, 2, 3]].isnan().all() and torch.equal(found[[1, 4]], whole[[5, 15]])
    assert all(intact(b) for b in buffers)


def test_the_check_would_see_one_weight_off_by_one_code(device):
    """The tolerances of the list above are tight enough to see the smallest error there can be, in 8 bits."""
    format = parse_format("int:bits=8,symmetric=True,scale_dtype=float32")
    weight, companions = packed(format, 33, 193, device)
    x = torch.full((5, 193), 0.25, device=device)
    values = plain.dequantize(weight, companions, format.spec, 193, FP32)
    result = lowbit_kernels.linear(x, weight, companions, None, format.spec, 193)
    check_sum(result, x, values.T, FP32, 193, 0.0)
    values[0, 100] += companions[0][0, 1]
    with pytest.raises(AssertionError, match=r"off by .* of what it may be"):
        check_sum(result, x, values.T, FP32, 193, 0.0)


def test_every_problem_has_its_own_name():
    both = [*PROBLEMS, *PRODUCT]
    assert len({p.id for p in both}) == len(set(both)) == len(both)


def test_the_list_covers_what_the_kernels_read():
    layouts = {lowbit_kernels.parse(parse_format(p.format).spec) for p in PROBLEMS if p.op == "linear"}
    assert {l.bits for l in layouts if l.name == "int"} == set(range(1, 9))
    assert {l.name for l in layouts} == {"int", "nf", "fp4", "codebook", "ternary"}
    assert {l.scale for l in layouts} == {*layout.SCALES, "none"}
    assert {l.group for l in layouts} == {0, *(2**i for i in range(4, 11))}
    assert {l.zeros for l in layouts} == {"int", "float", "fixed"}
    for op in ("linear", "input_gradient", "embedding"):
        read = [(lowbit_kernels.parse(parse_format(p.format).spec), p) for p in PROBLEMS if p.op == op]
        assert {layout.even(p.K, l) for l, p in read if not l.ternary} == {0, 1}
        assert {layout.even(p.K, l) for l, p in read if l.ternary} == {1, 2, 4, 8}
        assert any(p.N * l.row_lanes(p.K) % 8 for l, p in read if l.ternary)  # the tensor ends within 16 bytes


def test_ternary_rows_of_a_tensor_that_begins_anywhere_promise_nothing():
    ternary, other = (lowbit_kernels.parse(text) for text in ("ternary:bits=1.58", "int:bits=4"))
    assert layout.even(320, ternary, 0) == layout.even(320, ternary, 32) == 1
    assert layout.even(320, ternary, 2) == layout.even(213, ternary, 6) == 0
    assert layout.even(256, other, 2) == 1


@pytest.mark.parametrize("K", [315, 213, 121])
def test_ternary_weights_that_begin_anywhere_are_read_all_the_same(K, device):
    """By other loads in another order: inputs are small whole numbers, so that every sum is exact."""
    format, N = parse_format("ternary:bits=1.58,scale_dtype=float16"), 9
    weight, companions = packed(format, N, K, device)
    moved = torch.full((weight.numel() + 2,), -1, dtype=weight.dtype, device=device)[1:-1].view(weight.shape)
    moved.copy_(weight)
    assert weight.data_ptr() % 16 == 0 and moved.data_ptr() % 16
    generator = torch.Generator().manual_seed(K)
    for dtype in (FP16, FP32):
        for M in (1, 6):
            x = torch.randint(-3, 4, (M, K), generator=generator).to(device, dtype)
            gradient = torch.randint(-3, 4, (M, N), generator=generator).to(device, dtype)
            ends = torch.tensor([M], dtype=torch.int32, device=device)
            found = [
                (
                    lowbit_kernels.linear(x, given, companions, None, format.spec, K),
                    lowbit_kernels.input_gradient(gradient, given, companions, format.spec, K),
                    lowbit_kernels.grouped_linear(
                        x, ends, given[None], [c[None] for c in companions], None, format.spec, K
                    ),
                )
                for given in (weight, moved)
            ]
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        rows = [lowbit_kernels.dequantize(given, companions, format.spec, K, dtype) for given in (weight, moved)]
        assert torch.equal(*rows)


@pytest.mark.parametrize("K", [315, 121])
def test_a_gradient_of_many_rows_takes_them_in_parts(K, device, buffers, monkeypatch):
    """Shares of sums, of ternary rows that begin anywhere, take memory: only so much at a time."""
    format = parse_format("ternary:bits=1.58")
    weight, companions = packed(format, 16, K, device)
    gradient = random(70, 16, dtype=FP16, device=device)
    whole = lowbit_kernels.input_gradient(gradient, weight, companions, format.spec, K)
    monkeypatch.setattr(lowbit_kernels, "SHARED_VALUES", 8 * 40 * K)
    buffers.clear()
    assert torch.equal(lowbit_kernels.input_gradient(gradient, weight, companions, format.spec, K), whole)
    shared = [tuple(b.shape) for b in buffers[1:]]
    assert shared == ([(8, 40, K), (8, 30, K)] if K == 121 else []) and all(intact(b) for b in buffers)


def test_every_e4m3_scale_is_the_number_that_torch_reads(device):
    format, codes = parse_format("codebook:bits=4,group_size=32,scale_dtype=e4m3"), torch.arange(256, device=device)
    codes = codes[codes % 128 != 127]  # not a number
    weight, companions = packed(format, len(codes), 32, device)
    scales, shared, *rest = companions
    companions = [guard(codes.to(torch.uint8)[:, None]), shared, *rest]
    assert scales.shape == companions[0].shape and shared.numel() == 1
    found = lowbit_kernels.dequantize(weight, companions, format.spec, 32, torch.float32)
    named = layout.name_tensors(weight, companions, layout.parse(format.spec))
    expected = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * shared
    assert torch.equal(plain.group_scales(named, layout.parse(format.spec))[:, 0], expected)
    assert torch.equal(found, plain.dequantize(weight, companions, format.spec, 32, torch.float32))
