"""Columns kept in float16: which they are, the products beside them, what they are good for, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load, logits

import hf_lowbit
from hf_lowbit import LowBitConfig, ops
from hf_lowbit.calibration import Calibration, Moments
from hf_lowbit.formats import OutlierFormat, parse_format
from hf_lowbit.formats.outliers import checked_index
from hf_lowbit.methods import make_method
from hf_lowbit.plan import Packed
from hf_lowbit.quantizer import quantize_weight

FORMATS = [
    "int:bits=3,group_size=32,symmetric=False,zeros=int,scale_dtype=log8",
    "int:bits=2,group_size=-1,symmetric=True,scale_dtype=float16",
    "nf:bits=4,group_size=64,scale_dtype=log8",
    "hadamard+int:bits=4,group_size=32,symmetric=False,zeros=int,scale_dtype=log8",
]
SHAPE = (24, 96)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(large=(5, 50)):
    """Of inputs of which two are ten times as large as the others."""
    x = draw(400, SHAPE[1], seed=3)
    x[:, list(large)] *= 10
    found = Moments(SHAPE[1])
    found.add(x)
    return found


def make(text, percent=2.0, method="rtn", statistics=None):
    format = OutlierFormat(stored=parse_format(text), percent=percent)
    weight = draw(*SHAPE, seed=1)
    planned = Packed("layer", format, make_method(method), SHAPE)
    return format, quantize_weight(weight, planned, "layer", statistics), weight


@pytest.mark.parametrize("text", FORMATS)
def test_the_costliest_columns_are_kept(text):
    format, stored, weight = make(text, method="gptq", statistics=moments())
    assert stored["_outlier_index"].tolist() == [5, 50]
    assert torch.equal(stored["_outliers"], weight[:, [5, 50]].half())
    _, without_data, _ = make(text)
    norms = weight.square().sum(0).argsort(descending=True)[:2].sort().values
    assert without_data["_outlier_index"].tolist() == norms.tolist()
    assert {s: (tuple(t.shape), t.dtype) for s, t in stored.items()} == format.tensors(SHAPE)
    assert parse_format(format.spec) == format
    # 2 of 96 columns in 16 bits and an index of 64 bits.
    more = format.bits_per_weight(SHAPE) - format.rest.bits_per_weight(SHAPE)
    assert more == pytest.approx(2 * 16 / 96 + 64 / (24 * 96))


@pytest.mark.parametrize("text", FORMATS)
def test_products_are_those_with_the_dequantized_weight(text):
    format, stored, _ = make(text)
    weight = format.dequantize(stored, SHAPE)
    companions = [stored[suffix] for suffix in format.suffixes()]
    for rows in ((), (1,), (2, 3)):
        x, bias = draw(*rows, 96, seed=2).requires_grad_(), draw(24, seed=4)
        y = ops.linear(x, stored[""], companions, bias, format.spec, 96)
        # Two orders of float32 sums of 96 terms of size up to 10.
        torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
        alone = ops.input_gradient(torch.ones_like(y), stored[""], companions, format.spec, 96)
        torch.testing.assert_close(alone, x.grad, rtol=1e-4, atol=1e-4)
    found = ops.dequantize(stored[""], companions, format.spec, 96, torch.float32)
    torch.testing.assert_close(found, weight, rtol=0, atol=0)
    rows = format.select_rows(stored, torch.tensor([3, 20]))
    torch.testing.assert_close(format.dequantize(rows, (2, 96)), weight[[3, 20]], rtol=0, atol=0)

    spec = format.spec

    def run(x):
        return ops.linear(x, stored[""], companions, None, spec, 96)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.detach()), run(x.detach()))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("text", FORMATS[:2])
def test_they_lower_the_error_of_the_output(text, method):
    statistics = moments() if method == "gptq" else None
    format, stored, weight = make(text, method=method, statistics=statistics)
    plain = quantize_weight(weight, Packed("layer", format.rest, make_method(method), SHAPE), "layer", statistics)
    judge = moments() if method == "gptq" else Moments(SHAPE[1])
    if method == "rtn":
        judge.add(draw(400, SHAPE[1], seed=3))
    errors = [judge.output_error(weight, f.dequantize(t, SHAPE)) for f, t in ((format, stored), (format.rest, plain))]
    assert errors[0] < errors[1]


def test_whole_models(tiny, tmp_path):
    data = Calibration(list(torch.randint(4, 160, (8, 24), generator=torch.Generator().manual_seed(0))), 8, 24)
    config = LowBitConfig(bits=3, method="gptq", outliers=3, rules={r".*\.q_proj": {"outliers": 0}})
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "packed", calibration=data)
    model = repo.load()
    specs = {name.rpartition(".")[2]: m.spec for name, m in model.named_modules() if hasattr(m, "spec")}
    assert specs["k_proj"].startswith("outliers=3.0+int:bits=3") and specs["q_proj"].startswith("int:bits=3")
    assert specs["embed_tokens"].startswith("int:bits=8")
    plain = load("llama", tmp_path / "packed", quantization_config=LowBitConfig(dequantize=True))
    torch.testing.assert_close(logits(model, "llama"), logits(plain, "llama"), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load("llama", tmp_path / "again"), "llama"), logits(model, "llama"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": 11}, "outliers=11 is not possible: use a percentage above 0, at most 10"),
        ({"outliers": -1}, "outliers=-1 is not possible"),
        ({"outliers": 1, "format": "nested"}, "outliers=1 does not go with format 'nested' or bits_stored="),
        ({"outliers": 1, "bits_stored": 3.0}, "outliers=1 does not go with format 'nested' or bits_stored="),
        ({"outliers": 1, "method": "signround"}, "outliers=1 does not go with method 'signround', which trains blocks"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**options)


def test_damaged_files():
    for index in ([3, 2], [1, 1], [-1, 4], [5, 96]):
        with pytest.raises(ValueError, match="places of outliers are not in rising order below 96"):
            checked_index(torch.tensor(index, dtype=torch.int32), 96)
    with pytest.raises(ValueError, match="outliers do not fit float16"):
        OutlierFormat(stored=parse_format(FORMATS[0]), percent=2).take_out(torch.full((4, 64), 1e6))
    with pytest.raises(ValueError, match="is not possible: use a percentage"):
        parse_format("outliers=0+" + FORMATS[0])
