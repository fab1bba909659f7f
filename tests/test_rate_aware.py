"""GPTQ that meets a rate: the target is met, layers share it by what their errors cost, every way gives one result."""

import shutil

import pytest
import torch
from conftest import load, logits
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit import LowBitConfig, ops
from hf_lowbit.calibration import Calibration, damage
from hf_lowbit.calibration.blocks import Blocks
from hf_lowbit.calibration.statistics import Moments
from hf_lowbit.convert import open_source
from hf_lowbit.formats import parse_format
from hf_lowbit.linear import LowBitLinear
from hf_lowbit.methods import make_method
from hf_lowbit.methods.rate_aware import Share, widened
from hf_lowbit.storage.entropy import encode, symbols_for

BYTES = parse_format("int_columns:bits=8")


def ids(count=24, length=48):
    windows = torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), count, length)


def config(bits=3.0, **options):
    return LowBitConfig(method="gptq", bits_stored=bits, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Large enough for a coder's tables to be a small part."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=160, hidden_size=192, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def linears(model):
    return {
        n: m for n, m in model.named_modules() if isinstance(m, LowBitLinear) and m.format.inner.name == "int_columns"
    }


def coded_bits(modules, suffixes=("", "_scales", "_columns")) -> tuple[float, float]:
    """What the layers take as coded, and bits per weight of that."""
    bits = weights = 0
    for m in modules:
        packed = m.weight.detach()
        sizes = {"": encode(packed, symbols_for("", packed.dtype, m.format.bits)).nbytes}
        sizes |= {s: getattr(m, "weight" + s).nbytes for s in suffixes if s}
        bits += 8 * sum(sizes[s] for s in suffixes)
        weights += m.in_features * m.out_features
    return bits, bits / weights


@pytest.mark.parametrize(("bits", "options"), [(2.0, {}), (3.0, {"transform": "hadamard"}), (4.0, {})])
def test_the_model_takes_what_was_asked_for(bits, options, llama, tmp_path):
    repo = hf_lowbit.quantize(llama, config(bits, **options), output=tmp_path / "out", calibration=ids())
    model = repo.load()
    layers = linears(model)
    assert len(layers) == 21 and coded_bits(layers.values())[1] == pytest.approx(bits, rel=0.01)
    rates = [coded_bits([m])[1] for m in layers.values()]
    assert max(rates) - min(rates) > 0.3  # layers differ in what they are worth


def test_every_way_gives_the_same_bits_and_the_same_values(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    repo = hf_lowbit.quantize(llama, config(), output=tmp_path / "out", calibration=ids())
    packed = repo.load()
    other = LlamaForCausalLM.from_pretrained(llama, quantization_config=config(calibration=ids()))
    again = hf_lowbit.quantize(llama, config(), output=tmp_path / "again", calibration=ids()).load()
    states = [m.state_dict() for m in (packed, other, again)]
    assert all(torch.equal(states[0][k], s[k]) for s in states[1:] for k in states[0])
    x = torch.randint(4, 160, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = LlamaForCausalLM.from_pretrained(repo.folder, quantization_config=LowBitConfig(dequantize=True))
    torch.testing.assert_close(packed(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)


def test_a_run_that_stopped_goes_on_to_the_same_bits(llama, tmp_path, monkeypatch):
    whole = hf_lowbit.quantize(llama, config(), output=tmp_path / "whole", calibration=ids())
    from hf_lowbit.calibration.pipeline import Run

    write, calls = Run.write, []

    def stop(self, *args):
        if calls:
            raise KeyboardInterrupt
        calls.append(write(self, *args))

    monkeypatch.setattr(Run, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        hf_lowbit.quantize(llama, config(), output=tmp_path / "out", calibration=ids())
    monkeypatch.undo()
    monkeypatch.setattr(damage, "_from_the_head", None)  # is not measured again
    resumed = hf_lowbit.quantize(llama, config(), output=tmp_path / "out", calibration=ids())
    files = [next(r.folder.glob("*.safetensors")).read_bytes() for r in (whole, resumed)]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_small_models_of_other_shapes(name, tiny, tmp_path):
    repo = hf_lowbit.quantize(tiny(name), config(), output=tmp_path / "out", calibration=ids())
    model = load(name, repo.folder)
    assert linears(model) and torch.isfinite(logits(model, name)).all()
    with safe_open(next(repo.folder.glob("*.safetensors")), "pt") as file:
        assert any(key.endswith("weight_columns") for key in file.keys())  # noqa: SIM118


def test_gradients_are_those_of_the_whole_model(llama, tmp_path):
    """Measured block by block, against autograd through the whole model with the same labels."""
    source, tokens = open_source(llama, config(calibration=ids()), None), ids(3, 40).tokens(None)
    names = [n for n in source.plan.packed if source.plan.packed[n].format == BYTES]
    found = damage.measure_damage(Blocks(source), tmp_path, names, tokens, 7, batch_size=2, device=torch.device("cpu"))
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    sums = {}

    def watch(name):
        def hook(module, args, output):
            found = sums.setdefault(name, torch.zeros(output.shape[-1]))

            def add(gradient):
                found.add_(gradient.square().flatten(0, -2).sum(0))

            output.register_hook(add)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(7)
    for window in tokens:
        scores = model(window[None]).logits[0]
        labels = torch.multinomial(torch.softmax(scores.detach(), -1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    for name in names:
        torch.testing.assert_close(found[f"{name}.gradients"], sums[name] / tokens.numel(), rtol=1e-3, atol=1e-9)


# -- one matrix --------------------------------------------------------------------------------------------------------


def problem(rows=192, columns=320):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator) * 0.02
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(3000, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    moments, fresh = Moments(columns), Moments(columns)
    moments.add(x[:2000])
    fresh.add(x[2000:])
    return W, moments, fresh


def restored(quantized, format, shape):
    return format.dequantize(format.pack(quantized), shape)


def stored(quantized, format) -> float:
    packed = format.pack(quantized)
    size = encode(packed[""], symbols_for("", packed[""].dtype, format.bits)).nbytes
    return 8 * (size + sum(t.nbytes for s, t in packed.items() if s)) / quantized.codes.numel()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_what_knows_less_on_fresh_inputs_at_no_more_bits(bits):
    """Than GPTQ in groups by far, and than steps of rows without data by more."""
    W, moments, fresh = problem()
    groups = parse_format(f"int:bits={bits},group_size=64")
    grouped = make_method("gptq").quantize(W, groups, moments)
    spent = groups.bits_per_weight(tuple(W.shape))
    ours = make_method("gptq", {"bits_stored": spent}).quantize(W, BYTES, moments)
    plain_format = parse_format("int:bits=8,group_size=-1,symmetric=True")
    plain = make_method("ecsq", {"bits_stored": spent}).quantize(W, plain_format)
    assert stored(ours, BYTES) <= 1.01 * spent
    errors = [
        fresh.output_error(W, restored(q, f, tuple(W.shape)))
        for q, f in ((ours, BYTES), (grouped, groups), (plain, plain_format))
    ]
    assert errors[0] < 0.5 * errors[1] and errors[0] < 0.5 * errors[2]


@pytest.mark.parametrize("shape", [(192, 320), (7, 1200), (600, 50), (1, 64), (3, 5)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_shapes_and_widths(shape, bits):
    W, moments, _ = problem(*shape)
    format = parse_format(f"int_columns:bits={bits}")
    quantized = make_method("gptq", {"bits_stored": 1.5}).quantize(W, format, moments)
    assert (
        quantized.codes.dtype == torch.uint8 and 1 <= int(quantized.codes.min()) <= int(quantized.codes.max()) < 2**bits
    )
    back = restored(quantized, format, shape)
    assert torch.isfinite(back).all() and moments.output_error(W, back) < moments.output_error(W, 0 * W)


@pytest.mark.parametrize("before", ["", "hadamard+"])
def test_the_gradient_alone_is_that_of_the_product(before):
    spec = before + BYTES.spec
    W, moments, _ = problem(24, 96)
    stored = BYTES.pack(make_method("gptq", {"bits_stored": 3.0}).quantize(W, BYTES, moments))
    companions = [stored[suffix] for suffix in BYTES.suffixes()]
    x, gradient = torch.randn(2, 3, 96, requires_grad=True), torch.randn(2, 3, 24)
    ops.linear(x, stored[""], companions, None, spec, 96).backward(gradient)
    found = ops.input_gradient(gradient, stored[""], companions, spec, 96)
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-5)  # the same float32 products


def test_rows_that_are_worth_more_get_smaller_errors():
    W, moments, _ = problem()
    gradients = torch.where(torch.arange(192) < 96, 1.0, 100.0)
    quantized = make_method("gptq", {"bits_stored": 3.0}).quantize(W, BYTES, Share(moments, 3.0 * W.numel(), gradients))
    E = restored(quantized, BYTES, tuple(W.shape)) - W
    errors = ((E @ moments.square) * E).sum(1)
    # Steps go by the square root of the worth, with a tenth of the mean added: 105 / 6 between the squares.
    assert 0.7 * 105 / 6 < errors[:96].mean() / errors[96:].mean() < 1.4 * 105 / 6
    assert stored(quantized, BYTES) == pytest.approx(3.0, rel=0.01)


def cost(rows, columns) -> float:
    return float(rows.square().mean() * columns.square().mean())


@pytest.mark.parametrize("case", ["nothing", "row", "column", "both"])
def test_steps_are_widened_where_it_costs_least(case):
    x = torch.rand(64, 96, generator=torch.Generator().manual_seed(0))
    large = {"nothing": [], "row": [x[5]], "column": [x[:, 7]], "both": [x[5], x[:, 7], x[20:22, 3]]}[case]
    for part in large:
        part *= 3
    rows, columns = widened(x)
    assert rows.shape == (64, 1) and columns.shape == (96,) and min(rows.min(), columns.min()) >= 1
    assert (x <= rows * columns * (1 + 1e-6)).all()
    # What a row or a column shares is its own to bear; never worse than columns alone or rows alone.
    by_columns, by_rows = (torch.maximum(x.amax(d, keepdim=True), torch.ones(())) for d in (0, 1))
    assert cost(rows, columns) <= min(cost(by_rows, torch.ones(96)), cost(torch.ones(64, 1), by_columns)) * (1 + 1e-6)
    if case == "row":
        assert (rows > 1).nonzero()[:, 0].tolist() == [5]
    if case == "column":
        assert (columns > 1).nonzero()[:, 0].tolist() == [7]
    if case == "both":
        assert cost(rows, columns) < 0.5 * min(cost(by_rows, torch.ones(96)), cost(torch.ones(64, 1), by_columns))


def test_zeros_and_dead_inputs():
    W, moments, _ = problem()
    zeros = make_method("gptq", {"bits_stored": 3.0}).quantize(0 * W, BYTES, moments)
    assert (restored(zeros, BYTES, tuple(W.shape)) == 0).all()
    dead = Moments(320)
    dead.add(torch.randn(500, 320, generator=torch.Generator().manual_seed(0)) * (torch.arange(320) % 2))
    quantized = make_method("gptq", {"bits_stored": 2.0}).quantize(W, BYTES, dead)
    codes = quantized.codes.float() - 128
    assert codes[:, ::2].square().mean() < 0.1 * codes[:, 1::2].square().mean()  # bits go where inputs are


def test_what_does_not_go_together_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match=r"format 'int_columns' and bits_stored= belong together"):
        LowBitConfig(method="gptq", format="int_columns")
    with pytest.raises(ValueError, match=r"bits_stored= has one step a row and is symmetric"):
        config(group_size=64)
    with pytest.raises(ValueError, match=r"needs calibration data"):
        hf_lowbit.quantize(llama, config(), output=tmp_path / "out")
    rules = {r".*\.down_proj": {"method": "signround", "bits": 4}}
    with pytest.raises(ValueError, match=r"aims at bits_stored=, and .*down_proj is trained a block at a time"):
        hf_lowbit.quantize(llama, config(rules=rules), output=tmp_path / "out", calibration=ids())
    shutil.rmtree(tmp_path)
