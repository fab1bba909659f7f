"""A packed model on CPU kernels holds its packed tensors and nothing beside them: no unpacked copy, no second layout.

Measured in a fresh process, after a smaller model has brought in what a process needs anyway. Where tensors lie is
read from the process's own map: they stay where the file is mapped, so opening a model copies nothing, memory that is
not the file's (RssAnon) hardly grows, and pages of the file (RssFile) are read when a kernel first needs them.
"""

import json
import subprocess
import sys

import pytest
import transformers

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit import native_backend as native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"the CPU kernels: {native.unavailable()}")

MEASURE = """
import gc, json, re, sys
import hf_lowbit
hf_lowbit.__path__[:] = {path!r}  # where its library was found here
import torch, transformers

def resident():
    gc.collect()
    with open("/proc/self/status") as status:
        found = dict(re.findall(r"(Rss\\w+):\\s+(\\d+)", status.read()))
    return [int(found[name]) * 1024 for name in ("RssAnon", "RssFile")]

def mapped(address):
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, last = (int(n, 16) for n in line.split()[0].split("-"))
            if first <= address < last:
                return line.rstrip().endswith(".safetensors")
    return False

def run(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    opened = resident()
    with torch.no_grad():
        for length in (1, 8, 30):  # a row, a few, and enough to be multiplied by torch in parts
            model(torch.arange(length)[None], use_cache=False)
    return model, opened

torch.set_num_threads(1)
run({warm!r})
before = resident()
model, opened = run({folder!r})
after = resident()
tensors = {{t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}}
packed = [t for t in tensors.values() if t.dtype == torch.int16]
coverage = model.hf_quantizer.coverage
print(json.dumps({{
    "stated": coverage["packed_bytes"] + coverage["kept_bytes"],
    "held": sum({{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}}.values()),
    "packed": [sum(t.nbytes for t in packed), sum(t.nbytes for t in packed if mapped(t.data_ptr()))],
    "opened": [b - a for a, b in zip(before, opened)],
    "run": [b - a for a, b in zip(before, after)],
}}))
"""
WIDTH = 1024
NOISE = (
    8 * WIDTH * WIDTH
)  # allocators keep some of what activations took; half of one unpacked float32 weight of the MLP


def save(folder, layers: int, width: int) -> str:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "float")
    config = LowBitConfig(bits=4, method="rtn", method_options={"range": "minmax"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    model.save_pretrained(folder / "packed")
    return str(folder / "packed")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    warm = save(tmp_path_factory.mktemp("warm"), 1, 256)
    folder = save(tmp_path_factory.mktemp("measured"), 6, WIDTH)
    code = MEASURE.format(path=list(hf_lowbit.__path__), warm=warm, folder=folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_held_are_those_of_the_file_and_stay_in_it(measured):
    assert measured["held"] <= 1.02 * measured["stated"]
    packed, mapped = measured["packed"]
    assert packed > 30 * 2**20 and mapped == packed


def test_opening_a_model_copies_nothing(measured):
    anonymous, _ = measured["opened"]
    assert anonymous <= NOISE


def test_running_it_keeps_nothing_but_its_pages(measured):
    anonymous, file = measured["run"]
    print(f"stated {measured['stated']}, anonymous {anonymous}, of the file {file}")
    assert anonymous + file <= 1.02 * measured["stated"] + NOISE
    assert file >= 0.95 * measured["packed"][0]  # the measurement sees what is there
