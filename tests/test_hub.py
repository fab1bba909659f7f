"""Publishing: over HTTP to a local server that speaks the Hub's API, and back into a fresh process."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import load, make_tiny
from hub_server import HubServer
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lowbit import LowBitConfig
from hf_lowbit.card import PLACEHOLDER
from hf_lowbit.evaluate import Evaluation
from hf_lowbit.formats import parse_format
from hf_lowbit.hub import content_hash, push_to_hub, write_model_card
from hf_lowbit.storage import content

RULES = {r".*\.(q|k)_proj": {"bits": 6}, "lm_head": {"bits": 8}}
EVALUATION = Evaluation(12.5, 0.25, tokens=630, windows=10, kl=0.125, kl_se=0.01, top1=0.75, top1_se=0.02)


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """A tiny Llama in mixed widths, in three shards."""
    folder = tmp_path_factory.mktemp("packed")
    config = LowBitConfig(bits=3, group_size=32, rules=RULES, embeddings="float")
    load("llama", tiny("llama"), quantization_config=config).save_pretrained(folder, max_shard_size="25KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture
def server(monkeypatch):
    """A local Hub that this process talks to."""
    with HubServer() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        downloads = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", downloads)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "x")
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


def merge(source: Path, target: Path) -> Path:
    """The same repo in a single file."""
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors.update(load_file(file))
    target.mkdir()
    save_file(dict(reversed(tensors.items())), target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", target)
    return target


# -- content hash ------------------------------------------------------------------------------------------------------


def test_content_hash_is_what_the_docstring_says(packed):
    digest, tensors = hashlib.sha256(), {}
    for file in packed.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensors[name] = (handle.get_slice(name).get_dtype(), handle.get_tensor(name))
    for name, (dtype, tensor) in sorted(tensors.items()):
        digest.update(json.dumps([name, dtype, list(tensor.shape)], separators=(",", ":")).encode() + b"\n")
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert content_hash(packed) == digest.hexdigest()


def test_content_hash_does_not_depend_on_shards_or_chunks(packed, tmp_path, monkeypatch):
    whole = content_hash(packed)
    assert content_hash(merge(packed, tmp_path / "merged")) == whole
    monkeypatch.setattr(content, "CHUNK_BYTES", 7)
    assert content_hash(packed) == whole


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_content_hash_sees_every_change(packed, tmp_path, change):
    before = content_hash(packed)
    file = merge(packed, tmp_path / "merged") / "model.safetensors"
    tensors = load_file(file)
    name = "model.norm.weight"
    tensor = tensors.pop(name)
    assert tensor.dtype == torch.float32
    if change == "value":
        tensor.view(torch.int32)[-1] ^= 1
    if change == "dtype":
        tensor = tensor.view(torch.int32)
    if change == "shape":
        tensor = tensor[None]
    tensors["renamed" if change == "name" else name] = tensor
    save_file(tensors, file)
    assert content_hash(file.parent) != before


# -- the card ----------------------------------------------------------------------------------------------------------


def test_card_says_what_the_folder_holds(copy):
    write_model_card(copy, base_model=None)
    card = ModelCard.load(copy / "README.md")
    data = card.data.to_dict()
    assert data == {
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lowbit", "3-bit", "6-bit", "8-bit"],
    }
    # Sizes are compared with sums over the files, not with what the card was made from.
    tensors = {k: v for file in copy.glob("*.safetensors") for k, v in load_file(file).items()}
    stored = sum(t.nbytes for t in tensors.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    memory = sum(p.nbytes for p in model.parameters())
    weights = sum(p.numel() for p in model.dequantize().parameters())
    row = f"| all | {weights:,} | {stored / 1e6:.3f} | {8 * stored / weights:.3f} "
    assert row + f"| {memory / 1e6:.3f} | {8 * memory / weights:.3f} |" in card.text
    assert "Both are equal" in card.text
    spec = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"]["model.layers.*.mlp.up_proj"]
    bits = parse_format(spec).bits_per_weight((144, 64))
    assert f"| `model.layers.*.mlp.up_proj` | 2 | `{spec}` | {bits:.3f} |" in card.text
    assert "| `model.embed_tokens.weight` | 0.041 | embeddings='float' |" in card.text
    settings = json.loads(card.text.split("```json\n")[1].split("```")[0])
    saved = json.loads((copy / "config.json").read_text())["quantization_config"]
    assert settings.pop("method_options") == {"range": "weighted"}  # defaults are spelled out
    assert settings == {k: v for k, v in saved.items() if k not in ("layers", "quant_method", "version")}
    assert settings["group_size"] == 32 and "q|k" in json.dumps(settings["rules"])
    assert "The quality of these weights was not measured." in card.text
    assert content_hash(copy) in card.text
    assert f"torch {torch.__version__}" in card.text and "was not recorded" in card.text
    assert "AutoModelForCausalLM.from_pretrained(" in card.text
    assert not list(copy.glob("*.unfinished"))


@pytest.mark.parametrize("form", ["object", "dict"])
def test_card_states_what_was_measured(copy, form):
    evaluation = EVALUATION if form == "object" else {**EVALUATION.to_dict(), "text": "the test text"}
    card = write_model_card(copy, evaluation=evaluation)
    assert "| perplexity | 12.5 ± 0.25 |" in card.text and "nats per token | 0.125 ± 0.01 |" in card.text
    assert "630 predictions in 10 fixed,\nnon-overlapping windows of 64 tokens" in card.text
    text = "the test text" if form == "dict" else "a text whose name was not recorded"
    assert f"Measured on {text}:" in card.text
    results = ModelCard.load(copy / "README.md").data.eval_results
    assert {r.metric_type: r.metric_value for r in results} == {"perplexity": 12.5, "kl": 0.125, "top1": 0.75}
    assert {r.dataset_name for r in results} == {text}


def test_card_without_reference_has_only_perplexity(copy):
    card = write_model_card(copy, evaluation=Evaluation(12.5, float("nan"), tokens=63, windows=1))
    assert "| perplexity | 12.5 |" in card.text and "KL divergence" not in card.text


def test_card_takes_the_license_of_the_base_folder_and_keeps_it(copy, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Base\n")
    first = write_model_card(copy, base_model=str(base))
    assert (first.data.license, first.data.license_name, first.data.license_link) == ("other", "own", "LICENSE")
    assert first.data.base_model is None and str(base) not in str(first)
    assert write_model_card(copy).data.license == "other"


def test_card_of_another_task(tiny, tmp_path):
    load("vit", tiny("vit"), quantization_config=LowBitConfig(bits=4)).save_pretrained(tmp_path)
    card = write_model_card(tmp_path)
    assert card.data.pipeline_tag == "image-classification"
    assert "AutoModelForImageClassification.from_pretrained(" in card.text


def test_card_of_tied_weights_counts_them_once(tiny, tmp_path):
    config = LowBitConfig(bits=4, rules={"lm_head": {"bits": 6}})
    model = load("llama-tied", tiny("llama-tied"), quantization_config=config)
    model.save_pretrained(tmp_path)
    weights = sum(p.numel() for p in load("llama-tied", tiny("llama-tied")).parameters())
    assert f"| all | {weights:,} |" in write_model_card(tmp_path).text


# -- errors before anything is sent ------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    shards = sorted(folder.glob("*.safetensors"))
    content, settings = json.loads(index.read_text()), json.loads(config.read_text())
    if how == "lost shard":
        shards[1].unlink()
    if how == "truncated shard":
        os.truncate(shards[1], shards[1].stat().st_size - 5)
    if how == "lost index":
        index.unlink()
    if how == "index without map":
        index.write_text("{}")
    if how == "index not JSON":
        index.write_text("{")
    if how == "path in index":
        content["weight_map"]["x"] = "../x.safetensors"
    if how == "tensor not in shard":
        content["weight_map"]["x"] = shards[0].name
    if how == "tensor in another shard":
        content["weight_map"]["model.norm.weight"] = shards[0].name
    if how == "both":
        shutil.copy(shards[0], folder / "model.safetensors")
    if how == "no config":
        config.unlink()
    if how == "not packed":
        del settings["quantization_config"]
    if how == "other method":
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    if how == "other class":
        settings.update(architectures=["OwnForCausalLM"], model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    if how == "other shape":
        settings["intermediate_size"] = 128
    if index.exists() and not how.startswith("index"):
        index.write_text(json.dumps(content))
    if config.exists():
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lost shard", "model-00002-of-0.* is missing: model.safetensors.index.json lists it"),
        ("truncated shard", "model-00002-of-0.* cannot be read .* truncated or damaged"),
        ("lost index", "neither model.safetensors nor model.safetensors.index.json"),
        ("index without map", "has no 'weight_map'"),
        ("index not JSON", "index.json is not JSON"),
        ("path in index", "'../x.safetensors', which is not a safetensors file of this folder"),
        ("tensor not in shard", "model-00001-of-0.* does not hold x"),
        ("tensor in another shard", "holds model.norm.weight, which .* places in model-00001"),
        ("both", "holds both model.safetensors and model.safetensors.index.json"),
        ("no config", "has no config.json"),
        ("not packed", "is not packed by hf_lowbit, it is in float"),
        ("other method", "is not packed by hf_lowbit, it is quantized by 'gptq'"),
        ("other class", "cannot be checked without its model class: .* needs code of its own"),
        ("other shape", r"bytes of model.layers.0.mlp.gate_proj, and int:.* needs .* for \(128, 64\)"),
    ],
)
def test_incomplete_folders_are_refused_and_nothing_is_sent(copy, server, how, message):
    damage(copy, how)
    with pytest.raises(ValueError, match=message):
        push_to_hub(copy, "me/packed")
    assert server.log == []


def test_other_bad_arguments(copy, tiny, server):
    for repo_id in ("two/many/parts", "me/has space", "-me/x", ""):
        with pytest.raises(ValueError, match=f"repo_id='{repo_id}' is not the id of a repo"):
            push_to_hub(copy, repo_id)
    with pytest.raises(ValueError, match="base_model='/no/such/folder' is not the id of a repo"):
        push_to_hub(copy, "me/x", base_model="/no/such/folder")
    with pytest.raises(ValueError, match="the evaluation has no 'perplexity'"):
        push_to_hub(copy, "me/x", evaluation={"tokens": 3})
    with pytest.raises(ValueError, match="LlamaForCausalLM is not packed by hf_lowbit"):
        push_to_hub(load("llama", tiny("llama")), "me/x")
    with pytest.raises(ValueError, match="/nowhere is not a folder"):
        push_to_hub("/nowhere", "me/x")
    assert server.log == []


# -- the Hub -----------------------------------------------------------------------------------------------------------

PUSH = """
import sys, torch, hf_lowbit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
from hf_lowbit.hub import push_to_hub
from hf_lowbit.evaluate import Evaluation
source, out = sys.argv[1:]
config = hf_lowbit.LowBitConfig(bits=3, rules={"lm_head": {"bits": 6}})
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
evaluation = {**Evaluation(12.5, 0.25, tokens=630, windows=10).to_dict(), "text": "own words"}
info = push_to_hub(model, "me/packed", tokenizer=tokenizer, base_model="some/base", evaluation=evaluation)
torch.save(model(torch.arange(4, 20)[None]).logits, out)
print(info.oid)
"""

PULL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/packed")
assert AutoTokenizer.from_pretrained("me/packed")("b")["input_ids"] == [1]
torch.save(model(torch.arange(4, 20)[None]).logits, sys.argv[1])
from huggingface_hub import snapshot_download
print(snapshot_download("me/packed"))
"""


def test_push_and_download_in_fresh_processes(tiny, tmp_path, python):
    """Through HTTP and LFS, into a process that never imports this package: the same logits, bit for bit."""
    make_base = {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"}
    with HubServer() as hub:
        hub.repos["some/base"], hub.commits["some/base"] = make_base, []
        environment = {**hub.environment, "HF_HOME": str(tmp_path / "home")}
        pushed = python(_call(PUSH, tiny("llama"), tmp_path / "before.pt"), **environment)
        assert pushed.stdout.split()[-1] == hub.oid("me/packed")
        assert len(hub.commits["me/packed"]) == 1
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.repos["me/packed"])
        assert len(hub.objects) == 1, "weights go through LFS"
        pulled = python(_call(PULL, tmp_path / "after.pt"), **environment)
    assert "hf_lowbit" not in PULL
    before, after = torch.load(tmp_path / "before.pt"), torch.load(tmp_path / "after.pt")
    assert torch.equal(before, after)
    snapshot = pulled.stdout.split()[-1]
    card = ModelCard.load(Path(snapshot, "README.md"))
    assert content_hash(snapshot) in card.text
    assert 'from_pretrained("me/packed")' in card.text and PLACEHOLDER not in card.text
    assert card.data.base_model == "some/base" and card.data.base_model_relation == "quantized"
    assert card.data.license == "apache-2.0" and card.data.tags == ["lowbit", "3-bit", "6-bit", "8-bit"]
    assert card.data.eval_results[0].metric_value == 12.5 and card.data.eval_results[0].dataset_name == "own words"


def _call(code: str, *arguments) -> str:
    return f"import sys; sys.argv[1:] = {[str(a) for a in arguments]!r}\n" + code


def test_folder_is_pushed_as_it_is(copy, server):
    card = write_model_card(copy)
    (copy / "README.md").write_text(str(card) + "\nAdded by hand.\n")
    (copy / ".hidden").write_text("x")
    (copy / "model-00009-of-00009.safetensors.unfinished").write_text("x")
    files = {p.name: p.read_bytes() for p in copy.iterdir()}
    push_to_hub(copy, "packed", private=True, commit_message="own words")
    published = server.repos["me/packed"]
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == files
    assert set(published) == {n for n in files if n != ".hidden" and not n.endswith(".unfinished")}
    assert all(published[n] == files[n] for n in published if n != "README.md")
    assert "Added by hand." in published["README.md"].decode()
    assert 'from_pretrained("me/packed")' in published["README.md"].decode()
    assert server.private["me/packed"] == "private"
    assert [c["summary"] for c in server.commits["me/packed"]] == ["own words"]


def test_stale_card_is_replaced(copy, tiny, server):
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# The base model, with its own numbers\n")
    push_to_hub(copy, "me/packed")
    card = ModelCard(server.repos["me/packed"]["README.md"].decode())
    assert "its own numbers" not in card.text and content_hash(copy) in card.text and card.data.license == "mit"


def test_second_push_deletes_stale_weights_in_its_one_commit(copy, packed, server, tmp_path):
    push_to_hub(copy, "me/packed")
    server.repos["me/packed"]["adapter_model.safetensors"] = b"not ours"
    push_to_hub(merge(packed, tmp_path / "merged"), "me/packed")
    names = {n for n in server.repos["me/packed"] if "safetensors" in n}
    assert names == {"model.safetensors", "adapter_model.safetensors"}
    assert len(server.commits["me/packed"]) == 2


@pytest.mark.parametrize("route", ["create", "commit"])
@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "log in with `hf auth login`"), (403, "use one with write permission"), (500, "try again later")],
)
def test_errors_of_the_hub_say_what_to_do_and_publish_nothing(copy, server, route, status, hint):
    server.fail[route] = status
    with pytest.raises(HfHubHTTPError, match=rf"Nothing was published to (me/)?packed \(HTTP {status}\): .*{hint}"):
        push_to_hub(copy, "me/packed")
    assert not any(server.repos.values())


def test_wrong_token(copy, server):
    with pytest.raises(HfHubHTTPError, match=r"HTTP 401\): log in with"):
        push_to_hub(copy, "me/packed", token="wrong")
    assert server.repos == {}


def test_unreachable_base_card_is_a_warning(copy, server, caplog):
    transformers.utils.logging.enable_propagation()
    push_to_hub(copy, "me/packed", base_model="no/such")
    assert "the card of no/such cannot be read, so its license is not in the new one" in caplog.text
    card = ModelCard(server.repos["me/packed"]["README.md"].decode())
    assert card.data.base_model == "no/such" and card.data.license is None


def test_a_model_quantized_on_the_fly_names_what_it_was_loaded_from(tmp_path, server):
    base = make_tiny("llama", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    push_to_hub(load("llama", base, quantization_config=LowBitConfig(bits=4)), "me/packed")
    content = server.repos["me/packed"]["README.md"].decode()
    assert ModelCard(content).data.license == "mit" and str(tmp_path) not in content
