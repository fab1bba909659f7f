"""GPTQ does what its formulas say, and what that is good for: less error in a layer's outputs on fresh inputs."""

from dataclasses import replace

import pytest
import torch
from test_methods import FORMATS

from hf_lowbit.calibration import Moments
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method
from hf_lowbit.methods.gptq import feed_back, inverse_factor
from hf_lowbit.methods.refining import descend, fit_scales, refine

ROWS, COLUMNS = 40, 200  # the last group of 64 has 8 columns
TEXTS = [text.format(widths[len(widths) // 2]) for family in FORMATS.values() for text, widths in family]


def inputs(tokens: int, seed: int, columns: int = COLUMNS) -> torch.Tensor:
    """Correlated inputs of unequal size, as layers have them: one mixture, fresh draws."""
    mixture = torch.randn(columns, columns, generator=torch.Generator().manual_seed(1)) / columns**0.5
    size = torch.linspace(-2, 2, columns).exp()[torch.randperm(columns, generator=torch.Generator().manual_seed(2))]
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) @ mixture * size


def moments(tokens: int = 2000, seed: int = 3, columns: int = COLUMNS) -> Moments:
    found = Moments(columns)
    found.add(inputs(tokens, seed, columns))
    return found


def weight(columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(4)) * 0.02


def plain(W, H, order, format, grid) -> torch.Tensor:
    """The definition: the inverse of what is left of H, anew for every column, float64."""
    W, H, codes = W.double().clone(), H.double(), torch.empty(W.shape, dtype=torch.uint8)
    for position, column in enumerate(order.tolist()):
        rest = order[position:]
        inverse = torch.linalg.inv(H[rest][:, rest])
        group = column // (W.shape[1] if format.group_size == -1 else format.group_size)
        scales, zeros = (None if t is None else t[:, group : group + 1] for t in (grid.scales, grid.zeros))
        code = format.encode_groups(W[:, column].float().view(-1, 1, 1), scales, zeros, grid.levels)
        error = W[:, column] - format.decode_groups(code, scales, zeros, grid.levels).view(-1)
        W[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0])
        codes[:, column] = code.view(-1)
    return codes


@pytest.mark.parametrize("block", [1, 48, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_it_is_the_column_by_column_definition(text, block):
    format, W, H = parse_format(text), weight(), moments().damped(0.01)
    grid = make_method("lloyd" if format.learns_levels else "rtn").quantize(W, format)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))
    assert torch.equal(feed_back(W, H, order, format, grid, block), plain(W, H, order, format, grid))


def test_the_factor_is_the_inverses():
    H = moments().damped(0.01).double()
    H = (H + H.T) / 2
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ H, torch.eye(COLUMNS, dtype=torch.float64))


def test_moments_without_a_factor_are_damped_until_they_have_one():
    H = torch.ones(8, 8)  # of rank one
    H[0, 0] -= 1e-3  # and not even positive semidefinite
    U = inverse_factor(H)
    assert torch.isfinite(U).all() and (U.diagonal() > 0).all()
    with pytest.raises(ValueError, match="moments of its inputs are not finite"):
        inverse_factor(torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("act_order", [True, False])
def test_it_beats_rounding_to_nearest_on_fresh_inputs(text, act_order):
    format, W, fresh = parse_format(text), weight(), inputs(500, seed=9)

    def error(name, options, statistics):
        quantized = make_method(name, options).quantize(W, format, statistics)
        restored = format.dequantize(format.pack(quantized), W.shape)
        return (fresh @ (restored - W).T).square().sum()

    simple = ("lloyd", {}) if format.learns_levels else ("rtn", {"range": "mse"})
    assert error("gptq", {"act_order": act_order}, moments()) < error(*simple, None)


@pytest.mark.parametrize("text", TEXTS)
def test_the_result_is_sound(text):
    format, W = parse_format(text), weight()
    first, second = (make_method("gptq").quantize(W, format, moments()) for _ in range(2))
    assert torch.equal(W, weight()), "the input was changed"
    again = format.unpack(format.pack(first), W.shape)
    for part in ("codes", "scales", "zeros", "levels"):
        a, b, c = (getattr(q, part) for q in (first, second, again))
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert torch.equal(a, b)
            torch.testing.assert_close(c, a, rtol=2.0**-19, atol=0)  # log8 and e4m3 find their ranges again
    half = make_method("gptq").quantize(W.bfloat16(), format, moments())
    assert torch.equal(half.codes, make_method("gptq").quantize(W.bfloat16().float(), format, moments()).codes)


@pytest.mark.parametrize(
    ("bits", "given", "range"),
    [(2, None, "weighted"), (3, None, "mse"), (2, "mse", "mse"), (3, "weighted", "weighted"), (4, "minmax", "minmax")],
)
def test_equal_inputs_of_no_correlation_leave_nothing_to_make_up_for(bits, given, range):
    """With H a multiple of the identity, the codes are the nearest ones, on ranges of that kind."""
    format, W = parse_format(f"int:bits={bits}"), weight()
    found = Moments(COLUMNS)
    found.square, found.tokens = 2.5 * torch.eye(COLUMNS), 1
    quantized = make_method("gptq", {"refine": 0, "range": given}).quantize(W, format, found)
    expected = make_method("rtn", {"range": range}).quantize(W, format)
    assert torch.equal(quantized.codes, expected.codes) and torch.equal(quantized.scales, expected.scales)


def test_zeros_and_constants_survive():
    format = parse_format("int:bits=3,group_size=64")
    got = format.decode(make_method("gptq").quantize(torch.zeros(3, COLUMNS), format, moments()))
    assert torch.equal(got, torch.zeros(3, COLUMNS))
    got = format.decode(make_method("gptq").quantize(torch.full((3, COLUMNS), 0.5), format, moments()))
    torch.testing.assert_close(got, torch.full((3, COLUMNS), 0.5), rtol=2.0**-10, atol=0)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="method 'gptq' needs calibration data: give calibration="):
        make_method("gptq").quantize(weight(), parse_format("int:bits=4"))
    with pytest.raises(ValueError, match=r"damping=0 is not possible: method 'gptq' takes a number above 0"):
        make_method("gptq", {"damping": 0})
    with pytest.raises(ValueError, match=r"refine=-1 is not possible: method .gptq. takes a whole number"):
        make_method("gptq", {"refine": -1})
    with pytest.raises(ValueError, match=r"range='max' is unknown: method 'gptq' takes 'weighted', 'mse', 'minmax'"):
        make_method("gptq", {"range": "max"})
    with pytest.raises(ValueError, match=r"range='mse' is of no use, since a table of levels is learned: drop it"):
        make_method("gptq", {"range": "mse"}).check(parse_format("codebook:bits=3"))
    columns = parse_format("int_columns:bits=8,group_size=-1,symmetric=True")
    with pytest.raises(ValueError, match=r"range='mse' is of no use, since bits_stored= clips nothing: drop it"):
        make_method("gptq", {"range": "mse", "bits_stored": 3.0}).check(columns)


# -- refining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_refinement_lowers_what_it_minimises(text):
    format, W, H = parse_format(text), weight(), moments().damped(0.01)
    start = make_method("gptq", {"refine": 0}).quantize(W, format, moments())

    def errors(quantized):
        E = (format.decode(quantized) - W).double()
        return ((E @ H.double()) * E).sum(1)

    refined = refine(W, H, format, start)
    if format.scale_dtype == "e8m0":  # powers of two, rounded up: fitted scales need not help
        assert errors(refined).sum() <= errors(start).sum()
    else:
        assert errors(refined).sum() < errors(start).sum()
    if format.rounds_scales_alone or start.scales is None:
        assert (errors(refined) <= errors(start)).all()
    both = make_method("gptq", {"refine": 1}).quantize(W, format, moments())
    assert torch.equal(both.codes, refined.codes)
    assert (errors(descend(W, H, format, start)) <= errors(start) * (1 + 1e-6)).all()  # of float32 sums


@pytest.mark.parametrize(
    "text", ["int:bits=3,group_size=64,scale_dtype=float32", "nf:bits=3,group_size=-1,scale_dtype=float32"]
)
def test_fitted_scales_solve_the_normal_equations(text):
    format, W, H = parse_format(text), weight(), moments().damped(0.01)
    start = make_method("gptq", {"refine": 0}).quantize(W, format, moments())
    fitted = fit_scales(W, H, format, start)
    units = format.decode(replace(start, scales=torch.ones_like(start.scales))).double()
    slope = ((format.decode(fitted) - W).double() @ H.double()) * units
    before = ((format.decode(start) - W).double() @ H.double()) * units
    size = COLUMNS if format.group_size == -1 else format.group_size
    for group in range(fitted.scales.shape[1]):
        part = slice(group * size, (group + 1) * size)
        # What is left is the pull of 1e-4 to the old scales, which moved by some percent.
        assert slope[:, part].sum(1).norm() < 0.02 * before[:, part].sum(1).norm()


def test_fitted_scales_of_turned_groups_keep_their_sign():
    format, W, H = parse_format("codebook:bits=3,group_size=32,scale_dtype=e4m3"), weight(), moments().damped(0.01)
    start = make_method("gptq", {"refine": 0}).quantize(W, format, moments())
    fitted, turned = fit_scales(W, H, format, start).scales, start.scales < 0
    assert torch.equal(fitted.sign(), start.scales.sign())
    assert (fitted != start.scales)[turned].float().mean() > 0.5 and turned.any()  # they are fitted like the others


@pytest.mark.parametrize("block", [1, 48, 1000])
def test_descent_is_coordinate_descent(block):
    format, W, H = parse_format("int:bits=3,group_size=64"), weight(), moments().damped(0.01)
    start = make_method("gptq", {"refine": 0}).quantize(W, format, moments())
    Q, codes = format.decode(start).double(), start.codes.clone()
    for k in range(COLUMNS):
        best = Q[:, k] - (Q - W) @ H[:, k].double() / H[k, k].double()
        scales, zeros = start.scales[:, [k // 64]], start.zeros[:, [k // 64]]
        code = format.encode_groups(best.float().view(-1, 1, 1), scales, zeros)
        Q[:, k], codes[:, k] = format.decode_groups(code, scales, zeros).view(-1), code.view(-1)
    assert torch.equal(descend(W, H, format, start, block).codes, codes)
