"""What every test shares: an offline environment, few threads, and tiny models of many architectures.

The models are random, made from configs, and saved once per session in float32 by the fixture ``tiny``, which is a
function: ``tiny("llama")`` is the folder of a model with ``config.json`` and ``model.safetensors``. Names and shapes
of weights are those of the real architectures; the sizes are just large enough that packing pays.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("HF_LOWBIT_BACKEND", None)
os.environ.pop("HF_LOWBIT_AUTOLOAD", None)

import functools
import subprocess
import sys

import pytest
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 160
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 144,  # not a multiple of the default group: the last group of a row is shorter
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_BERT = {**_TEXT, "type_vocab_size": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 16,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _llava():
    t = transformers
    vision, text = t.CLIPVisionConfig(**_VISION), t.LlamaConfig(**_TEXT)
    return t.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16, vision_feature_layer=-1
    )


# Architecture: the class to load it with, and its config.
TINY = {
    "llama": ("AutoModelForCausalLM", lambda t: t.LlamaConfig(**_TEXT, tie_word_embeddings=False)),
    "llama-tied": ("AutoModelForCausalLM", lambda t: t.LlamaConfig(**_TEXT, tie_word_embeddings=True)),
    "gpt2": (
        "AutoModelForCausalLM",
        lambda t: t.GPT2Config(
            vocab_size=VOCABULARY, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        ),
    ),
    "qwen3": ("AutoModelForCausalLM", lambda t: t.Qwen3Config(**_TEXT, tie_word_embeddings=False)),
    "qwen3-moe": (
        "AutoModelForCausalLM",
        lambda t: t.Qwen3MoeConfig(
            **_TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, tie_word_embeddings=False
        ),
    ),
    "gemma3": ("AutoModelForCausalLM", lambda t: t.Gemma3TextConfig(**_TEXT, query_pre_attn_scalar=16)),
    "t5": ("AutoModelForSeq2SeqLM", lambda t: t.T5Config(**_T5)),
    "t5-gated": ("AutoModelForSeq2SeqLM", lambda t: t.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "vit": ("AutoModelForImageClassification", lambda t: t.ViTConfig(**_VISION, num_labels=5)),
    "bert": ("AutoModelForSequenceClassification", lambda t: t.BertConfig(**_BERT, num_labels=3)),
    "bert-mlm": ("AutoModelForMaskedLM", lambda t: t.BertConfig(**_BERT)),
    "whisper": ("AutoModelForSpeechSeq2Seq", lambda t: t.WhisperConfig(**_WHISPER)),
    "llava": ("AutoModelForImageTextToText", lambda t: _llava()),
}


def make_tiny(name: str, folder, seed: int = 0):
    """Saves the tiny model ``name`` in float32 to ``folder`` and returns it."""
    auto, config = TINY[name]
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model = getattr(transformers, auto).from_config(config(transformers)).eval()
        # Random initialisation is too small to matter in most of these: give every matrix unit gain.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(name)``: the folder of a tiny float model; see :data:`TINY`. It must not be changed."""

    @functools.cache
    def folder(name: str) -> str:
        return str(make_tiny(name, tmp_path_factory.mktemp(name)))

    return folder


def auto_class(name: str):
    """The class that loads the tiny model ``name``."""
    return getattr(transformers, TINY[name][0])


def load(name: str, folder, **kwargs):
    """The tiny model ``name``, or a packed form of it, from ``folder``."""
    return auto_class(name).from_pretrained(folder, **kwargs)


def inputs(name: str, batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Inputs for the tiny model ``name``, the same every time."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "whisper":
        return {
            "input_features": torch.randn(batch, 16, 32, generator=generator),
            "decoder_input_ids": tokens[:, :6],
        }
    if name == "llava":
        return {"input_ids": torch.cat([torch.full((batch, 16), 3), tokens], 1), "pixel_values": pixels}
    if name.startswith("t5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
    return {"input_ids": tokens}


@torch.no_grad()
def logits(model, name: str) -> torch.Tensor:
    """Output of ``model`` for :func:`inputs`."""
    return model(**inputs(name)).logits


@pytest.fixture
def python():
    """``python(code, **environment)``: runs ``code`` in a fresh interpreter, without warnings of ours in the way."""

    def run(code: str, check: bool = True, timeout: float = 120, **environment: str):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)
        if check:
            assert result.returncode == 0, result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="module")
def varied(request, tmp_path_factory):
    """As ``tiny``, and those in ``MORE`` of the module, with norms and biases that are not 1 and 0."""

    @functools.cache
    def folder(name):
        path = make_tiny(name, tmp_path_factory.mktemp(name))
        model = load(name, path)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(path)
        return str(path)

    with pytest.MonkeyPatch.context() as patch:
        for name, made in request.module.MORE.items():
            patch.setitem(TINY, name, made)
        yield folder
