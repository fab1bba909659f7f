"""Bad input gets an early error that names what is wrong: the option, the tensor, the file, and the cure."""

import json
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import load
from safetensors.torch import load_file, save_file

import hf_lowbit.quantizer
from hf_lowbit import LowBitConfig

OPTIONS = {
    "bits 0": ({"bits": 0}, r"bits=0 is out of range: use bits=1 to 8, or 1.58"),
    "bits 9": ({"bits": 9}, r"bits=9 is out of range: use bits=1 to 8"),
    "bits text": ({"bits": "4"}, r"bits='4' is not a number: use bits=1 to 8"),
    "bits true": ({"bits": True}, r"bits=True is not a number"),
    "bits 2.5, one width": ({"bits": 2.5, "format": "fp4"}, r"bits=2.5 is a budget, which needs .* 'int' or 'nf'"),
    "bits 2.5 in a rule": ({"rules": {"x": {"bits": 2.5}}}, r"rule 'x': bits=2.5 is a budget, which is for the whole"),
    "bits of no plan": ({"bits": "no.json"}, r"the plan no.json cannot be read .*hf-lowbit plan"),
    "bits nan": ({"bits": float("nan")}, r"bits=nan is out of range"),
    "method": ({"method": "gptqq"}, r"method='gptqq' is unknown: use one of .*hqq, .*rtn"),
    "format": ({"format": "integer"}, r"format='integer' is unknown: use one of int, nf, fp4, codebook, ternary"),
    "option": ({"bit": 4}, r"LowBitConfig has no option 'bit'; did you mean 'bits'\?"),
    "far option": ({"wibble": 4}, r"LowBitConfig has no option 'wibble': it takes bits, format, method"),
    "group 7": ({"group_size": 7}, r"group_size=7 is not possible: use 16, 32, 64, 128, 256, 512, 1024, or 'row'"),
    "group 0": ({"group_size": 0}, r"group_size=0 is not possible: use a power of two, or 'row'"),
    "group text": ({"group_size": "x"}, r"group_size='x' is not possible: use a power of two, or 'row'"),
    "row codebook with groups": (
        {"format": "codebook", "codebook": "row", "group_size": 64},
        r"codebook.*row.*group_size",
    ),
    "symmetric with zeros": (
        {"symmetric": True, "zeros": "int"},
        r"a symmetric grid has no zero points: drop zeros=, or use symmetric=False",
    ),
    "zeros": ({"zeros": "half"}, r"zeros='half' is unknown: use 'int' or 'float'"),
    "scale dtype": ({"scale_dtype": "float8"}, r"scale_dtype='float8' is unknown: use one of float16, bfloat16"),
    "option of another format": ({"format": "nf", "zeros": "int"}, r"format 'nf' has no option 'zeros'"),
    "method of another format": (
        {"format": "codebook", "method": "rtn"},
        r"method 'rtn' does not make format 'codebook': use .*'lloyd'",
    ),
    "method option": ({"method": "rtn", "method_options": {"rnge": 1}}, r"method 'rtn' has no option 'rnge': it takes"),
    "method value": ({"method": "rtn", "method_options": {"range": "max"}}, r"range='max' is unknown"),
    "backend": ({"backend": "cuda"}, r"backend='cuda' is unknown: use 'auto' or one of triton, native, torch"),
    "stored bits": ({"bits_stored": 9}, r"bits_stored=9 is not possible: use a number from 0.5 to 7, such as 3.0"),
    "stored bits text": ({"bits_stored": "3"}, r"bits_stored='3' is not possible: use a number"),
    "stored bits nan": ({"bits_stored": float("nan")}, r"bits_stored=nan is not possible"),
    "stored bits of a fixed method": (
        {"bits_stored": 3, "method": "hqq"},
        r"method 'hqq' cannot aim at bits_stored=3: use 'ecsq'",
    ),
    "stored bits in groups": (
        {"bits_stored": 3, "group_size": 64},
        r"method 'ecsq' needs one step a row on a grid around zero, of at least 2 bits: use group_size='row'",
    ),
    "stored bits off zero": ({"bits_stored": 3, "symmetric": False}, r"method 'ecsq' needs one step a row"),
    "stored bits in one bit": ({"bits_stored": 1, "bits": 1}, r"method 'ecsq' needs one step a row"),
    "no stored bits": ({"method": "ecsq"}, r"method 'ecsq' needs to know how many bits it may take: give bits_stored="),
    "stored bits of a rule": ({"rules": {"a": {"bits_stored": 8}}}, r"rule 'a': bits_stored=8 is not possible"),
    "rule pattern": ({"rules": {"(": None}}, r"rule '\(' is not a regular expression: missing \)"),
    "rule value": ({"rules": {"a": 4}}, r"rule 'a' must be a dict of options or None \(keep in float\), not 4"),
    "rule option": ({"rules": {"a": {"bit": 4}}}, r"rule 'a' has no option 'bit': it takes bits, format"),
    "rule bits": ({"rules": {"a": {"bits": 9}}}, r"rule 'a': bits=9 is out of range"),
    "rules text": ({"rules": "lm_head"}, r"rules='lm_head' must be a dict of regular expressions, in order"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    options, message = OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**options)


# -- repos -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """Folder of a tiny Llama in 4 bits, in several shards."""
    folder = tmp_path_factory.mktemp("packed")
    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4))
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def broken(packed, tmp_path):
    """A copy of the packed repo to break."""
    return Path(shutil.copytree(packed, tmp_path / "broken"))


@pytest.fixture
def float_copy(tiny, tmp_path):
    """A copy of the float repo to break."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "float"))


def change(folder: Path, edit):
    """Applies ``edit`` to the tensors of the file that holds a layer's down_proj, and gives the file's name."""
    file = next(f for f in sorted(folder.glob("*.safetensors")) if DOWN + ".weight" in load_file(f))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return file.name


def change_config(folder: Path, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


DOWN = "model.layers.1.mlp.down_proj"
QUANTIZE = {"quantization_config": LowBitConfig(bits=4)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value, float_copy, monkeypatch):
    first = "model.layers.0.self_attn.k_proj.weight"

    def edit(tensors):
        tensors[first][3, 5] = value

    change(float_copy, edit)
    done, quantize = [], hf_lowbit.quantizer.quantize_weight
    monkeypatch.setattr(
        hf_lowbit.quantizer,
        "quantize_weight",
        lambda weight, planned, name: done.append(name) or quantize(weight, planned, name),
    )
    with pytest.raises(ValueError, match=rf"{first} has 1 NaN or infinite values: the checkpoint is damaged"):
        load("llama", float_copy, **QUANTIZE)
    assert done[-1] == first and len(done) < 14  # raised at once: later tensors are not quantized


def test_scale_too_large_for_its_dtype(float_copy):
    change(float_copy, lambda tensors: tensors[DOWN + ".weight"].mul_(1e7))
    message = rf"{DOWN}.weight: a scale of .* does not fit float16; use scale_dtype='float32'"
    with pytest.raises(ValueError, match=message):
        load("llama", float_copy, quantization_config=LowBitConfig(bits=4, scale_dtype="float16"))
    config = LowBitConfig(bits=4, rules={f".*{DOWN}": {"scale_dtype": "float32"}})
    load("llama", float_copy, quantization_config=config)


def test_checkpoint_that_contradicts_the_config(float_copy):
    change_config(float_copy, lambda config: config.update(intermediate_size=96))
    message = r"model.layers.0.mlp.down_proj.weight has shape \(64, 144\) in the checkpoint, the config says \(64, 96\)"
    with pytest.raises(ValueError, match=message):
        load("llama", float_copy, **QUANTIZE)


def test_packed_checkpoint_that_contradicts_the_config(broken):
    change_config(broken, lambda config: config.update(intermediate_size=96))
    message = r"mlp.*_proj.weight is I16 of shape .* in model-.*safetensors, but the config says int:bits=4"
    with pytest.raises(ValueError, match=message):
        load("llama", broken)


def test_other_format_than_the_file(broken):
    def edit(config):
        layers = config["quantization_config"]["layers"]
        layers[DOWN.replace(".1.", ".*.")] = layers[DOWN.replace(".1.", ".*.")].replace("bits=4", "bits=3")

    change_config(broken, edit)
    message = r"down_proj.weight is I16 of shape \(64, 48\) in model-.*, but the config says int:bits=3.*\(64, 36\)"
    with pytest.raises(ValueError, match=message):
        load("llama", broken)


@pytest.mark.parametrize("spec", ["int:bits=99", "int:bits=4,colour=red", "cubic:bits=4", "int:bits=four", "int"])
def test_layers_that_no_version_wrote(spec, broken):
    def edit(config):
        config["quantization_config"]["layers"][DOWN.replace(".1.", ".*.")] = spec

    change_config(broken, edit)
    with pytest.raises(ValueError, match=r"bits|has no option|unknown format|int"):
        load("llama", broken)


def test_config_of_a_later_version(broken):
    change_config(broken, lambda config: config["quantization_config"].update(version="99.0", sparkle=True))
    with pytest.raises(ValueError, match=r"this repo was packed by hf_lowbit 99.0, this is .*no option 'sparkle'"):
        load("llama", broken)


def test_config_without_layers(broken):
    change_config(broken, lambda config: config["quantization_config"].pop("layers"))
    with pytest.raises(ValueError, match="quantization_config has no 'layers': it was not written by hf_lowbit"):
        load("llama", broken)


@pytest.mark.parametrize("tensor", ["weight", "weight_scales", "weight_zeros"])
def test_missing_tensor(tensor, broken):
    change(broken, lambda tensors: tensors.pop(f"{DOWN}.{tensor}"))
    with pytest.raises(ValueError, match=rf"the checkpoint has no tensor {DOWN}.{tensor}: it is incomplete"):
        load("llama", broken)


def test_wrong_dtype_of_a_companion(broken):
    def edit(tensors):
        tensors[DOWN + ".weight_zeros"] = tensors[DOWN + ".weight_zeros"].to(torch.int32)

    change(broken, edit)
    with pytest.raises(ValueError, match=rf"{DOWN}.weight_zeros is I32 of shape .* needs U8 of shape"):
        load("llama", broken)


@pytest.mark.parametrize("keep", [0.9, 0.2, 4, 0], ids=["tail", "middle", "header", "all"])
@pytest.mark.parametrize("kind", ["packed", "float"])
def test_truncated_shard(kind, keep, request):
    folder = request.getfixturevalue("broken" if kind == "packed" else "float_copy")
    file = sorted(folder.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read \(.*\): it is missing, truncated or damaged"):
        load("llama", folder, **(QUANTIZE if kind == "float" else {}))


def test_missing_shard(broken):
    file = sorted(broken.glob("*.safetensors"))[-1]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read .*: it is missing, truncated or damaged"):
        load("llama", broken)


def header_lies(case: str, header: dict):
    name = next(n for n in header if n.endswith("weight"))
    start, end = header[name]["data_offsets"]
    if case == "beyond the end":
        header[name]["data_offsets"] = [start, end + 2**40]
    elif case == "overlap":
        other = next(n for n in header if n not in (name, "__metadata__"))
        header[other]["data_offsets"] = [start, end]
    elif case == "negative":
        header[name]["data_offsets"] = [-8, end]
    elif case == "huge shape":
        header[name]["shape"] = [2**40, 2**40]
    elif case == "dtype":
        header[name]["dtype"] = "F64"


@pytest.mark.parametrize(
    "case", ["beyond the end", "overlap", "negative", "huge shape", "dtype", "length of the header", "not json"]
)
def test_header_that_lies(case, broken):
    file = broken / change(broken, lambda tensors: None)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header_lies(case, header)
    text = b"{" * length if case == "not json" else json.dumps(header).encode()
    claimed = 2**62 if case == "length of the header" else len(text)
    file.write_bytes(struct.pack("<Q", claimed) + text + data[8 + length :])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read \(.*\): it is missing, truncated or damaged"):
        load("llama", broken)


def test_repo_of_another_method(float_copy):
    change_config(
        float_copy, lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    )
    with pytest.raises(ValueError, match="quantized with BitsAndBytesConfig but you are passing a LowBitConfig"):
        load("llama", float_copy, **QUANTIZE)


@pytest.mark.parametrize("suffix", ["qweight", "weight"])
def test_repo_of_an_unknown_method(suffix, float_copy):
    """Transformers skips a method that it does not know; the integers in the files give it away."""

    def edit(tensors):
        del tensors[DOWN + ".weight"]
        tensors[f"{DOWN}.{suffix}"] = torch.zeros(18, 64, dtype=torch.int32)

    change(float_copy, edit)
    change_config(float_copy, lambda c: c.update(quantization_config={"quant_method": "mystery"}))
    message = rf"{DOWN}.{suffix} in model.safetensors is I32: this repo is quantized already, by something else"
    with pytest.raises(ValueError, match=message):
        load("llama", float_copy, **QUANTIZE)


def test_repo_packed_with_other_settings(packed):
    message = r"packed already, with other settings than you ask for: bits=3 \(the repo has 4\), format='nf' \(the repo"
    with pytest.raises(ValueError, match=message):
        load("llama", packed, quantization_config=LowBitConfig(bits=3, format="nf"))
    with pytest.raises(ValueError, match=r"rules={'lm_head': None} \(the repo has {}\)"):
        load("llama", packed, quantization_config=LowBitConfig(rules={"lm_head": None}))
    load("llama", packed, quantization_config=LowBitConfig(bits=4))  # the same settings are no contradiction


def test_loading_options_are_honoured_for_a_packed_repo(packed):
    model = load("llama", packed, quantization_config=LowBitConfig(backend="torch"))
    assert {m.backend for m in model.modules() if hasattr(m, "packed_names")} == {"torch"}


def test_backend_that_cannot_run(packed, tiny, monkeypatch):
    config = LowBitConfig(bits=4, backend="triton")
    message = r"no backend can run linear of int:bits=8.* on cpu in torch.float32 \(triton: .*native.*torch.*\)"
    for folder in (packed, tiny("llama")):
        with pytest.raises(RuntimeError, match=message):
            load("llama", folder, quantization_config=config)
    monkeypatch.setenv("HF_LOWBIT_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="HF_LOWBIT_BACKEND='cuda' is unknown: use 'auto' or one of triton, native, torch"
    ):
        load("llama", packed)


# -- destinations ------------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Writing past ``size`` bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
def test_full_destination_leaves_nothing_that_loads(shard, packed, tmp_path):
    model = load("llama", packed)
    with largest_file(20_000), pytest.raises(Exception, match=r"[Ff]ile too large|File size limit|os error 27"):
        model.save_pretrained(tmp_path, max_shard_size=shard)
    with pytest.raises((OSError, ValueError)):
        load("llama", tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    load("llama", tmp_path)


def test_destination_that_cannot_be_written(packed, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        load("llama", packed).save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "in the way"
