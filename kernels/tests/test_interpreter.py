"""The interpreter, mended, does in bfloat16 what torch does; stock, it does not, which is why it is mended."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

if not triton.knobs.runtime.interpret:
    pytest.skip("these are about the interpreter", allow_module_level=True)

from support.interpreter import mend

SIZE = 4096


@pytest.fixture(autouse=True)
def _mended():
    mend()


@triton.jit
def binary_kernel(a, b, out, OP: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x, y = tl.load(a + place), tl.load(b + place)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "less":
        z = x < y
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "clamp":
        z = tl.clamp(x, -0.5, 0.5)
    tl.store(out + place, z)


@triton.jit
def cast_kernel(a, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(a + place).to(out.dtype.element_ty))


@triton.jit
def reduce_kernel(a, total, largest, running, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    values = tl.load(a + place)
    tl.store(total, tl.sum(values, axis=0))
    tl.store(largest, tl.max(values, axis=0))
    tl.store(running + place, tl.cumsum(values, axis=0))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@triton.autotune([triton.Config({"BLOCK": b}) for b in (16, 32)], key=["n"])
@triton.jit
def tuned_kernel(a, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(a + place, 2.0, mask=place < n)


def numbers(seed: int) -> torch.Tensor:
    """All magnitudes that matter, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SIZE, generator=generator) * 2 ** (12 * torch.rand(SIZE, generator=generator) - 6)).bfloat16()


EXPECTED = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "less": torch.lt,
    "where": torch.minimum,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().bfloat16(),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic(op):
    x, y = numbers(0), numbers(1)
    expected = EXPECTED[op](x, y)
    out = torch.empty_like(expected)
    binary_kernel[(1,)](x, y, out, op, SIZE)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(source, target):
    bits = torch.randint(-(2**31), 2**31, (SIZE,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    # Every pattern of bits that float32 has, ties and the values that carry into the next power of two among them.
    values = torch.cat([bits[: SIZE // 2], bits[SIZE // 2 :] & ~0xFFFF | 0x8000]).view(torch.float32)
    values[:4] = torch.tensor([1.99999, 0.0, -0.0, float("inf")])
    values = (values.nan_to_num(1.0).clamp(-1e4, 1e4) if target == torch.float16 else values.nan_to_num(1.0)).to(source)
    if source == torch.int32:
        values = bits >> 16
    out = torch.empty(SIZE, dtype=target)
    cast_kernel[(1,)](values, out, SIZE)
    assert torch.equal(out, values.to(target))


def test_a_nan_stays_one():
    out = torch.empty(16, dtype=torch.bfloat16)
    for bits in (0x7FFFFFFF, 0x7F800001, -1):
        cast_kernel[(1,)](torch.full((16,), bits, dtype=torch.int32).view(torch.float32), out, 16)
        assert out.isnan().all()


def test_reductions_of_bfloat16_are_in_float32():
    x = torch.randint(-8, 8, (SIZE,), generator=torch.Generator().manual_seed(0)).bfloat16()  # sums are exact
    total, largest, running = torch.empty(1), torch.empty(1), torch.empty(SIZE)
    reduce_kernel[(1,)](x, total, largest, running, SIZE)
    assert total.item() == x.float().sum() and largest.item() == x.max()
    assert torch.equal(running, x.float().cumsum(0))


def test_a_dot_of_bfloat16():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, (64, 64), generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(64, 64)
    dot_kernel[(1,)](a, b, out, 64)
    assert torch.equal(out, a.float() @ b.float())  # small integers: exact


def test_autotuning_between_configs_needs_no_device():
    a = torch.zeros(70)
    tuned_kernel[lambda meta: (triton.cdiv(70, meta["BLOCK"]),)](a, 70)
    assert (a == 2).all()


def test_the_stock_interpreter_is_wrong():
    """When this fails, Triton has mended itself and :mod:`support.interpreter` can shrink."""
    code = """
import torch, test_interpreter as t
t.mend = None
x, y = t.numbers(0), t.numbers(1)
out = torch.empty_like(x)
t.binary_kernel[(1,)](x, y, out, "add", t.SIZE)
print((out != x + y).float().mean().item() > 0.5)
x = torch.full((16,), 1.005859375)  # between two bfloat16, nearer to the upper one
out = torch.empty(16, dtype=torch.bfloat16)
t.cast_kernel[(1,)](x, out, 16)
print((out != x.bfloat16()).all().item())
"""
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["True", "True"], run.stderr[-2000:]
