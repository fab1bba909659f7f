"""One embedding under several names, as encoder-decoders have it: nothing of it is missing, however it is loaded."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_lowbit import LowBitConfig, LowBitEmbedding
from hf_lowbit.convert import quantize_folder

T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
SIDES = ("encoder", "decoder")
BART = {"d_model": 64, "vocab_size": 96, "max_position_embeddings": 32} | {
    f"{side}_{what}": value
    for side in SIDES
    for what, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 128}.items()
}
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)),
}
IDS = torch.arange(4, 24).reshape(2, 10)


def load(folder, **options):
    """The model, after a look at what transformers says of its load."""
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_missing_or_unexpected(name, dtype, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().to(dtype).save_pretrained(tmp_path / "float")
    config = LowBitConfig(bits=4, method="rtn")
    model = load(tmp_path / "float", quantization_config=config, dtype=dtype)
    shared = model.get_input_embeddings()
    sides = [side.embed_tokens for side in (model.get_encoder(), model.get_decoder())]
    assert model.dtype == dtype
    for side in sides:
        assert isinstance(side, LowBitEmbedding)
        assert all(getattr(side, n) is p for n, p in shared.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    quantize_folder(tmp_path / "float", tmp_path / "converted", config, progress=False)
    for folder in ("saved", "converted"):
        assert torch.equal(logits(load(tmp_path / folder, dtype=dtype)), logits(model))
    # The empty tensors that say a dtype may also be there once, under the name of the embedding that is stored.
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    likes = [n for n in tensors if n.endswith(".weight_like")]
    for side in [n for n in likes if "embed_tokens" in n]:
        del tensors[side]
    assert len([n for n in tensors if n.endswith(".weight_like")]) == 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(load(tmp_path / "saved", dtype=dtype)), logits(model))
