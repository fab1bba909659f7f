"""The fast product with scales in the weights: values in derived bounds, whatever the scales, and when it is taken."""

from dataclasses import replace

import pytest
import torch
from problems import guard, intact, packed
from support.fast_tolerance import fast_bound

from hf_lowbit.formats import parse_format

FP16, BF16 = torch.float16, torch.bfloat16
OTHERS = ("bfloat16", "float32", "e4m3", "e8m0")  # dtypes of scales
TABLES = (("float16", 1, 512), ("log8", 12, 330), ("e4m3", 3, 72), ("bfloat16", 4, 256))  # scales and shapes
FLOATS = ((16, 12, 330), (16, 3, 512), (32, 5, 512), (64, 16, 330))  # groups and shapes, for zero points as floats
CASES = [
    *((f"int:bits={b},group_size={g}", M, K, 1) for b in range(1, 9) for g, M, K in ((32, 3, 512), (64, 12, 330))),
    *((f"int:bits={b},group_size=32", 12, 330, 1) for b in range(1, 9)),
    *((f"int:bits={b},group_size=64", 3, K, 1) for b in (3, 6, 8) for K in (64, 192, 512)),
    *((f"int:bits={b},group_size=16", M, K, 1) for b in range(1, 9) for M, K in ((1, 512), (12, 330), (3, 72))),
    *((f"int:bits={b},group_size=32,scale_dtype=log8", 16, 256, 1) for b in range(1, 9)),
    *((f"int:bits={b},group_size=32,scale_dtype=log8", 4, 577, 2) for b in (1, 3, 4, 8)),
    *((f"int:bits={b},group_size=32,symmetric=True", 17, 256, 1) for b in range(1, 9)),
    *((f"int:bits={b},group_size={g},scale_dtype=log8", 5, 330, 1) for b, g in ((4, 16), (6, 16), (3, 64), (8, 64))),
    *((f"int:bits=4,group_size={g},scale_dtype={s}", 6, 330, 2) for s in OTHERS for g in (16, 32, 64)),
    *((f"int:bits=4,group_size=32,scale_dtype={s},symmetric=True", 6, 256, 1) for s in OTHERS),
    *(
        (f"int:bits=7,group_size=16,scale_dtype={s}", M, K, 1)
        for s in (*OTHERS, "log8")
        for M, K in ((1, 512), (5, 330))
    ),
    *((f"int:bits=3,group_size=16,scale_dtype={s},zeros=float", 5, 512, 1) for s in (*OTHERS, "log8")),
    ("int:bits=4,group_size=32,scale_dtype=log8,symmetric=True", 33, 192, 1),
    *((f"int:bits={b},group_size=32", 6, 192, 1) for b in (1, 2, 7, 8)),
    *((f"codebook:bits={b},group_size=16,scale_dtype={s}", M, K, 1) for b in range(1, 5) for s, M, K in TABLES),
    *((f"nf:bits=4,group_size=16,scale_dtype={s}", M, K, 2) for s, M, K in TABLES),
    *((f"fp4:bits=4,group_size=16,scale_dtype={s}", M, K, 1) for s, M, K in TABLES),
    *((f"int:bits={b},group_size={g},zeros=float", M, K, 1) for b in range(1, 9) for g, M, K in FLOATS),
    ("int:bits=4,group_size=32", 5, 1, 1),
    ("int:bits=7,group_size=32", 9, 1536, 4),
]
NARROW = [  # for bfloat16 alone: for float16, these stay in sums
    ("int:bits=6,group_size=32,zeros=float", 2, 330, 1),
    ("int:bits=8,group_size=32,zeros=float,scale_dtype=log8", 1, 512, 1),
    ("int:bits=8,group_size=64,zeros=float", 1, 330, 2),
]
FORM = {FP16: "subnormal", BF16: "magic"}
dtypes = pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def assembly(device):
    from support.inline_asm import emulate_inline_asm

    emulate_inline_asm()


def product(x, weight, companions, bias, format, split: int = 1):
    from lowbit_kernels.fast import fast_linear, fast_tiles
    from lowbit_kernels.layout import parse

    assert fast_tiles(len(x), parse(format.spec), FORM[x.dtype]).scaled == 1
    return fast_linear(x, weight, companions, bias, format.spec, x.shape[1], split=split)


def _asked():
    for case in (*CASES, *NARROW):
        for dtype in (FP16, BF16):
            text, M, K, split = case
            if dtype == BF16 or not (case in NARROW or text.startswith("fp4")):  # and so does FP4
                name = f"{str(dtype)[6:]}-{text.replace(',', '_')}_M{M}_K{K}_split{split}"
                yield pytest.param(case, dtype, id=name)


@pytest.mark.parametrize("case, dtype", list(_asked()))
def test_values_are_the_reference(case, dtype, device):
    text, M, K, split = case
    format, N = parse_format(text), 70
    weight, companions = packed(format, N, K, device)
    x = guard(torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(device, dtype))
    bias = guard(torch.randn(N, generator=torch.Generator().manual_seed(M)).to(device, dtype))
    expected, bound = fast_bound(x, weight, companions, bias, format.spec, K, FORM[dtype])
    result = product(x, weight, companions, bias, format, split)
    assert ((result.double() - expected).abs() <= bound).all()
    assert intact(x) and intact(bias) and intact(weight)


@dtypes
@pytest.mark.parametrize("more", ["", ",scale_dtype=log8", ",zeros=float"])
@pytest.mark.parametrize("bits, group", [(b, g) for g in (16, 32, 64) for b in range(1, 9)])
def test_every_weight_alone_is_right_to_its_own_rounding(bits, group, more, dtype, device):
    """With a single input not 0 an error of one code, group or zero point anywhere it looks would show."""
    format, N, K = parse_format(f"int:bits={bits},group_size={group}{more}"), 64, 512
    weight, companions = packed(format, N, K, device)
    for start in range(0, K, 128):  # in each quarter of a step and beyond
        x = torch.zeros(16, K, dtype=dtype, device=device)
        k = start + torch.randperm(128, generator=torch.Generator().manual_seed(bits + start))[:16]
        x[torch.arange(16), k] = 1
        expected, bound = fast_bound(x, weight, companions, None, format.spec, K, FORM[dtype])
        assert ((product(x, weight, companions, None, format).double() - expected).abs() <= bound).all()


def scaled(format, N: int, K: int, device, scales: torch.Tensor):
    """A packed weight with ``scales`` (N, groups)."""
    weight, companions = packed(format, N, K, device)
    companions[0] = guard(scales.to(device, companions[0].dtype))
    return weight, companions


@dtypes
@pytest.mark.parametrize("zeros", ["int", "float"])
def test_every_row_has_its_own_power_of_two(zeros, dtype, device):
    """Rows of scales from 2**-20 to 2**15, each up to 16 times the others of its row: what is small stays exact."""
    format, N, K = parse_format(f"int:bits=4,group_size=32,zeros={zeros}"), 72, 256
    powers = torch.linspace(-20, 11, N)[:, None] + 4 * torch.rand(
        N, K // 32, generator=torch.Generator().manual_seed(0)
    )
    weight, companions = scaled(format, N, K, device, 2**powers)
    x = (1e-3 * torch.randn(6, K, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    expected, bound = fast_bound(x, weight, companions, None, format.spec, K, FORM[dtype])
    result = product(x, weight, companions, None, format).double()
    assert result.isfinite().all() and ((result - expected).abs() <= bound).all()
    # The bound is worth something for each row: it is far below the row's own values, but for the last bit of float16.
    assert (bound - 2.0**-23 < expected.abs().amax(0) / (20 if dtype == FP16 else 5)).all()


@dtypes
@pytest.mark.parametrize("zeros", ["int", "float"])
def test_powers_of_two_may_be_far_apart_in_a_row(zeros, dtype, device):
    """What is too small beside the greatest becomes 0 in float16, and nothing of its neighbours in a register."""
    format, N, K = parse_format(f"int:bits=4,group_size=16,scale_dtype=e8m0,zeros={zeros}"), 64, 512
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(57, 128, (N, K // 16), generator=generator)  # 2**-70 to 1
    weight, companions = scaled(format, N, K, device, codes)
    x = torch.randn(5, K, generator=generator).to(device, dtype)
    expected, bound = fast_bound(x, weight, companions, None, format.spec, K, FORM[dtype])
    result = product(x, weight, companions, None, format).double()
    assert result.isfinite().all() and ((result - expected).abs() <= bound).all()


@dtypes
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32", "log8", "e4m3"])
def test_scales_of_zero_make_zeros(scales, group, dtype, device):
    format, N, K = parse_format(f"int:bits=4,group_size={group},scale_dtype={scales}"), 70, 512
    weight, companions = packed(format, N, K, device)
    companions[0] = guard(torch.zeros_like(companions[0]))
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    assert torch.equal(product(x, weight, companions, bias, format), bias.expand(5, N))


@dtypes
@pytest.mark.parametrize("most", [0.25, 1.0, 300.0, 2.0**14])
def test_levels_may_be_large_or_small(most, dtype, device):
    """A level times its scale, as great as scales are made, would be more than float16 has."""
    format, N, K = parse_format("codebook:bits=4,group_size=16,scale_dtype=float16"), 64, 256
    weight, companions = packed(format, N, K, device)
    companions[1] = guard(companions[1] * (most / companions[1].abs().max()))
    x = (torch.randn(5, K, generator=torch.Generator().manual_seed(0)) / max(most, 1)).to(device, dtype)
    expected, bound = fast_bound(x, weight, companions, None, format.spec, K, FORM[dtype])
    result = product(x, weight, companions, None, format).double()
    assert result.isfinite().all() and ((result - expected).abs() <= bound).all()
    assert (bound - 2.0**-23 < expected.abs().amax(0) / (20 if dtype == FP16 else 5)).all()


@dtypes
def test_negative_scales_count_by_their_size(dtype, device):
    format, N, K = parse_format("int:bits=4,group_size=32"), 64, 256
    weight, companions = packed(format, N, K, device)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    result = product(x, weight, companions, None, format)
    companions[0] = guard(-companions[0])
    assert torch.equal(product(x, weight, companions, None, format), -result)


def test_it_is_taken_for_more_than_two_rows_and_small_groups():
    from lowbit_kernels.fast import fast_linear, fast_tiles
    from lowbit_kernels.layout import parse

    def taken(text, M=16, form="subnormal"):
        return fast_tiles(M, parse(text), form).scaled

    small = "int:bits=4,group_size=32"
    assert taken(small) and taken(small, 3) and taken(small, 500) and not taken(small, 2)
    assert taken(small, form="magic") and not taken(small, form="lop3")
    assert taken("int:bits=4,group_size=64") and not taken("int:bits=4,group_size=64", 2)
    assert all(taken(f"int:bits={bits},group_size=16", 1) for bits in range(1, 9))
    others = (
        "int:bits=4,group_size=128",
        "int:bits=4,group_size=-1",
        "nf:bits=4,group_size=32",
    )
    assert not any(taken(text) for text in others) and taken(f"{small},scale_dtype=e4m3")
    floats = f"{small},zeros=float"
    assert taken(floats, 3) and taken(floats, 5, "magic") and not taken(floats, 4, "magic")
    assert taken("int:bits=5,group_size=32,zeros=float", 3, "magic")
    vectors = [
        (b, g) for b in range(1, 9) for g in (32, 64) if taken(f"int:bits={b},group_size={g},zeros=float", 1, "magic")
    ]
    assert vectors == [(6, 32), (8, 32), (8, 64)]
    tiles, x = fast_tiles(16, parse(small), "subnormal"), torch.zeros(16, 64, dtype=FP16)
    with pytest.raises(ValueError, match=r"scales of .* cannot go into weights in the form 'lop3'"):
        fast_linear(x, *packed(parse_format(small), 16, 64, "cpu"), None, small, 64, form="lop3", tiles=tiles)
    with pytest.raises(ValueError, match="more than two steps a turn of the loop: give spans=1 or 2"):
        fast_linear(x, *packed(parse_format(small), 16, 64, "cpu"), None, small, 64, tiles=replace(tiles, spans=4))


def test_zero_points_may_begin_anywhere(device):
    """In groups of 16 they are read by words where they begin at one."""
    format, N, K = parse_format("int:bits=8,group_size=16"), 64, 512
    weight, companions = packed(format, N, K, device)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0)).to(device, FP16)
    expected = product(x, weight, companions, None, format)
    room = torch.empty(companions[1].numel() + 1, dtype=torch.uint8, device=device)
    moved = room[1:].view(companions[1].shape)
    moved.copy_(companions[1])
    assert moved.data_ptr() % 4 == 1 and companions[1].data_ptr() % 4 == 0
    assert torch.equal(product(x, weight, [companions[0], moved], None, format), expected)


def test_sizes_of_a_file_are_not_taken_by_a_form_that_cannot(monkeypatch):
    import lowbit_kernels
    from lowbit_kernels import Device, parse, tuning

    device, text = Device("nvidia", "sm_90", 132), "int:bits=4,group_size=32"
    for form, scaled in (("magic", 1), ("lop3", 0)):
        entry = tuning.Entry(
            form,
            "int4_g32",
            16,
            4096,
            4096,
            {"rows": 16, "outputs": 64, "blocks": 4, "columns": 1, "window": 8, "scaled": 1},
            1,
        )
        monkeypatch.setattr(tuning, "find", lambda *_, entry=entry: entry)
        assert lowbit_kernels._fast_tiles(device, form, parse(text), 16, 4096, 4096)[0].scaled == scaled
