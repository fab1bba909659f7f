"""The ``triton`` backend: :mod:`hf_lowbit.lowbit_kernels` on GPUs.

The kernels are a project of their own that knows nothing of this package; here they are registered with what they can
run. Neither Triton nor a device is touched before a kernel is asked for. Where ``TRITON_INTERPRET=1`` was set when
this module was imported, Triton interprets its kernels and they run on CPU tensors, slowly: that is how they are
tested where there is no GPU.
"""

import functools
import importlib
import importlib.util
import os

import torch

from .backends import Kernel, register_kernel
from .formats import KERNEL_FORMATS
from .transforms.hadamard import signs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = frozenset({"cuda", "xpu"} | ({"cpu"} if INTERPRETED else set()))
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


@functools.cache
def unavailable() -> str | None:
    """What is missing on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install 'hf-lowbit[triton]'"
    if not (INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()):
        return "needs a GPU and a build of torch that supports it; torch finds none"
    return None


def _kernels():
    return importlib.import_module(".lowbit_kernels", __package__)


def _run(op: str, *arguments):
    return getattr(_kernels(), op)(*arguments)


def _rotate(x: torch.Tensor, inverse: bool) -> torch.Tensor:
    """:func:`hf_lowbit.transforms.hadamard.rotate`: signs are exact in every dtype, the rest is one kernel."""
    hadamard = importlib.import_module(".lowbit_kernels.hadamard", __package__).hadamard
    s = signs(x.shape[-1], x.dtype, x.device)
    return hadamard(x, inverse) * s if inverse else hadamard(x * s)


def explain_forms(device: torch.device, format: str, dtype: torch.dtype) -> tuple[str, list[tuple[str, str | None]]]:
    """What a device is to the kernels, and for every form of their ``linear`` why it is passed over there, or None.

    ``device`` has to be one that this backend runs on. Raises ValueError for an ``HF_LOWBIT_FORM`` that is unknown.
    """
    forms, layout = _kernels().forms, _kernels().parse(format)
    record = forms.describe(device)
    return str(record), forms.explain(record, layout, dtype)


for _op in ("linear", "input_gradient", "dequantize", "embedding"):
    register_kernel(
        Kernel(
            backend="triton",
            op=_op,
            run=functools.partial(_run, _op),
            formats=KERNEL_FORMATS,
            devices=DEVICES,
            dtypes=DTYPES,
            unavailable=unavailable,
        )
    )
register_kernel(
    Kernel(backend="triton", op="rotate", run=_rotate, devices=DEVICES, dtypes=DTYPES, unavailable=unavailable)
)
