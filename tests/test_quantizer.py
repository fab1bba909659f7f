"""A packed model is used like any other: generation, dtypes, devices, compilation, gradients, copies, training."""

import copy
import io

import pytest
import torch
import transformers
from conftest import inputs, load, logits
from safetensors import safe_open
from transformers import AutoConfig
from transformers.distributed.configuration_utils import DistributedConfig

from hf_lowbit import LowBitConfig, LowBitEmbedding, LowBitLinear
from hf_lowbit.packed import PackedMixin

EVERYTHING = {".*embed_tokens|lm_head": {"bits": 4}}
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}


@pytest.fixture(scope="module")
def repo(tiny, tmp_path_factory):
    """Folder of a tiny Llama in 4 bits, embedding and head included."""
    folder = tmp_path_factory.mktemp("packed")
    load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, rules=EVERYTHING)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(repo):
    """The packed model; tests that change it load their own."""
    return load("llama", repo)


@pytest.fixture(scope="module")
def expected(model):
    return logits(model, "llama")


def packed_dtypes(model):
    return {n: p.dtype for n, m in model.named_modules() if isinstance(m, PackedMixin) for p in m.stored().values()}


def close_in(dtype, result, expected) -> bool:
    """Whether ``result`` differs from float32's by no more than rounding: about ten roundings in each of two layers,
    none of which a norm magnifies by more than four."""
    return (result.float() - expected).norm() / expected.norm() <= 4 * (2 * 10) ** 0.5 * EPSILON[dtype]


def tensor_names(folder) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


# -- generation --------------------------------------------------------------------------------------------------------


def test_greedy_generation_follows_the_logits(model):
    tokens = inputs("llama")["input_ids"]
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        best = model(generated).logits.argmax(-1)
    ended = (generated[:, tokens.shape[1] :] == 2).cumsum(-1) > 0
    assert (ended | (generated[:, tokens.shape[1] :] == best[:, tokens.shape[1] - 1 : -1])).all()


def test_sampling_is_the_same_for_the_same_seed(model):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs("llama"), max_new_tokens=8, do_sample=True, temperature=1.5, eos_token_id=None)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_left_padded_batch_equals_single_runs(model):
    rows = [row[-n:] for row, n in zip(inputs("llama", batch=3)["input_ids"], (12, 7, 3), strict=True)]
    padded = torch.stack([torch.nn.functional.pad(row, (12 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (12 - len(row), 0)) for row in rows])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        last = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits[:, -1]
    for row, result, final in zip(rows, together, last, strict=True):
        alone = model.generate(row[None], max_new_tokens=6, do_sample=False)[0, len(row) :]
        assert torch.equal(result[12 : 12 + len(alone)], alone)
        with torch.no_grad():
            torch.testing.assert_close(final, model(row[None]).logits[0, -1])


def test_static_cache_generates_the_same(model):
    tokens = inputs("llama")["input_ids"]
    dynamic = model.generate(tokens, max_new_tokens=6, do_sample=False)
    static = model.generate(
        tokens, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static, dynamic)
    assert model.hf_quantizer.is_compileable


@pytest.mark.slow
def test_compiled_static_cache_generates_the_same(model):
    tokens = inputs("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    compiled = transformers.CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    static = model.generate(tokens, cache_implementation="static", compile_config=compiled, **options)
    assert torch.equal(static, model.generate(tokens, **options))


def test_compiles_into_one_graph(repo, expected):
    torch._dynamo.reset()
    compiled = torch.compile(load("llama", repo), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, "llama"), expected)


@pytest.mark.slow
def test_compiles_with_inductor(repo, expected):
    torch._dynamo.reset()
    compiled = torch.compile(load("llama", repo), fullgraph=True)
    torch.testing.assert_close(logits(compiled, "llama"), expected)


def test_text_generation_pipeline(repo):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(160)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    generate = transformers.pipeline("text-generation", model=load("llama", repo), tokenizer=tokenizer)
    (first,), (second,) = generate(["w5 w6 w7", "w8"], max_new_tokens=3, do_sample=False, batch_size=2)
    assert first["generated_text"].startswith("w5 w6 w7") and second["generated_text"].startswith("w8")


# -- dtypes and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_half_precision(dtype, repo, model, expected):
    half = load("llama", repo, dtype=dtype)
    result = logits(half, "llama")
    assert half.dtype == result.dtype == dtype
    assert packed_dtypes(half) == packed_dtypes(model)
    assert close_in(dtype, result, expected)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_quantizing_in_half_precision(dtype, tiny, tmp_path):
    config = LowBitConfig(bits=4, rules=EVERYTHING)
    model = load("llama", tiny("llama"), dtype=dtype, quantization_config=config)
    assert model.dtype == logits(model, "llama").dtype == dtype
    model.save_pretrained(tmp_path)
    again = load("llama", tmp_path)  # the dtype comes from the config
    assert again.dtype == dtype
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_autocast(model, expected):
    with torch.autocast("cpu", torch.bfloat16):
        result = logits(model, "llama")
    assert result.dtype == torch.bfloat16
    assert close_in(torch.bfloat16, result, expected)


def test_moving_to_another_dtype_leaves_the_packed_tensors(repo, expected):
    model = load("llama", repo)
    before = packed_dtypes(model)
    model.to(torch.bfloat16)
    assert packed_dtypes(model) == before
    assert model.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert close_in(torch.bfloat16, logits(model, "llama"), expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(device_map, repo, expected, tiny):
    assert torch.equal(logits(load("llama", repo, device_map=device_map), "llama"), expected)
    config = LowBitConfig(bits=4, rules=EVERYTHING)
    fresh = load("llama", tiny("llama"), device_map=device_map, quantization_config=config)
    assert torch.equal(logits(fresh, "llama"), expected)


def test_tensor_parallelism_is_refused(repo):
    config = AutoConfig.from_pretrained(repo)
    config.distributed_config = DistributedConfig(tp_plan="auto", tp_size=2)  # as from_pretrained sets it
    with pytest.raises(ValueError, match=r"packed layers cannot be split over processes .* without tp_plan="):
        load("llama", repo, config=config)


def test_disk_offload_of_a_packed_repo(repo, expected, tmp_path):
    model = load("llama", repo, device_map=ON_DISK, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits(model, "llama"), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load("llama", tmp_path / "again"), "llama"), expected)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj is offloaded: load the model without"):
        model.dequantize()


def test_quantizing_to_disk_is_refused(tiny, repo, tmp_path):
    with pytest.raises(ValueError, match="quantizing on the fly to a 'disk' device is not possible: quantize to a"):
        load("llama", tiny("llama"), device_map=ON_DISK, quantization_config=LowBitConfig())
    with pytest.raises(ValueError, match="dequantizing to a 'disk' device is not possible: load without offloading"):
        load("llama", repo, device_map=ON_DISK, quantization_config=LowBitConfig(dequantize=True))


# -- gradients and training --------------------------------------------------------------------------------------------


def test_gradients_reach_the_input_and_equal_the_float_ones(repo):
    packed, plain = load("llama", repo), load("llama", repo)
    plain.dequantize()
    rows = packed.get_input_embeddings()(inputs("llama")["input_ids"]).detach()
    gradients = []
    for model in (packed, plain):
        embeds = rows.clone().requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        gradients.append(embeds.grad)
    largest = gradients[1].abs().max().item()  # a small one is a sum of terms as large as that, in another order
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * largest)
    assert largest > 0


def test_gradient_checkpointing_changes_no_gradient(repo):
    model = load("llama", repo).train()
    embeds = model.get_input_embeddings()(inputs("llama")["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().sum().backward()
    plain, embeds.grad = embeds.grad, None
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model(inputs_embeds=embeds).logits.square().sum().backward()
    assert torch.equal(embeds.grad, plain)


def test_trainer_takes_adapters_only(repo, tmp_path):
    from peft import LoraConfig, get_peft_model

    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        transformers.Trainer(load("llama", repo), arguments)
    adapted = get_peft_model(load("llama", repo), LoraConfig(target_modules="all-linear", r=2))
    transformers.Trainer(adapted, arguments)


def test_lora_attaches_to_every_packed_layer_and_learns(repo, expected):
    from peft import LoraConfig, get_peft_model

    base = load("llama", repo)
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2))
    layers = [m for m in adapted.modules() if isinstance(getattr(m, "base_layer", None), LowBitLinear)]
    assert len(layers) == 14
    batch = inputs("llama")
    output = adapted(**batch, labels=batch["input_ids"])
    assert torch.equal(output.logits, expected)  # an adapter begins as nothing
    output.loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    assert all(m.lora_B["default"].weight.grad.abs().sum() > 0 for m in layers)


# -- copies and other handling -----------------------------------------------------------------------------------------


def test_deepcopy_and_torch_save(model, expected):
    assert torch.equal(logits(copy.deepcopy(model), "llama"), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), "llama"), expected)


def test_state_dict_round_trip(repo, model, expected):
    other = load("llama", repo)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, "llama"), expected)


def test_resizing_an_embedding_that_is_not_packed(tiny):
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, embeddings="float"))
    before = logits(model, "llama")
    model.resize_token_embeddings(176)
    assert torch.equal(logits(model, "llama")[..., :160], before)


def test_memory_footprint_is_that_of_the_packed_tensors(model):
    coverage = model.hf_quantizer.coverage
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == coverage["packed_bytes"] + coverage["kept_bytes"] + buffers


def test_empty_weights_then_load(repo, expected):
    from accelerate import init_empty_weights

    with init_empty_weights():
        config = transformers.AutoConfig.from_pretrained(repo)
    model = load("llama", repo, config=config)
    assert torch.equal(logits(model, "llama"), expected)


def test_exports(model):
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4, 64)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_integer_input_is_refused_with_the_cure(model):
    with pytest.raises(TypeError, match=r"got an input of torch.int16: .* keep this layer in float by a rule"):
        model.lm_head(torch.zeros(1, 64, dtype=torch.int16))


def test_checkpoint_that_fuses_what_the_model_has_apart(tmp_path):
    config = transformers.HrmTextConfig(
        vocab_size=160, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    assert any("gate_up_proj" in name for name in tensor_names(tmp_path / "float"))
    packed = load("llama", tmp_path / "float", quantization_config=LowBitConfig(bits=4))
    names = [n for n, m in packed.named_modules() if isinstance(m, LowBitLinear)]
    assert {n.rpartition(".")[2] for n in names} >= {"gate_proj", "up_proj", "down_proj"}
    packed.save_pretrained(tmp_path / "packed")
    assert not any("gate_up_proj" in name for name in tensor_names(tmp_path / "packed"))
    assert torch.equal(logits(load("llama", tmp_path / "packed"), "llama"), logits(packed, "llama"))


def test_a_repo_shows_what_it_is_made_of(model):
    assert "int:bits=4" in repr(model.lm_head) and "bits per weight" in repr(model.lm_head)
    assert isinstance(model.model.embed_tokens, LowBitEmbedding)
    assert "4.38 bits per weight" in repr(model.model.embed_tokens)
