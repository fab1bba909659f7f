"""Every architecture: quantized while loading, saved in shards, loaded again in a process that never imports us,
dequantized into a plain model that needs us no more; and which modules are packed under which rules.

The tiny models are random, so "close to the float model" means little by itself. What is claimed instead: a packed
model computes exactly what its dequantized form computes, more bits come closer to the float model, and saving and
loading changes no bit.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TINY, inputs, load, logits
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_lowbit import LowBitConfig, LowBitEmbedding, LowBitLinear, plan
from hf_lowbit.packed import PackedMixin
from hf_lowbit.quantizer import LowBitHfQuantizer

TESTS = str(Path(__file__).parent)
FORMATS = {
    "1-symmetric": {"bits": 1, "embeddings": "float"},
    "2-hqq": {"bits": 2, "method": "hqq"},
    "4-symmetric-row": {"bits": 4, "symmetric": True, "group_size": "row"},
    "8-minmax": {"bits": 8, "method": "rtn", "method_options": {"range": "minmax"}},
    "5-bf16-scales": {"bits": 5, "scale_dtype": "bfloat16", "group_size": 32},
    "nf3": {"bits": 3, "format": "nf"},
    "fp4": {"bits": 4, "format": "fp4"},
    "codebook": {"bits": 3, "format": "codebook"},
    "codebook-row": {"bits": 2, "format": "codebook", "codebook": "row"},
    "ternary": {"bits": 1.58},
    "everything": {"bits": 3, "rules": {r".*embed_tokens|lm_head": {"bits": 4}}},
}
CASES = {f"{name}-{bits}": (name, {"bits": bits}) for name in TINY for bits in (3, 4)}
CASES |= {f"llama-{key}": ("llama", options) for key, options in FORMATS.items()}
CASES |= {
    "llama-tied-packed": ("llama-tied", {"bits": 4, "rules": {".*embed_tokens": {"bits": 6}}}),
    "gemma3-packed": ("gemma3", {"bits": 4, "rules": {".*embed_tokens": {"bits": 4, "format": "nf"}}}),
    "gpt2-packed": ("gpt2", {"bits": 4, "rules": {"lm_head|.*wte": {"bits": 8}, ".*wpe": {"bits": 5}}}),
}


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """``{case: (folder, logits)}`` of every case, quantized while loading and saved in small shards."""
    results = {}
    for case, (name, options) in CASES.items():
        model = load(name, tiny(name), quantization_config=LowBitConfig(**options))
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder, max_shard_size="40KB")
        results[case] = (str(folder), logits(model, name))
    return results


@pytest.fixture(scope="module")
def plain(packed, tmp_path_factory):
    """``{case: (folder, logits)}`` of the dequantized models of some cases."""
    results = {}
    for case in [c for c in CASES if c.endswith(("-4", "-packed"))] + ["llama-nf3", "llama-everything"]:
        name, model = CASES[case][0], load(CASES[case][0], packed[case][0])
        model.dequantize()
        assert not any(isinstance(m, PackedMixin) for m in model.modules())
        assert "hf_lowbit" not in {type(m).__module__.partition(".")[0] for m in model.modules()}
        assert all(p.is_floating_point() for p in model.parameters())
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder)
        results[case] = (str(folder), logits(model, name))
    return results


# Loads every folder and writes the logits; it must not import hf_lowbit itself.
LOAD_ALL = f"""
import json, sys
{{before}}
sys.path.insert(0, {TESTS!r})
import torch
torch.set_num_threads(1)
from conftest import load, logits
jobs, out = json.load(open(sys.argv[1] if len(sys.argv) > 1 else {{jobs!r}})), {{out!r}}
torch.save({{{{case: logits(load(name, folder), name) for case, (name, folder) in jobs.items()}}}}, out)
{{after}}
"""


def in_a_fresh_process(python, folders, tmp_path, before="", after="", **environment):
    jobs, out = tmp_path / "jobs.json", tmp_path / "logits.pt"
    jobs.write_text(json.dumps({case: (CASES[case][0], folder) for case, (folder, _) in folders.items()}))
    python(LOAD_ALL.format(before=before, after=after, jobs=str(jobs), out=str(out)), **environment)
    return torch.load(out)


def test_packed_repos_load_bit_identical_where_nobody_imports_us(packed, python, tmp_path):
    fresh = in_a_fresh_process(python, packed, tmp_path, after="assert 'hf_lowbit' in sys.modules")
    assert [case for case in CASES if not torch.equal(fresh[case], packed[case][1])] == []


def test_dequantized_models_load_without_us(plain, python, tmp_path):
    before = "sys.modules['hf_lowbit'] = None"
    fresh = in_a_fresh_process(python, plain, tmp_path, before=before, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert [case for case in plain if not torch.equal(fresh[case], plain[case][1])] == []


@pytest.mark.parametrize("case", CASES)
def test_reload_is_bit_identical_and_complete(case, packed):
    folder, expected = packed[case]
    name = CASES[case][0]
    assert len([f for f in os.listdir(folder) if f.endswith(".safetensors")]) > 1
    model = load(name, folder)
    assert torch.equal(logits(model, name), expected)
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, PackedMixin) for p in m.stored().values())
    coverage = model.hf_quantizer.coverage
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert coverage["packed_bytes"] + coverage["kept_bytes"] == total
    assert coverage["packed_modules"] > 0


@pytest.mark.parametrize("case", ["llama-4", "llama-everything", "gemma3-packed", "gpt2-packed", "t5-4", "vit-3"])
def test_saving_twice_changes_nothing(case, packed, tmp_path):
    model = load(CASES[case][0], packed[case][0])
    model.save_pretrained(tmp_path)
    config = [json.loads((Path(f) / "config.json").read_text()) for f in (packed[case][0], tmp_path)]
    assert config[0] == config[1]
    again = load(CASES[case][0], tmp_path).state_dict()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, again[k])} == set()


def test_dequantized_models_compute_what_the_packed_ones_do(plain, packed):
    for case, (_, result) in plain.items():
        # The same float32 weights; sums of at most 256 terms in another order, through at most 32 layers in a row.
        error = (result - packed[case][1]).norm() / packed[case][1].norm()
        assert error <= 32 * 256 * 2**-24, (case, error)


@pytest.mark.parametrize("name", TINY)
def test_more_bits_come_closer(name, tiny, packed):
    folder = tiny(name)
    reference = logits(load(name, folder), name)

    def error(result):
        return ((result - reference).norm() / reference.norm()).item()

    eight, two = (logits(load(name, folder, quantization_config=LowBitConfig(bits=bits)), name) for bits in (8, 2))
    assert error(eight) < error(packed[f"{name}-4"][1]) < error(two)
    # 8 bits have steps 16 times finer than 4 bits: allow half of that for the part that is not linear.
    assert error(eight) < error(packed[f"{name}-4"][1]) * 2 / 16 * 2


def test_options_dequantize_on_the_fly_and_from_a_packed_repo(tiny, packed):
    for folder, config in (
        (packed["llama-4"][0], LowBitConfig(dequantize=True)),
        (tiny("llama"), LowBitConfig(bits=4, dequantize=True)),
    ):
        model = load("llama", folder, quantization_config=config)
        assert not any(isinstance(m, PackedMixin) for m in model.modules())
        assert not hasattr(model.config, "quantization_config")
        assert not getattr(model, "is_quantized", False)
        found, expected = logits(model, "llama"), packed["llama-4"][1]  # sums may be in another order
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_dequantize_to_another_dtype_casts_the_whole_model(packed):
    model = load("llama", packed["llama-4"][0])
    model.dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, "llama").dtype == torch.bfloat16


def test_one_config_serves_two_models(tiny):
    config = LowBitConfig(bits=4)
    first = load("llama", tiny("llama"), quantization_config=config)
    second = load("gpt2", tiny("gpt2"), quantization_config=config)
    assert config.layers is None
    assert first.config.quantization_config.layers != second.config.quantization_config.layers


# -- other heads on the same repo --------------------------------------------------------------------------------------


def test_base_model_of_a_causal_repo(packed):
    model = load("llama", packed["llama-4"][0])
    base = AutoModel.from_pretrained(packed["llama-4"][0])
    assert len([m for m in base.modules() if isinstance(m, LowBitLinear)]) == 14
    with torch.no_grad():
        expected = model.model(**inputs("llama")).last_hidden_state
        assert torch.equal(base(**inputs("llama")).last_hidden_state, expected)


def test_base_model_saved_and_loaded_under_a_head(tiny, tmp_path):
    base = AutoModel.from_pretrained(tiny("llama"), quantization_config=LowBitConfig(bits=4))
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, LowBitLinear)
    assert not isinstance(model.lm_head, LowBitLinear)  # new, in float
    with torch.no_grad():
        states = model.model(**inputs("llama")).last_hidden_state
        assert torch.equal(states, base(**inputs("llama")).last_hidden_state)


def test_new_classification_head_stays_float_and_trains(packed):
    model = AutoModelForSequenceClassification.from_pretrained(packed["llama-4"][0], num_labels=3)
    assert type(model.score) is torch.nn.Linear and model.score.weight.requires_grad
    assert isinstance(model.model.layers[0].mlp.up_proj, LowBitLinear)
    batch = inputs("llama")
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_modules_that_the_checkpoint_lacks_stay_float_and_initialised(tiny):
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny("bert-mlm"), num_labels=3, quantization_config=LowBitConfig(bits=4)
    )
    pooler = model.bert.pooler.dense
    assert type(pooler) is torch.nn.Linear
    assert pooler.weight.abs().max() < 10 * model.config.initializer_range and (pooler.bias == 0).all()
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, LowBitLinear)
    kept = {k["name"]: k["reason"] for k in model.hf_quantizer.coverage["kept"]}
    assert kept["bert.pooler.dense"] == "new: not in the checkpoint"
    assert "bert.pooler.dense" not in model.config.quantization_config.layers


# -- which modules are packed ------------------------------------------------------------------------------------------


def packed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedMixin)}


def reasons(model):
    return {k["name"]: k["reason"] for k in model.hf_quantizer.coverage["kept"]}


def test_modules_to_not_convert_replaces_the_default(tiny):
    config = LowBitConfig(bits=4, modules_to_not_convert=["k_proj", "model.layers.1"])
    model = load("llama", tiny("llama"), quantization_config=config)
    names = packed_names(model)
    assert not any("k_proj" in n or n.startswith("model.layers.1.") for n in names)
    assert len(names) == 7 - 1 + 2  # embedding and head
    config = LowBitConfig(bits=4, modules_to_not_convert=["lm_head"])
    assert "lm_head" not in packed_names(load("llama", tiny("llama"), quantization_config=config))
    assert reasons(model)["model.layers.1.mlp.up_proj"] == "modules_to_not_convert"


def test_the_first_rule_that_matches_decides(tiny):
    rules = {
        r"model\.layers\.0\.mlp\.down_proj": None,
        r".*mlp\.down_proj": {"bits": 6},
        r".*mlp\..*": {"format": "nf", "bits": 3},
        r"lm_head": {"bits": 8},
        r".*embed_tokens": {"bits": 4, "group_size": 32},
    }
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=2, rules=rules))
    first, second = model.model.layers
    assert type(first.mlp.down_proj) is torch.nn.Linear
    assert reasons(model)["model.layers.0.mlp.down_proj"] == r"rule 'model\\.layers\\.0\\.mlp\\.down_proj'"
    assert second.mlp.down_proj.format.bits == 6
    assert (second.mlp.up_proj.format.name, second.mlp.up_proj.format.bits) == ("nf", 3)
    assert second.self_attn.q_proj.format.bits == 2
    assert model.lm_head.format.bits == 8
    assert (model.model.embed_tokens.format.bits, model.model.embed_tokens.format.group_size) == (4, 32)


def test_rules_and_their_order_survive_saving(tiny, tmp_path):
    rules = {r"z.*|.*up_proj": None, r"a.*|.*mlp\..*": {"bits": 6}, "lm_head": {"bits": 8}}
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, rules=rules))
    model.save_pretrained(tmp_path)
    saved = load("llama", tmp_path).config.quantization_config
    assert list(saved.rules.items()) == list(rules.items())
    assert saved.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama", {"model.embed_tokens", "lm_head"}),
        ("llama-tied", {"model.embed_tokens", "lm_head"}),
        ("gpt2", {"transformer.wte", "lm_head"}),  # not its positions
        ("t5", {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),  # not its biases by distance
        ("bert", {"bert.embeddings.word_embeddings"}),  # not its classifier
        ("whisper", {"model.decoder.embed_tokens", "proj_out"}),
        ("vit", set()),
        ("llava", {"model.language_model.embed_tokens", "lm_head"}),
    ],
)
def test_embedding_and_head_have_8_bits(name, ends, tiny, tmp_path):
    config = LowBitConfig(bits=3, format="nf")
    model = load(name, tiny(name), quantization_config=config)
    eight = {n for n, m in model.named_modules() if isinstance(m, PackedMixin) and m.format.bits == 8}
    assert eight == ends
    assert {model.get_submodule(n).format.name for n in ends} <= {"int"}
    kept = load(name, tiny(name), quantization_config=LowBitConfig(bits=3, format="nf", embeddings="float"))
    assert packed_names(kept) == packed_names(model) - ends
    if ends:
        assert "embeddings='float'" in reasons(kept).values()
        two = load(name, tiny(name), quantization_config=LowBitConfig(bits=3, embeddings=2))
        assert {two.get_submodule(n).format.bits for n in ends} == {2}


def test_repos_from_before_embeddings_were_packed_load_as_they_are(tiny, tmp_path):
    load("llama", tiny("llama"), quantization_config=LowBitConfig(embeddings="float")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["embeddings"]
    file.write_text(json.dumps(config))
    model = load("llama", tmp_path, quantization_config=LowBitConfig(embeddings="float"))
    assert type(model.lm_head) is torch.nn.Linear
    with pytest.raises(ValueError, match=r"embeddings=8 \(the repo has 'float'\)"):
        load("llama", tmp_path, quantization_config=LowBitConfig(embeddings=8))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_packed_repo_gives_its_embedding_and_head_back_as_floats(name, tiny, tmp_path):
    model = load(name, tiny(name), quantization_config=LowBitConfig(bits=3))
    model.save_pretrained(tmp_path / "packed")
    floats = load(name, tmp_path / "packed", quantization_config=LowBitConfig(embeddings="float"))
    assert packed_names(floats) == packed_names(model) - {"model.embed_tokens", "lm_head"}
    assert torch.equal(floats.lm_head.weight, model.lm_head.dequantize(floats.dtype))
    assert torch.equal(floats.model.embed_tokens.weight, model.model.embed_tokens.dequantize(floats.dtype))
    assert (floats.lm_head.weight is floats.model.embed_tokens.weight) == name.endswith("tied")
    floats.resize_token_embeddings(floats.config.vocab_size + 3)
    floats.save_pretrained(tmp_path / "floats")
    again = load(name, tmp_path / "floats")
    assert packed_names(again) == packed_names(floats)
    assert torch.equal(again.lm_head.weight, floats.lm_head.weight)


@pytest.mark.parametrize("kept", [{"lm_head": None}, {".*embed_tokens": None}])
def test_a_tied_default_follows_what_was_asked_for(kept, tiny):
    model = load("llama-tied", tiny("llama-tied"), quantization_config=LowBitConfig(bits=4, rules=kept))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()
    config = LowBitConfig(bits=4, modules_to_not_convert=["lm_head"])
    assert type(load("llama-tied", tiny("llama-tied"), quantization_config=config).lm_head) is torch.nn.Linear


def test_a_tie_with_what_cannot_be_packed(tiny, monkeypatch):
    """The head is kept with the embedding that some class reads directly; asking for it is an error."""
    real = plan._obstacle
    monkeypatch.setattr(
        plan, "_obstacle", lambda m, name, module: "X reads it" if "embed" in name else real(m, name, module)
    )
    model = load("llama-tied", tiny("llama-tied"), quantization_config=LowBitConfig(bits=4))
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.embed_tokens) is torch.nn.Embedding
    message = "'lm_head' cannot be packed: it shares its weight with 'model.embed_tokens', and X reads it"
    with pytest.raises(ValueError, match=message):
        load("llama-tied", tiny("llama-tied"), quantization_config=LowBitConfig(rules={"lm_head": {"bits": 4}}))


@pytest.mark.parametrize("asked", ["lm_head", ".*embed_tokens"])
def test_tied_embedding_and_head_are_packed_together(asked, tiny):
    config = LowBitConfig(bits=4, rules={asked: {"bits": 8}})
    model = load("llama-tied", tiny("llama-tied"), quantization_config=config)
    assert isinstance(model.lm_head, LowBitLinear) and isinstance(model.model.embed_tokens, LowBitEmbedding)
    for name in model.lm_head.packed_names:
        assert getattr(model.lm_head, name) is getattr(model.model.embed_tokens, name), name
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = set(dict(model.named_parameters()))
    assert "lm_head.weight" not in names and "model.embed_tokens.weight_scales" in names


def test_scaled_embedding_keeps_its_scale(tiny):
    config = LowBitConfig(bits=8, rules={".*embed_tokens": {"bits": 8}})
    model = load("gemma3", tiny("gemma3"), quantization_config=config)
    reference = load("gemma3", tiny("gemma3"))
    embedding, original = model.model.embed_tokens, reference.model.embed_tokens
    assert isinstance(embedding, LowBitEmbedding) and isinstance(embedding, type(original))
    tokens = inputs("gemma3")["input_ids"]
    # Half a step of 8 bits over a row's range, in units that the scaling (the square root of the width) magnifies.
    step = (original.weight.max() - original.weight.min()) / 255 * original.embed_scale
    assert (embedding(tokens) - original(tokens)).abs().max() <= step
    plain_model = model.dequantize() or model
    assert type(plain_model.model.embed_tokens) is type(original)


def test_fused_experts_are_reported_as_kept(tiny, caplog):
    config = LowBitConfig(bits=5)  # the warning is given once for every text; no other test has this one
    with caplog.at_level("WARNING", "transformers.hf_lowbit"):
        model = load("qwen3-moe", tiny("qwen3-moe"), quantization_config=config)
    experts = {n: r for n, r in reasons(model).items() if "experts" in n}
    assert len(experts) == 4 and set(experts.values()) == {"fused experts are not packed yet"}
    (report,) = [r.getMessage() for r in caplog.records if "packed 10 modules" in r.getMessage()]
    assert "fused experts are not packed yet: model.layers.*.mlp.experts.gate_up_proj" in report


def test_what_a_parent_reads_directly_is_kept(tiny):
    model = load("t5", tiny("t5"), quantization_config=LowBitConfig(bits=4))
    assert {r for n, r in reasons(model).items() if n.endswith(".wo")} == {"T5DenseActDense reads its weight directly"}
    with pytest.raises(ValueError, match=r"rule '.\*wo' asks to pack '.*wo', which is not possible: T5DenseActDense"):
        load("t5", tiny("t5"), quantization_config=LowBitConfig(bits=4, rules={".*wo": {"bits": 4}}))


def test_rule_that_matches_nothing(tiny):
    with pytest.raises(
        ValueError, match=r"rule 'lm_haed' matches no module that could be packed. There are: .*lm_head"
    ):
        load("llama", tiny("llama"), quantization_config=LowBitConfig(rules={"lm_haed": None}))


# -- activations in 8 bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_activations_in_8_bits_are_a_loading_option(backend, tiny, tmp_path):
    config = LowBitConfig(bits=4, activations="int8", backend=backend)
    model = load("llama", tiny("llama"), quantization_config=config)
    model.save_pretrained(tmp_path)
    assert "activations" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    exact, rounded = logits(load("llama", tmp_path), "llama"), logits(model, "llama")
    again = load("llama", tmp_path, quantization_config=LowBitConfig(activations="int8", backend=backend))
    assert torch.equal(logits(again, "llama"), rounded)
    # Inputs are off by steps of 1/127 of the largest of 32 values, about 2.5 of their rms: 2.5 / 127 / 12**.5 = 0.6 %;
    # nine linears follow one another, the head's among them: 3 * 0.6 %, and twice that as a margin.
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.036


def test_activations_in_8_bits_where_they_cannot_work(tiny):
    with pytest.raises(ValueError, match="activations='int4' is unknown: use 'float' or 'int8'"):
        LowBitConfig(activations="int4")
    with pytest.raises(ValueError, match="activations='int8' needs packed weights"):
        LowBitConfig(activations="int8", dequantize=True)
    quantizer = LowBitHfQuantizer(LowBitConfig(activations="int8"), pre_quantized=False)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with pytest.raises(ValueError, match="activations='int8' is for CPUs, and this model goes to 'cuda'"):
        quantizer._process_model_before_weight_loading(model, device_map={"": 0})
