"""Every way to initialise an adapter does what it claims, gives the same bits again, and says what cannot work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import load, logits
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.apiq import ApiQBlockwise, Trained
from hf_lowbit.adapters.initialization import BASE_FILE, BASE_KEY, METHODS, initialize, make_hook
from hf_lowbit.calibration import Calibration, Layer, Moments, Solution
from hf_lowbit.formats import parse_format
from hf_lowbit.hub import content_hash
from hf_lowbit.linear import LowBitLinear
from hf_lowbit.low_rank import correction, low_rank
from hf_lowbit.methods import make_method
from hf_lowbit.plan import Packed
from hf_lowbit.quantizer import quantize_weight

CONFIG, RANK = LowBitConfig(bits=2, embeddings="float"), 8
APIQ = ("apiq-lw", "apiq-bw")
TEXT = torch.randint(4, 160, (16, 32), generator=torch.Generator().manual_seed(0))


def start(source, destination, method, config=CONFIG, **options):
    options.setdefault("calibration", Calibration(TEXT, len(TEXT), TEXT.shape[1]))
    return initialize(source, config, destination=destination, method=method, rank=options.pop("rank", RANK), **options)


def factors(made):
    return load_file(made.adapter / "adapter_model.safetensors")


def merged(made):
    """The float32 model with ``Q + B A`` as weights, made without PEFT."""
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32).dequantize().eval()
    found = factors(made)
    for key in [k for k in found if ".lora_A." in k]:
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        product = found[key.replace(".lora_A.", ".lora_B.")] @ found[key]
        module.weight.data += product if isinstance(module, nn.Linear) else product.T
    return model


def bits(made):
    """Everything that was written, byte by byte, but for the folder's own name in the adapter's config."""
    files = [f for f in made.base.rglob("*") if f.is_file() and f.name != "adapter_config.json"]
    return {str(f.relative_to(made.base)): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """``made(method)``: the packed tiny Llama with its adapter, once."""
    done = {}

    def make(method, name="llama"):
        if (method, name) not in done:
            done[method, name] = start(tiny(name), tmp_path_factory.mktemp("made") / "out", method)
        return done[method, name]

    return make


def layer(text="int:bits=2,group_size=32,scale_dtype=log8", rows=48, columns=80, method="rtn"):
    """A layer of random weights, with correlated inputs for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    format = parse_format(text)
    planned = Packed("layer", format, make_method(method), (rows, columns))
    inputs = torch.randn(256, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    moments = Moments(columns, cross=True)
    moments.add(inputs + 0.3 * torch.randn(inputs.shape, generator=generator), inputs)
    return Layer("layer", planned, weight), moments


def rounded(layer):
    return Solution(quantize_weight(layer.weight, layer.planned, "layer"))


# -- each method's own objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_low_rank_is_optimal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    B, A = low_rank(matrix, 5)
    left = (matrix.double() - B @ A).square().sum()
    tail = torch.linalg.svdvals(matrix.double())[5:].square().sum()  # Eckart and Young
    torch.testing.assert_close(left, tail)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


def test_correction_is_optimal_for_its_inputs_and_plain_svd_is_not():
    one, moments = layer()
    error, square = one.weight - one.value(rounded(one)), moments.damped(0.01)
    A, B = correction(error, square, RANK)

    def loss(left):
        return float(((left.double() @ square.double()) * left.double()).sum())

    root = torch.linalg.cholesky(square.double())
    best = float(torch.linalg.svdvals(error.double() @ root)[RANK:].square().sum())
    assert loss(error - B @ A) == pytest.approx(best, rel=1e-5)
    plain_b, plain_a = low_rank(error, RANK)
    assert loss(error - plain_b @ plain_a) > 1.1 * best


@pytest.mark.parametrize(
    "text", ["int:bits=2,group_size=32,scale_dtype=log8", "int:bits=3,group_size=16,symmetric=True", "nf:bits=2"]
)
def test_loftq_comes_closer_than_one_svd(text):
    one, _ = layer(text)
    distances = []
    for iterations in (1, 5):
        hook = make_hook("loftq", RANK, {"iterations": iterations})
        value = one.value(hook.solve_layer(one, None, None))
        distances.append(float((one.weight - value).square().sum()))
    B, A = low_rank(one.weight - one.value(rounded(one)), RANK)
    once = float((one.weight - one.value(rounded(one)) - (B @ A).float()).square().sum())
    assert distances[0] == pytest.approx(once, rel=1e-5)
    assert distances[1] < distances[0] < float((one.weight - one.value(rounded(one))).square().sum())


def test_layerwise_apiq_begins_at_eora_and_ends_below_it():
    one, moments = layer()
    hooks = {"eora": make_hook("eora", RANK), "start": make_hook("apiq-lw", RANK, {"steps": 0})}
    hooks |= {"short": make_hook("apiq-lw", RANK, {"steps": 5}), "apiq": make_hook("apiq-lw", RANK)}
    solved = {name: hook.solve_layer(one, moments, None) for name, hook in hooks.items()}
    errors = {name: moments.output_error(one.weight, one.value(s)) for name, s in solved.items()}
    assert errors["apiq"] < errors["short"] < errors["start"] == errors["eora"]


def test_layerwise_apiq_is_never_worse_than_eora_on_what_is_held_out():
    """With fewer tokens than the layer has inputs, of which those held out have other directions."""
    one, _ = layer()
    generator = torch.Generator().manual_seed(1)
    seen, held_out = Moments(80), Moments(80)
    for moments in (seen, held_out):
        moments.add(torch.randn(48, 80, generator=generator))
    hook, eora = make_hook("apiq-lw", RANK), make_hook("eora", RANK)
    solved = [hook.solve_layer(one, seen, None, held_out), eora.solve_layer(one, seen, None)]
    solved.append(hook.solve_layer(one, seen, None))  # trained to the end
    errors = [held_out.output_error(one.weight, one.value(s)) for s in solved]
    assert errors[0] <= errors[1] < errors[2]
    assert seen.output_error(one.weight, one.value(solved[2])) < seen.output_error(one.weight, one.value(solved[1]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_order_of_the_methods_on_the_calibration_text(name, tiny, made):
    with torch.no_grad():
        reference = load(name, tiny(name)).eval()(TEXT).logits
        errors = {m: float((merged(made(m, name))(TEXT).logits - reference).square().mean()) for m in METHODS}
    assert max(errors[m] for m in APIQ) < errors["eora"] < errors["loftq"] < errors["zeros"]


# -- what ApiQ trains --------------------------------------------------------------------------------------------------

GRIDS = [
    "int:bits=2,group_size=32,scale_dtype=log8",
    "int:bits=3,group_size=64",
    "int:bits=4,group_size=32,symmetric=True",
    "int:bits=1,group_size=16,symmetric=True",
    "int:bits=2,group_size=32,zeros=float",
    "int:bits=3,group_size=-1,scale_dtype=bfloat16",
]


@pytest.mark.parametrize("text", GRIDS)
def test_training_begins_at_the_layers_own_grid_and_stores_what_it_trained(text):
    one, moments = layer(text)
    first = Solution(rounded(one).tensors, *correction(one.weight, moments.damped(0.01), 4))
    trained = Trained(one, first)
    for suffix, tensor in trained.solution().tensors.items():
        # log8 encodes scales that were decoded once: its range may differ by a rounding.
        torch.testing.assert_close(tensor, first.tensors[suffix], rtol=1e-6, atol=0)
    torch.testing.assert_close(trained.value(), one.value(first), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        trained.ranges.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained.value(), one.value(trained.solution()), rtol=1e-5, atol=1e-5)
    codes = [one.planned.format.unpack(s.tensors, one.planned.shape).codes for s in (first, trained.solution())]
    assert torch.equal(*codes)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_folders(method, name, made):
    out = made(method, name)
    model = out.load(dtype=torch.float32).eval()
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    assert len(layers) == {"llama": 14, "gpt2": 8}[name]
    with torch.no_grad():
        torch.testing.assert_close(model(TEXT).logits, merged(out)(TEXT).logits, rtol=1e-3, atol=1e-3)
    written = json.loads((out.adapter / BASE_FILE).read_text())
    assert (written[BASE_KEY], written["method"], written["rank"]) == (content_hash(out.base), method, RANK)
    config = json.loads((out.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, RANK, str(out.base))
    assert not list(out.base.parent.glob("out.*"))  # nothing is left of the work


def test_zeros_corrects_nothing(tiny, made):
    packed = load("llama", tiny("llama"), quantization_config=CONFIG).eval()
    base = load("llama", made("zeros").base).eval()
    assert torch.equal(logits(base, "llama"), logits(packed, "llama"))
    found = factors(made("zeros"))
    assert all(bool(t.any()) == (".lora_A." in k) for k, t in found.items())


def test_rules_decide_what_gets_an_adapter(tiny, tmp_path):
    config = LowBitConfig(bits=2, rules={r".*layers\.1\..*q_proj": None, ".*down_proj": {"bits": 4}})
    out = start(tiny("llama"), tmp_path / "out", "eora", config)
    names = {k.split(".lora_")[0] for k in factors(out)}
    assert len(names) == 13 and "base_model.model.model.layers.1.self_attn.q_proj" not in names
    model = out.load(dtype=torch.float32).eval()
    assert type(model.base_model.model.model.layers[1].self_attn.q_proj) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(model(TEXT).logits, merged(out)(TEXT).logits, rtol=1e-3, atol=1e-3)


def test_a_loaded_model_gives_the_same_bits_and_is_not_changed(tiny, tmp_path, made):
    model = load("llama", tiny("llama")).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = start(model, tmp_path / "out", "eora")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    whole = made("eora")
    for part in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out.base / part).read_bytes() == (whole.base / part).read_bytes()
    assert not list(tmp_path.glob("out.*"))


def test_tied_and_packed_embeddings(tiny, tmp_path):
    config = LowBitConfig(bits=2, rules={".*embed_tokens": {"bits": 8}})
    out = start(tiny("llama-tied"), tmp_path / "out", "eora", config, adapter=tmp_path / "apart", base_id="me/base")
    assert out.adapter == tmp_path / "apart"
    assert json.loads((out.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    model = out.load().eval()
    with torch.no_grad():
        assert torch.isfinite(model(TEXT).logits).all()


@pytest.mark.parametrize("text", ["nf", "fp4", "codebook", "ternary"])
@pytest.mark.parametrize("method", ["loftq", "eora"])
def test_other_formats(method, text, tiny, tmp_path):
    config = LowBitConfig(bits=1.58 if text == "ternary" else 4, format=text)
    out = start(tiny("llama"), tmp_path / "out", method, config)
    with torch.no_grad():
        reference = load("llama", tiny("llama")).eval()(TEXT).logits
        plain = load("llama", tiny("llama"), quantization_config=config).eval()(TEXT).logits
        assert (merged(out)(TEXT).logits - reference).square().mean() < (plain - reference).square().mean()


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(method, tiny, tmp_path, made):
    again = start(tiny("llama"), tmp_path / "out", method)
    assert bits(again) == bits(made(method))
    if method == "zeros":
        other = start(tiny("llama"), tmp_path / "other", method, seed=1)
        assert bits(other) != bits(again)


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import test_initialize as t
t.start({source!r}, {destination!r}, "apiq-bw", method_options={{"epochs": 2}})
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_run_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch):
    whole = start(tiny("llama"), tmp_path / "whole", "apiq-bw", method_options={"epochs": 2})
    code = KILLED.format(tests=str(Path(__file__).parent), source=tiny("llama"), destination=str(tmp_path / "out"))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = tmp_path / "out.calibration" / "block-00000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    finished, solve = len(list(first.parent.glob("block-*.safetensors"))), ApiQBlockwise.solve
    solved = []
    monkeypatch.setattr(ApiQBlockwise, "solve", lambda self, block: (solved.append(block.index), solve(self, block)))
    again = start(tiny("llama"), tmp_path / "out", "apiq-bw", method_options={"epochs": 2})
    assert solved == [0, 1][finished:]  # finished blocks were not solved again
    for part in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (again.base / part).read_bytes() == (whole.base / part).read_bytes()


def test_what_another_method_began_to_write_is_not_taken_over(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("hf_lowbit.convert.write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(tiny("llama"), tmp_path / "out", "zeros")
    shutil.rmtree(tmp_path / "out.calibration")
    with pytest.raises(ValueError, match=r"out.partial was begun with another source or other settings: solved"):
        start(tiny("llama"), tmp_path / "out", "loftq")


def test_a_run_that_ends_between_base_and_adapter_goes_on(tiny, tmp_path, monkeypatch, made):
    import hf_lowbit.adapters.initialization as module

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module, "_write_adapter", stop)
        with pytest.raises(KeyboardInterrupt):
            start(tiny("llama"), tmp_path / "out", "loftq")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert bits(start(tiny("llama"), tmp_path / "out", "loftq")) == bits(made("loftq"))


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "method": ({"method": "lofq"}, r"method='lofq' is unknown: use one of zeros, loftq, eora, apiq-lw, apiq-bw"),
    "option": ({"method_options": {"steps": 3}}, r"method 'eora' has no option 'steps': it takes damping"),
    "no option": ({"method": "zeros", "method_options": {"x": 1}}, r"method 'zeros' has no option 'x': it takes none"),
    "no calibration": (
        {"calibration": None},
        r"method 'eora' needs calibration data: give calibration=, such as a list of texts, or use 'loftq'",
    ),
    "empty calibration": ({"calibration": []}, r"the calibration text is empty: a list of 0 gave no tokens"),
    "short calibration": ({"calibration": [[5, 6, 7]]}, r"too short: a list of 1 gave 3 tokens, fewer than one window"),
    "no tokenizer": ({"calibration": ["text"]}, r"needs a tokenizer: give tokenizer=, or token ids"),
    "rank above": ({"rank": 33}, r"rank=33 is not possible for model.layers.0.self_attn.k_proj of 32x64: use 1 to 32"),
    "rank zero": ({"rank": 0}, r"rank=0 is not possible for model.layers.0.self_attn.q_proj of 64x64: use 1 to 64"),
    "apiq on nf": (
        {"method": "apiq-bw", "config": LowBitConfig(bits=4, format="nf")},
        r"ApiQ learns the ranges of integer grids, and model.layers.0.self_attn.q_proj is planned as 'nf': use "
        r"format='int', or method 'eora' or 'loftq'",
    ),
    "apiq-lw on a codebook": (
        {"method": "apiq-lw", "config": LowBitConfig(bits=3, format="codebook")},
        r"ApiQ learns the ranges of integer grids, and .* is planned as 'codebook'",
    ),
    "rule for nothing": (
        {"config": LowBitConfig(bits=2, rules={".*q_porj": {"bits": 4}})},
        r"rule '\.\*q_porj' matches no module that could be packed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tiny, tmp_path):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        start(tiny("llama"), tmp_path / "out", **{"method": "eora", **options})
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_bad_places_and_models(tiny, tmp_path, made):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder: remove it, or choose another"):
        start(tiny("llama"), tmp_path / "full", "zeros")
    with pytest.raises(FileExistsError, match="full exists and is not an empty folder"):
        start(tiny("llama"), tmp_path / "out", "zeros", adapter=tmp_path / "full")
    with pytest.raises(ValueError, match=r"is quantized already .*pack the original"):
        start(made("zeros").base, tmp_path / "out", "zeros")
    with pytest.raises(ValueError, match="a Linear cannot be packed: give a folder, a repo id or a plain transformers"):
        start(nn.Linear(2, 2), tmp_path / "out", "zeros")
    with pytest.raises(ValueError, match=r"a PeftModelForCausalLM cannot be packed: .*merge an adapter"):
        start(made("zeros").load(), tmp_path / "out", "zeros")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        start(tiny("t5"), tmp_path / "out", "zeros")
    with pytest.raises(ValueError, match="BertForSequenceClassification is not a causal language model"):
        start(tiny("bert"), tmp_path / "out", "zeros")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_files_are_plain_safetensors(made):
    with safe_open(made("eora").adapter / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
    assert len(names) == 28 and all(n.startswith("base_model.model.model.layers.") for n in names)
