"""Linears of experts against what each expert's rows give alone, and the promise that the host looks at nothing."""

from dataclasses import dataclass

import lowbit_kernels
import pytest
import torch
from lowbit_kernels import layout, plain
from lowbit_kernels.grouped import grouped_input_gradient, grouped_linear, row_tiles_needed
from lowbit_kernels.tiles import GEMV_ROWS, Tiles
from problems import BF16, FP16, FP32, guard, intact, packed
from support.tolerance import check_sum, flip, random, weight_error

from hf_lowbit.formats import parse_format


@dataclass(frozen=True)
class Experts:
    """Rows of x of each expert (and ``tail`` of none) on weights (N, K) packed as ``format``."""

    format: str
    counts: tuple[int, ...]
    N: int
    K: int
    dtype: torch.dtype
    tail: int = 0

    @property
    def id(self) -> str:
        counts = "_".join(map(str, self.counts))
        return f"{self.format}-{counts}-{self.tail}-N{self.N}_K{self.K}-{str(self.dtype).removeprefix('torch.')}"


def _problems() -> list[Experts]:
    dtypes = (BF16, FP16, FP32)
    # Every width; few rows an expert, more, and none for some.
    found = [Experts(f"int:bits={b}", (3, 0, 1, 2), 17, 128, dtypes[b % 3]) for b in range(1, 9)]
    found += [Experts(f"int:bits={b},symmetric=True", (0, 19, 2), 34, 65, dtypes[(b + 1) % 3]) for b in range(1, 9)]
    # Tables for all, of the tensor and of the row; ternary; scales that share a number of the tensor.
    for format in (
        *("nf:bits=4", "fp4:bits=4", "codebook:bits=3", "codebook:bits=4,group_size=-1,codebook=row"),
        *("ternary:bits=1.58", "int:bits=4,scale_dtype=e4m3,symmetric=True", "int:bits=3,zeros=float,group_size=16"),
        "int:bits=4,scale_dtype=log8,group_size=-1",
    ):
        found += [Experts(format, (2, 0, 3), 18, 70, BF16), Experts(format, (1, 20), 18, 70, FP16)]
    # Ternary rows of 8 and 13 lanes: all of an expert's, or each 8th of them, begin at 16 bytes.
    for K in (77, 123):
        found += [
            Experts("ternary:bits=1.58", (2, 0, 3), 24, K, FP16),
            Experts("ternary:bits=1.58", (1, 20), 24, K, BF16, 3),
        ]
    # An expert begins within 16 bytes; all of them together do not end so.
    found += [Experts("ternary:bits=1.58", (2, 3), 20, 123, FP32), Experts("ternary:bits=1.58", (0, 9), 20, 123, FP16)]
    # One expert; only the first, only the last; a row each; nobody; rows of no expert; rows of no expert alone.
    for dtype, (counts, tail) in zip(
        (*dtypes, *dtypes, *dtypes),
        (
            *(((5,), 0), ((37,), 0), ((9, 0, 0), 0), ((0, 0, 9), 0), ((1,) * 9, 0)),
            *(((0, 0), 3), ((2, 0, 1), 4), ((40, 0, 3), 17), ((1, 0, 33, 0, 16, 0, 0), 0)),
        ),
        strict=True,
    ):
        found.append(Experts("int:bits=4", counts, 17, 65, dtype, tail))
    return found


PROBLEMS = _problems()


def stacked(problem: Experts, device: str):
    """Weights and companions of all experts, and the ends of their rows, between canaries."""
    format, experts = parse_format(problem.format), range(len(problem.counts))
    each = [packed(format, problem.N, problem.K, device, seed) for seed in experts]
    weight = guard(torch.stack([w for w, _ in each]))
    companions = [guard(torch.stack(same)) for same in zip(*(c for _, c in each), strict=True)]
    ends = torch.tensor(problem.counts).cumsum(0).to(device, torch.int32)
    return format.spec, weight, companions, guard(ends)


def _each(problem: Experts, spec: str, weight, companions):
    """Rows, float32 weight and its error, for every expert."""
    lay, first = lowbit_kernels.parse(spec), 0
    for expert, count in enumerate(problem.counts):
        named = layout.name_tensors(weight[expert], [c[expert] for c in companions], lay)
        yield expert, slice(first, first + count), plain.weight_values(named, lay, problem.K), weight_error(named, lay)
        first += count


def _tiled(problem: Experts) -> bool:
    rows = sum(problem.counts) + problem.tail
    return -(-rows // len(problem.counts)) > GEMV_ROWS


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_every_expert_computes_what_it_would_alone(problem: Experts, device, buffers):
    (N, K), dtype = (problem.N, problem.K), problem.dtype
    spec, weight, companions, ends = stacked(problem, device)
    R, E = sum(problem.counts) + problem.tail, len(problem.counts)
    x, gradient = random(R, K, dtype=dtype, device=device), random(R, N, dtype=dtype, device=device, seed=2)
    bias = random(E, N, dtype=FP32, device=device, seed=3)
    buffers.clear()
    y = grouped_linear(x, ends, weight, companions, bias, spec, K)
    back = grouped_input_gradient(gradient, ends, weight, companions, spec, K)
    assert y.shape == (R, N) and back.shape == (R, K) and y.dtype == back.dtype == dtype
    for expert, rows, values, error in _each(problem, spec, weight, companions):
        rounded, more = values.to(dtype).float(), flip(error, dtype)
        right, off = (rounded, more) if _tiled(problem) else (values, error)
        check_sum(y[rows], x[rows].float(), right.T, dtype, K + 1, off, bias[expert].to(dtype))
        check_sum(back[rows], gradient[rows].float(), rounded, dtype, N, more)
    assert not y[R - problem.tail :].any() and not back[R - problem.tail :].any()
    shares = layout.even(K, lowbit_kernels.parse(spec)) > 1  # those of the gradient are summed in a third buffer
    assert len(buffers) == 2 + shares
    assert all(intact(b) for b in (*buffers, x, gradient, bias, ends, weight, *companions))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.dtype == FP32], ids=lambda p: p.id)
def test_the_plain_twins_take_every_expert_alone(problem: Experts, device):
    spec, weight, companions, ends = stacked(problem, device)
    R, K = sum(problem.counts) + problem.tail, problem.K
    x, gradient = random(R, K, dtype=FP32, device=device), random(R, problem.N, dtype=FP32, device=device)
    y = plain.grouped_linear(x, ends, weight, companions, None, spec, K)
    back = plain.grouped_input_gradient(gradient, ends, weight, companions, spec, K)
    for _, rows, values, error in _each(problem, spec, weight, companions):
        check_sum(y[rows], x[rows], values.T, FP32, K, error)
        check_sum(back[rows], gradient[rows], values, FP32, problem.N, error)
    assert not y[R - problem.tail :].any() and not back[R - problem.tail :].any()


def test_gradients_of_the_twins(device):
    problem = Experts("int:bits=3", (2, 0, 1), 3, 5, FP32, 1)
    spec, weight, companions, ends = stacked(problem, device)
    bias = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, bias: plain.grouped_linear(x, ends, weight, companions, bias, spec, 5), (x, bias)
    )
    gradient = torch.randn(4, 3, dtype=torch.float64, device=device)
    plain.grouped_linear(x, ends, weight, companions, bias, spec, 5).backward(gradient)
    twin = plain.grouped_input_gradient(gradient, ends, weight, companions, spec, 5)
    torch.testing.assert_close(x.grad, twin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [Tiles(1, 16, 32), Tiles(4, 32, 16), Tiles(16, 16, 16), Tiles(32, 64, 32)])
def test_any_tile_gives_the_rows_of_every_expert(tiles, device):
    problem = Experts("int:bits=4", (3, 0, 18, 1), 20, 70, FP32, 2)
    spec, weight, companions, ends = stacked(problem, device)
    x = random(24, 70, dtype=FP32, device=device)
    first, again = (
        grouped_linear(x, ends.to(torch.int64), weight, companions, None, spec, 70, tiles) for _ in range(2)
    )
    assert torch.equal(first, again)
    for _, rows, values, error in _each(problem, spec, weight, companions):
        check_sum(first[rows], x[rows], values.T, FP32, 70, error)
    assert not first[22:].any()


def test_the_grid_holds_the_worst_case_and_no_more():
    """Against every way to hand R rows to three experts and to none."""
    for rows in (1, 2, 4, 16):
        for R in range(1, 20):
            ways = [
                (a, b, c, R - a - b - c) for a in range(R + 1) for b in range(R + 1 - a) for c in range(R + 1 - a - b)
            ]
            assert row_tiles_needed(R, 3, rows) == max(sum(-(-n // rows) for n in way) for way in ways)


def test_ends_that_lie_are_not_followed_out_of_bounds(device, buffers):
    """What comes out is not defined, but nothing outside is read or written."""
    problem = Experts("int:bits=4", (4, 4), 17, 65, FP32)
    spec, weight, companions, _ = stacked(problem, device)
    x = random(8, 65, dtype=FP32, device=device)
    buffers.clear()
    for wrong in ([900, 1000], [-5, 8], [7, 3], [-9, -1]):
        ends = guard(torch.tensor(wrong, dtype=torch.int32, device=device))
        y = grouped_linear(x, ends, weight, companions, None, spec, 65)
        assert y.shape == (8, 17)
    assert all(intact(b) for b in buffers)


def test_no_rows(device):
    problem = Experts("int:bits=4", (0, 0), 17, 65, FP32)
    spec, weight, companions, ends = stacked(problem, device)
    assert grouped_linear(torch.ones(0, 65), ends, weight, companions, None, spec, 65).shape == (0, 17)
    assert grouped_input_gradient(torch.ones(0, 17), ends, weight, companions, spec, 65).shape == (0, 65)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ends": torch.zeros(3, dtype=torch.int32)}, r"ends is torch.int32 \(3,\) for a weight \(2, 17, 32\)"),
        ({"ends": torch.zeros(2)}, r"ends is torch.float32 \(2,\)"),
        ({"weight": torch.zeros(34, 32, dtype=torch.int16)}, r"stacked, \(E, N, lanes\)"),
        ({"companions": [torch.zeros(34, 2), torch.zeros(34, 1)]}, r"stack those of 2 experts"),
        ({"x": torch.zeros(2, 4, 65)}, r"rows are \(2, 4, 65\), but the weights take \(R, 65\)"),
        ({"x": torch.zeros(8, 64)}, r"rows are \(8, 64\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message, device):
    problem = Experts("int:bits=4", (4, 4), 17, 65, FP32)
    spec, weight, companions, ends = stacked(problem, device)
    given = {"x": torch.zeros(8, 65), "ends": ends, "weight": weight, "companions": companions, **change}
    with pytest.raises(ValueError, match=message):
        grouped_linear(**given, bias=None, format=spec, in_features=65)
