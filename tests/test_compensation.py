"""``compensation="eora"``: corrections beside packed layers, from calibration to every way of running them."""

import pytest
import torch
from conftest import inputs, load
from test_quantization import ids, same
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import LowBitConfig, cli
from hf_lowbit.adapters import initialize
from hf_lowbit.calibration import Moments
from hf_lowbit.calibration.block import Layer, Solution
from hf_lowbit.compensation import compensated
from hf_lowbit.formats import FORMATS
from hf_lowbit.inspection import inspect_repo
from hf_lowbit.low_rank import LowRank
from hf_lowbit.methods import make_method
from hf_lowbit.plan import Packed
from hf_lowbit.quantizer import quantize_weight

RANK = 4
METHODS = {
    "gptq": {"bits": 2, "method": "gptq"},
    "rtn": {"bits": 2, "method": "rtn"},
    "nf": {"bits": 3, "format": "nf"},
    "rotated": {"bits": 2, "method": "gptq", "transform": "hadamard"},
    "outliers": {"bits": 2, "method": "gptq", "outliers": 2},
    "signround": {"bits": 2, "method": "signround", "method_options": {"steps": 2}},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))


def eora(**options):
    return LowBitConfig(**options, compensation="eora", compensation_rank=RANK)


def difference(folder, packed) -> float:
    """Mean squared difference of logits from the float model's, on calibration tokens."""
    tokens = ids(8).tokens(None)
    with torch.no_grad():
        return float((load("llama", folder)(tokens).logits - packed(tokens).logits).square().mean())


@pytest.mark.parametrize("case", METHODS)
def test_a_correction_helps_every_method_and_is_counted(case, tiny, tmp_path):
    folder, options = tiny("llama"), METHODS[case]
    plain = LowBitConfig(**options)
    calibration = ids() if plain.needs_calibration else None
    without = hf_lowbit.quantize(folder, plain, output=tmp_path / "plain", calibration=calibration)
    repo = hf_lowbit.quantize(folder, eora(**options), output=tmp_path / "out", calibration=ids())
    packed = load("llama", repo.folder)
    assert difference(folder, packed) < difference(folder, load("llama", without.folder))
    layers = [m for m in packed.modules() if isinstance(m, hf_lowbit.LowBitLinear) and m.low_rank is not None]
    assert len(layers) == 14 and all(layer.low_rank == LowRank(RANK, torch.bfloat16) for layer in layers)
    own = sum(2 * RANK * (layer.in_features + layer.out_features) for layer in layers)
    assert repo.coverage["packed_bytes"] == without.coverage["packed_bytes"] + own
    totals = inspect_repo(repo.folder)["totals"]
    assert totals["packed_bytes"] == repo.coverage["packed_bytes"]
    assert packed.config.quantization_config.compensation_rank == RANK


def test_a_correction_is_the_best_of_its_rank_for_the_inputs():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator) for n in (48, 400))
    x = x * torch.linspace(0.1, 3, 64)
    moments = Moments(64)
    moments.add(x)
    planned = Packed("l", FORMATS["int"](2, 32), make_method("rtn"), (48, 64), LowRank(RANK, torch.bfloat16))
    layer = Layer("l", planned, weight)
    solution = Solution(quantize_weight(weight, planned, "l"))
    error = weight - layer.value(solution)
    found = compensated(layer, solution, moments)
    assert all(torch.equal(t, t.bfloat16().float()) for t in (found.lora_a, found.lora_b))
    # What no correction of this rank can remove: the energy beyond the first singular values of E R.
    root = torch.linalg.cholesky(moments.damped(0.01).double())
    rest = torch.linalg.svdvals(error.double() @ root)[RANK:].square().sum()
    left = (((weight - layer.value(found)).double() @ root).square()).sum()
    assert rest <= left <= rest * (1 + 2**-6) + 2**-14 * (error.double() @ root).square().sum()


def test_every_way_to_a_corrected_model_gives_the_same(tiny, tmp_path):
    folder, config = tiny("llama"), eora(bits=3, method="gptq")
    packed = load("llama", hf_lowbit.quantize(folder, config, output=tmp_path / "out", calibration=ids()).folder)
    config.calibration = ids()
    loaded = load("llama", folder, quantization_config=config)
    assert same(loaded, packed)
    loaded.save_pretrained(tmp_path / "saved")
    assert same(load("llama", tmp_path / "saved"), packed)
    x, dequantized = (
        inputs("llama"),
        load("llama", folder=tmp_path / "out", quantization_config=LowBitConfig(dequantize=True)),
    )
    with torch.no_grad():
        torch.testing.assert_close(packed(**x).logits, dequantized(**x).logits, rtol=0.05, atol=0.05)


def test_a_corrected_model_streams(tiny, tmp_path):
    repo = hf_lowbit.quantize(tiny("llama"), eora(bits=3, method="gptq"), output=tmp_path / "out", calibration=ids())
    packed, x = load("llama", repo.folder), inputs("llama")
    streamed = load("llama", repo.folder, quantization_config=LowBitConfig(max_memory_bytes="150KB"))
    with torch.no_grad():
        assert torch.equal(streamed(**x).logits, packed(**x).logits)


def test_a_rule_decides_and_what_calibration_does_not_reach_gets_none(tiny, tmp_path):
    config = LowBitConfig(
        bits=3, method="gptq", compensation="eora", rules={".*down_proj": {"compensation": "none"}}, embeddings=8
    )
    repo = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "out", calibration=ids())
    packed = load("llama", repo.folder)
    ranks = {n: m.low_rank and m.low_rank.rank for n, m in packed.named_modules() if hasattr(m, "low_rank")}
    assert {n for n, rank in ranks.items() if rank is None} == {
        n for n in ranks if n.endswith(("down_proj", "lm_head", "embed_tokens"))
    }
    assert set(ranks.values()) == {None, 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compensation": "lora"}, "compensation='lora' is unknown: use 'eora'"),
        ({"compensation_rank": 8}, "compensation_rank=8 is of no use without a compensation"),
        ({"compensation": "eora", "compensation_rank": 0}, "compensation_rank=0 is not possible: use a whole number"),
        ({"compensation": "eora", "format": "nested"}, "does not go with format 'nested'"),
        ({"compensation": "eora", "bits_stored": 3.0}, "does not go with bits_stored="),
        ({"compensation": "eora", "bits": 2.6}, "does not go with the budget bits=2.6"),
        ({"rules": {".*": {"compensation": "svd"}}}, r"rule '\.\*': compensation='svd' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**options)


def test_too_high_a_rank_missing_calibration_and_a_second_correction_are_refused(tiny, tmp_path):
    config = LowBitConfig(bits=2, compensation="eora", compensation_rank=33)
    with pytest.raises(ValueError, match=r"compensation_rank=33 is not possible for .*k_proj of 32x64: use at most 32"):
        hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "out", calibration=ids())
    with pytest.raises(ValueError, match="compensation='eora' needs calibration data"):
        hf_lowbit.quantize(tiny("llama"), eora(bits=2), output=tmp_path / "out")
    with pytest.raises(ValueError, match="the adapter is one itself: drop compensation="):
        initialize(tiny("llama"), eora(bits=2), destination=tmp_path / "out", method="eora", rank=4, calibration=ids())


def test_the_command_line_makes_corrections(tmp_path, tiny):
    from tiny_chat import save_tiny_chat

    chat = save_tiny_chat(tmp_path / "chat")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The document number {i} says that {i} times {i} is {i * i}." for i in range(99)))
    arguments = ["quantize", str(chat), str(tmp_path / "out"), "--calibration", str(text), "--windows", "4"]
    arguments += ["--length", "32", "--bits", "2", "--compensation", "eora", "--compensation-rank", "3"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    low_rank = inspect_repo(tmp_path / "out")["layers"]
    assert any("rank=3,dtype=bfloat16" in layer["format"] for layer in low_rank)
