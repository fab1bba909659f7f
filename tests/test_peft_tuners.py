"""PEFT's tuners besides LoRA on packed layers: the table of docs/finetuning.md, kept true.

Where a tuner works, loss and gradients are those on the dequantized model; where it merges, unmerging gives every bit
back; where it does not merge, the dequantized model does; where it cannot work, it says so when it is attached.
"""

import os
import re
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from conftest import inputs, load, logits
from peft import get_peft_model

from hf_lowbit import LowBitConfig, LowBitLinear

TARGETS = ["q_proj", "down_proj"]
# PEFT's name of the tuner: options of its config.
MERGES = {
    "BOFT": {"boft_block_size": 4},
    "Miss": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "Shira": {"r": 4},
    "Vera": {"r": 4},
}
TRAINS = {
    "AdaLora": {"total_step": 10},
    "C3A": {"block_size": 16},
    "FourierFT": {"n_frequency": 10},
    "Gralora": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "Pvera": {"r": 4},
    "RandLora": {"r": 4},
    "Road": {},
    "VBLoRA": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "WaveFT": {"n_frequency": 10},
}
BESIDE = {
    "LNTuning": {"target_modules": ["input_layernorm"]},
    "PrefixTuning": {"num_virtual_tokens": 2, "target_modules": None},
    "PromptEncoder": {"num_virtual_tokens": 2, "target_modules": None},
    "PromptTuning": {"num_virtual_tokens": 2, "target_modules": None},
}
REFUSED = {
    "Deft": {},
    "Delora": {},
    "Frod": {},
    "HRA": {},
    "Hira": {},
    "LoHa": {},
    "LoKr": {},
    "OSF": {},
    "Peanut": {},
    "Psoft": {},
    "Supertuning": {},
    "TinyLora": {},
    "TrainableTokens": {"token_indices": [1]},
    "UniLora": {},
}


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("packed"))
    load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, embeddings="float")).save_pretrained(folder)
    return folder


def adapt(folder, tuner, options, dequantize=False):
    model = load("llama", folder, **({"quantization_config": LowBitConfig(dequantize=True)} if dequantize else {}))
    options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, **options}
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, getattr(peft, f"{tuner}Config")(**{k: v for k, v in options.items() if v is not None})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def learn(adapted):
    """The loss, and the gradients of what is trained."""
    batch = inputs("llama")
    loss = adapted(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def environment():
    """Left as it was: BOFT, finding no CUDA compiler, leaves CXX=gcc behind, which links no C++ library."""
    with mock.patch.dict(os.environ):
        yield


def packed_bits(adapted):
    return [p.detach().clone() for m in adapted.modules() if isinstance(m, LowBitLinear) for p in m.stored().values()]


@pytest.mark.parametrize(("tuner", "options"), {**MERGES, **TRAINS, **BESIDE}.items(), ids=[*MERGES, *TRAINS, *BESIDE])
def test_trains_as_on_the_float_model(tuner, options, packed):
    (loss, gradients), (expected, others) = (learn(adapt(packed, tuner, options, d)) for d in (False, True))
    # Float32 products in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0
        # A small gradient is a sum of terms as large as the largest ones.
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=1e-4 * others[name].abs().max().item())


@pytest.mark.parametrize(("tuner", "options"), MERGES.items(), ids=MERGES)
def test_merges_by_rounding_again(tuner, options, packed):
    adapted = adapt(packed, tuner, options)
    before, bits = logits(adapted, "llama"), packed_bits(adapted)
    adapted.base_model.merge_adapter()
    merged = logits(adapted, "llama")
    assert 0 < (merged - before).norm() < 0.3 * before.norm()
    adapted.base_model.unmerge_adapter()
    assert all(torch.equal(*pair) for pair in zip(bits, packed_bits(adapted), strict=True))
    assert torch.equal(logits(adapted, "llama"), before)
    assert {status.quantization_backend for status in adapted.get_layer_status()} == {"lowbit"}
    assert torch.equal(logits(adapted.merge_and_unload(), "llama"), merged)


@pytest.mark.parametrize(("tuner", "options"), TRAINS.items(), ids=TRAINS)
def test_does_not_merge_into_codes_but_into_the_float_model(tuner, options, packed):
    adapted = adapt(packed, tuner, options)
    before, bits = logits(adapted, "llama"), packed_bits(adapted)
    for call in (adapted.base_model.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=rf"q_proj is packed, and PEFT's {tuner.lower()} cannot merge.*dequantize"):
            call()
    assert all(torch.equal(*pair) for pair in zip(bits, packed_bits(adapted), strict=True))
    adapted.base_model.model.dequantize()
    torch.testing.assert_close(logits(adapted.merge_and_unload(), "llama"), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tuner", "options"), MERGES.items(), ids=MERGES)
def test_merges_exactly_after_dequantizing(tuner, options, packed):
    adapted = adapt(packed, tuner, options)
    before = logits(adapted, "llama")
    adapted.base_model.model.dequantize()
    torch.testing.assert_close(logits(adapted.merge_and_unload(), "llama"), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tuner", "options"), REFUSED.items(), ids=REFUSED)
@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=str)
def test_refused_where_float_weights_are_read(tuner, options, targets, packed):
    with pytest.raises(ValueError, match=r"proj is packed, and PEFT's \w+ computes with float weights: use LoRA"):
        adapt(packed, tuner, {**options, "target_modules": targets})


def test_trainable_tokens_want_a_float_embedding(tiny, packed):
    adapted = adapt(packed, "TrainableTokens", {"token_indices": [1], "target_modules": ["embed_tokens"]})
    assert learn(adapted)[1]
    config = LowBitConfig(bits=4, rules={".*embed_tokens": {"bits": 4}})
    both = load("llama", tiny("llama"), quantization_config=config)
    with pytest.raises(ValueError, match="the input embedding is packed, and training single tokens"):
        get_peft_model(both, peft.TrainableTokensConfig(token_indices=[1]))


def test_the_table_in_the_docs_is_this_one():
    text = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (merges|trains|beside|refused)\b", text, flags=re.MULTILINE)
    table = {kind: {name.strip(" `").lower() for name in names.split(",")} for names, kind in rows}
    for kind, tested in {"merges": MERGES, "trains": TRAINS, "beside": BESIDE, "refused": REFUSED}.items():
        assert table[kind] == {name.lower() for name in tested}, kind
