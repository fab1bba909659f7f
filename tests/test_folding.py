"""Factors go into what makes a layer's inputs where that changes nothing, in any architecture, and nowhere else."""

import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import load, logits
from safetensors.torch import load_file
from torch import nn

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Block, Calibration, folding
from hf_lowbit.calibration.arguments import tensors_in
from hf_lowbit.calibration.blocks import Blocks
from hf_lowbit.calibration.folding import find_folds, plan_folds, still_right
from hf_lowbit.calibration.run import Run
from hf_lowbit.calibration.samples import Samples
from hf_lowbit.calibration.stream import Stream
from hf_lowbit.card import write_model_card
from hf_lowbit.convert import open_source
from hf_lowbit.methods.awq import Awq

_OPT = {
    "vocab_size": 160, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_PHI3 = {**conftest._TEXT, "tie_word_embeddings": False}
_BART = {
    "vocab_size": 160, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
MORE = {
    "opt": ("AutoModelForCausalLM", lambda t: t.OPTConfig(**_OPT)),
    "phi3": ("AutoModelForCausalLM", lambda t: t.Phi3Config(**_PHI3)),
    "bart": ("AutoModelForSeq2SeqLM", lambda t: t.BartConfig(**_BART)),
}
LLAMA = {
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
# What is to be found in the last block of each. (BERT and BART put norms after the sum, which everything reads.)
FOUND = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma3": {**LLAMA, "mlp.gate_proj mlp.up_proj": "pre_feedforward_layernorm"},
    "qwen3-moe": {k: v for k, v in LLAMA.items() if "mlp" not in k},  # whose router reads the norm, too
    "phi3": {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    "opt": {
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",  # through a ReLU
    },
    "bart": {"self_attn.out_proj": "self_attn.v_proj", "encoder_attn.out_proj": "encoder_attn.v_proj"},
    "bert-mlm": {"attention.output.dense": "attention.self.value"},
    "t5-gated": {
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v": "layer.0.layer_norm",
        "layer.0.SelfAttention.o": "layer.0.SelfAttention.v",
        "layer.1.EncDecAttention.q": "layer.1.layer_norm",  # k and v read the encoder
        "layer.1.EncDecAttention.o": "layer.1.EncDecAttention.v",
        "layer.2.DenseReluDense.wi_0 layer.2.DenseReluDense.wi_1": "layer.2.layer_norm",
    },
    "vit": {
        "attention.q_proj attention.k_proj attention.v_proj": "layernorm_before",
        "attention.o_proj": "attention.v_proj",
        "mlp.fc1": "layernorm_after",
    },
}


def awq(bits=4, fold="all", **options):
    return LowBitConfig(bits=bits, method="awq", embeddings="float", method_options={"fold": fold}, **options)


def ids(count=16, length=24):
    windows = torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), count, length)


def layers_of(repo) -> dict[str, str]:
    return json.loads((Path(repo.folder) / "config.json").read_text())["quantization_config"]["layers"]


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_what_is_found_changes_nothing_in_float(name, varied, monkeypatch):
    """In every family: arbitrary factors, folded into norms and weights, give what the block gave before."""
    source = open_source(Path(varied(name)), awq(), None)
    samples = Samples([conftest.inputs(name, batch=1)])
    blocks = Blocks(source, samples)
    folds = plan_folds(blocks)
    last = len(blocks.names) - 1
    assert {" ".join(f.layers): f.into for f in folds[blocks.names[last]]} == FOUND[name]
    generator = torch.Generator().manual_seed(1)

    def factors(self, weights, format, statistics, possible):
        return possible(torch.exp2(2 * torch.rand(weights[0].shape[1], generator=generator) - 1))

    monkeypatch.setattr(Awq, "factors", factors)
    stream = Stream(blocks, samples, False, torch.empty)
    for i in range(last + 1):
        block = as_block(blocks, i, stream)
        outputs = block.outputs(block.reference, block.inputs)
        foldings = still_right(block, folds[block.name], torch.float32)
        assert len(foldings) == len(folds[block.name])
        for item in foldings:
            item.apply(block, None)
        for layer_name, layer in block.layers.items():
            weight = block.as_parameter(layer_name, layer.weight)[layer_name + ".weight"]
            block.module.get_submodule(layer_name).weight = nn.Parameter(weight.contiguous())
        changed = block.outputs(block.module, block.inputs)
        # Each weight and input is rounded a few times more, and sums of a few hundred such products follow each other.
        torch.testing.assert_close(changed, outputs, rtol=1e-4, atol=1e-5 * float(outputs.abs().max()))
        assert all(not torch.equal(block.reference.get_parameter(n), v) for n, v in block.tuned.items())
        stream.leave(i, outputs)


def as_block(blocks, i, stream) -> Block:
    from hf_lowbit.calibration.block import Layer, _weight

    arguments, module = stream.enter(i), blocks.read(i)
    names, plan = blocks.layers[i], blocks.source.plan.packed
    full = {n: f"{blocks.names[i]}.{n}" for n in names}
    layers = {n: Layer(full[n], plan[full[n]], _weight(module.get_submodule(n)).clone()) for n in names}
    return Block(blocks.names[i], i, module, layers, stream.hidden, None, arguments, None, 1)


class Toy(nn.Module):
    """A block with one thing that stands in the way of folding."""

    def __init__(self, obstacle=""):
        super().__init__()
        torch.manual_seed(0)
        self.obstacle = obstacle
        self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)

    def forward(self, x):
        y = self.norm(x)
        h = self.first(y)
        if self.obstacle == "another reader of the norm":
            x = x + 1e-3 * y
        if self.obstacle == "another reader of the layer":
            x = x + 1e-3 * h.sum(-1, keepdim=True)
        if self.obstacle == "a bend":
            h = nn.functional.silu(h)
        if self.obstacle == "a limit":
            h = h.clamp(-50, 50)
        if self.obstacle == "a sum":
            h = h + 1e-3
        if self.obstacle == "neighbours":
            h = h + 1e-3 * h.roll(1, -1)
        if self.obstacle == "another order":
            h = h.flip(-1)
        if self.obstacle == "a norm of several":
            y = self.norm(x * 2)
            h = h + 1e-3 * self.first(y)
        return x + self.second(h)


@pytest.mark.parametrize(
    ("obstacle", "found"),
    {
        "": {"first": "norm", "second": "first"},
        "another order": {"first": "norm", "second": "first"},
        "another reader of the norm": {"second": "first"},
        "another reader of the layer": {"first": "norm"},
        "a bend": {"first": "norm"},
        "a limit": {"first": "norm"},
        "a sum": {"first": "norm"},
        "neighbours": {"first": "norm"},
        "a norm of several": {},
    }.items(),
)
def test_what_stands_in_the_way_is_seen(obstacle, found):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    layers = ["first", "second"]
    folds = find_folds(Toy(obstacle), layers, tuple(layers), lambda block: tensors_in([block(x.clone())]))
    assert {fold.layers[0]: fold.into for fold in folds} == found
    if obstacle == "another order":
        assert folds[1].index.tolist() == list(range(12))[::-1]


def test_heads_that_share_values_share_factors(varied):
    source = open_source(Path(varied("llama")), awq(), None)
    blocks = Blocks(source, Samples([conftest.inputs("llama", batch=1)]))
    fold = next(f for f in plan_folds(blocks)["model.layers.0"] if f.into.endswith("v_proj"))
    heads = torch.arange(64).view(4, 16)
    assert torch.equal(fold.index.view(4, 16), heads[:2].repeat_interleave(2, 0))
    wish = torch.exp2(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    got = fold.possible(wish, blocks.read(0), torch.float32).view(2, 2, 16)
    assert torch.equal(got[:, 0], got[:, 1])
    torch.testing.assert_close(got[:, 0], wish.view(2, 2, 16).log().mean(1).exp())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_rounding_of_a_norm_is_part_of_the_factors(name, varied):
    """What the layers are divided by is the quotient of the norm's weights as they are stored, before and after."""
    source = open_source(Path(varied(name)), awq(), torch.bfloat16)
    blocks = Blocks(source, Samples([conftest.inputs(name, batch=1)]))
    fold, block = plan_folds(blocks)["model.layers.0"][0], blocks.read(0)
    wish = torch.exp2(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    got = fold.possible(wish, block, torch.bfloat16)
    gain = fold.offset + block.input_layernorm.weight
    stored = fold.offset + fold.weight(got, block).to(torch.bfloat16).float()
    torch.testing.assert_close(gain * got, stored, rtol=2**-22, atol=0)  # two roundings of float32
    assert fold.offset == float(name == "gemma3") and not torch.equal(got, wish)
    assert ((got / wish).log2().abs() < 2**-6).all()  # no more than bfloat16 costs, next to an offset too


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "t5"])
def test_whole_models_are_smaller_and_load_plainly(name, varied, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    folder = varied(name)
    repo = hf_lowbit.quantize(folder, awq(), output=tmp_path / "out", calibration=ids(), dtype="bfloat16")
    online = awq(fold=False)
    other = hf_lowbit.quantize(folder, online, output=tmp_path / "online", calibration=ids(), dtype="bfloat16")
    saved = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert "folded" not in json.loads((other.folder / "config.json").read_text())["quantization_config"]
    packed = saved["folded"]
    assert packed and all(saved["layers"][layer].startswith("int:") for layer in packed)
    assert all(spec.startswith("int_columns:") for layer, spec in saved["layers"].items() if layer not in packed)
    assert repo.coverage["packed_bytes"] < other.coverage["packed_bytes"]
    kept, before = (load_file(r.folder / "model.safetensors") for r in (repo, other))
    norms = {k for k in kept if k.endswith("norm.weight") and not torch.equal(kept[k], before[k])}
    assert norms and all(kept[k].dtype == torch.bfloat16 for k in norms)
    model = load(name, repo.folder)
    plain = load(name, repo.folder, quantization_config=LowBitConfig(dequantize=True), dtype=torch.float32)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(load(name, repo.folder, dtype=torch.float32), name), logits(plain, name), **close)
    config = awq(calibration=ids())
    fly = load(name, folder, quantization_config=config, dtype=torch.bfloat16)
    assert torch.equal(logits(fly, name), logits(model, name))
    fly.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(name, tmp_path / "again"), name), logits(model, name))
    # And it is the model: nearer to it than at three bits.
    float_logits = logits(load(name, folder, dtype=torch.float32), name)
    three = hf_lowbit.quantize(folder, awq(3), output=tmp_path / "3", calibration=ids()).load(dtype=torch.float32)
    errors = [(logits(m, name) - float_logits).square().mean() for m in (plain, three)]
    assert errors[0] < errors[1] < float_logits.square().mean() / 2


def test_it_goes_on_after_a_stop_to_the_same_bits(varied, tmp_path, monkeypatch):
    expected = hf_lowbit.quantize(varied("llama"), awq(), output=tmp_path / "whole", calibration=ids())

    def stop(self, *block, write=Run.write):
        write(self, *block)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "write", stop)
        hf_lowbit.quantize(varied("llama"), awq(), output=tmp_path / "out", calibration=ids())
    assert [p.name for p in (tmp_path / "out.calibration").glob("block-*")] == ["block-00000.safetensors"]
    repo = hf_lowbit.quantize(varied("llama"), awq(), output=tmp_path / "out", calibration=ids())
    first, second = (r.folder / "model.safetensors" for r in (expected, repo))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(ValueError, match=r"begun with another source or other settings: .*fold"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "write", stop)
            hf_lowbit.quantize(varied("llama"), awq(), output=tmp_path / "other", calibration=ids())
        online = awq(fold=False)
        hf_lowbit.quantize(varied("llama"), online, output=tmp_path / "other", calibration=ids())


def test_layers_that_are_planned_in_another_way_keep_their_own(varied, tmp_path):
    rules = {
        r".*\.0\.self_attn\.q_proj": {"method": "gptq", "method_options": {}},
        r".*\.1\.mlp\.up_proj": None,
        r".*\.1\.self_attn\.o_proj": {"outliers": 2},
        r".*\.0\.mlp\.down_proj": {"transform": "hadamard"},
        r".*\.1\.self_attn\.v_proj": {"bits": 8},
    }
    repo = hf_lowbit.quantize(varied("llama"), awq(rules=rules), output=tmp_path / "out", calibration=ids())
    specs = {}
    for name, module in repo.load().named_modules():
        if hasattr(module, "spec"):
            specs[name.removeprefix("model.layers.")] = module.spec
    own = {name for name, spec in specs.items() if "int_columns" in spec}
    readers = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert own == {
        *(f"0.{n}" for n in readers - {"self_attn.q_proj"}), *(f"1.{n}" for n in readers),  # not alike
        "1.mlp.gate_proj", "1.mlp.down_proj",  # read, and are made by, what stays in float
        "1.self_attn.o_proj", "0.mlp.down_proj",  # beside outliers, and rotated
    }  # fmt: skip


def test_by_default_no_layer_shares(varied, tmp_path):
    config = LowBitConfig(bits=4, method="awq")
    repo = hf_lowbit.quantize(varied("llama"), config, output=tmp_path / "out", calibration=ids())
    saved = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert saved["folded"] == {
        "model.layers.*.mlp.down_proj": "model.layers.*.mlp.up_proj",
        "model.layers.*.self_attn.o_proj": "model.layers.*.self_attn.v_proj",
    }
    assert {name for name, spec in saved["layers"].items() if spec.startswith("int_columns")} == {
        f"model.layers.*.{name}" for names in LLAMA for name in names.split() if " " in names
    }
    card = str(write_model_card(repo.folder))
    assert '"fold": true' in card and '"model.layers.*.mlp.down_proj": "model.layers.*.mlp.up_proj"' in card


def test_corrections_and_trained_neighbours_go_with_it(varied, tmp_path):
    float_logits, errors = logits(load("llama", varied("llama")), "llama"), []
    for i, more in enumerate(({}, {"compensation": "eora", "compensation_rank": 16, "preprocess": "magr"})):
        rules = {r".*\.q_proj": {"method": "gptq", "method_options": {}}, r".*\.v_proj": {"method": "signround"}}
        rules[r".*\.v_proj"]["method_options"] = {"steps": 2}
        repo = hf_lowbit.quantize(
            varied("llama"), awq(2, rules=rules, **more), output=tmp_path / str(i), calibration=ids()
        )
        layers = layers_of(repo)
        assert layers["model.layers.*.mlp.down_proj"].startswith("int:")
        assert layers["model.layers.*.self_attn.o_proj"].startswith("int_columns:")  # v is trained: it takes none
        errors.append((logits(repo.load(), "llama") - float_logits).square().mean())
    assert errors[1] < errors[0]


def test_a_block_that_computes_otherwise_gets_no_factors(varied, tmp_path, monkeypatch):
    """Folds are planned on the first block, but tried on every one."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def own(self, hidden_states, *args, **kwargs):
        output = forward(self, hidden_states, *args, **kwargs)
        return output + 0.1 * self.input_layernorm(hidden_states) if self.self_attn.layer_idx else output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", own)
    warned = []
    monkeypatch.setattr(folding.logger, "warning", lambda text, *values: warned.append(text % values))
    repo = hf_lowbit.quantize(varied("llama"), awq(8), output=tmp_path / "out", calibration=ids())
    assert warned == [
        "model.layers.1: the factors of what self_attn.q_proj, self_attn.k_proj, self_attn.v_proj reads cannot go into "
        "input_layernorm here, as they can in others: it gets none"
    ]
    norms, before = (load_file(Path(p) / "model.safetensors") for p in (repo.folder, varied("llama")))
    key = "model.layers.{}.input_layernorm.weight"
    assert torch.equal(norms[key.format(1)], before[key.format(1)])
    assert not torch.equal(norms[key.format(0)], before[key.format(0)])
    float_logits = logits(load("llama", varied("llama")), "llama")
    assert (logits(repo.load(), "llama") - float_logits).square().mean() < 1e-3 * float_logits.square().mean()


def test_bad_input():
    with pytest.raises(ValueError, match="fold='most' is not possible: method 'awq' takes True, False or 'all'"):
        awq(fold="most")
