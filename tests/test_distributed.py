"""LoRA training on a packed base in two processes over gloo: the same as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from conftest import load
from peft import PeftModel
from safetensors.torch import load_file

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.scales import train_scales

# Processes multiply matrices of other heights and add gradients in another order. A product of at most 144 terms is off
# by 144 * 2**-24 of the sum of magnitudes at most; about 8 of them lie one after another in the two blocks, back and
# forth, in each of the steps.
RELATIVE = 144 * 8 * 2 * worker.STEPS * 2**-24


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Folder with the results of two processes, and the losses of all runs."""
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", worker.__file__, tiny("llama"), str(folder)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((folder / "losses.json").read_text())
    losses["one"] = worker.train(tiny("llama"), folder / "one", 1)
    model = worker.make(tiny("llama"))
    losses["by hand"] = worker.steps(model, 0, 1).tolist()
    model.save_pretrained(folder / "by hand")
    return folder, losses


@pytest.mark.parametrize("name,alone", [("ddp", "one"), ("fsdp", "by hand")])
def test_two_processes_are_one_with_the_same_batch(runs, tiny, name, alone):
    folder, losses = runs
    assert len(losses[name]) == worker.STEPS
    for mine, expected in zip(losses[name], losses[alone], strict=True):
        assert abs(mine - expected) <= RELATIVE * expected
    assert abs(losses[alone][0] - losses[alone][-1]) > 20 * RELATIVE * losses[alone][0]
    mine, expected = (load_file(folder / n / "adapter_model.safetensors") for n in (name, alone))
    assert mine.keys() == expected.keys()
    for key, tensor in expected.items():
        assert mine[key].shape == tensor.shape
        assert (mine[key] - tensor).norm() <= RELATIVE * tensor.norm()
        assert "lora_A" in key or tensor.norm() > 0


@pytest.mark.parametrize("name,alone", [("ddp", "one"), ("fsdp", "by hand")])
def test_what_rank_0_saved_reloads(runs, tiny, name, alone):
    folder, _ = runs
    ids = worker.data()[:2]
    logits = []
    for source in (name, alone):
        base = load("llama", tiny("llama"), dtype=torch.float32, quantization_config=LowBitConfig(bits=4))
        with torch.no_grad():
            plain = base(ids).logits
            logits.append(PeftModel.from_pretrained(base, Path(folder) / source).eval()(ids).logits)
    assert (logits[0] - logits[1]).norm() <= RELATIVE * logits[1].norm()
    assert (plain - logits[1]).norm() > 20 * RELATIVE * logits[1].norm()


def test_ddp_leaves_codes_alone_and_nothing_else(tiny):
    """In every form of the model: DDP cannot send 16-bit integers, and must send all that is trained."""

    def left(model):
        return set(model._ddp_params_and_buffers_to_ignore) & {n for n, _ in model.named_parameters()}

    def codes(model):
        return {n for n, p in model.named_parameters() if p.dtype == torch.int16}

    base = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4))
    assert left(base) == codes(base) != set()
    train_scales(base, zeros=True)
    assert left(base) == codes(base) and not any(p.requires_grad for n, p in base.named_parameters() if n in left(base))
    adapted = worker.make(tiny("llama"))
    assert left(adapted) == codes(adapted) != set()
    assert left(load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4)).dequantize()) == set()
