"""Packed repos load in processes that never import this package, at no cost to those that do not need it.

Every test runs fresh interpreters. What is claimed of cost is structure (which modules an import brings in, and that
no device is asked), since timings on a shared machine say little; the import's own time is measured and shown by
``pytest -rP``.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import load

from hf_lowbit import LowBitConfig

LOAD = "import sys, transformers; model = transformers.AutoModelForCausalLM.from_pretrained({!r});"
# Stands for a machine where the package is not installed.
ABSENT = "import sys; sys.modules['hf_lowbit'] = None;"
OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
REPOS = {
    "int4": ("llama", {"bits": 4}),
    "int8": ("llama", {"bits": 8}),
    "int8-symmetric-row": ("llama", {"bits": 8, "symmetric": True, "group_size": "row"}),
    "int1": ("llama", {"bits": 1}),
    "nf": ("llama", {"bits": 4, "format": "nf"}),
    "fp4": ("llama", {"format": "fp4"}),
    "codebook": ("llama", {"bits": 4, "format": "codebook"}),
    "ternary": ("llama", {"bits": 1.58}),
    "gpt2": ("gpt2", {"bits": 4}),
    "gpt2-int8": ("gpt2", {"bits": 8}),
    "tied-packed": ("llama-tied", {"bits": 8, "rules": {".*embed_tokens": {"bits": 8}}}),
    "t5": ("t5", {"bits": 4}),
    "only-embedding": ("llama", {"bits": 8, "rules": {".*embed_tokens": {"bits": 8}, ".*": None}}),
}


@pytest.fixture(scope="module")
def repos(tiny, tmp_path_factory):
    """``{name: folder}`` of one packed repo for every line of REPOS."""
    folders = {}
    for key, (name, options) in REPOS.items():
        folders[key] = str(tmp_path_factory.mktemp(key))
        model = load(name, tiny(name), quantization_config=LowBitConfig(**options))
        model.save_pretrained(folders[key])
    return folders


def test_packed_repo_loads_without_an_import(repos, python):
    code = (
        "import sys, torch\n"
        "names = ('hf_lowbit', 'transformers', 'peft', 'accelerate', 'safetensors', 'huggingface_hub')\n"
        "found = {m for m in sys.modules if m.partition('.')[0] in names}\n"
        "assert found == {'hf_lowbit', 'hf_lowbit.version', 'hf_lowbit._autoload'}, found\n"
        # The finder is there once, steps aside for every other name, and after its one use.
        "from hf_lowbit._autoload import _Finder, install\n"
        "install(); assert sys.meta_path.count(_Finder) == 1 and _Finder.find_spec('json') is None\n"
        "import transformers.quantizers; assert sys.meta_path.count(_Finder) == 1\n"
        "import peft; assert _Finder not in sys.meta_path\n"
        "install(); assert _Finder not in sys.meta_path\n"
    )
    result = python(code + LOAD.format(repos["int4"]) + "print(type(model.model.layers[0].mlp.up_proj).__name__)")
    assert result.stdout.strip() == "LowBitLinear"


@pytest.mark.parametrize("switch", [{"HF_LOWBIT_AUTOLOAD": "0"}, OFF], ids=str)
def test_switches_turn_it_off_and_an_import_on_again(switch, repos, python):
    code = (
        "import sys, torch; before = set(sys.modules); import transformers.quantizers\n"
        "assert 'hf_lowbit.quantizer' not in sys.modules\n"
        f"try:\n    {LOAD.format(repos['int4'])}\n"
        "except RuntimeError as error: print('refused')\n"
        f"import hf_lowbit\n{LOAD.format(repos['int4'])}\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    result = python(code, **switch)
    assert result.stdout.split() == ["refused", "LowBitLinear"]
    assert "Unknown quantization type, got lowbit" in result.stderr


# One process that tries every repo: the loads must raise, each for itself.
TRY_ALL = """
import json, sys, transformers, torch
results = {}
for key, (folder, auto) in json.loads(sys.argv[1]).items():
    try:
        getattr(transformers, auto).from_pretrained(folder)
        results[key] = "loaded"
    except Exception as error:
        results[key] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


def test_without_the_package_every_packed_repo_fails_loudly(repos):
    autos = {"t5": "AutoModelForSeq2SeqLM"}
    jobs = {key: (folder, autos.get(REPOS[key][0], "AutoModelForCausalLM")) for key, folder in repos.items()}
    code = [sys.executable, "-c", ABSENT + TRY_ALL, json.dumps(jobs)]
    result = subprocess.run(code, env={**os.environ, **OFF}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert {key for key, outcome in outcomes.items() if not outcome.startswith("RuntimeError")} == set()
    assert all("mismatch" in outcome.lower() or "size" in outcome.lower() for outcome in outcomes.values()), outcomes


def test_a_failure_to_register_breaks_neither_torch_nor_transformers(python):
    code = (
        "import torch, hf_lowbit\n"
        "def register(): raise RuntimeError('not today')\n"
        "hf_lowbit.register = register\n"
        "import transformers\n"
        "print(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig("
        "hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)).dtype)"
    )
    result = python(code)
    assert result.stdout.strip() == "torch.float32"
    assert "hf_lowbit could not register with transformers: RuntimeError('not today')" in result.stderr


def test_own_import_is_small_and_probes_no_device(python):
    code = (
        "import sys, time, torch\n"
        "before = set(sys.modules); from hf_lowbit import _autoload; _autoload.install()\n"
        "hook = sorted(set(sys.modules) - before); sys.meta_path.remove(_autoload._Finder)\n"
        "import transformers.quantizers.auto, transformers.modeling_utils, transformers.core_model_loading\n"
        "def probe(*args, **kwargs): raise AssertionError('a device was asked for')\n"
        "for name in ('is_available', 'device_count', 'get_device_capability', 'current_device', 'init'):\n"
        "    setattr(torch.cuda, name, probe)\n"
        "torch.accelerator.is_available = torch.accelerator.current_accelerator = probe\n"
        "for name in [m for m in sys.modules if m.startswith('hf_lowbit')]: del sys.modules[name]\n"
        "before = set(sys.modules); start = time.process_time()\n"
        "import hf_lowbit; hf_lowbit.register(); hf_lowbit.LowBitConfig\n"
        "seconds = time.process_time() - start\n"
        "assert not torch.cuda.is_initialized()\n"
        "import json; print(json.dumps([seconds, hook, sorted(set(sys.modules) - before)]))"
    )
    seconds, hook, modules = json.loads(python(code, **OFF).stdout)
    assert hook == ["hf_lowbit", "hf_lowbit._autoload", "hf_lowbit.version"]
    print(f"import hf_lowbit, registration included: {1000 * seconds:.1f} ms beyond torch and transformers")
    # Besides our own modules: nothing heavy. Whoever adds a dependency here pays for it in every process.
    foreign = {m.partition(".")[0] for m in modules} - {"hf_lowbit"} - sys.stdlib_module_names
    assert foreign <= {"transformers"}, foreign
    lazy = ("hf_lowbit.cli", "hf_lowbit.hub", "hf_lowbit.reference", "hf_lowbit.methods.", "hf_lowbit.lowbit_kernels")
    assert {m for m in modules if m.startswith(lazy)} <= {"hf_lowbit.methods.base"}
