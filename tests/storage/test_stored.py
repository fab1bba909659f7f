"""Coded repos: they load to the same bits as raw ones, are made in every way, and say what is wrong with them."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import load, logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_lowbit import LowBitConfig
from hf_lowbit.cli import app
from hf_lowbit.compress import compress_folder
from hf_lowbit.convert import quantize_folder
from hf_lowbit.inspection import inspect_repo
from hf_lowbit.storage import content, entropy, recode, stored

NAME = "llama"
KINDS = {
    "int4": {"bits": 4},
    "int3, float embeddings": {"bits": 3, "embeddings": "float"},
    "int3 symmetric": {"bits": 3, "symmetric": True, "group_size": "row", "embeddings": "float"},
    "nf4": {"bits": 4, "format": "nf", "embeddings": "float"},
    "ecsq": {"bits_stored": 2.5},
}

FLOAT_ENDS = {"bits_stored": 2.5, "embeddings": "float"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """So that tensors of tiny models are coded."""
    monkeypatch.setattr(stored, "LEAST_BYTES", 256)


@pytest.fixture
def raw(tiny, tmp_path):
    """A packed repo in bfloat16, in several files."""
    model = load(NAME, tiny(NAME), quantization_config=LowBitConfig(**FLOAT_ENDS), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "raw", max_shard_size="30KB")
    return tmp_path / "raw"


@pytest.fixture
def coded(raw, tmp_path):
    compress_folder(raw, tmp_path / "coded", progress=False)
    return tmp_path / "coded"


def tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        t.dtype == second[k].dtype and torch.equal(t, second[k]) for k, t in first.items()
    )


@pytest.mark.parametrize("storage", ["entropy", "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_coded_loads_to_the_same_model(kind, storage, tiny, tmp_path):
    config = LowBitConfig(**KINDS[kind], storage=storage)
    model = load(NAME, tiny(NAME), quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "coded", max_shard_size="30KB")
    files = tensors(tmp_path / "coded")
    assert any(entropy.is_coded(t) for t in files.values()), "nothing was coded"
    saved = json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]
    assert saved["storage"] == storage
    again = load(NAME, tmp_path / "coded")
    assert same(model.state_dict(), again.state_dict())
    assert torch.equal(logits(again, NAME), logits(model, NAME))
    again.save_pretrained(tmp_path / "again", max_shard_size="30KB")  # as it was
    assert same(files, tensors(tmp_path / "again"))


def test_another_storage_when_loading(coded, raw, tmp_path):
    model = load(NAME, coded, quantization_config=LowBitConfig(storage="raw"))
    model.save_pretrained(tmp_path / "decoded", max_shard_size="30KB")
    assert same(tensors(tmp_path / "decoded"), tensors(raw))
    assert "storage" not in json.loads((tmp_path / "decoded" / "config.json").read_text())["quantization_config"]


def test_kept_bfloat16_is_coded_and_bit_identical(tiny, tmp_path):
    config = LowBitConfig(bits=4, embeddings="float", storage="entropy")
    model = load(NAME, tiny(NAME), quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    name = "model.embed_tokens.weight"
    found = tensors(tmp_path)[name]
    assert entropy.is_coded(found) and found.nbytes < 0.75 * model.state_dict()[name].nbytes
    assert torch.equal(load(NAME, tmp_path).state_dict()[name], model.state_dict()[name])
    as_float32 = load(NAME, tmp_path, dtype=torch.float32).state_dict()[name]  # decoded, then cast like a raw one
    assert torch.equal(as_float32, model.state_dict()[name].float())


@pytest.mark.parametrize("storage", ["entropy", "zstd"])
def test_compress_and_decompress_lose_nothing(storage, raw, tmp_path):
    result = compress_folder(raw, tmp_path / "coded", storage, progress=False)
    assert result["bytes_after"] == sum(f.stat().st_size for f in (tmp_path / "coded").glob("*.safetensors"))
    assert result["bytes_after"] < result["bytes_before"]
    compress_folder(tmp_path / "coded", tmp_path / "back", "raw", progress=False)
    assert content.content_hash(tmp_path / "back") == content.content_hash(raw)
    config = [json.loads((folder / "config.json").read_text()) for folder in (raw, tmp_path / "back")]
    assert config[0] == config[1]
    assert {p.name for p in raw.iterdir()} == {p.name for p in (tmp_path / "coded").iterdir()}
    index = json.loads((tmp_path / "coded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result["bytes_after"]
    compress_folder(tmp_path / "coded", tmp_path / "other", "entropy", progress=False)  # from any to any
    assert torch.equal(logits(load(NAME, tmp_path / "other"), NAME), logits(load(NAME, raw), NAME))


@pytest.mark.parametrize("storage", ["entropy", "zstd"])
def test_a_repo_that_cannot_be_compressed_grows_by_no_more_than_a_thousandth(storage, tiny, tmp_path):
    """Codes of one bit are signs, one as likely as the other."""
    options = {"bits": 1, "method": "rtn", "symmetric": True, "embeddings": "float"}
    quantize_folder(tiny(NAME), tmp_path / "raw", LowBitConfig(**options), progress=False)
    result = compress_folder(tmp_path / "raw", tmp_path / "coded", storage, progress=False)
    assert result["bytes_after"] <= 1.001 * result["bytes_before"]
    coded = {name for name, tensor in tensors(tmp_path / "coded").items() if entropy.is_coded(tensor)}
    assert not [name for name in coded if name.endswith("q_proj.weight")]  # others are padded


def test_quantize_folder_with_storage_equals_compress(tiny, tmp_path):
    config = {"bits": 4, "method": "rtn"}
    quantize_folder(tiny(NAME), tmp_path / "raw", LowBitConfig(**config), max_shard_size="30KB", progress=False)
    coded = LowBitConfig(**config, storage="entropy")
    quantize_folder(tiny(NAME), tmp_path / "coded", coded, max_shard_size="30KB", progress=False)
    compress_folder(tmp_path / "raw", tmp_path / "compressed", progress=False)
    assert same(tensors(tmp_path / "coded"), tensors(tmp_path / "compressed"))
    assert any(entropy.is_coded(t) for t in tensors(tmp_path / "coded").values())
    assert not [p.name for p in (tmp_path / "coded").iterdir() if p.suffix in (".raw", ".tmp")]


def test_compressing_goes_on_after_the_last_finished_file(raw, tmp_path, monkeypatch):
    import hf_lowbit.compress as module

    done = []

    def stops(source, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(source.name)
        return recode.store_file(source, *args)

    monkeypatch.setattr(module, "store_file", stops)
    with pytest.raises(KeyboardInterrupt):
        compress_folder(raw, tmp_path / "coded", progress=False)
    assert not (tmp_path / "coded").exists()
    first = list(done)
    monkeypatch.setattr(module, "store_file", lambda s, *a: done.append(s.name) or recode.store_file(s, *a))
    with pytest.raises(ValueError, match="other settings: storage"):
        compress_folder(raw, tmp_path / "coded", "zstd", progress=False)
    compress_folder(raw, tmp_path / "coded", progress=False)
    assert not set(done[2:]) & set(first), "finished files were written again"
    assert torch.equal(logits(load(NAME, tmp_path / "coded"), NAME), logits(load(NAME, raw), NAME))


def test_command_line(tiny, raw, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--json")])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run("compress", raw, tmp_path / "coded")["storage"] == "entropy"
    assert run("decompress", tmp_path / "coded", tmp_path / "back")["storage"] == "raw"
    assert content.content_hash(tmp_path / "back") == content.content_hash(raw)
    run("quantize", tiny(NAME), tmp_path / "q", "--bits", 4, "--method", "rtn", "--storage", "zstd")
    report = run("inspect", tmp_path / "coded", "--entropy")
    table = CliRunner().invoke(app, ["inspect", str(tmp_path / "coded"), "--entropy"])
    assert table.exit_code == 0 and "above" in table.output, table.output
    for layer in report["layers"]:
        assert layer["above_entropy"] == pytest.approx(layer["coded_bits"] / layer["entropy"] - 1)
    assert CliRunner().invoke(app, ["compress", str(raw), str(tmp_path / "x"), "--storage", "raw"]).exit_code == 1


def test_inspection_states_both_sizes(raw, coded):
    before, after = inspect_repo(raw, entropy=True), inspect_repo(coded, entropy=True)
    for first, second in zip(before["layers"], after["layers"], strict=True):
        assert (first["name"], first["bytes"]) == (second["name"], second["bytes"])
        assert first["stored_bytes"] == first["bytes"] and second["stored_bytes"] <= second["bytes"]
        assert first["entropy"] == second["entropy"] > 0
    totals = after["totals"]
    assert totals["stored_bytes"] < totals["packed_bytes"] == before["totals"]["packed_bytes"]


# -- faults ------------------------------------------------------------------------------------------------------------


def change(folder, pick, alter) -> str:
    """Alters one coded tensor of ``folder`` that ``pick`` chooses by name; its name."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        content = load_file(file)
        for name, tensor in content.items():
            if entropy.is_coded(tensor) and pick in name:
                content[name] = alter(tensor.clone())
                save_file(content, file, metadata={"format": "pt"})
                return name
    raise AssertionError("no such coded tensor")


def flip(place):
    def alter(tensor):
        tensor[place] ^= 16
        return tensor

    return alter


@pytest.mark.parametrize("alter", [flip(-40), flip(60), lambda t: t[:-24]], ids=["block", "head", "truncated"])
@pytest.mark.parametrize("pick", ["q_proj.weight", "embed_tokens.weight"])
def test_damage_is_named_by_everything_that_reads(alter, pick, coded, tmp_path):
    name = change(coded, pick, alter)
    with pytest.raises(ValueError, match=rf"{name}.* cannot be decoded: .*(damaged|truncated)"):
        load(NAME, coded)
    with pytest.raises(ValueError, match=rf"{name} in model-.* cannot be decoded"):
        compress_folder(coded, tmp_path / "back", "raw", progress=False)
    if pick == "q_proj.weight":  # inspection reads what is packed
        with pytest.raises(ValueError, match=rf"{name} cannot be decoded"):
            inspect_repo(coded, entropy=True)
    assert not (tmp_path / "back").exists()


def test_a_missing_shard(coded, tmp_path):
    file = sorted(coded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises((OSError, ValueError), match=file.name):
        load(NAME, coded)
    with pytest.raises(ValueError, match=f"{file.name} is missing"):
        compress_folder(coded, tmp_path / "back", "raw", progress=False)


def test_a_tensor_that_stands_for_another_shape(coded):
    name = change(coded, "q_proj.weight", lambda t: entropy.encode(entropy.decode_tensor(t)[:-1].contiguous()))
    with pytest.raises(ValueError, match=rf"{name} is I16 of shape"):
        load(NAME, coded)


def test_disk_offload_is_refused(coded, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(ValueError, match="hf-lowbit decompress"):
        load(NAME, coded, device_map={**places, "model.layers": "disk"}, offload_folder=str(tmp_path / "offload"))


def test_without_this_package_nothing_is_invented(coded, python):
    """A process that does not know the format gets shapes that do not fit, and no random weights in their place."""
    code = f"""
        import os
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        from transformers import AutoModelForCausalLM
        AutoModelForCausalLM.from_pretrained({os.fspath(coded)!r})
    """
    assert python(code, check=False).returncode != 0


def test_config():
    with pytest.raises(ValueError, match="storage='gzip' is unknown"):
        LowBitConfig(storage="gzip")
    assert LowBitConfig(storage="entropy").to_dict()["storage"] == "entropy"
    assert "storage" not in LowBitConfig().to_dict()


def test_compress_refuses_what_is_not_packed(tiny, tmp_path):
    with pytest.raises(ValueError, match="is not packed by hf_lowbit"):
        compress_folder(tiny(NAME), tmp_path / "coded")


def test_a_tensor_that_looks_coded_comes_back_as_it_was():
    tensor = torch.frombuffer(bytearray(b"LBC1" + bytes(60)), dtype=torch.uint8)
    kept = stored.store("buffer", tensor, None, "entropy")
    assert torch.equal(entropy.decode_tensor(kept), tensor)
