"""Packing from disk to disk gives the bits that loading gives, can be stopped anywhere, and says what is wrong."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, load, logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lowbit import LowBitConfig, convert
from hf_lowbit.convert import MANIFEST, quantize_folder
from hf_lowbit.storage import shards

CONFIG = LowBitConfig(bits=3, group_size=32, method="rtn", method_options={"range": "minmax"})
EMBEDDINGS = {".*(embed_tokens|shared|wte|lm_head)": {"bits": 8}}


def pack(source, destination, config=CONFIG, **options):
    return quantize_folder(source, destination, config, progress=False, **options)


def sharded(name, source, folder):
    """The tiny model saved again in many files."""
    load(name, source).save_pretrained(folder, max_shard_size="50KB")
    return folder


def stored(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        t.dtype == second[k].dtype and torch.equal(t, second[k]) for k, t in first.items()
    )


# -- the same bits as loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_folder_equals_loading_and_saving(name, tiny, tmp_path):
    source = sharded(name, tiny(name), tmp_path / "source")
    coverage = pack(source, tmp_path / "packed", max_shard_size="30KB")
    live = load(name, source, quantization_config=CONFIG)
    assert coverage == live.hf_quantizer.coverage
    packed = load(name, tmp_path / "packed")
    assert torch.equal(logits(packed, name), logits(live, name))
    live.save_pretrained(tmp_path / "saved")
    assert same(stored(tmp_path / "packed"), stored(tmp_path / "saved"))
    mine, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("packed", "saved"))
    assert mine == theirs
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    assert not (tmp_path / "packed.partial").exists()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3", "t5"])
def test_packed_embeddings_and_heads(name, tiny, tmp_path):
    config = LowBitConfig(bits=4, group_size=32, rules=EMBEDDINGS)
    pack(tiny(name), tmp_path / "packed", config)
    live = load(name, tiny(name), quantization_config=config)
    packed = load(name, tmp_path / "packed")
    assert torch.equal(logits(packed, name), logits(live, name))
    live.save_pretrained(tmp_path / "saved")
    assert same(stored(tmp_path / "packed"), stored(tmp_path / "saved"))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_dtype_casts_as_loading_does(name, dtype, tiny, tmp_path):
    pack(tiny(name), tmp_path / "packed", dtype=dtype)
    packed, live = load(name, tmp_path / "packed"), load(name, tiny(name), dtype=dtype, quantization_config=CONFIG)
    assert packed.dtype == live.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert torch.equal(logits(packed, name), logits(live, name))


def test_duplicate_of_a_tied_weight_is_stored_once(tiny, tmp_path):
    source = shutil.copytree(tiny("llama-tied"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for rules in ({}, EMBEDDINGS):
        config = LowBitConfig(bits=4, rules=rules)
        pack(source, tmp_path / "twice", config)
        pack(tiny("llama-tied"), tmp_path / "once", config)
        assert same(stored(tmp_path / "twice"), stored(tmp_path / "once"))
        for folder in ("twice", "once"):
            shutil.rmtree(tmp_path / folder)


def test_tie_that_the_weights_contradict_is_left_to_loading(tiny, tmp_path):
    source = shutil.copytree(tiny("llama-tied"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    pack(source, tmp_path / "packed")
    packed, live = load("llama", tmp_path / "packed"), load("llama", source, quantization_config=CONFIG)
    assert torch.equal(logits(packed, "llama"), logits(live, "llama"))
    step = (tensors["lm_head.weight"].amax() - tensors["lm_head.weight"].amin()) / 255
    assert (packed.lm_head.dequantize() - tensors["lm_head.weight"]).abs().max() <= step


def test_tensors_that_loading_splits(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**vision, use_swiglu_ffn=True)).eval()
    model.save_pretrained(tmp_path / "source")
    assert any("weights_in" in key for key in stored(tmp_path / "source"))  # two matrices in one
    pack(tmp_path / "source", tmp_path / "packed")
    packed = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    live = transformers.AutoModel.from_pretrained(tmp_path / "source", quantization_config=CONFIG)
    assert "encoder.layer.0.mlp.gate_proj" in packed.hf_quantizer.plan.packed
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(packed(image).last_hidden_state, live(image).last_hidden_state)


def test_other_files_are_taken_over_and_code_is_not(tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    kept = ["tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tools.jinja"]
    left = ["README.md", "modeling_x.py", "pytorch_model.bin", "onnx/model.onnx", ".git/config", "x.safetensors"]
    for file in [*kept, *left]:
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_text(file)
    pack(source, tmp_path / "packed")
    made = {p.relative_to(tmp_path / "packed").as_posix() for p in (tmp_path / "packed").rglob("*") if p.is_file()}
    assert made == {*kept, "config.json", "generation_config.json", "model.safetensors"}
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "quantized_with": f"hf_lowbit {convert.__version__}"}


def test_tensor_that_the_class_does_not_know_stays(tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    tensors = {**load_file(source / "model.safetensors"), "extra.table": torch.arange(6, dtype=torch.int32)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    pack(source, tmp_path / "packed")
    assert torch.equal(stored(tmp_path / "packed")["extra.table"], tensors["extra.table"])


def test_hub_repo_is_looked_at_before_its_weights_are_fetched(tiny, tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(repo, allow_patterns):
        fetched.append(allow_patterns)
        return tiny("llama")

    monkeypatch.setattr(convert, "snapshot_download", snapshot_download)
    pack("someone/tiny-llama", tmp_path / "packed")
    assert fetched == [convert.SMALL_FILES, [*convert.SMALL_FILES, "model.safetensors"]]
    assert (tmp_path / "packed" / "model.safetensors").exists()


# -- stopped and started again -----------------------------------------------------------------------------------------


def states(folder) -> dict[str, tuple[int, int]]:
    found = {p.name: p.stat() for p in Path(folder).glob("*.safetensors")}
    return {name: (s.st_ino, s.st_mtime_ns) for name, s in found.items()}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_run_goes_on_after_the_last_finished_shard(stop, tiny, tmp_path, monkeypatch):
    pack(tiny("llama"), tmp_path / "whole", max_shard_size="15KB")
    calls, real = [], shards.Layout.write

    def write(self, path, tensors):
        def stopping():
            for i, item in enumerate(tensors):
                if len(calls) == 3 and i == 2:
                    raise stop
                yield item

        calls.append(path)
        real(self, path, stopping())

    monkeypatch.setattr(shards.Layout, "write", write)
    message = "no space left for .*free some and start again" if isinstance(stop, OSError) else None
    with pytest.raises(type(stop), match=message):
        pack(tiny("llama"), tmp_path / "packed", max_shard_size="15KB")
    partial = tmp_path / "packed.partial"
    assert not (tmp_path / "packed").exists()
    before = states(partial)
    assert len(before) == 2
    monkeypatch.undo()
    pack(tiny("llama"), tmp_path / "packed", max_shard_size="15KB")
    after = states(tmp_path / "packed")
    assert {name: after[name] for name in before} == before  # not written again
    assert len(after) > 3 and not partial.exists()
    assert same(stored(tmp_path / "packed"), stored(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "packed")) == sorted(os.listdir(tmp_path / "whole"))


def test_killed_process_leaves_what_can_be_resumed(tiny, tmp_path):
    code = f"""
import os, signal
from hf_lowbit import LowBitConfig, pieces
from hf_lowbit.convert import quantize_folder
real, calls = pieces.quantize_weight, []
def quantize_weight(*arguments):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
pieces.quantize_weight = quantize_weight
config = LowBitConfig(bits=3, group_size=32, method="rtn", method_options={{"range": "minmax"}})
quantize_folder({tiny("llama")!r}, {str(tmp_path / "packed")!r}, config, max_shard_size="30KB", progress=False)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "packed").exists()
    partial = tmp_path / "packed.partial"
    assert list(partial.glob("*.tmp")) and (partial / MANIFEST).exists()
    before = states(partial)
    assert before
    pack(tiny("llama"), tmp_path / "packed", max_shard_size="30KB")
    after = states(tmp_path / "packed")
    assert {name: after[name] for name in before} == before
    pack(tiny("llama"), tmp_path / "whole", max_shard_size="30KB")
    assert sorted(os.listdir(tmp_path / "packed")) == sorted(os.listdir(tmp_path / "whole"))
    assert same(stored(tmp_path / "packed"), stored(tmp_path / "whole"))


@pytest.fixture
def begun(tiny, tmp_path, monkeypatch):
    """A source, and a destination to which packing was begun and stopped before the last step."""
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(convert.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "packed", max_shard_size="30KB")
    return source, tmp_path / "packed"


def test_run_with_other_settings_is_refused(begun):
    source, destination = begun
    other = LowBitConfig(bits=4, group_size=32, method="rtn", method_options={"range": "minmax"})
    with pytest.raises(ValueError, match=r"bits \(3 then, 4 now\).*remove that folder to start over"):
        pack(source, destination, other, max_shard_size="30KB")
    with pytest.raises(ValueError, match=r"max_shard_size \('30KB' then, '60KB' now\)"):
        pack(source, destination, max_shard_size="60KB")
    with pytest.raises(ValueError, match=r"dtype \('float32' then, 'float16' now\)"):
        pack(source, destination, max_shard_size="30KB", dtype="float16")
    pack(source, destination, max_shard_size="30KB")


def test_run_with_another_source_is_refused(begun):
    source, destination = begun
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(ValueError, match=r"another source or other settings: .*model\.safetensors"):
        pack(source, destination, max_shard_size="30KB")


def test_damaged_shard_of_an_interrupted_run_is_made_again(begun):
    source, destination = begun
    partial = destination.with_name("packed.partial")
    damaged = sorted(partial.glob("*.safetensors"))[1]
    os.truncate(damaged, damaged.stat().st_size - 1)
    pack(source, destination, max_shard_size="30KB")
    packed, live = load("llama", destination), load("llama", source, quantization_config=CONFIG)
    assert torch.equal(logits(packed, "llama"), logits(live, "llama"))


def test_two_processes_do_not_share_a_destination(tiny, tmp_path, monkeypatch):
    real = convert.resume

    def resume(*arguments):
        with pytest.raises(FileExistsError, match=r"another process is packing into .*packed"):
            monkeypatch.setattr(convert, "resume", real)
            pack(tiny("llama"), tmp_path / "packed")
        real(*arguments)

    monkeypatch.setattr(convert, "resume", resume)
    pack(tiny("llama"), tmp_path / "packed")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_destinations_that_cannot_be(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match=r"full exists and is not an empty folder: remove it"):
        pack(tiny("llama"), tmp_path / "full")
    with pytest.raises(OSError, match=r"file/packed cannot be written .*choose another place"):
        pack(tiny("llama"), tmp_path / "full" / "file" / "packed")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes").touch()
    with pytest.raises(FileExistsError, match=r"mine\.partial is in the way \(it holds notes"):
        pack(tiny("llama"), tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    pack(tiny("llama"), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_read_only_destination(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OSError, match=r"cannot be written .*choose another place"):
        pack(tiny("llama"), tmp_path / "locked" / "packed")
    assert not list((tmp_path / "locked").iterdir())


def test_disk_that_is_too_small_is_noticed_first(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(OSError, match=r"needs 0\.\d MB, its disk has 0\.0 MB left") as error:
        pack(tiny("llama"), tmp_path / "packed")
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "packed").exists()


@pytest.fixture
def broken(tiny, tmp_path):
    """``broken(change)``: a copy of a sharded llama after ``change(folder, tensors of its first file, that file)``."""

    def make(change):
        source = sharded("llama", tiny("llama"), tmp_path / "source")
        file = next(f for f in sorted(source.glob("*.safetensors")) if any("q_proj" in k for k in load_file(f)))
        tensors = load_file(file)
        change(source, tensors, file)
        if file.exists() and file.stat().st_size > 100:
            save_file(tensors, file, metadata={"format": "pt"})
        return source

    return make


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil(value):
    def change(folder, tensors, file):
        name = next(k for k in tensors if "q_proj" in k)
        tensors[name] = value(tensors[name])

    return change


def test_nan_names_file_and_tensor(broken, tmp_path):
    source = broken(spoil(lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))))
    with pytest.raises(
        ValueError,
        match=r"model-0000\d-of-000\d\d\.safetensors: model\.layers\.\d\.self_attn\.q_proj\.weight has 64 NaN",
    ):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_shape_that_contradicts_the_config(broken, tmp_path):
    source = broken(spoil(lambda t: t[:, :-1].contiguous()))
    with pytest.raises(
        ValueError, match=r"safetensors: .*q_proj\.weight has shape \(64, 63\), but the config says \(64"
    ):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed.partial").exists()  # said before anything is written


def test_integer_weight(broken, tmp_path):
    source = broken(spoil(lambda t: t.to(torch.int8)))
    with pytest.raises(ValueError, match=r"safetensors: .*q_proj\.weight is I8, not floating point"):
        pack(source, tmp_path / "packed")


def test_missing_tensor(broken, tmp_path):
    source = broken(lambda folder, tensors, file: tensors.pop(next(k for k in tensors if "q_proj" in k)))
    with pytest.raises(
        ValueError, match=r"has no tensor model\.layers\.\d\.self_attn\.q_proj\.weight: it is incomplete"
    ):
        pack(source, tmp_path / "packed")


def test_missing_shard(broken, tmp_path):
    source = broken(lambda folder, tensors, file: file.unlink())
    with pytest.raises(ValueError, match=r"model-0000\d-of-000\d\d\.safetensors is missing: .*index\.json lists it"):
        pack(source, tmp_path / "packed")


def test_truncated_shard(broken, tmp_path):
    source = broken(lambda folder, tensors, file: os.truncate(file, 90))
    with pytest.raises(ValueError, match=r"model-0000\d-of-000\d\d\.safetensors cannot be read .*truncated or damaged"):
        pack(source, tmp_path / "packed")


@pytest.mark.parametrize("name", ["../outside.safetensors", "weights.bin"])
def test_index_that_points_elsewhere(name, broken, tmp_path):
    source = broken(lambda folder, tensors, file: None)
    edit(source / "model.safetensors.index.json", weight_map={"x": name})
    with pytest.raises(ValueError, match="which is not a safetensors file of this folder"):
        pack(source, tmp_path / "packed")


def test_pickles_are_not_opened(tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor .*pytorch_model\.bin, which is not read"):
        pack(source, tmp_path / "packed")


def test_gguf_is_refused(tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    (source / "model.safetensors").rename(source / "model.gguf")
    with pytest.raises(ValueError, match=r"model\.gguf are quantized already: take the original"):
        pack(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="is a GGUF file, which is quantized already"):
        pack(source / "model.gguf", tmp_path / "packed")


@pytest.mark.parametrize("place", ["top", "nested"])
def test_quantized_source_is_refused(place, tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    found = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit(source / "config.json", **(found if place == "top" else {"text_config": found}))
    with pytest.raises(ValueError, match=r"is quantized already \(quant_method 'gptq' in config\.json\)"):
        pack(source, tmp_path / "packed")


def test_own_packed_source_is_refused(tiny, tmp_path):
    pack(tiny("llama"), tmp_path / "packed")
    with pytest.raises(ValueError, match=r"is quantized already \(quant_method 'lowbit'"):
        pack(tmp_path / "packed", tmp_path / "again")


def test_code_in_the_repo_is_not_run(tiny, tmp_path):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    edit(source / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (source / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match=r"needs code of its own \(auto_map in config\.json\), which is not run here"):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "run").exists()


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no config\.json"):
        pack(tmp_path / "empty", tmp_path / "packed")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not JSON .*truncated or damaged"):
        pack(tmp_path / "empty", tmp_path / "packed")
    with pytest.raises(ValueError, match="'no/such-repo' is not a folder, and not a Hub repo that can be fetched"):
        pack("no/such-repo", tmp_path / "packed")


def test_nothing_to_pack(tiny, tmp_path):
    with pytest.raises(ValueError, match="nothing to pack"):
        pack(tiny("llama"), tmp_path / "packed", LowBitConfig(rules={".*": None}))


def test_config_of_the_user_is_not_changed(tiny, tmp_path):
    config = LowBitConfig(bits=4)
    before = copy.deepcopy(vars(config))
    pack(tiny("llama"), tmp_path / "packed", config)
    assert vars(config) == before


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's record of peak memory")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, python):
    """Eight more layers cost less than their packed weights: neither these nor the float ones are gathered."""
    size, peaks, packed = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4}, {}, {}
    for layers in (1, 9):
        config = transformers.LlamaConfig(**size, num_hidden_layers=layers, vocab_size=32, dtype="bfloat16")
        source = tmp_path / f"source{layers}"
        source.mkdir()
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(source)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        tensors = {k: torch.full(t.shape, 0.01, dtype=torch.bfloat16) for k, t in model.state_dict().items()}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        del tensors
        out = python(
            f"""
from hf_lowbit import LowBitConfig
from hf_lowbit.convert import quantize_folder
config = LowBitConfig(bits=4, method="rtn", method_options={{"range": "minmax"}})
coverage = quantize_folder({str(source)!r}, {str(tmp_path / f"packed{layers}")!r}, config, progress=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(coverage["packed_bytes"])
""",
            timeout=600,
        )
        # (Not ru_maxrss: a child begins with that of its parent.)
        peaks[layers], packed[layers] = int(out.stdout.split()[-2]) * 1024, int(out.stdout.split()[-1])
    assert peaks[9] - peaks[1] < packed[9] - packed[1], (peaks, packed)
