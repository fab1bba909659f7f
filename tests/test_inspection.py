"""What ``inspect_repo`` says is what the files hold and what the loaded model says of itself."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from conftest import load
from safetensors.torch import load_file, save_file

from hf_lowbit import LowBitConfig, inspection
from hf_lowbit.convert import quantize_folder
from hf_lowbit.inspection import inspect_repo
from hf_lowbit.packed import PackedMixin

SETTINGS = {
    "default": LowBitConfig(bits=3, group_size=32, method="rtn"),
    "rules": LowBitConfig(bits=2, method="rtn", rules={r".*\.0\..*\.(q|q_proj|c_fc)": {"format": "nf", "bits": 4}}),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "qwen3-moe", "t5", "vit"])
def test_report_is_what_files_and_model_hold(name, settings, tiny, tmp_path):
    coverage = quantize_folder(
        tiny(name), tmp_path / "packed", SETTINGS[settings], max_shard_size="60KB", progress=False
    )
    report = inspect_repo(tmp_path / "packed")
    json.dumps(report)
    files = list((tmp_path / "packed").glob("*.safetensors"))
    tensors = [t for file in files for t in load_file(file).values()]
    totals = report["totals"]
    assert totals["packed_bytes"] + totals["kept_bytes"] == sum(t.nbytes for t in tensors)
    assert totals["file_bytes"] == sum(os.path.getsize(file) for file in files)
    for key in ("packed_weights", "packed_bytes", "bits_per_packed_weight", "kept_bytes"):
        assert totals[key] == coverage[key]
    assert report["note"] is None

    model = load(name, tmp_path / "packed")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, PackedMixin)}
    modules = {n: m for n, m in modules.items() if n not in model.hf_quantizer.plan.tied}
    assert [layer["name"] for layer in report["layers"]] == list(modules)
    for layer in report["layers"]:
        module = modules[layer["name"]]
        assert (layer["format"], layer["bits"]) == (module.spec, module.format.bits)
        assert layer["shape"] == list(module.packed_shape)
        assert layer["bytes"] == sum(t.nbytes for t in module.stored().values())
        assert layer["bits_per_weight"] == 8 * layer["bytes"] / math.prod(layer["shape"])
    assert len({layer["format"] for layer in report["layers"]}) == (2 if settings == "rules" else 1) + (name != "vit")


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("gpt2", "transformer.wpe", "embedding; pack it by a rule"),
        ("llama", "model.layers.0.mlp.down_proj", "rule '.*down_proj'"),
        ("qwen3-moe", "model.layers.0.mlp.experts.gate_up_proj", "fused experts are not packed yet"),
    ],
)
def test_reasons_are_those_of_the_plan(name, module, reason, tiny, tmp_path):
    rules = {".*down_proj": None} if name == "llama" else {}
    quantize_folder(tiny(name), tmp_path / "packed", LowBitConfig(method="rtn", rules=rules), progress=False)
    kept = {entry["name"].removesuffix(".weight"): entry for entry in inspect_repo(tmp_path / "packed")["kept"]}
    assert kept[module]["reason"] == reason
    assert kept[module]["bytes"] > 0


def test_tied_and_packed_weight_counts_once(tiny, tmp_path):
    config = LowBitConfig(bits=4, method="rtn", rules={".*embed_tokens": {"bits": 8}})
    quantize_folder(tiny("llama-tied"), tmp_path / "packed", config, progress=False)
    report = inspect_repo(tmp_path / "packed")
    assert [layer["bits"] for layer in report["layers"]].count(8) == 1
    assert not any("lm_head" in entry["name"] for entry in report["kept"])


def test_saved_model_reports_the_same(tiny, tmp_path):
    config = SETTINGS["default"]
    quantize_folder(tiny("gpt2"), tmp_path / "packed", config, progress=False)
    load("gpt2", tiny("gpt2"), quantization_config=config).save_pretrained(tmp_path / "saved")
    packed, saved = inspect_repo(tmp_path / "packed"), inspect_repo(tmp_path / "saved")
    del packed["totals"]["file_bytes"], saved["totals"]["file_bytes"]  # headers list tensors in another order
    assert packed == saved


def test_model_without_a_class_is_described_by_its_files(tiny, tmp_path):
    quantize_folder(tiny("llama"), tmp_path / "packed", SETTINGS["default"], progress=False)
    known = inspect_repo(tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "not-there-yet"}))
    report = inspect_repo(tmp_path / "packed")
    assert "not-there-yet" in report["note"]
    assert {(e["name"], e["bytes"], e["format"]) for e in report["layers"]} == {
        (e["name"], e["bytes"], e["format"]) for e in known["layers"]
    }
    assert report["totals"]["packed_bytes"] == known["totals"]["packed_bytes"]
    assert report["totals"]["kept_bytes"] == known["totals"]["kept_bytes"]
    assert report["totals"]["packed_weights"] is report["layers"][0]["shape"] is None
    assert {entry["reason"] for entry in report["kept"]} == {"kept when it was packed"}


def test_weights_are_not_read(tiny, tmp_path):
    """With a hole in the place of every weight (the header alone is true) the report is the same."""
    quantize_folder(tiny("llama"), tmp_path / "packed", SETTINGS["default"], progress=False)
    report = inspect_repo(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    size, head = file.stat().st_size, file.read_bytes()
    head = head[: 8 + int.from_bytes(head[:8], "little")]
    file.write_bytes(head)
    os.truncate(file, size)
    assert inspect_repo(tmp_path / "packed") == report


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_float_and_foreign_repos(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"is not packed by hf_lowbit, it is in float: pack it with `hf-lowbit quantize"
    ):
        inspect_repo(tiny("llama"))
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="is not packed by hf_lowbit, it is quantized by 'awq'"):
        inspect_repo(source)


def test_paths_that_are_no_repo(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        inspect_repo(tmp_path)
    with pytest.raises(ValueError, match="'no/such-repo' is not a folder, and not a Hub repo that can be read"):
        inspect_repo("no/such-repo")


@pytest.fixture
def packed(tiny, tmp_path) -> Path:
    quantize_folder(tiny("llama"), tmp_path / "packed", SETTINGS["default"], max_shard_size="45KB", progress=False)
    return tmp_path / "packed"


def test_damaged_repos(packed):
    file = sorted(packed.glob("*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*truncated or damaged"):
        inspect_repo(packed)
    file.write_bytes((2**40).to_bytes(8, "little") + whole[8:])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*truncated or damaged"):
        inspect_repo(packed)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing: .*index\.json lists it"):
        inspect_repo(packed)


def test_repo_that_lacks_a_packed_layer(packed):
    file = next(f for f in packed.glob("*.safetensors") if any("up_proj" in k for k in load_file(f)))
    tensors = load_file(file)
    name = next(k for k in tensors if k.endswith("up_proj.weight"))
    save_file({k: t for k, t in tensors.items() if not k.startswith(name)}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the files hold 0 bytes of .*up_proj, and int:bits=3.* needs \d+ for .*incomplete"
    ):
        inspect_repo(packed)


def test_hub_repo_is_read_by_its_headers(packed, monkeypatch):
    """Offline, a repo in the cache is read there."""
    monkeypatch.setattr(inspection, "snapshot_download", lambda repo, allow_patterns: str(packed))
    assert inspect_repo("someone/packed") == inspect_repo(packed)
