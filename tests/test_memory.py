"""Peak memory while loading on the fly: the packed model, at most twice the largest float tensor, and a constant.

Measured in a fresh process by sampling RssAnon, because pages of a checkpoint that is read through a memory map count
as resident too, and the kernel takes those back at will. A thread samples every millisecond; what lives for less is
not seen, which for tensors of megabytes it does not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hf_lowbit.memory import INTERVAL
from hf_lowbit.methods.base import CHUNK_WEIGHTS

# What a load needs besides weights: float tensors that are freed but not yet given back (`hf_lowbit/memory.py`), and
# about ten float32 temporaries of a method's chunk of rows (`hf_lowbit/methods/base.py`).
CONSTANT = INTERVAL + 10 * 4 * CHUNK_WEIGHTS

MEASURE = """
import sys, threading, time, json, gc
sys.path.insert(0, {tests!r})
import torch, transformers
from hf_lowbit import LowBitConfig
torch.set_num_threads(1)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder):
    config = LowBitConfig(bits=4, method="rtn", method_options={{"range": "minmax"}})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

load({warm!r})  # imports, caches
gc.collect()
base, peak, done = anonymous(), 0, False

def sample():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=sample)
thread.start()
model = load({folder!r})
done = True
thread.join()
coverage = model.hf_quantizer.coverage
print(json.dumps([peak - base, anonymous() - base, coverage["packed_bytes"] + coverage["kept_bytes"]]))
"""


def save(folder, layers: int, width: int, intermediate: int) -> str:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """``{layers: (peak, after, packed size, float size, largest tensor)}``, bytes beyond the baseline."""
    results = {}
    for layers in (2, 12):
        width, intermediate = 512, 4096
        folder = save(tmp_path_factory.mktemp(f"layers{layers}"), layers, width, intermediate)
        code = MEASURE.format(tests=str(Path(__file__).parent), warm=tiny("llama"), folder=folder)
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr[-2000:]
        largest = 4 * width * intermediate
        results[layers] = (
            *json.loads(run.stdout.splitlines()[-1]),
            os.path.getsize(f"{folder}/model.safetensors"),
            largest,
        )
    return results


@pytest.mark.parametrize("layers", [2, 12])
def test_peak_is_packed_size_and_twice_the_largest_tensor(layers, measured):
    peak, after, packed, size, largest = (value / 2**20 for value in measured[layers])
    print(f"{layers} layers: peak {peak:.0f} MiB, after {after:.0f}, packed {packed:.0f}, float {size:.0f}")
    assert peak <= packed + 2 * largest + CONSTANT / 2**20
    assert after >= 0.9 * packed  # the measurement sees what is there


def test_peak_beyond_the_packed_model_does_not_grow_with_layers(measured):
    few, many = (measured[layers][0] - measured[layers][2] for layers in (2, 12))
    largest = measured[2][4]
    # Ten more layers are 40 such tensors in float. What is freed but held may differ by the interval.
    assert many - few <= largest + INTERVAL
