"""A nested repo: every width loads as an ordinary model of that width, from its own planes alone."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from hf_lowbit import LowBitConfig, ops
from hf_lowbit.backends import Problem, explain
from hf_lowbit.convert import quantize_folder
from hf_lowbit.formats import parse_format
from hf_lowbit.formats.nested import NestedFormat
from hf_lowbit.methods import make_method
from hf_lowbit.packed import PackedMixin

INPUTS = torch.arange(3, 30)[None]
WIDTHS = range(2, 9)


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, **({"quantization_config": LowBitConfig(**options)} if options else {})
    )


@torch.no_grad()
def logits(model):
    return model(INPUTS).logits


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2"])
def nested(request, tiny, tmp_path_factory):
    """A nested repo of 8 bits, and the logits of the model that it was saved from."""
    folder = tmp_path_factory.mktemp(request.param) / "nested"
    model = load(tiny(request.param), format="nested")
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "nested"
    quantize_folder(tiny("llama"), folder, LowBitConfig(format="nested"), progress=False)
    return folder


def packed_weights(folder, **options):
    model = load(folder, **options)
    return {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedMixin)}


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_a_width_loads_as_an_ordinary_model_and_is_saved_as_one(nested, bits, tmp_path):
    folder, whole = nested
    model = load(folder, load_bits=bits)
    formats = {m.format.spec for m in model.modules() if isinstance(m, PackedMixin)}
    assert formats - {"int:bits=8,group_size=32,scale_dtype=log8,symmetric=False,zeros=int"} == {
        f"codebook:bits={bits},group_size=32,scale_dtype=e4m3,codebook=tensor"
    }
    if bits == 8:  # which was computed in plain PyTorch, this perhaps by kernels: float32 sums in another order
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.bits == bits
    assert not any("_bit" in name or "_levels" in name for name in load_file(tmp_path / "model.safetensors"))


def test_without_load_bits_all_bits_are_loaded(nested):
    folder, whole = nested
    torch.testing.assert_close(logits(load(folder)), whole, rtol=1e-4, atol=1e-4)


def test_more_bits_are_nearer_to_the_float_weights(tiny, llama):
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    errors = []
    for bits in WIDTHS:
        weights = packed_weights(llama, load_bits=bits)
        errors.append(sum(float((w - plain.get_submodule(n).weight).square().sum()) for n, w in weights.items()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


def test_the_seed_is_as_good_as_its_own_codebook(tiny, llama):
    """Width 3 is chosen freely: no worse than Lloyd's levels at 3 bits with scales of the same size."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    own = packed_weights(tiny("llama"), bits=3, format="codebook", group_size=32, scale_dtype="e4m3")
    nested = packed_weights(llama, load_bits=3)

    def error(weights):
        return sum(
            float((w - plain.get_submodule(n).weight).square().sum()) for n, w in weights.items() if "layers" in n
        )

    assert error(nested) <= error(own)


@pytest.mark.parametrize("bits", WIDTHS)
def test_only_the_planes_of_the_width_are_read(llama, bits, monkeypatch):
    read, materialize = [], core_model_loading._materialize_copy

    def count(tensor, *args, **kwargs):
        made = materialize(tensor, *args, **kwargs)
        read.append(made.nbytes)
        return made

    monkeypatch.setattr(core_model_loading, "_materialize_copy", count)
    load(llama, load_bits=bits)
    stored = load_file(llama / "model.safetensors")
    unwanted = [n for n in stored for b in range(bits + 1, 9) if n.endswith((f"_bit{b}", f"_levels{b}"))]
    assert len(unwanted) == 2 * (8 - bits) * 14
    assert sum(read) == sum(t.nbytes for n, t in stored.items() if n not in unwanted)


@pytest.mark.parametrize("bits", [2, 4])
def test_damaged_planes_of_more_bits_do_not_matter(llama, bits, tmp_path):
    wanted = logits(load(llama, load_bits=bits))
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(llama / "model.safetensors")
    late = [n for n in stored for b in range(bits + 1, 9) if n.endswith(f"_bit{b}")]
    save_file({n: ~t if n in late else t for n, t in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load(tmp_path, load_bits=bits)), wanted)
    assert not torch.equal(logits(load(tmp_path)), logits(load(llama)))


def test_disk_to_disk_makes_the_same_repo(tiny, llama, tmp_path):
    load(tiny("llama"), format="nested").save_pretrained(tmp_path)
    first, second = load_file(llama / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_mixed_widths_load_what_they_have(tiny, tmp_path):
    rules = {r".*down_proj": {"bits": 4}, r".*o_proj": {"format": "int", "bits": 6}}
    load(tiny("llama"), format="nested", rules=rules).save_pretrained(tmp_path)
    model = load(tmp_path, load_bits=5)
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.format.bits == 4
    assert layer.mlp.up_proj.format.bits == 5
    assert layer.self_attn.o_proj.spec.startswith("int:bits=6")
    model.save_pretrained(tmp_path / "five")
    assert torch.equal(logits(load(tmp_path / "five")), logits(model))


def test_load_bits_can_be_dequantized(llama):
    packed = load(llama, load_bits=4)
    plain = load(llama, load_bits=4, dequantize=True)
    assert not any(isinstance(m, PackedMixin) for m in plain.modules())
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, packed.model.layers[0].mlp.up_proj.dequantize())


def test_errors_say_what_the_repo_holds(tiny, llama, tmp_path):
    with pytest.raises(ValueError, match=r"load_bits=9 is not possible: use 2 to 8"):
        LowBitConfig(load_bits=9)
    with pytest.raises(ValueError, match=r"load_bits=4 is for repos that are nested already.*format='nested'"):
        load(tiny("llama"), load_bits=4)
    load(llama, load_bits=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match=r"needs a nested repo, and this one holds codebook of 4 bits, int of 8 bits"):
        load(tmp_path / "four", load_bits=3)
    load(tiny("llama"), format="nested", bits=5).save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match=r"load_bits=6 is more than this repo has: it holds 5 bits"):
        load(tmp_path / "five", load_bits=6)
    with pytest.raises(ValueError, match=r"max_memory_bytes= reads layers from disk as they run"):
        load(llama, load_bits=4, max_memory_bytes="300MB")
    with pytest.raises(ValueError, match=r"seed=5 is not possible: method 'nested' takes 2, 3 or 4"):
        LowBitConfig(format="nested", method_options={"seed": 5})
    with pytest.raises(ValueError, match=r"format='nested' takes bits from 2 to 8, not 1"):
        LowBitConfig(format="nested", bits=1)


@pytest.mark.parametrize("bits", WIDTHS)
def test_kernels_run_a_width_with_groups_turned_around(bits):
    """Negative scales in 8 bits, which nothing but a loaded nested repo has."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 200, generator=generator), torch.randn(5, 200, generator=generator)
    format = parse_format("nested:bits=8")
    stored = format.pack(make_method("nested").quantize(weight, format))
    part = format.at(bits)
    stored = part.to_codebook({suffix: stored[suffix] for suffix in part.tensors((48, 200))}, (48, 200))
    assert (stored["_scales"] >= 128).any()
    packed, *companions = stored.values()
    spec = part.codebook.spec
    expected = x.double() @ part.codebook.dequantize(stored, (48, 200)).double().T
    runs = explain(Problem("linear", spec, "cpu", torch.float32))
    for backend in [backend for backend, reason in runs if reason is None]:
        y = ops.linear(x, packed, companions, None, spec, 200, backend)
        # Sums of 200 float32 products of magnitude up to 16.
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=200 * 16 * 2**-24)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("scale_dtype", ["e4m3", "log8", "float16"])
def test_every_width_has_a_zero_and_ascending_levels(seed, scale_dtype):
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)) * 0.05
    format = parse_format(f"nested:bits=8,group_size=32,scale_dtype={scale_dtype}")
    assert isinstance(format, NestedFormat)
    stored = format.pack(make_method("nested", {"seed": seed}).quantize(weight, format))
    for bits in format.widths:
        levels = stored[f"_levels{bits}"][0]
        assert (levels == 0).any()
        assert torch.equal(levels, levels.sort().values)


def test_matrices_with_nothing_in_them():
    format, method = LowBitConfig(format="nested").resolve()
    for weight in (torch.zeros(3, 70), torch.full((2, 64), 0.5), torch.zeros(1, 1)):
        stored = format.pack(method.quantize(weight, format))
        torch.testing.assert_close(format.dequantize(stored, tuple(weight.shape)), weight, rtol=2**-4, atol=0)
