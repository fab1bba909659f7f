"""Merging adapters into packed models: what each way keeps, what it says it cost, and that its result saves whole."""

import copy
import json

import pytest
import torch
import transformers
from conftest import inputs, load, logits
from peft import LoraConfig, PeftModel, get_peft_model
from test_lora import stir

from hf_lowbit import LowBitConfig, LowBitLinear
from hf_lowbit.adapters import merge
from hf_lowbit.adapters.requantize import requantize
from hf_lowbit.inspection import inspect_repo
from hf_lowbit.low_rank import LowRank, parse_low_rank

# Model: how it is packed, and what its adapter changes.
MODELS = {
    "llama": ({"rules": {".*embed_tokens": {"bits": 4}}}, ["embed_tokens", "q_proj", "down_proj"]),
    "llama-tied": ({"rules": {".*embed_tokens": {"bits": 4}}}, ["embed_tokens", "q_proj"]),
    "gpt2": ({}, ["c_attn", "c_proj"]),
    "qwen3": ({"format": "nf"}, ["o_proj", "lm_head"]),  # the head is in float
}
WAYS = ("requantize", "dequantize", "low_rank")


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    folders = {}
    for name, (options, _) in MODELS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        load(name, tiny(name), quantization_config=LowBitConfig(bits=4, embeddings="float", **options)).save_pretrained(
            folders[name]
        )
    return folders


@pytest.fixture
def adapt(packed):
    """``adapt(name, **options)``: the packed model with an adapter that changes it by a lot."""

    def make(name="llama", **options):
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": MODELS[name][1], **options}
        adapted = get_peft_model(load(name, packed[name]), LoraConfig(**options))
        stir(adapted)
        return adapted.eval()

    return make


def fixed(model):
    """Copies of all packed tensors."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n and not p.requires_grad}


# -- PEFT's own calls --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_rounds_once_and_unmerge_gives_every_bit_back(options, safe, adapt):
    adapted = adapt(**options)
    before, bits = logits(adapted, "llama"), fixed(adapted)
    adapted.base_model.merge_adapter(safe_merge=safe)
    merged = logits(adapted, "llama")
    assert 0 < (merged - before).norm() < 0.2 * before.norm()
    for layer in (m for m in adapted.modules() if hasattr(m, "merge_cost")):
        assert 0 < layer.merge_cost.error < 0.2 and layer.merge_cost.error < layer.merge_cost.error_to_change
    adapted.base_model.unmerge_adapter()
    assert all(torch.equal(tensor, fixed(adapted)[name]) for name, tensor in bits.items())
    assert torch.equal(logits(adapted, "llama"), before)


def test_a_merge_reaches_what_was_wanted_as_well_as_packing_does(adapt):
    adapted = adapt()
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    wanted = (layer.base_layer.dequantize() + layer.get_delta_weight("default")).detach()
    fresh = copy.deepcopy(layer.base_layer)
    fresh.set_packed(fresh.format.pack(fresh.method.quantize(wanted, fresh.format)))
    adapted.base_model.merge_adapter()
    assert torch.equal(layer.base_layer.dequantize(), fresh.dequantize())
    error = (layer.base_layer.dequantize() - wanted).norm() / wanted.norm()
    assert layer.merge_cost.error == pytest.approx(float(error), rel=1e-5)


def test_several_adapters_are_merged_in_one_rounding(adapt):
    results = []
    for names in ([["default", "other"]], [["default"], ["other"]]):
        adapted = adapt()
        adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        adapted.set_adapter("other")
        stir(adapted, 1)
        adapted.base_model.set_adapter(["default", "other"])
        before = logits(adapted, "llama")
        for some in names:
            adapted.base_model.merge_adapter(some)
        results.append(logits(adapted, "llama"))
        adapted.base_model.unmerge_adapter()
        assert torch.equal(logits(adapted, "llama"), before)
    assert torch.equal(*results)


def test_the_method_is_the_one_that_packed_the_layer(tiny, tmp_path):
    config = LowBitConfig(
        bits=3, method_options={"range": "minmax"}, rules={".*down_proj": {"method": "hqq", "method_options": {}}}
    )
    load("llama", tiny("llama"), quantization_config=config).save_pretrained(tmp_path)
    layer = load("llama", tmp_path).model.layers[0]
    found = layer.mlp.down_proj.method, layer.self_attn.q_proj.method
    assert [m.name for m in found] == ["hqq", "rtn"] and found[1].range == "minmax"


def test_a_layer_that_nobody_said_how_to_pack_is_packed_by_the_best_method(adapt):
    layer = adapt().get_base_model().model.layers[0].mlp.down_proj.base_layer
    layer.method = None
    before = layer.dequantize()
    cost = requantize(layer, before + 0.1)
    assert cost.error < 0.1 and not torch.equal(layer.dequantize(), before)


def test_small_changes_are_lost_and_the_report_says_so(packed):
    adapted = get_peft_model(load("llama", packed["llama"]), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)
    _, report = merge(adapted, progress=False)
    assert all(cost.error_to_change > 1 for cost in report.costs.values()) and len(report.costs) == 2
    assert "rounding 2 layers again" in str(report) and "q_proj" in str(report)


# -- the three ways ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", WAYS)
def test_every_way_saves_and_reloads(how, name, adapt, tmp_path):
    adapted = adapt(name)
    before = logits(adapted, name)
    merged, report = merge(adapted, how, progress=False)
    assert type(merged).__name__ == type(adapted.get_base_model()).__name__ and report.how == how
    assert not any("lora" in n for n, _ in merged.named_parameters())
    after = logits(merged, name)
    if how == "low_rank" and name != "qwen3":
        assert torch.equal(after, before)
    elif how != "requantize":
        # One float32 sum is made in another order.
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    else:
        assert 0 < (after - before).norm() < 0.2 * before.norm() and report.costs
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(name, tmp_path), name), after)
    if how != "dequantize":
        report = inspect_repo(tmp_path)
        corrected = [layer["name"] for layer in report["layers"] if "with rank=4,dtype=float32" in layer["format"]]
        assert bool(corrected) == (how == "low_rank")
        totals, coverage = report["totals"], load(name, tmp_path).hf_quantizer.coverage
        assert totals["packed_bytes"] == coverage["packed_bytes"] and totals["packed_weights"] > 0
        # Whether tied or not by now: the dequantized model is still this one.
        torch.testing.assert_close(logits(load(name, tmp_path).dequantize(), name), after, rtol=1e-4, atol=1e-4)


def test_the_result_loads_in_a_process_that_never_imports_the_package(adapt, tmp_path, python):
    merged, _ = merge(adapt(), "low_rank", progress=False)
    merged.save_pretrained(tmp_path)
    code = (
        f"import torch, transformers; model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        f"with torch.no_grad(): y = model(torch.tensor({inputs('llama')['input_ids'].tolist()})).logits\n"
        "print(y.double().sum().item(), model.model.layers[0].mlp.down_proj.low_rank.spec)"
    )
    total, spec = python(code).stdout.split()
    assert float(total) == logits(merged, "llama").double().sum().item() and spec == "rank=4,dtype=float32"


def test_the_cost_is_measured_on_windows_and_the_model_left_as_it_was(adapt, tiny):
    windows = torch.randint(4, 160, (3, 20), generator=torch.Generator().manual_seed(0))
    adapted, plain = adapt(), load("llama", tiny("llama"))
    before = logits(adapted, "llama")
    reports = {how: merge(adapted, how, windows=windows, reference=plain, progress=False)[1] for how in WAYS}
    assert torch.equal(logits(adapted, "llama"), before)
    assert reports["requantize"].kl > 1e-3 > 1e-6 > abs(reports["dequantize"].kl) and reports["low_rank"].kl == 0
    assert reports["low_rank"].before == reports["low_rank"].after
    assert reports["requantize"].before.kl > 0 and reports["requantize"].after.kl != reports["requantize"].before.kl
    text = str(reports["requantize"])
    assert "KL(with the adapter || merged)" in text and "before: perplexity" in text and "KL to the reference" in text
    alone = merge(adapted, windows=windows, progress=False)[1]
    assert alone.kl == reports["requantize"].kl and alone.before.kl is None and alone.after.kl is None


def test_low_rank_corrections_add_up_and_take_adapters_again(adapt, tmp_path):
    first, report = merge(adapt(target_modules=["q_proj"]), "low_rank", progress=False)
    q_proj = first.model.layers[0].self_attn.q_proj
    assert q_proj.low_rank == LowRank(4, torch.float32) and report.bytes_added == 2 * 4 * (64 + 64) * 4
    second = get_peft_model(first, LoraConfig(r=3, target_modules=["q_proj", "down_proj"])).eval()
    stir(second, 2)
    before = logits(second, "llama")
    loss = second(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss
    loss.backward()  # through the correction, which stays as it is
    assert q_proj.weight_factor_in.grad is None
    second.base_model.merge_adapter()
    assert q_proj.low_rank.rank == 4 and not torch.equal(logits(second, "llama"), before)
    second.base_model.unmerge_adapter()
    assert torch.equal(logits(second, "llama"), before)
    merged, _ = merge(second, "low_rank", progress=False)
    torch.testing.assert_close(logits(merged, "llama"), before, rtol=1e-4, atol=1e-4)
    config = merged.config.quantization_config
    assert config.low_rank == {
        "model.layers.*.self_attn.q_proj": "rank=7,dtype=float32",
        "model.layers.*.mlp.down_proj": "rank=3,dtype=float32",
    }
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load("llama", tmp_path), "llama"), logits(merged, "llama"))


def test_dtypes_of_a_half_precision_model(packed, tmp_path):
    adapted = get_peft_model(
        load("llama", packed["llama"], dtype=torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    )
    stir(adapted)
    adapted.eval()
    before = logits(adapted, "llama")
    exact, _ = merge(copy.deepcopy(adapted), "dequantize", dtype=torch.float32, progress=False)
    assert exact.dtype == torch.float32
    merged, _ = merge(adapted, "low_rank", progress=False)
    assert torch.equal(logits(merged, "llama"), before) and before.dtype == torch.bfloat16
    factor = merged.model.layers[0].self_attn.q_proj.weight_factor_in
    assert merged.to(torch.float16) and factor.dtype == torch.float32
    merged.to(torch.bfloat16).save_pretrained(tmp_path)
    again = load("llama", tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again, "llama"), before)


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_refusals(adapt, packed):
    with pytest.raises(ValueError, match="how='melt' is unknown: use 'requantize', 'dequantize', 'low_rank'"):
        merge(adapt(), "melt")
    with pytest.raises(ValueError, match="merge needs a PeftModel, not LlamaForCausalLM: load the adapter by"):
        merge(load("llama", packed["llama"]))
    with pytest.raises(ValueError, match=r"dtype=torch.float16 has no meaning for how='requantize'"):
        merge(adapt(), dtype=torch.float16)
    adapted = adapt(use_dora=True)
    bits = fixed(adapted)
    with pytest.raises(ValueError, match="adapter 'default' uses Dora, which is more than a product of two factors"):
        merge(adapted, "low_rank")
    assert all(torch.equal(tensor, fixed(adapted)[name]) for name, tensor in bits.items())
    head = get_peft_model(load("qwen3", packed["qwen3"]), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="no LoRA layer on a packed one: use PEFT's merge_and_unload"):
        merge(head)


@pytest.mark.parametrize("how", WAYS)
def test_a_diverged_adapter_is_not_merged(how, adapt):
    adapted = adapt(target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        adapted.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight[0, 0] = float("inf")
    bits = fixed(adapted)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.lora_B.default.weight has NaN or infinite.*Nothing"):
        merge(adapted, how, progress=False)
    with pytest.raises(ValueError, match=r"weights of model.layers.1.mlp.down_proj NaN or infinite|seems to be broken"):
        adapted.base_model.merge_adapter(safe_merge=how == "requantize")
    down = "model.layers.1.mlp.down_proj.base_layer.weight"
    assert all(torch.equal(tensor, fixed(adapted)[name]) for name, tensor in bits.items() if name.endswith(down))


def test_damaged_low_rank_files_are_refused(adapt, tmp_path):
    merged, _ = merge(adapt(target_modules=["q_proj"]), "low_rank", progress=False)
    merged.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    ((key, spec),) = config["quantization_config"]["low_rank"].items()
    for wrong, message in [
        ("rank=5,dtype=float32", r"q_proj.weight_factor_in is F32 of shape \(4, 64\).*rank=5.*\(5, 64\)"),
        ("rank=4,dtype=float16", "q_proj.weight_factor_in is F32 .*needs F16"),
        ("rank=4", "'rank=4' is not the text of a low-rank correction"),
        ("rank=0,dtype=float32", "is not the text"),
    ]:
        config["quantization_config"]["low_rank"][key] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load("llama", tmp_path)
    config["quantization_config"]["low_rank"] = {key: spec, "model.layers.*.mlp.up_proj": spec}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no tensor model.layers.0.mlp.up_proj.weight_factor_in: it is incomplete"):
        load("llama", tmp_path)


def test_the_text_of_a_correction():
    correction = parse_low_rank("rank=16,dtype=bfloat16")
    assert correction == LowRank(16, torch.bfloat16) and parse_low_rank(correction.spec) == correction
    assert correction.nbytes((100, 60)) == 16 * 160 * 2


def test_peft_reloads_the_adapter_after_a_merge_was_undone(adapt, packed, tmp_path):
    adapted = adapt()
    before = logits(adapted, "llama")
    adapted.base_model.merge_adapter()
    adapted.base_model.unmerge_adapter()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load("llama", packed["llama"]), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), before)
    assert isinstance(again.get_base_model().model.layers[0].mlp.down_proj.base_layer, LowBitLinear)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path) is not None
