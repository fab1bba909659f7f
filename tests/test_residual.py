"""A decoder with a rotated residual stream is the same model, packs and loads as any, and others are refused."""

import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import load, logits
from safetensors.torch import load_file

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.adapters import initialize
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.blocks import Blocks
from hf_lowbit.calibration.residual import Turn, plan_rotation
from hf_lowbit.calibration.run import Run
from hf_lowbit.calibration.samples import Samples
from hf_lowbit.convert import open_source
from hf_lowbit.plan import STREAM

UNTIED = {**conftest._TEXT, "tie_word_embeddings": False}
MORE = {
    "llama-biases": ("AutoModelForCausalLM", lambda t: t.LlamaConfig(**UNTIED, attention_bias=True, mlp_bias=True)),
    "gemma": ("AutoModelForCausalLM", lambda t: t.GemmaConfig(**UNTIED)),
    "gemma3-untied": ("AutoModelForCausalLM", lambda t: t.Gemma3TextConfig(**UNTIED, query_pre_attn_scalar=16)),
    "gpt2-untied": (
        "AutoModelForCausalLM",
        lambda t: t.GPT2Config(
            vocab_size=160, n_positions=64, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False,
        ),
    ),
    "cohere": ("AutoModelForCausalLM", lambda t: t.CohereConfig(**UNTIED)),
}  # fmt: skip
READERS = [f"model.layers.*.self_attn.{n}_proj" for n in "qkv"] + [
    f"model.layers.*.mlp.{n}_proj" for n in ("gate", "up")
]
WRITERS = ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))


def rotated(bits=4, method="gptq", **options):
    return LowBitConfig(bits=bits, method=method, transform="hadamard-folded", **options)


def ids(count=16, length=24):
    windows = torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), count, length)


def planned(folder, name):
    source = open_source(Path(folder), rotated(), None)
    return plan_rotation(Blocks(source, Samples([conftest.inputs(name, batch=1)])))


@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen3", "gemma"])
@torch.no_grad()
def test_the_rotated_model_is_the_same(name, varied):
    model, residual = load(name, varied(name)), planned(varied(name), name)
    expected = logits(model, name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    residual.embed_in(model)
    for block, turn in residual.turns.items():
        turn.apply(model.get_submodule(block))
    Turn([residual.norm], []).apply(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-4)  # sums in other orders
    same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert all("q_norm" in n or "k_norm" in n or n.endswith("bias") for n in same)
    assert not any(n.endswith(("o_proj.bias", "down_proj.bias")) for n in same)
    assert set(residual.folded()) == {n.replace("*", str(i)) for n in READERS for i in (0, 1)}


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "llama-tied": "one weight for model.embed_tokens and lm_head, and 'hadamard-folded' changes each.*: untie them",
        "gpt2-untied": "GPT2LMHeadModel has no norm before lm_head that can be rotated",
        "cohere": "CohereForCausalLM has no norm before lm_head that can be rotated",
        "gemma3-untied": r"model.layers.0 does not give the same with a rotated residual stream \(relative error",
        "qwen3-moe": r"model.layers.0 does not give the same with a rotated residual stream \(relative error",
        "t5": "has several rows of blocks, and 'hadamard-folded' is for decoders alone",
        "bert-mlm": "one weight for .*: untie them",
    }.items(),
)
def test_what_would_not_be_the_same_is_refused(name, message, varied):
    with pytest.raises(ValueError, match=message + "(?s:.*)[uU]se transform='hadamard', which rotates inputs"):
        planned(varied(name), name)


def test_every_block_is_tried(varied, tmp_path, monkeypatch):
    """What is to be done is found in the first block, but a later one that computes otherwise is not let through."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def own(self, hidden_states, *args, **kwargs):
        output = forward(self, hidden_states, *args, **kwargs)
        return output + 1e-3 * hidden_states.abs() if self.self_attn.layer_idx else output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", own)
    with pytest.raises(ValueError, match=r"model[.]layers[.]1 does not give the same with a rotated residual stream"):
        hf_lowbit.quantize(varied("llama"), rotated(), output=tmp_path / "out", calibration=ids())


@pytest.mark.parametrize("embeddings", [8, "float"])
def test_repos_load_plainly_and_rotate_less(embeddings, varied, tmp_path):
    name, config = "llama-biases", rotated(embeddings=embeddings)
    repo = hf_lowbit.quantize(varied(name), config, output=tmp_path / "out", calibration=ids(), dtype="bfloat16")
    saved = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    assert saved["transform"] == "hadamard-folded" and saved["folded"] == dict.fromkeys(READERS, STREAM)
    layers = {key: spec.split(":")[0] for key, spec in saved["layers"].items()}
    ends = {} if embeddings == "float" else {"model.embed_tokens": "int", "lm_head": "int"}
    assert layers == {**dict.fromkeys(READERS, "int"), **dict.fromkeys(WRITERS, "hadamard+int"), **ends}
    stored = load_file(repo.folder / "model.safetensors")
    assert all((t == 1).all() for n, t in stored.items() if n.endswith("norm.weight"))
    model = load(name, repo.folder)
    fly = load(
        name, varied(name), quantization_config=rotated(embeddings=embeddings, calibration=ids()), dtype=torch.bfloat16
    )
    assert torch.equal(logits(fly, name), logits(model, name))
    fly.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(name, tmp_path / "again"), name), logits(model, name))
    plain = load(name, repo.folder, quantization_config=LowBitConfig(dequantize=True), dtype=torch.float32)
    packed = load(name, repo.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(packed, name), logits(plain, name), rtol=1e-4, atol=1e-4)
    expected = logits(load(name, varied(name), dtype=torch.float32), name)
    assert (logits(packed, name) - expected).square().mean() < 0.1 * expected.square().mean()


def test_eight_bits_are_near_the_float_model(varied, tmp_path):
    """What is lost is what codes lose, in all blocks and both ends: as much as with rotations at run time."""
    expected, errors = logits(load("llama", varied("llama")), "llama"), []
    for transform in ("hadamard", "hadamard-folded"):
        config = LowBitConfig(bits=8, method="gptq", transform=transform)
        repo = hf_lowbit.quantize(varied("llama"), config, output=tmp_path / transform, calibration=ids())
        errors.append((logits(repo.load(), "llama") - expected).square().mean() / expected.square().mean())
    assert errors[1] < 2 * errors[0] < 1e-2


def test_it_goes_on_after_a_stop_to_the_same_bits(varied, tmp_path, monkeypatch):
    expected = hf_lowbit.quantize(varied("llama"), rotated(), output=tmp_path / "whole", calibration=ids())
    for count in (1, 2):  # after the ends, and after the first block

        def stop(self, index, *more, write=Run.write, count=count):
            write(self, index, *more)
            if len(list(self.work.glob("block-*"))) == count:
                raise KeyboardInterrupt

        output = tmp_path / str(count)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "write", stop)
            hf_lowbit.quantize(varied("llama"), rotated(), output=output, calibration=ids())
        repo = hf_lowbit.quantize(varied("llama"), rotated(), output=output, calibration=ids())
        first, second = (r.folder / "model.safetensors" for r in (expected, repo))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "awq", "method_options": {"feedback": True}, "outliers": 2},
        {"method": "signround", "method_options": {"steps": 2, "tune_norms": True}},
        {"compensation": "eora", "compensation_rank": 8, "format": "nf"},
        {"rules": {r".*\.0\.mlp\.(down|up)_proj": None, r".*\.1\.self_attn\.[oq]_proj": {"transform": "none"}}},
        {"rules": {r"model\.layers\.1\..*": None}},
    ],
    ids=["awq", "signround", "eora", "rules", "block"],
)
def test_it_goes_with_everything_else(options, varied, tmp_path):
    expected, errors = logits(load("llama", varied("llama")), "llama"), []
    for transform in ("hadamard", "hadamard-folded"):
        config = LowBitConfig(**{"bits": 4, "method": "gptq", **options, "transform": transform})
        repo = hf_lowbit.quantize(varied("llama"), config, output=tmp_path / transform, calibration=ids())
        errors.append((logits(repo.load(), "llama") - expected).square().mean() / expected.square().mean())
    assert errors[1] < 2 * errors[0]  # a wrong model would be as far as two models are


def test_bad_input(varied, tmp_path):
    with pytest.raises(ValueError, match="'hadamard-folded' needs a method with calibration, such as 'gptq'"):
        rotated(method="rtn")
    with pytest.raises(ValueError, match="does not go with bits_stored=: use transform='hadamard'"):
        LowBitConfig(method="gptq", bits_stored=3.0, transform="hadamard-folded")
    with pytest.raises(ValueError, match=r"rule '\.\*': transform='hadamard-folded' is for the whole model"):
        LowBitConfig(method="gptq", rules={".*": {"transform": "hadamard-folded"}})
    with pytest.raises(ValueError, match="transform='hadamard-folded' does not go with an adapter's start"):
        initialize(varied("llama"), rotated(), destination=tmp_path / "out", method="zeros", rank=4)
