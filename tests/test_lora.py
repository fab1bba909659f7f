"""LoRA by PEFT on packed layers: attached everywhere, equal to LoRA on the dequantized model, or refused clearly.

The float counterpart of every test is the same packed model, dequantized, with PEFT's own layers and the same adapter:
both must compute the same, up to float32 rounding, which is what ``close`` allows.
"""

import json
import warnings

import pytest
import torch
import transformers
from conftest import inputs, load, logits
from peft import (
    AutoPeftModelForCausalLM,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    MontecloraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora.config import BdLoraConfig, CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from hf_lowbit import LowBitConfig, LowBitLinear
from hf_lowbit.adapters.lora import LoraLowBitEmbedding, LoraLowBitLinear

EMBEDDING = {"rules": {".*embed_tokens": {"bits": 4}}}
TARGETS = ["q_proj", "down_proj"]


def close(a, b):
    # Float32 products of at most 160 terms, in another order, through two layers; outputs are of order 1 to 10.
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """``packed(name)``: the folder of a packed tiny model, its embedding too where the name ends in "+"."""
    folders = {}

    def folder(name):
        if name not in folders:
            base = name.removesuffix("+")
            options = EMBEDDING if name.endswith("+") else {}
            folders[name] = str(tmp_path_factory.mktemp("packed"))
            config = LowBitConfig(bits=4, embeddings="float", **options)
            load(base, tiny(base), quantization_config=config).save_pretrained(folders[name])
        return folders[name]

    return folder


def adapt(folder, seed=0, dequantize=False, name="llama", **options):
    """The packed model in ``folder`` with an adapter of random, small, non-zero weights, in eval mode."""
    config = LowBitConfig(dequantize=True) if dequantize else None
    model = load(name, folder, **({"quantization_config": config} if config else {}))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights and of Conv1D
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    stir(adapted, seed)
    return adapted.eval()


@torch.no_grad()
def stir(adapted, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(adapted.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def gradients(adapted, name="llama"):
    adapted.zero_grad()
    batch = inputs(name)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


# -- right layers, and the same as on a float model --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("qwen3", 14), ("gpt2", 8)])
def test_all_linear_takes_every_packed_layer(name, count, packed):
    adapted = adapt(packed(name), name=name, target_modules="all-linear")
    layers = [m for m in adapted.modules() if isinstance(m, LoraLowBitLinear)]
    assert len(layers) == count and all(isinstance(m.base_layer, LowBitLinear) for m in layers)
    assert not any(isinstance(m, LowBitLinear) for n, m in adapted.named_modules() if not n.endswith("base_layer"))


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "kasa": {"kasa_config": KasaConfig()},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "bdlora": {
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    },
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding-mica": {"target_modules": ["embed_tokens"], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_float_model(case, packed):
    folder = packed("llama+")
    mine, plain = (adapt(folder, dequantize=float, **CASES[case]) for float in (False, True))
    if case == "kasa":  # cuts the base weight, which is then rounded again
        with mine.disable_adapter(), plain.disable_adapter():
            assert 0 < (logits(mine, "llama") - logits(plain, "llama")).norm() < 0.2 * logits(plain, "llama").norm()
        return
    with mine.disable_adapter():
        base = logits(mine, "llama")
    assert not torch.allclose(base, logits(mine, "llama"), atol=1e-2)  # the adapter changes something
    close(logits(mine, "llama"), logits(plain, "llama"))
    expected = gradients(plain)
    assert expected.keys() == gradients(mine).keys()
    for name, gradient in gradients(mine).items():
        assert gradient.abs().sum() > 0
        close(gradient, expected[name])


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_biases_and_transposed_weights(name, packed):
    targets = ["c_attn", "c_proj"] if name == "gpt2" else TARGETS
    mine, plain = (adapt(packed(name), name=name, dequantize=d, target_modules=targets) for d in (False, True))
    close(logits(mine, name), logits(plain, name))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_dropout_keeps_no_dequantized_weight_for_the_backward_pass(options, packed):
    adapted = adapt(packed("llama"), lora_dropout=0.1, **options).train()
    weights = [m.dequantize() for m in adapted.modules() if isinstance(m, LowBitLinear)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch = inputs("llama")
        loss = adapted(**batch, labels=batch["input_ids"]).loss
    floats = [t for t in saved if t.is_floating_point() and t.ndim == 2]
    assert floats and not [t.shape for t in floats for w in weights for v in (w, w.T) if torch.equal(t, v)]
    loss.backward()


def test_checkpointing_and_kbit_preparation(packed):
    model = load("llama", packed("llama"), dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "weight_" in n}
    model = prepare_model_for_kbit_training(model)  # casts every half-precision parameter to float32
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    stir(adapted)
    assert all(gradient.abs().sum() > 0 for gradient in gradients(adapted).values())
    state = adapted.get_base_model().state_dict()
    for name, tensor in before.items():
        module, _, parameter = name.rpartition(".")
        kept = state[f"{module}.base_layer.{parameter}"]
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor)


# -- several adapters --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(packed):
    def pair(dequantize):
        adapted = adapt(packed("llama+"), dequantize=dequantize, target_modules=["embed_tokens", "q_proj"])
        adapted.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        adapted.set_adapter("other")
        stir(adapted, 1)
        return adapted.eval()

    return pair(False), pair(True)


def test_switching_adapters_and_mixed_batches(two):
    batch = inputs("llama", batch=3)
    results = []
    for adapted in two:
        with torch.no_grad():
            alone = {}
            for name in ("default", "other"):
                adapted.set_adapter(name)
                alone[name] = adapted(**batch).logits
            with adapted.disable_adapter():
                alone["__base__"] = adapted(**batch).logits
            mixed = adapted(**batch, adapter_names=["default", "__base__", "other"]).logits
        for row, name in enumerate(("default", "__base__", "other")):
            close(mixed[row], alone[name][row])
        results.append(mixed)
    assert not torch.allclose(results[0][0], results[0][1])
    close(*results)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties", "dare_ties", "magnitude_prune"])
def test_weighted_combinations(kind, packed):
    results = []
    for dequantize in (False, True):
        adapted = adapt(packed("llama"), dequantize=dequantize)
        adapted.add_adapter("other", LoraConfig(r=4, target_modules=TARGETS))
        adapted.set_adapter("other")
        stir(adapted, 1)
        torch.manual_seed(0)  # dare drops at random
        adapted.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", combination_type=kind, density=0.5)
        adapted.set_adapter("both")
        results.append(logits(adapted.eval(), "llama"))
    close(*results)


# -- starts that look at weights or data -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_decompositions_take_their_part_out_of_the_packed_weight(start, packed):
    model = load("llama", packed("llama"))
    before = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, LowBitLinear)}
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=start))
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLowBitLinear)}
    assert len(layers) == 4
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach()
        residual = layer.base_layer.dequantize()
        assert delta.norm() > 0.1 * before[name].norm()
        # What is left is rounded again: no further off than the cost says, which is less than rounding to zero.
        error = (residual + delta - before[name]).norm() / (before[name] - delta).norm()
        assert 0 < error < 0.2 and float(error) == pytest.approx(layer.merge_cost.error, rel=1e-3)


def test_eva_gives_ranks_by_activations(packed):
    adapted = get_peft_model(
        load("llama", packed("llama")),
        LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, tau=0.9)),
    )
    batch = {"input_ids": inputs("llama")["input_ids"]}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    initialize_lora_eva_weights(adapted, [batch] * 4, show_progress_bar=False)
    ranks = [m.r["default"] for m in adapted.modules() if isinstance(m, LoraLowBitLinear)]
    assert len(ranks) == 4 and sum(ranks) <= 4 * 4
    for layer in (m for m in adapted.modules() if isinstance(m, LoraLowBitLinear)):
        rows = layer.lora_A["default"].weight
        close(rows @ rows.T, torch.eye(len(rows)))  # right singular vectors of its inputs


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_from_statistics_of_the_float_model(method, packed, tmp_path):
    """PEFT's preprocessing writes a cache beside the float model, which the packed one reads."""

    def adapt(model, run=None):
        corda = CordaConfig(corda_method=method, cache_file=str(tmp_path / "cache" / "corda.pt"))
        config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="corda", corda_config=corda)
        preprocess_corda(model, config, run_model=run)
        return get_peft_model(model, config).eval()

    plain = load("llama", packed("llama"), quantization_config=LowBitConfig(dequantize=True))
    weights = {n: m.weight.detach().clone() for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    batch = inputs("llama")["input_ids"]
    reference = adapt(plain, lambda: [plain(input_ids=row[None]) for row in batch]).get_base_model()
    adapted = adapt(load("llama", packed("llama"))).get_base_model()
    layers = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLowBitLinear)}
    assert len(layers) == 4
    for name, layer in layers.items():
        expected = reference.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()
        close(delta, expected.get_delta_weight("default").detach())
        assert not hasattr(layer.base_layer, "eigens")
        wanted = weights[name] - delta
        error = (layer.base_layer.dequantize() - wanted).norm() / wanted.norm()
        assert 0 < error < 0.2 and float(error) == pytest.approx(layer.merge_cost.error, rel=1e-3)


REFUSED = [
    ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, ValueError, "adapters.initialize.*loftq"),
    ({"init_lora_weights": "corda"}, ValueError, "layers.0.self_attn.q_proj has no statistics.*cache_file"),
    ({"init_lora_weights": "pissa", "r": 100}, ValueError, "rank 100 is above 64.*q_proj.*64x64.*rank_pattern"),
    ({"target_modules": ["nope"]}, ValueError, "nope"),
    ({"trainable_token_indices": [1, 2]}, ValueError, "input embedding is packed.*keep it in float"),
    ({"modules_to_save": ["up_proj"]}, ValueError, "'up_proj', but model.layers.0.mlp.up_proj is packed"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refusals_name_layer_and_cure(options, error, message, packed):
    with pytest.raises(error, match=message):
        get_peft_model(load("llama", packed("llama+")), LoraConfig(**{"target_modules": TARGETS, **options}))


@pytest.fixture
def said():
    """What the package logs, as text."""
    logger = transformers.utils.logging.get_logger("transformers.hf_lowbit")
    logger.warning_once.cache_clear() if hasattr(logger.warning_once, "cache_clear") else None
    type(logger).warning_once.cache_clear()
    lines, original = [], logger.handle
    logger.handle = lambda record: lines.append(record.getMessage())
    yield lines
    logger.handle = original


def test_warnings_for_what_works_but_is_no_use(packed, said):
    adapt(packed("llama"), r=100)
    assert any("rank 100 is above 64, the smaller dimension of q_proj (64x64)" in line for line in said)
    adapt(packed("llama"), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    assert any("lora_ga" in line and "start as plain LoRA" in line for line in said)


# -- saved and loaded --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    """An adapter's folder, that names the packed base, and the logits with it."""
    adapted = adapt(packed("llama+"), target_modules=["embed_tokens", "q_proj"])
    folder = str(tmp_path_factory.mktemp("adapter"))
    adapted.save_pretrained(folder)
    return folder, logits(adapted, "llama")


WAYS = {
    "from_pretrained": lambda base, adapter: PeftModel.from_pretrained(load("llama", base), adapter),
    "low_cpu_mem": lambda base, adapter: PeftModel.from_pretrained(
        load("llama", base), adapter, low_cpu_mem_usage=True
    ),
    "auto_peft": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "auto": lambda base, adapter: transformers.AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: _load_adapter(load("llama", base), adapter),
}


def _load_adapter(model, adapter):
    model.load_adapter(adapter)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading(way, packed, saved, said):
    adapter, expected = saved
    model = WAYS[way](packed("llama+"), adapter).eval()
    assert sum(isinstance(m, (LoraLowBitLinear, LoraLowBitEmbedding)) for m in model.modules()) == 3
    assert torch.equal(logits(model, "llama"), expected)
    assert not [line for line in said if "another base" in line]


def test_loading_in_a_process_that_never_imports_the_package(packed, saved, python):
    adapter, expected = saved
    code = (
        "import torch, transformers, peft\n"
        f"base, adapter = {packed('llama+')!r}, {adapter!r}\n"
        f"ids = torch.tensor({inputs('llama')['input_ids'].tolist()})\n"
        "auto = transformers.AutoModelForCausalLM\n"
        "models = [peft.PeftModel.from_pretrained(auto.from_pretrained(base), adapter), "
        "auto.from_pretrained(adapter),\n          peft.AutoPeftModelForCausalLM.from_pretrained(adapter)]\n"
        "model = auto.from_pretrained(base); model.load_adapter(adapter); models.append(model)\n"
        "model = auto.from_pretrained(base); model.add_adapter(peft.LoraConfig(target_modules='all-linear'))\n"
        "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'LoraLowBitLinear'\n"
        "for model in models:\n"
        "    with torch.no_grad(): print(model.eval()(input_ids=ids).logits.double().sum().item())\n"
        "import sys; assert 'hf_lowbit' in sys.modules"
    )
    sums = [float(line) for line in python(code).stdout.split()]
    assert sums == [expected.double().sum().item()] * 4


def test_an_adapter_of_another_base_is_loaded_with_a_warning(tiny, packed, saved, said):
    other = load(
        "llama",
        tiny("llama"),
        quantization_config=LowBitConfig(bits=4, method_options={"range": "minmax"}, **EMBEDDING),
    )
    PeftModel.from_pretrained(other, saved[0])
    found = [line for line in said if "belongs to another base" in line]
    assert len(found) == 1 and saved[0] in found[0] and packed("llama+") in found[0] and "embed_tokens" in found[0]


def test_what_is_known_of_the_base_is_a_file_beside_the_adapter(packed, saved, tmp_path, said):
    from hf_lowbit.adapters.base import folder_digests

    with open(f"{saved[0]}/lowbit_adapter.json", encoding="utf-8") as file:
        layers = json.load(file)["layers"]
    everywhere = folder_digests(packed("llama+"))
    assert len(layers) == 3 and layers == {name: everywhere[name] for name in layers}
    plain = adapt(packed("llama"), dequantize=True)
    plain.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    (tmp_path / "lowbit_adapter.json").write_text("{damaged")
    PeftModel.from_pretrained(load("llama", packed("llama")), str(tmp_path))
    assert any("lowbit_adapter.json cannot be read" in line for line in said)


def test_resizing_a_packed_embedding_says_what_to_do(packed):
    model = load("llama", packed("llama+"))
    with pytest.raises(
        ValueError, match=r"input embedding of this model is packed and cannot be resized.*embeddings='float'"
    ):
        model.resize_token_embeddings(200)
    plain = load("llama", packed("llama+"), quantization_config=LowBitConfig(dequantize=True))
    for float_one in (model.dequantize(), plain):
        assert float_one.resize_token_embeddings(200).weight.shape[0] == 200
