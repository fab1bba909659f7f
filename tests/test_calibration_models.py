"""Encoder-decoders, vision towers and models of both are calibrated through all of their blocks."""

import functools
import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import load
from safetensors.torch import load_file
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import LowBitConfig, cli
from hf_lowbit.calibration import Block, Calibration, Planned, calibrate
from hf_lowbit.calibration.blocks import Blocks
from hf_lowbit.calibration.samples import Samples
from hf_lowbit.calibration.stream import Stream
from hf_lowbit.convert import open_source

CONFIG = LowBitConfig(bits=3, method="gptq", embeddings="float")
_BART = {
    "vocab_size": 160, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def _clip(t):
    return t.CLIPConfig(text_config=conftest._TEXT, vision_config=conftest._VISION, projection_dim=32)


def _llava_2(t):
    config = conftest._llava()
    config.vision_feature_layer = -2  # the image is what the last layer but one gives
    return config


MORE = {
    "bart": ("AutoModelForSeq2SeqLM", lambda t: t.BartConfig(**_BART)),
    "clip": ("AutoModel", _clip),
    "swin": ("AutoModelForImageClassification", lambda t: t.SwinConfig(**_SWIN, num_labels=5)),
    "llava-2": ("AutoModelForImageTextToText", _llava_2),
    "albert": ("AutoModelForMaskedLM", lambda t: t.AlbertConfig(**conftest._BERT, embedding_size=32)),
}
NAMES = ["t5", "whisper", "vit", "llava", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bart", "clip", "swin"))]


@pytest.fixture(scope="module")
def any_tiny(tiny, tmp_path_factory):
    """As ``tiny``, with more models."""

    @functools.cache
    def folder(name):
        return tiny(name) if name not in MORE else str(conftest.make_tiny(name, tmp_path_factory.mktemp(name)))

    with pytest.MonkeyPatch.context() as patch:
        for name, made in MORE.items():
            patch.setitem(conftest.TINY, name, made)
        yield folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))


def calls(name, count=16, seed=0):
    """Inputs as a processor would return them."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        ids = torch.randint(4, 160, (1, 12), generator=generator)
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        found.append(
            {
                "t5": {"input_ids": ids, "decoder_input_ids": ids[:, :7]},
                "bart": {"input_ids": ids, "labels": ids[:, :7]},
                "whisper": {
                    "input_features": torch.randn(1, 16, 32, generator=generator), "decoder_input_ids": ids[:, :6],
                },
                "clip": {"input_ids": ids, "pixel_values": pixels},
                "llava": {"input_ids": torch.cat([torch.full((1, 16), 3), ids], 1), "pixel_values": pixels},
            }.get(name.removesuffix("-2"), {"pixel_values": pixels})
        )  # fmt: skip
    return found


@torch.no_grad()
def outputs(model, inputs):
    found = [model(**call) for call in inputs]
    return torch.cat(
        [torch.cat([o[k].flatten() for k in ("logits", "text_embeds", "image_embeds") if k in o]) for o in found]
    )


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# How many tokens the layers see: of the text or image, of the decoder, and in the decoder's part that looks back.
TOKENS = {
    "t5": {16 * 12, 16 * 7}, "bart": {16 * 12, 16 * 7}, "whisper": {16 * 16, 16 * 6}, "vit": {16 * 17},
    "clip": {16 * 12, 16 * 17}, "swin": {16 * 64, 16 * 16}, "llava": {16 * 17, 16 * 28},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_calibration_helps_models_of_every_kind(name, any_tiny, tmp_path):
    data, held_out, folder = Calibration(calls(name), 16), calls(name, 4, seed=9), any_tiny(name)
    repo = hf_lowbit.quantize(folder, CONFIG, output=tmp_path / "out", calibration=data)
    assert set(repo.tokens.values()) == TOKENS[name]
    model = repo.load()
    listed = [
        n for n, m in model.named_modules() if hasattr(m, "packed_shape") and any(p.isdigit() for p in n.split("."))
    ]
    assert set(repo.tokens) == set(listed)  # all that is in a list of blocks, on every side
    expected = outputs(load(name, folder), held_out)
    rounded = load(name, folder, quantization_config=LowBitConfig(bits=3, embeddings="float"))
    errors = [float((outputs(m, held_out) - expected).square().mean()) for m in (model, rounded)]
    assert errors[0] < 0.9 * errors[1]
    through = LowBitConfig(bits=3, method="gptq", embeddings="float", calibration=data)
    assert same(load(name, folder, quantization_config=through), model)
    record = model.config.quantization_config.calibration
    assert record["kind"] == "inputs" and record["windows"] == 16 and "sha256" in record


@pytest.mark.parametrize("name", ["t5", "swin", pytest.param("llava", marks=pytest.mark.slow)])
def test_blocks_of_every_kind_are_trained(name, any_tiny, tmp_path):
    config = LowBitConfig(bits=3, method="signround", method_options={"steps": 12}, embeddings="float")
    data, held_out, folder = calls(name), calls(name, 4, seed=9), any_tiny(name)
    model = load(name, hf_lowbit.quantize(folder, config, output=tmp_path / "out", calibration=data).folder)
    expected = outputs(load(name, folder), held_out)
    rounded = load(name, folder, quantization_config=LowBitConfig(bits=3, embeddings="float"))
    errors = [float((outputs(m, held_out) - expected).square().mean()) for m in (model, rounded)]
    assert errors[0] < 0.9 * errors[1]


def mixed(name):
    """Inputs of several lengths; for models of images and text, some without an image."""
    found = calls(name, 4)
    for call in found[1:2]:
        for key in {"input_ids", "decoder_input_ids"} & set(call):
            call[key] = torch.cat([call[key], call[key][:, -2:]], 1)
    if name.startswith("llava"):
        found.insert(2, {"input_ids": found[0]["input_ids"][:, 16:]})
    return found


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "swin", "llava", "llava-2"])
def test_blocks_see_what_they_see_in_the_model(name, any_tiny):
    samples = Samples([{k: v for k, v in call.items() if k != "labels"} for call in mixed(name)])
    model = load(name, any_tiny(name)).eval()
    blocks = Blocks(open_source(Path(any_tiny(name)), CONFIG, None), samples)
    caught: dict[str, list[torch.Tensor]] = {block: [] for block in blocks.names}
    for block in blocks.names:
        model.get_submodule(block).register_forward_pre_hook(lambda _, args, block=block: caught[block].append(args[0]))
    with torch.no_grad():
        for call in samples.calls:
            model(**call, **({"use_cache": False} if name in ("t5", "whisper", "llava", "llava-2") else {}))
    stream = Stream(blocks, samples, False, torch.empty)
    for i, block in enumerate(blocks.names):
        arguments = stream.enter(i)
        assert len(arguments.samples) == len(caught[block]) > 0
        for window, expected in enumerate(caught[block]):
            found = arguments.unfolded(stream.hidden[window : window + 1], window)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        stream.leave(i, Block(block, i, blocks.read(i), {}, stream.hidden, None, arguments, None, 2).advance()[0])
    assert len(blocks.order.rows) == {"whisper": 2, "t5": 2, "clip": 2, "swin": 2, "llava": 2, "llava-2": 2}[name]


@pytest.mark.parametrize("name, stopped", [("t5", "decoder.block.1"), ("llava", "model.language_model.layers.0")])
def test_a_stopped_run_goes_on(name, stopped, any_tiny, tmp_path):
    rules = {".*projector.*": None} if name == "llava" else {}
    config = LowBitConfig(bits=3, method="gptq", embeddings="float", rules=rules)
    samples, source = Samples(mixed(name)), functools.partial(open_source, Path(any_tiny(name)), config, None)
    whole = calibrate(source(), tmp_path / "whole", Planned(), samples, {})

    class Stops(Planned):
        def solve(self, block):
            if block.name == stopped:
                raise KeyboardInterrupt
            super().solve(block)

    with pytest.raises(KeyboardInterrupt):
        calibrate(source(), tmp_path / "work", Stops(), samples, {})
    run = calibrate(source(), tmp_path / "work", Planned(), samples, {})
    files = sorted(path.name for path in tmp_path.glob("whole/block-*"))
    assert len(files) == 4 and all((run.work / f).read_bytes() == (whole.work / f).read_bytes() for f in files)
    with pytest.raises(ValueError, match=r"other settings: calibration \('.*' then, '.*' now\)"):
        calibrate(source(), tmp_path / "work", Planned(), Samples(mixed(name)[:3]), {})


def test_an_encoder_decoder_reads_and_writes_the_same_text(any_tiny, tmp_path):
    text = Calibration([list(range(4, 100))], 6, 16)
    model = load("t5", any_tiny("t5"))
    samples = text.samples(model)
    for call in samples.calls:
        assert torch.equal(call["decoder_input_ids"][:, 1:], call["input_ids"][:, :-1])
        assert call["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id
    repo = hf_lowbit.quantize(any_tiny("t5"), CONFIG, output=tmp_path / "out", calibration=text)
    assert set(repo.tokens.values()) == {6 * 16}
    record = load("t5", repo.folder).config.quantization_config.calibration
    assert (record["windows"], record["length"]) == (6, 16)


@pytest.mark.parametrize("options", [{"bits": 2.6}, {"bits_stored": 3.0, "method": "gptq"}], ids=["budget", "rate"])
def test_what_needs_one_row_says_so(options, any_tiny, tmp_path):
    text = Calibration([list(range(4, 100))], 4, 16)
    with pytest.raises(
        ValueError, match=r"T5.* does something of its own before decoder.block.0: a search for bits, and"
    ):
        hf_lowbit.quantize(any_tiny("t5"), LowBitConfig(**options), output=tmp_path / "out", calibration=text)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_a_search_for_bits_wants_a_model_of_text(name, any_tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"takes (pixel_values|input_features), not text, and a search .* whole number"
    ):
        hf_lowbit.quantize(any_tiny(name), LowBitConfig(bits=2.6), output=tmp_path / "out", calibration=calls(name, 2))


def test_a_stored_rate_wants_a_model_of_text(any_tiny, tmp_path):
    config = LowBitConfig(method="gptq", bits_stored=3.0)
    with pytest.raises(ValueError, match=r"ViT.* is calibrated on dicts of inputs, and bits_stored= .* method 'ecsq'"):
        hf_lowbit.quantize(any_tiny("vit"), config, output=tmp_path / "out", calibration=calls("vit", 2))


def test_the_command_line_takes_a_file_of_inputs(any_tiny, tmp_path):
    """The same bits as the same calls in Python."""
    given, file = calls("vit", 2), tmp_path / "images.jsonl"
    file.write_text("".join(json.dumps({k: v.tolist() for k, v in call.items()}) + "\n" for call in given))
    arguments = ["quantize", any_tiny("vit"), str(tmp_path / "line"), "--calibration", str(file), "--bits", "3"]
    result = CliRunner().invoke(cli.app, [*arguments, "--method", "gptq", "--embeddings", "float"])
    assert result.exit_code == 0, result.output
    hf_lowbit.quantize(any_tiny("vit"), CONFIG, output=tmp_path / "python", calibration=given)
    line, python = (load_file(tmp_path / name / "model.safetensors") for name in ("line", "python"))
    assert line.keys() == python.keys() and all(torch.equal(line[k], python[k]) for k in line)


def test_inputs_may_lack_the_batch_and_be_lists(any_tiny):
    model, call = load("whisper", any_tiny("whisper")), calls("whisper", 1)[0]
    bare = {"input_features": call["input_features"][0].tolist(), "labels": [7, 8, -100], "path": "a.wav"}
    (found,) = Calibration([bare], 1).samples(model).calls
    assert torch.equal(found["input_features"], call["input_features"]) and set(found) == {*call}
    assert found["decoder_input_ids"].tolist() == [[model.config.decoder_start_token_id, 7, 8]]


BAD = {
    "vit": {
        "text": (["a text"], r"takes pixel_values, not text: in Python, .* on the command line, a \.jsonl file"),
        "ids": (
            [list(range(600))],
            "ViTForImageClassification takes pixel_values, not text: in Python, give calibration=",
        ),
        "no image": ([{"input_features": torch.zeros(1, 2, 2)}], "input 0 has input_features, but ViT.* needs pixel_v"),
        "one dict": ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "from a dict: give a list of such dicts"),
        "nothing": ([], "the calibration text is empty"),
        "then text": ([*calls("vit", 1), "text"], "calibration input 1 is a str, the first one was a dict"),
        "size": ([{"pixel_values": torch.zeros(1, 3, 8, 8)}], r"cannot be calibrated on pixel_values \(1, 3, 8, 8\)"),
    },
    "whisper": {"no decoder": ([{"input_features": torch.zeros(1, 16, 32)}], "and nothing for the decoder: give dec")},
    "clip": {"no image": (calls("t5", 2), "CLIPModel cannot be calibrated on .*also takes pixel_values")},
    "t5": {
        "ids": ([{"input_ids": torch.tensor([[999]])}], "tokens go from 999 to 999, the model's vocabulary from 0 to"),
        "few": ([[4, 5, 6]], "too short: a list of 1 gave 3 tokens, fewer than one window"),
    },
    "albert": {"again": ([{"input_ids": torch.ones(1, 9).long()}], "layer_groups.0 runs more than once for one input")},
}


@pytest.mark.parametrize("name, case", [(name, case) for name in BAD for case in BAD[name]])
def test_bad_inputs_are_refused(name, case, any_tiny, tmp_path):
    data, message = BAD[name][case]
    with pytest.raises(ValueError, match=message):
        hf_lowbit.quantize(any_tiny(name), CONFIG, output=tmp_path / "out", calibration=data)
    assert not (tmp_path / "out").exists()
