"""Whole models with calibration: the same bits on every way to them, after every stop, with the truth in the config."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import transformers
from conftest import auto_class, inputs, load
from tiny_chat import save_tiny_chat
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import LowBitConfig, cli
from hf_lowbit.calibration import Calibration, pipeline
from hf_lowbit.card import write_model_card

TEXT = "\n\n".join(
    f"The document number {i} says that {i} times {i} is {i * i}, which nobody doubts." for i in range(99)
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("chat"))


def ids(count=40, length=48):
    windows = torch.randint(4, 160, (count, length), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), count, length)


def gptq(**options):
    return LowBitConfig(bits=3, method="gptq", **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3-moe"])
def test_every_way_gives_the_same_bits(name, tiny, tmp_path, cache):
    folder = tiny(name)
    repo = hf_lowbit.quantize(folder, gptq(), output=tmp_path / "out", calibration=ids())
    assert not list(tmp_path.glob("out.*"))  # nothing is left beside it
    assert set(repo.tokens.values()) == {40 * 48} and len(repo.tokens) + 2 >= repo.coverage["packed_modules"]
    packed = load(name, repo.folder)
    assert same(load(name, folder, quantization_config=gptq(calibration=ids())), packed)
    runs = list(cache.iterdir())
    stamps = {p: p.stat().st_mtime_ns for p in runs[0].iterdir()}
    again = load(name, folder, quantization_config=gptq(calibration=ids()))  # from the cache, without a second run
    assert same(again, packed) and list(cache.iterdir()) == runs
    assert {p: p.stat().st_mtime_ns for p in runs[0].iterdir()} == stamps
    again.save_pretrained(tmp_path / "saved")
    assert same(load(name, tmp_path / "saved"), packed)
    repo = hf_lowbit.quantize(load(name, folder), gptq(calibration=ids()), output=tmp_path / "from-memory")
    assert same(repo.load(), packed)
    rounded = load(name, folder, quantization_config=LowBitConfig(bits=3))
    assert not same(rounded, packed)


def test_the_base_model_takes_the_same_solutions(tiny, tmp_path):
    from transformers import AutoModel

    config = gptq(calibration=ids())
    whole, base = (
        auto.from_pretrained(tiny("llama"), quantization_config=config) for auto in (auto_class("llama"), AutoModel)
    )
    assert same(whole.model, base)


def test_the_repo_tells_what_it_was_calibrated_on_and_no_more(chat, tmp_path):
    file = tmp_path / "secret-name.txt"
    file.write_text(TEXT)
    given = Calibration(str(file), 8, 64, seed=3)
    repo = hf_lowbit.quantize(chat, gptq(), output=tmp_path / "out", calibration=given)
    config = json.loads((repo.folder / "config.json").read_text())["quantization_config"]
    record = config["calibration"]
    assert {k: v for k, v in record.items() if k != "sha256"} == {
        "kind": "file", "windows": 8, "length": 64, "seed": 3, "chat_template": False,
    }  # fmt: skip
    for path in repo.folder.iterdir():
        assert b"nobody doubts" not in path.read_bytes() and b"secret-name" not in path.read_bytes()
    card = write_model_card(repo.folder)
    assert record["sha256"] in card.content and '"method": "gptq"' in card.content
    # It comes back with the model, and another config may be given to a repo that is packed.
    model = repo.load(quantization_config=gptq(calibration=given))
    assert model.config.quantization_config.calibration == record
    hf_lowbit.quantize(
        chat, gptq(), output=tmp_path / "other", calibration=Calibration(TEXT.split("\n\n"), 8, 64, seed=4)
    )
    other = json.loads((tmp_path / "other" / "config.json").read_text())["quantization_config"]["calibration"]
    assert other["kind"] == "documents" and other["sha256"] != record["sha256"]


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "awq", "preprocess": "magr"}])
def test_it_goes_on_after_kill_9_to_the_same_bits(tiny, tmp_path, python, options):
    config = LowBitConfig(bits=3, **options)
    expected = hf_lowbit.quantize(tiny("llama"), config, output=tmp_path / "whole", calibration=ids())
    code = f"""
import os, signal, torch, hf_lowbit
torch.set_num_threads({torch.get_num_threads()})
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.pipeline import Run
write = Run.write
def stop(self, *block):
    write(self, *block)
    os.kill(os.getpid(), signal.SIGKILL)
if not os.path.exists({str(tmp_path / "out.calibration")!r}):
    Run.write = stop
windows = torch.randint(4, 160, (40, 48), generator=torch.Generator().manual_seed(0))
hf_lowbit.quantize({tiny("llama")!r}, LowBitConfig(bits=3, **{options!r}), output={str(tmp_path / "out")!r},
                   calibration=Calibration(list(windows), 40, 48))
"""
    killed = python(code, check=False)
    assert killed.returncode == -signal.SIGKILL
    blocks = sorted(p.name for p in (tmp_path / "out.calibration").glob("block-*"))
    assert blocks == ["block-00000.safetensors"] and not (tmp_path / "out").exists()
    python(code)
    assert files(tmp_path / "out") == files(expected.folder)


def test_activations_above_the_budget_lie_in_a_file(tiny, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(pipeline, "_hold", lambda *a, hold=pipeline._hold: held.append(hold(*a)) or held[-1])
    nbytes = 4 * 40 * 48 * 64
    repos = [
        hf_lowbit.quantize(
            tiny("llama"), gptq(), output=tmp_path / str(limit), calibration=ids(), max_activation_bytes=limit
        )
        for limit in (None, nbytes, nbytes - 1)
    ]
    assert [t is not None for t in held] == [False, False, True] and held[2].numel() * 4 == nbytes
    assert files(repos[0].folder) == files(repos[1].folder) == files(repos[2].folder)


def test_a_full_disk_is_said_before_work(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left|disk"):
        hf_lowbit.quantize(tiny("llama"), gptq(), output=tmp_path / "out", calibration=ids(), max_activation_bytes=0)


def test_what_calibration_does_not_reach_is_planned_without_it(tiny, tmp_path):
    repo = hf_lowbit.quantize(tiny("llava"), gptq(), output=tmp_path / "out", calibration=ids())
    saved = LowBitConfig.from_dict(json.loads((repo.folder / "config.json").read_text())["quantization_config"])
    assert all("language_model" in name for name in repo.tokens)
    assert all(rule == {"method": "rtn", "method_options": {}} for rule in saved.rules.values()) and saved.rules
    assert any("vision_tower" in rule for rule in saved.rules) and not any("language" in rule for rule in saved.rules)
    fast = load("llava", tiny("llava"), quantization_config=gptq(calibration=ids()))
    assert same(fast, load("llava", repo.folder))


@pytest.mark.parametrize("name", ["llava", "bert-mlm"])
def test_a_stored_rate_leaves_what_is_not_reached_at_a_fixed_width(name, tiny, tmp_path):
    config = LowBitConfig(method="gptq", bits_stored=3.0, calibration=ids(16, 32))
    fast = load(name, tiny(name), quantization_config=config)
    layers = fast.config.quantization_config.layers
    outside = [spec for key, spec in layers.items() if re.search("vision|projector|transform", key)]
    inside = [spec for key, spec in layers.items() if "layer" in key and "vision" not in key]
    assert outside and all(spec.startswith("int:bits=4") for spec in outside)
    assert inside and all(spec.startswith("int_columns") for spec in inside)
    repo = hf_lowbit.quantize(tiny(name), config, output=tmp_path / "out")
    assert same(fast, load(name, repo.folder))
    fast.save_pretrained(tmp_path / "saved")
    assert same(fast, load(name, tmp_path / "saved"))


def test_calibrated_models_run(tiny):
    model = load("llama", tiny("llama"), quantization_config=gptq(calibration=ids()))
    assert torch.isfinite(model(**inputs("llama")).logits).all()
    assert model.hf_quantizer.coverage["packed_modules"] > 0


def test_few_tokens_are_warned_of_once_with_numbers(tiny, tmp_path, caplog):
    hf_lowbit.quantize(tiny("llama"), gptq(), output=tmp_path / "out", calibration=ids(1, 48))
    warned = [r.getMessage() for r in caplog.records if "fewer tokens" in r.getMessage()]
    assert len(warned) == 1
    widest = max(
        module.in_features for name, module in load("llama", tiny("llama")).named_modules() if "proj" in name
    )  # fmt: skip
    assert f"48 tokens, {widest} inputs. Give more text" in warned[0]


_PEAK = """
import torch, hf_lowbit
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.blocks import Blocks
kept, read = [], Blocks.read
if {keep}:
    Blocks.read = lambda self, index: kept.append(read(self, index)) or kept[-1]
config = hf_lowbit.LowBitConfig(bits=8, method="gptq", method_options={{"refine": 0}}, group_size="row")
data = Calibration([list(range(4, 68))] * 16, 16, 64)
repo = hf_lowbit.quantize({source!r}, config, output={output!r}, calibration=data)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print(repo.coverage["packed_bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's record of peak memory")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, python):
    """Eight more layers cost less than their packed weights: neither these nor float blocks are gathered.

    By default glibc raises the size from which it maps memory for one allocation alone to that of the largest one
    freed, and holds on to the gaps between smaller ones: tens of megabytes that come and go from run to run. With a
    fixed size every tensor of 128 KB or more is given back when it is freed, and the peak is that of what is in use.
    That the measure sees what is kept is shown by a run that keeps every block in float.
    """
    size, peaks, packed = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 4}, {}, {}
    for layers, keep in ((1, False), (9, False), (9, True)):
        source = tmp_path / f"source{layers}"
        if not source.exists():
            config = transformers.LlamaConfig(**size, num_hidden_layers=layers, vocab_size=160, dtype="bfloat16")
            torch.manual_seed(0)
            transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        code = _PEAK.format(keep=keep, source=str(source), output=str(tmp_path / f"packed{layers}{keep}"))
        out = python(code, timeout=600, MALLOC_MMAP_THRESHOLD_="131072").stdout.split()
        peaks[layers, keep], packed[layers] = int(out[-2]) * 1024, int(out[-1])
    floats = 8 * 4 * (4 * 384 * 384 + 3 * 384 * 1024)
    assert peaks[9, False] - peaks[1, False] < packed[9] - packed[1], (peaks, packed)
    assert peaks[9, True] - peaks[9, False] > 0.9 * floats, peaks


# -- the command line --------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_command_line_calibrates(chat, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    options = ("--bits", 3, "--method", "gptq", "--calibration", file, "--windows", 8, "--length", 64)
    result = invoke("quantize", chat, tmp_path / "out", *options, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["fewest_tokens"] == 8 * 64 and values["calibrated_modules"] == values["packed_modules"] - 2
    hf_lowbit.quantize(chat, gptq(), output=tmp_path / "library", calibration=Calibration(file, 8, 64))
    assert files(tmp_path / "out") == files(tmp_path / "library")
    shown = invoke("quantize", chat, tmp_path / "shown", *options).stdout
    assert "modules calibrated, each on at least 512 tokens" in shown


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, calibration, message",
    [
        ({"method": "gptq"}, None, r"method 'gptq' \(or one of the rules\) needs calibration data: give calibration="),
        (
            {"rules": {".*q_proj": {"method": "gptq"}}},
            None,
            r"method 'rtn' \(or one of the rules\) needs calibration data",
        ),
        ({"method": "hqq"}, ["a text"], "method 'hqq' looks at weights alone: drop calibration=, or use .*'gptq'"),
        ({"method": "gptq"}, [[5, 6, 7]], "the calibration text is too short: .* gave 3 tokens, fewer than one window"),
        ({"method": "gptq"}, ["a text"], "the calibration text needs a tokenizer"),
        ({"method": "gptq"}, 7, "calibration cannot be read from a int"),
    ],
)
def test_bad_calibration_is_refused(config, calibration, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf_lowbit.quantize(tiny("llama"), LowBitConfig(**config), output=tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        load("llama", tiny("llama"), quantization_config=LowBitConfig(**config, calibration=calibration))


def test_a_model_without_files_is_refused(tiny):
    model = load("llama", tiny("llama"))
    with pytest.raises(ValueError, match="method 'gptq' reads the float model from safetensors files"):
        type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=gptq(calibration=ids())
        )


def test_an_output_that_is_in_use_is_refused(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        hf_lowbit.quantize(tiny("llama"), gptq(), output=tmp_path / "out", calibration=ids())
