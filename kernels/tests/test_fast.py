"""The fast NVIDIA kernel computes what the plain twin does: under the interpreter, with its inline assembly emulated.

Tolerances follow from the arithmetic: products of codes and inputs are exact in float32, and summed there, K of them
with an error of 4 * sqrt(K) * 2**-24 of the sum of magnitudes (four standard deviations of independent roundings); the
result is rounded once to the dtype. Tables are rounded to the dtype first. In bfloat16 values stand above an offset of
128 (8 bits: 256), and the sum of inputs is subtracted as often: both sums count. What has its scales in the weights is
in ``test_fast_scaled.py``.
"""

from dataclasses import replace

import pytest
import torch
from problems import guard, intact, packed

from hf_lowbit import reference
from hf_lowbit.formats import parse_format

FP16, BF16 = torch.float16, torch.bfloat16
EIGHT_BITS = ("e4m3", "e8m0")  # scales
# Two blocks whose plane of one bit is loaded at once, and rows that end after the first or within one.
SPANNED = ((1, "log8", 512), (1, "float16", 320), (3, "log8", 330), (3, "e8m0", 512), (3, "log8", 64))
CASES = [
    *((f"int:bits={b},group_size=64", M, 512, FP16, None) for b in range(1, 9) for M in (1, 5)),
    *((f"int:bits={b},group_size=128,symmetric=True", 3, 512, BF16, None) for b in range(1, 9)),
    *((f"int:bits={b},group_size=64", 2, 330, FP16, "lop3") for b in range(1, 9)),
    *((f"int:bits={b},group_size=64", 17, 330, BF16, None) for b in range(1, 9)),
    *((f"int:bits=4,group_size={g}", 2, 320, FP16, None) for g in (16, 128, 256, -1)),
    *((f"int:bits={b},group_size=32", M, K, FP16, None) for b in range(1, 9) for M, K in ((2, 330), (1, 512))),
    *((f"int:bits={b},group_size=32", 2, 512, BF16, None) for b in range(1, 9)),
    *((f"codebook:bits={b},group_size=32,scale_dtype={s}", 12, K, FP16, None) for b, s, K in SPANNED),
    ("int:bits=4,group_size=32,zeros=float,scale_dtype=bfloat16", 2, 512, FP16, None),
    ("int:bits=4,group_size=32,symmetric=True", 2, 512, FP16, "lop3"),
    *((f"int:bits={b},group_size=32", 2, 512, FP16, "lop3") for b in (2, 5)),
    ("int:bits=4,group_size=64,scale_dtype=log8,symmetric=True", 1, 512, FP16, None),
    *((f"int:bits={b},group_size=32,scale_dtype=log8", 1, K, FP16, None) for b, K in ((2, 512), (3, 330), (4, 512))),
    ("int:bits=7,group_size=32,scale_dtype=log8", 1, 512, BF16, None),
    ("int:bits=4,group_size=64,zeros=float", 1, 512, FP16, None),
    *(
        (f, M, 256, d, None)
        for f in ("nf:bits=4", "nf:bits=3", "nf:bits=2", "fp4:bits=4", "codebook:bits=4", "codebook:bits=1")
        for M, d in ((1, FP16), (7, BF16))
    ),
    ("nf:bits=4,group_size=32", 2, 192, FP16, None),
    ("nf:bits=4,group_size=32", 4, 192, FP16, None),
    ("nf:bits=4,group_size=32", 2, 512, BF16, None),
    *(("nf:bits=4,group_size=32", M, K, d, None) for M, K, d in ((16, 512, FP16), (9, 330, FP16), (17, 192, BF16))),
    *((f"int:bits=4,group_size=32,scale_dtype={s}", 2, K, FP16, None) for s in EIGHT_BITS for K in (330, 512)),
    *((f"int:bits=5,group_size={g},scale_dtype={s}", 6, 330, FP16, None) for s in EIGHT_BITS for g in (16, 64)),
    *((f"codebook:bits=4,group_size=32,scale_dtype={s}", M, 200, FP16, None) for s in EIGHT_BITS for M in (2, 4, 6)),
    ("codebook:bits=4,group_size=-1", 5, 330, FP16, "lop3"),
    ("fp4:bits=4", 3, 320, BF16, None),
    ("fp4:bits=4,group_size=16,scale_dtype=e4m3", 2, 192, FP16, None),
    *((f"codebook:bits={b},group_size=-1,codebook=row", 2, 200, FP16, None) for b in (3, 4)),
]


@pytest.fixture(autouse=True)
def assembly(device):
    from support.inline_asm import emulate_inline_asm

    emulate_inline_asm()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c[0].replace(',', '_')}_M{c[1]}_K{c[2]}_{str(c[3])[6:]}_{c[4]}"
)
def test_fast_linear_is_the_reference(case, device):
    from lowbit_kernels.fast import fast_linear, sum_tiles
    from lowbit_kernels.layout import parse

    text, M, K, dtype, form = case
    format, N, split = parse_format(text), 70, 2 if M == 1 else 1
    weight, companions = packed(format, N, K, device)
    x = guard(torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(device, dtype))
    bias = guard(torch.randn(N, generator=torch.Generator().manual_seed(M)).to(device, dtype))
    values = reference.dequantize(weight, companions, format.spec, K, torch.float64)
    expected = x.double() @ values.T + bias.double()
    scales = format.unpack(dict(zip(("", *format.suffixes()), (weight, *companions), strict=True)), (N, K)).scales
    one = 0 if scales is None else (scales.abs().double().repeat_interleave(-(-K // scales.shape[1]), 1)[:, :K])
    offset = (256 if format.bits == 8 else 128) if dtype == BF16 else 0
    reach = 2 * (2**format.bits + offset)
    magnitude = x.double().abs() @ (values.abs() + one * reach).T
    half = torch.finfo(dtype).eps / 2
    table = half * (x.double().abs() @ values.abs().T) if format.name in ("nf", "fp4", "codebook") else 0
    tolerance = magnitude * 4 * K**0.5 * 2.0**-24 + table + half * expected.abs() * 1.01 + 2.0**-24

    tiles = sum_tiles(M, parse(format.spec), form or ("magic" if dtype == BF16 else "subnormal"))
    result = fast_linear(x, weight, companions, bias, format.spec, K, form=form, tiles=tiles, split=split)

    assert ((result.double() - expected).abs() <= tolerance).all()
    assert intact(x) and intact(bias) and intact(weight)


def alone(format, seed: int, dtype, tiles, device):
    """Results and exact values, float64, of 16 rows of x with a single 1 each, in 16 columns of a weight."""
    from lowbit_kernels.fast import fast_linear

    N, K = 64, 256
    weight, companions = packed(format, N, K, device)
    k = torch.randperm(K, generator=torch.Generator().manual_seed(seed))[:16]
    x = torch.zeros(16, K, dtype=dtype, device=device)
    x[torch.arange(16), k] = 1
    expected = reference.dequantize(weight, companions, format.spec, K, torch.float64)[:, k].T
    return fast_linear(x, weight, companions, None, format.spec, K, tiles=tiles).double(), expected


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_weight_alone_is_exact_to_a_rounding(bits, dtype, device):
    """With a single input not 0 there is nothing to sum: an error of one code anywhere it looks would show."""
    from lowbit_kernels.fast import sum_tiles
    from lowbit_kernels.layout import parse

    format = parse_format(f"int:bits={bits},group_size=64")
    tiles = sum_tiles(16, parse(format.spec), "magic" if dtype == BF16 else "subnormal")
    result, expected = alone(format, bits, dtype, tiles, device)
    # The float32 sums see codes of at most 8 bits and offsets of 12: they are exact; so is a float16 scale in float32.
    assert ((result - expected).abs() <= expected.abs() * (torch.finfo(dtype).eps / 2 + 2.0**-23) + 2.0**-25).all()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("bits", range(1, 5))
def test_every_level_alone_is_exact_to_a_rounding(bits, pairs, dtype, device):
    """In registers and by pairs in shared memory, whichever the rules take."""
    from lowbit_kernels.fast import fast_tiles
    from lowbit_kernels.layout import parse

    format = parse_format(f"codebook:bits={bits},group_size=64,scale_dtype=float16")
    form = "magic" if dtype == BF16 else "subnormal"
    tiles = replace(fast_tiles(16, parse(format.spec), form), pairs=pairs)
    result, expected = alone(format, bits, dtype, tiles, device)
    # The level is rounded to the dtype, and the result.
    assert ((result - expected).abs() <= expected.abs() * (torch.finfo(dtype).eps + 2.0**-23) + 2.0**-25).all()


def test_a_table_of_pairs_is_for_one_table_of_levels_and_many_rows(device):
    from lowbit_kernels import Device, _fast_tiles
    from lowbit_kernels.fast import fast_linear, fast_tiles
    from lowbit_kernels.layout import parse

    def taken(text, M=16, form="subnormal"):
        return fast_tiles(M, parse(text), form).pairs

    assert taken("nf:bits=4") and taken("codebook:bits=4", 5) and taken("fp4:bits=4", form="magic")
    by_row = "codebook:bits=4,group_size=-1,codebook=row"
    assert not any(map(taken, ("nf:bits=3", "fp4:bits=4", by_row, "int:bits=4"))) and not taken("nf:bits=4", 4)
    weight, companions = packed(parse_format(by_row), 16, 64, device)
    tiles = replace(fast_tiles(16, parse(by_row), "subnormal"), pairs=1)
    with pytest.raises(ValueError, match=r"levels of .*codebook=row.* have no table of pairs in the form 'subnormal'"):
        fast_linear(torch.zeros(16, 64, dtype=FP16), weight, companions, None, by_row, 64, tiles=tiles)
    with pytest.raises(ValueError, match=r"stages=3.* leave no room for a table of pairs"):
        tiles = replace(fast_tiles(16, parse("nf:bits=4"), "subnormal"), stages=3)
        weight, companions = packed(parse_format("nf:bits=4"), 16, 64, device)
        fast_linear(torch.zeros(16, 64, dtype=FP16), weight, companions, None, "nf:bits=4", 64, tiles=tiles)
    device = Device("nvidia", "sm_90", 132)  # its file has sizes for all tables of 4 bits in groups of 64
    for text in ("nf:bits=4,group_size=64", "codebook:bits=4,group_size=64"):
        assert _fast_tiles(device, "subnormal", parse(text), 16, 4096, 4096)[0].pairs


@pytest.mark.parametrize("format", ["ternary:bits=1.58", "codebook:bits=5", "codebook:bits=8,group_size=16"])
def test_a_format_without_a_fast_kernel_is_refused(format, device):
    from lowbit_kernels.fast import fast_linear

    with pytest.raises(ValueError, match="no fast kernel reads"):
        fast_linear(torch.zeros(1, 64, dtype=FP16), torch.zeros(1, 64, dtype=torch.int16), [], None, format, 64)
