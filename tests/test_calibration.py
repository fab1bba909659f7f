"""Calibration sees what the model computes, goes on after a stop, and says what is wrong with its text."""

import dataclasses
import gc
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import transformers
from conftest import inputs, load
from tiny_chat import save_tiny_chat

import hf_lowbit.calibration as calibration
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration, LayerHook, Moments, Planned, Solution, calibrate
from hf_lowbit.calibration.blocks import Blocks
from hf_lowbit.convert import open_source
from hf_lowbit.methods import make_method
from hf_lowbit.quantizer import quantize_weight

CONFIG = LowBitConfig(bits=2, embeddings="float")
DECODERS = ["llama", "llama-tied", "gpt2", "qwen3", "qwen3-moe", "gemma3"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """One token a byte."""
    return transformers.AutoTokenizer.from_pretrained(save_tiny_chat(tmp_path_factory.mktemp("chat")))


def windows(count=6, length=12, seed=0):
    return torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(seed))


def source(tiny, name="llama", config=CONFIG):
    return open_source(Path(tiny(name)), config, None)


@dataclass
class Plain(LayerHook):
    """Rounds, and remembers what it was given."""

    activations: ClassVar[str] = "quantized"

    def __post_init__(self):
        self.seen, self.blocks = {}, []

    def solve(self, block):
        self.blocks.append((block.name, block.inputs.clone(), block.groups()))
        super().solve(block)

    def solve_layer(self, layer, moments, generator):
        self.seen[layer.name] = moments
        return Solution(quantize_weight(layer.weight, layer.planned, layer.name))


# -- the text ----------------------------------------------------------------------------------------------------------


def test_all_kinds_of_text_give_the_same_windows(tokenizer, tmp_path):
    documents = [f"Document {i} speaks of the number {i * i}." for i in range(40)]
    ids = [tokenizer(d)["input_ids"] for d in documents]
    (tmp_path / "plain.txt").write_text("\n\n".join(documents))
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    (tmp_path / "records.jsonl").write_text(lines)
    expected = Calibration(documents, 5, 32).tokens(tokenizer)
    assert expected.shape == (5, 32) and expected.dtype == torch.int64
    for kind in (
        tuple(documents),
        iter(documents),
        ids,
        [torch.tensor(i) for i in ids],
        [np.array(i) for i in ids],
        [{"text": d} for d in documents],
        tmp_path / "records.jsonl",
        str(tmp_path / "records.jsonl"),
    ):
        assert torch.equal(Calibration(kind, 5, 32).tokens(tokenizer), expected)
    # In a text file a document ends with its line; nothing else differs.
    plain = tokenizer.decode(Calibration(tmp_path / "plain.txt", 2000, 2).tokens(tokenizer).flatten())
    assert plain.count("Document") == 40 and plain.count("</s>") == 39


def test_a_data_set_is_read_as_a_stream(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    documents = [f"Document {i} speaks of the number {i * i}." for i in range(40)]
    for name, texts in (("all", documents), ("few", documents[:9])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    expected = Calibration(documents, 5, 32).tokens(tokenizer)
    folder = Calibration(str(tmp_path / "all"), 5, 32)
    assert torch.equal(folder.tokens(tokenizer), expected)
    record = folder.record(expected)
    assert record["kind"] == "data set" and "name" not in record  # nobody else has that folder

    found, load = [], datasets.load_dataset

    def by_name(path, config, **options):
        found.append((path, config))
        return load(str(tmp_path / config), **options)

    monkeypatch.setattr(datasets, "load_dataset", by_name)
    named = Calibration("org/texts:few", 1, 32)
    assert torch.equal(named.tokens(tokenizer), Calibration(documents[:9], 1, 32).tokens(tokenizer))
    assert found == [("org/texts", "few")] and named.record(expected)["name"] == "org/texts:few"


def test_the_seed_chooses_windows(tokenizer):
    text = ["The quick brown fox jumps over the lazy dog. " * 20] * 5
    choices = [Calibration(text, 6, 16, seed=s).tokens(tokenizer) for s in (0, 0, 1)]
    assert torch.equal(choices[0], choices[1]) and not torch.equal(choices[0], choices[2])
    everything = Calibration(text, 1000, 16).tokens(tokenizer)
    assert all((everything == w).all(1).any() for w in choices[2])


def test_chats_go_through_the_template(tokenizer):
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    found = tokenizer.decode(Calibration(chat * 4, 1000, 8).tokens(tokenizer).flatten())
    assert "user: Hi" in found and "assistant: Hello" in found
    asked = tokenizer.decode(Calibration(["Hi"] * 9, 1, 64, chat_template=True).tokens(tokenizer).flatten())
    assert asked.startswith("<s>user: Hi</s>")


BAD_TEXT = {
    "nothing": ([], {}, r"calibration text is empty: a list of 0 gave no tokens"),
    "empty strings": (["", ""], {}, r"calibration text is empty: a list of 2 gave no tokens"),
    "too short": (["abc"], {}, r"too short: a list of 1 gave 3 tokens, fewer than one window of length=512"),
    "a number": (7, {}, r"cannot be read from a int: give strings, token ids, a file or the name of a data set"),
    "numbers": ([0.5, 0.25], {}, r"a calibration document is a float: give strings, lists of token ids"),
    "record": ([{"body": "x"}], {}, r"record has the fields body, none of text, messages"),
    "no file": (Path("nowhere.txt"), {}, r"calibration file nowhere.txt does not exist"),
    "no data set": ("no/such-data-set", {}, r"'no/such-data-set' is neither a file nor a data set that can be read"),
    "one string": ("One text. " * 40, {}, r"one string, 'One text.* for text, give a list of it, calibration=\[text\]"),
    "two lines": ("One\ntext", {}, r"one string, 'One.ntext'"),
    "a folder": (Path(__file__).parent, {}, r"calibration file .*tests is a folder: give a file in it"),
    "no windows": (["abc"], {"windows": 0}, r"windows=0 of length=512: use at least 1 of at least 2 tokens"),
    "length 1": (["abc"], {"length": 1}, r"windows=128 of length=1: use at least 1"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(case, tokenizer):
    text, options, message = BAD_TEXT[case]
    with pytest.raises(ValueError, match=message):
        Calibration(text, **options).tokens(tokenizer)


def test_bad_lines_and_missing_tokenizer(tokenizer, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2, is not JSON"):
        Calibration(tmp_path / "broken.jsonl").tokens(tokenizer)
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not text in UTF-8"):
        Calibration(tmp_path / "latin.txt").tokens(tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer: give tokenizer=, or token ids"):
        Calibration(["text"]).tokens()
    assert Calibration([[5, 6, 7, 8]], 2, 2).tokens().tolist() == [[5, 6], [7, 8]]
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no chat template: give plain text"):
        Calibration(["text"], chat_template=True).tokens(plain)


# -- moments -----------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_tokens_at_once():
    x, r = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(0)).double().unbind()
    moments = Moments(16, cross=True)
    for a, b in zip(x, r, strict=True):
        moments.add(a, b)
    x, r = x.reshape(-1, 16), r.reshape(-1, 16)
    assert moments.tokens == 35
    for found, exact in ((moments.square, x.T @ x), (moments.cross, r.T @ x)):
        torch.testing.assert_close(found, (exact / 35).float())
    W, V = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).unbind()
    assert moments.output_error(W, V) == pytest.approx(float((x @ (V - W).double().T).square().sum() / 35), rel=1e-5)


def test_no_tokens_count_as_white_inputs():
    assert torch.equal(Moments(4).damped(0.01), torch.eye(4))


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_compute_what_the_model_computes(name, tiny):
    model, tokens = load(name, tiny(name)).eval(), inputs(name)["input_ids"]
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    blocks = Blocks(source(tiny, name))
    hidden, arguments = blocks.capture(tokens)
    assert len(blocks.names) == len(expected) - 1
    for i in range(len(blocks.names)):
        torch.testing.assert_close(hidden, expected[i])
        block = blocks.read(i)
        with torch.no_grad():
            rows = [arguments[i].run(block, hidden[w], w) for w in arguments[i].batches(2)]
        hidden = torch.cat(rows)
    last = model.get_decoder().norm if hasattr(model.get_decoder(), "norm") else model.get_decoder().ln_f
    with torch.no_grad():
        torch.testing.assert_close(last(hidden), expected[-1])


def test_nothing_packed_in_the_blocks(tiny):
    config = LowBitConfig(bits=4, rules={".*layers.*": None, ".*lm_head": {"bits": 4}})
    with pytest.raises(ValueError, match=r"nothing is packed in the blocks model.layers.0 to model.layers.1"):
        Blocks(source(tiny, "llama", config))


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {r".*(embed_tokens|wte)": {"bits": 4}}], ids=["", "embedding"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hooks_see_the_inputs_of_the_quantized_model(name, rules, tiny, tmp_path):
    hook, tokens = Plain(), windows()
    config = LowBitConfig(bits=2, rules={**rules, r".*(embed_tokens|wte|lm_head)": None})
    calibrate(source(tiny, name, config), tmp_path / "work", hook, tokens, {})
    packed = load(name, tiny(name), quantization_config=config).eval()
    caught = {}
    for layer in hook.seen:
        module = packed.get_submodule(layer)
        module.register_forward_pre_hook(lambda _, args, layer=layer: caught.update({layer: args[0]}))
    with torch.no_grad():
        expected = packed(tokens, output_hidden_states=True, use_cache=False).hidden_states
    for (_, hidden, _), state in zip(hook.blocks, expected, strict=False):
        torch.testing.assert_close(hidden, state, rtol=1e-4, atol=1e-4)
    for layer, moments in hook.seen.items():
        x = caught[layer].reshape(-1, caught[layer].shape[-1])
        assert moments.tokens == len(x) == tokens.numel()
        torch.testing.assert_close(moments.square, x.T @ x / len(x), rtol=1e-3, atol=1e-3)


def test_the_float_activations_are_those_of_the_float_embedding(tiny, tmp_path):
    class Both(Plain):
        activations = "both"

        def solve(self, block):
            self.reference = self.__dict__.get("reference", block.reference_inputs.clone())
            super().solve(block)

    hook, tokens = Both(), windows()
    config = LowBitConfig(bits=2, rules={".*embed_tokens": {"bits": 2}})
    calibrate(source(tiny, "llama", config), tmp_path / "work", hook, tokens, {})
    with torch.no_grad():
        expected = load("llama", tiny("llama")).get_input_embeddings()(tokens)
    assert torch.equal(hook.reference, expected)
    assert not torch.allclose(hook.blocks[0][1], expected, atol=1e-2 * float(expected.abs().max()))


def test_query_key_and_value_share_their_moments(tiny, tmp_path):
    hook = Plain()
    calibrate(source(tiny), tmp_path / "work", hook, windows(), {})
    qkv, up = [f"self_attn.{n}_proj" for n in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
    assert hook.blocks[0][2] == [qkv, ["self_attn.o_proj"], up, ["mlp.down_proj"]]
    first = [hook.seen[f"model.layers.0.{n}"] for n in qkv]
    assert first[0] is first[1] is first[2]


def test_one_float_block_is_alive(tiny, tmp_path, monkeypatch):
    alive, read = [], Blocks.read

    def watched(self, index):
        gc.collect()
        assert not [r for r in alive if r() is not None], f"an earlier block is alive when block {index} is read"
        block = read(self, index)
        alive.extend(weakref.ref(p) for p in block.parameters())
        return block

    monkeypatch.setattr(Blocks, "read", watched)
    calibrate(source(tiny), tmp_path / "work", Plain(), windows(), {})
    assert len(alive) == 2 * 9  # two blocks of seven linear layers and two norms


def test_a_stopped_run_goes_on(tiny, tmp_path):
    whole = calibrate(source(tiny), tmp_path / "whole", Plain(), windows(), {})

    class Stops(Plain):
        def solve(self, block):
            if block.index == 1:
                raise KeyboardInterrupt
            super().solve(block)

    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        calibrate(source(tiny), work, Stops(), windows(), {})
    second = Plain()
    run = calibrate(source(tiny), work, second, windows(), {})
    assert [name for name, _, _ in second.blocks] == ["model.layers.1"]
    for index in (0, 1):
        assert run.path(index).read_bytes() == whole.path(index).read_bytes()


def test_other_settings_are_refused(tiny, tmp_path):
    work = tmp_path / "work"
    calibrate(source(tiny), work, Plain(), windows(), {"rank": 4})
    with pytest.raises(ValueError, match=r"begun with another source or other settings: rank \(4 then, 8 now\)"):
        calibrate(source(tiny), work, Plain(), windows(), {"rank": 8})
    with pytest.raises(ValueError, match=r"other settings: calibration \('.*' then, '.*' now\)"):
        calibrate(source(tiny), work, Plain(), windows(seed=1), {"rank": 4})
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is in the way"):
        calibrate(source(tiny), other, Plain(), windows(), {})


def test_a_damaged_block_is_named(tiny, tmp_path):
    from safetensors.torch import save_file

    run = calibrate(source(tiny), tmp_path / "work", Plain(), windows(), {})
    save_file({"model.layers.1.self_attn.q_proj.weight": torch.zeros(3)}, run.path(1))
    with pytest.raises(ValueError, match=r"block-00001.safetensors is damaged at model.layers.1.self_attn.q_proj"):
        list(run.solutions())


def test_bad_windows(tiny, tmp_path):
    with pytest.raises(ValueError, match="Plain needs calibration data: give calibration="):
        calibrate(source(tiny), tmp_path / "work", Plain(), None, {})
    with pytest.raises(ValueError, match=r"windows of 200 tokens are longer than the model's 128 positions"):
        calibrate(source(tiny), tmp_path / "work", Plain(), windows(1, 200), {})
    with pytest.raises(ValueError, match=r"tokens go from 4 to 999, the model's vocabulary from 0 to 159"):
        calibrate(source(tiny), tmp_path / "work", Plain(), torch.tensor([[4, 999]]), {})
    assert not (tmp_path / "work").exists()


def test_overflow_is_named(tiny, tmp_path):
    model = load("llama", tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e30)
    model.save_pretrained(tmp_path / "huge")
    with pytest.raises(ValueError, match=r"the activations after model.layers.1 are not finite: the model is damaged"):
        calibrate(open_source(tmp_path / "huge", CONFIG, None), tmp_path / "work", Plain(), windows(), {})


def test_public_names():
    assert all(hasattr(calibration, name) for name in calibration.__all__)


# -- methods by the plan -----------------------------------------------------------------------------------------------


def run_planned(tiny, tmp_path, config, name="llama", tokens=None):
    return calibrate(source(tiny, name, config), tmp_path / "run", Planned(), tokens or windows(40, 48), {})


def test_each_layer_is_solved_by_the_method_that_its_rule_names(tiny, tmp_path):
    config = LowBitConfig(bits=3, method="gptq", rules={r".*down_proj": {"method": "rtn"}}, embeddings="float")
    found = dict(run_planned(tiny, tmp_path, config).solutions())
    for name, packed in source(tiny, config=config).plan.packed.items():
        assert packed.method.name == ("rtn" if "down_proj" in name else "gptq")
        assert found[name].tokens == (None if "down_proj" in name else 40 * 48)
    # The first layer's inputs are the float model's.
    name, model = "model.layers.0.self_attn.q_proj", load("llama", tiny("llama"))
    seen = Moments(model.config.hidden_size)
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.add(args[0]))
    with torch.no_grad():
        model(windows(40, 48))
    hook.remove()
    planned = source(tiny, config=config).plan.packed[name]
    weight = model.get_submodule(name).weight.detach()
    rounded = quantize_weight(weight, dataclasses.replace(planned, method=make_method("rtn")), name)
    errors = [
        seen.output_error(weight, planned.format.dequantize(t, planned.shape)) for t in (found[name].tensors, rounded)
    ]
    assert errors[0] < errors[1]


def test_a_layer_that_never_ran_is_refused(tiny, tmp_path, monkeypatch):
    config = LowBitConfig(bits=3, method="gptq", embeddings="float")
    monkeypatch.setattr(calibration.pipeline.Block, "_input_of", lambda *_: None)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj never saw a token of the calibration"):
        run_planned(tiny, tmp_path, config)
