"""The rate model: entropy, prices of codes, and the search for a step."""

import math

import pytest
import torch

from hf_lowbit.formats import parse_format
from hf_lowbit.rate import SLOPE, ZERO, cheapest_codes, code_lengths, coded_bits, count_codes, entropy, find_step
from hf_lowbit.storage.entropy import encode, symbols_for


@pytest.mark.parametrize(
    "counts, bits",
    [([1, 1], 1.0), ([4, 4, 4, 4], 2.0), ([8, 0, 0], 0.0), ([], 0.0), ([0, 0], 0.0), ([2, 1, 1], 1.5)],
)
def test_entropy(counts, bits):
    assert entropy(torch.tensor(counts, dtype=torch.int64)) == pytest.approx(bits, abs=1e-12)


def test_codes_are_counted_from_minus_128_to_127():
    counts = count_codes(torch.tensor([[-128.0, 0.0], [0.0, 127.0]]))
    assert counts.sum() == 4 and counts[0] == 1 and counts[ZERO] == 2 and counts[255] == 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 64), (7, 577), (300, 576), (64, 4096)])
@pytest.mark.parametrize("kind", ["normal", "constant", "uniform"])
def test_the_account_of_coded_bits_is_the_coders_size(bits, shape, kind):
    """To 10 bytes a block, or 40 where it holds next to nothing, and states end as they began."""
    generator, top = torch.Generator().manual_seed(0), 2**bits
    codes = {
        "normal": (torch.randn(shape, generator=generator) * top / 8 + top / 2).round().clamp(0, top - 1),
        "constant": torch.full(shape, float(top // 2)),
        "uniform": torch.randint(0, top, shape, generator=generator),
    }[kind].to(torch.uint8)
    format = parse_format(f"int:bits={bits},group_size=-1,symmetric=True")
    packed = format.pack_rows(codes)
    size = min(encode(packed, symbols_for("", packed.dtype, bits)).nbytes, packed.nbytes)
    blocks = 1 + packed.nbytes // 2**15
    assert coded_bits(codes, format) / 8 == pytest.approx(size, abs=40 * blocks)
    assert coded_bits(codes[:: 1 if len(codes) < 64 else 2], format, shape[0]) == pytest.approx(
        8 * size, rel=0.03, abs=320 * blocks
    )


def test_lengths_are_those_of_an_ideal_coder_and_unseen_codes_cost_more():
    counts = torch.zeros(256, dtype=torch.int64)
    counts[ZERO], counts[ZERO + 1], counts[ZERO - 1] = 8, 4, 4
    lengths = code_lengths(counts)
    assert lengths[ZERO] == 1 and lengths[ZERO + 1] == lengths[ZERO - 1] == 2
    assert lengths[0] == math.log2(16 / 0.5)


def test_the_cheapest_codes_are_the_cheapest():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * 3
    x[:3] = torch.tensor([200.0, -200.0, 0.0])
    lengths = code_lengths(count_codes(x.round().clamp(-20, 20)))
    chosen = cheapest_codes(x, lengths, SLOPE, 20)

    def cost(codes):
        return (x - codes).square() + SLOPE * lengths[codes.long() + ZERO]

    nearest = x.round().clamp(-20, 20)
    assert (cost(chosen) <= torch.minimum(cost(nearest), cost(nearest - nearest.sign())) + 1e-4).all()
    assert (chosen != nearest).any() and chosen.abs().max() == 20
    assert torch.equal(cheapest_codes(x, lengths, 0.0, 20), nearest)


def test_rounding_by_rate_has_less_error_at_equal_rate():
    """By 0.019 bits for a Laplacian source at 1.5 bits; a normal one, with its step fitted, has nothing to gain."""
    generator = torch.Generator().manual_seed(0)
    x = torch.empty(200_000).exponential_(generator=generator)
    x *= torch.randint(0, 2, x.shape, generator=generator) * 2 - 1

    def measure(step, slope):
        lengths = code_lengths(count_codes((x / step).round()))
        codes = cheapest_codes(x / step, lengths, slope, 127)
        scale = (x * codes).sum() / codes.square().sum()
        return entropy(count_codes(codes)), float((x - scale * codes).square().mean())

    plain_step = find_step(lambda s: measure(s, 0.0)[0], 1.5, 1.0)
    priced_step = find_step(lambda s: measure(s, SLOPE)[0], 1.5, 1.0)
    plain, priced = measure(plain_step, 0.0), measure(priced_step, SLOPE)
    assert plain[0] == pytest.approx(priced[0], abs=2e-3)
    assert 0.5 * math.log2(plain[1] / priced[1]) > 0.015


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0, 6.9])
@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_the_step_is_found_from_anywhere(target, start):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))

    def rate(step):
        return entropy((x / step).round().unique(return_counts=True)[1])

    assert rate(find_step(rate, target, start)) == pytest.approx(target, abs=2e-3)


def test_a_rate_that_cannot_be_met_gives_the_nearest():
    assert 2.0 - min(2.0, 1 / find_step(lambda s: min(2.0, 1 / s), 5.0, 1.0)) < 1e-9
