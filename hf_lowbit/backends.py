"""Which code runs a packed weight: kernels declare what they can do, one loop selects.

A backend is a family of kernels: ``triton`` (GPUs), ``native`` (CPUs), ``torch`` (anywhere). A :class:`Kernel` is a
frozen record with the function that runs it; :func:`select` takes the first one in order of preference that has no
objection, and :func:`explain` gives every objection, which is what ``hf-lowbit doctor`` prints. A user forces a
backend with ``LowBitConfig(backend=...)`` or the environment variable ``HF_LOWBIT_BACKEND``; one that cannot run then
is an error, not a fallback.
"""

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .formats import parse_format

BACKENDS = ("triton", "native", "torch")
ENVIRONMENT_VARIABLE = "HF_LOWBIT_BACKEND"


@dataclass(frozen=True)
class Problem:
    """What is to be run.

    Args:
        op: "linear", "linear_int8", "input_gradient", "dequantize", "embedding" or "rotate".
        format: Text of the format (:attr:`hf_lowbit.formats.Format.spec`); of "rotate" the name of the transform.
        device: Device type, such as "cpu" or "cuda".
        dtype: Dtype of the activations, or of the result where there are none.
    """

    op: str
    format: str
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Kernel:
    """One kernel and what it can run; ``None`` means no restriction.

    Args:
        backend: One of :data:`BACKENDS`.
        op: The op that it implements.
        run: The function, with the arguments of the op.
        formats: Names of formats.
        devices: Device types.
        dtypes: Activation dtypes.
        unavailable: Returns a reason why the kernel cannot run on this machine at all, or None.
    """

    backend: str
    op: str
    run: Callable
    formats: frozenset[str] | None = None
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    unavailable: Callable[[], str | None] | None = None

    def objection(self, problem: Problem) -> str | None:
        """Why this kernel cannot run ``problem``, or None if it can."""
        if self.op != problem.op:
            return f"implements {self.op}"
        if self.unavailable is not None and (reason := self.unavailable()):
            return reason
        if self.formats is not None and (name := parse_format(problem.format).name) not in self.formats:
            return f"does not read format {name!r}"
        if self.devices is not None and problem.device not in self.devices:
            return f"does not run on {problem.device!r}"
        if self.dtypes is not None and problem.dtype not in self.dtypes:
            return f"does not take {problem.dtype}"
        return None


KERNELS: list[Kernel] = []
KERNEL_MODULES = (".reference", ".native_backend", ".triton_backend")


def kernels() -> list[Kernel]:
    """All kernels, in order of preference; imports the modules that register them."""
    for module in KERNEL_MODULES:
        importlib.import_module(module, __package__)
    return KERNELS


def register_kernel(kernel: Kernel) -> Kernel:
    """Adds a kernel; kernels are tried in the order of :data:`BACKENDS`, then of registration."""
    if kernel.backend not in BACKENDS:
        raise ValueError(f"backend={kernel.backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    KERNELS.append(kernel)
    KERNELS.sort(key=lambda k: BACKENDS.index(k.backend))
    _select.cache_clear()
    return kernel


def check_backend(backend: str, source: str = "backend") -> str:
    """``backend`` if it is one of the known names or "auto"; ``source`` is the name of the option in the error.

    Raises:
        ValueError: otherwise.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{source}={backend!r} is unknown: use 'auto' or one of {', '.join(BACKENDS)}")
    return backend


def requested_backend(backend: str) -> str:
    """``backend``, or what the environment variable asks for where it is "auto"."""
    if backend != "auto":
        return backend
    return check_backend(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


def explain(problem: Problem, backend: str = "auto") -> list[tuple[str, str | None]]:
    """For every backend, the reason why it is passed over for ``problem``, or None if it can run."""
    wanted, result = requested_backend(backend), []
    for name in BACKENDS:
        candidates = [k for k in kernels() if k.backend == name and k.op == problem.op]
        if wanted not in ("auto", name):
            reason: str | None = f"backend {wanted!r} was asked for"
        elif not candidates:
            reason = f"has no kernel for {problem.op!r} in this version"
        else:
            objections = [k.objection(problem) for k in candidates]
            reason = None if None in objections else "; ".join(o for o in objections if o)
        result.append((name, reason))
    return result


def select(op: str, format: str, device: str, dtype: torch.dtype, backend: str = "auto") -> Kernel:
    """The kernel that runs this problem.

    Raises:
        RuntimeError: if none can, with every kernel's reason.
    """
    return _select(op, format, device, dtype, requested_backend(backend))


@functools.lru_cache(maxsize=4096)
def _select(op: str, format: str, device: str, dtype: torch.dtype, wanted: str) -> Kernel:
    problem = Problem(op, format, device, dtype)
    for kernel in kernels():
        if wanted in ("auto", kernel.backend) and kernel.objection(problem) is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(problem, wanted))
    raise RuntimeError(f"no backend can run {op} of {format} on {device} in {dtype} ({reasons})")
