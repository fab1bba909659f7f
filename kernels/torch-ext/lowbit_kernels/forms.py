"""Which code computes ``x @ W.T``: every form declares what it can run, one loop selects and can say why.

The forms, in order of preference:

- ``subnormal`` (float16), ``lop3`` (float16) and ``magic`` (bfloat16) are :mod:`.fast`: NVIDIA's inline assembly, W
  decoded in pairs on the way to the tensor cores. ``lop3`` is never preferred; it is there for a device whose tensor
  cores should turn out not to keep float16 subnormals.
- ``portable`` is :mod:`.matmul`: no assembly, every format, float32 too; AMD, Intel and the interpreter.
- ``unpacked`` writes W out in the dtype of x, some rows at a time, and leaves the product to torch. It costs a fixed
  4 bytes of traffic a weight and is first only from so many rows of x on as the device's file in ``tuning`` says.

Why that order, for any number of rows below that: in compiled code a fast form takes about 2 instructions a weight for
16 rows of x, the portable one 9 to 20 for 64, so per row the fast form is cheaper however many rows there are. This
is counting. Nothing here was timed; ``benchmarks/gpu_check.py`` times it.

A user narrows the choice with ``HF_LOWBIT_FORM``: names of forms, separated by commas, tried in that order. If none of
them can run a problem, that is an error with every reason. No device is looked at before the first call.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from . import fast, tuning
from .layout import Layout

ENVIRONMENT_VARIABLE = "HF_LOWBIT_FORM"
HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Device:
    """What a form is chosen by.

    Args:
        vendor: "nvidia", "amd", "intel", or "interpreter" for Triton's interpreter.
        architecture: "sm_90", "gfx942"; empty where there is no such name.
        multiprocessors: How many there are, 0 if unknown.
    """

    vendor: str
    architecture: str = ""
    multiprocessors: int = 0

    @property
    def capability(self) -> int:
        """Ten times NVIDIA's compute capability, 90 for 9.0; 0 for others."""
        return int(self.architecture[3:]) if self.architecture.startswith("sm_") else 0

    @property
    def warp(self) -> int:
        """Threads in a warp: 64 on AMD's CDNA (gfx9), else 32."""
        return 64 if self.architecture.startswith("gfx9") else 32

    @property
    def registers(self) -> dict[str, int]:
        """Said to NVIDIA's assembler, which else saves registers in matrix-vector kernels and spills a few."""
        return {"maxnreg": fast.REGISTERS} if self.vendor == "nvidia" else {}

    def __str__(self) -> str:
        return f"{self.vendor} {self.architecture}".strip()


@functools.cache
def describe(device: torch.device) -> Device:
    """The record of a real device; a device without an index is the current one."""
    if device.type == "cpu" or triton.knobs.runtime.interpret:
        return Device("interpreter")
    if device.type != "cuda":
        return Device("intel")
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip:
        return Device("amd", properties.gcnArchName.partition(":")[0], count)
    return Device("nvidia", f"sm_{properties.major}{properties.minor}", count)


@dataclass(frozen=True)
class Form:
    """One way to compute the product and what it can run; ``None`` means no restriction.

    Args:
        name: What it is called.
        dtypes: Dtypes of x.
        reads: Whether it reads a layout.
        vendors: Vendors of devices.
        least_capability: Of NVIDIA devices, as :attr:`Device.capability`.
    """

    name: str
    dtypes: frozenset[torch.dtype] | None = None
    reads: Callable[[Layout], bool] | None = None
    vendors: frozenset[str] | None = None
    least_capability: int = 0

    def objection(self, device: Device, layout: Layout, dtype: torch.dtype) -> str | None:
        """Why it cannot run that, or None if it can."""
        if self.vendors is not None and device.vendor not in self.vendors:
            return f"is for {', '.join(sorted(self.vendors))}, not {device}"
        if device.vendor == "nvidia" and device.capability < self.least_capability:
            return f"needs sm_{self.least_capability} or newer, not {device.architecture}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        if self.reads is not None and not self.reads(layout):
            return f"does not read {layout.name} of {layout.bits} bits in groups of {layout.group or 'a row'}"
        return None


def _fast(name: str, dtype: torch.dtype) -> Form:
    reads = functools.partial(fast.reads, form=name)
    return Form(name, frozenset({dtype}), reads, frozenset({"nvidia"}), least_capability=80)


FAST = (_fast("subnormal", torch.float16), _fast("lop3", torch.float16), _fast("magic", torch.bfloat16))
PORTABLE = Form("portable", HALVES | {torch.float32})
UNPACKED = Form("unpacked", HALVES)
FORMS = (*FAST, PORTABLE, UNPACKED)
NAMES = tuple(form.name for form in FORMS)


def requested(names: str | None = None) -> tuple[Form, ...] | None:
    """The forms that ``names`` (comma-separated), or else the environment variable, asks for, in that order; or None.

    Raises:
        ValueError: for a name that is unknown.
    """
    source, text = ("form", names) if names else (ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE))
    return _parse(source, text) if text else None


@functools.cache
def _parse(source: str, text: str) -> tuple[Form, ...]:
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in NAMES]:
        raise ValueError(f"{source}={text!r}: {unknown[0]!r} is unknown: use one or more of {', '.join(NAMES)}")
    return tuple(FORMS[NAMES.index(name)] for name in wanted)


def explain(
    device: Device, layout: Layout, dtype: torch.dtype, names: str | None = None
) -> list[tuple[str, str | None]]:
    """For every form, why it is passed over, or None if it can run; the first that can is taken for few rows."""
    wanted = requested(names) or FORMS
    order = (*wanted, *(form for form in FORMS if form not in wanted))
    return [
        (form.name, form.objection(device, layout, dtype) if form in wanted else "is not among those asked for")
        for form in order
    ]


def choose(device: Device, layout: Layout, dtype: torch.dtype, rows: int, names: str | None = None) -> Form:
    """The form that computes ``rows`` rows of x in ``dtype`` on ``device``.

    Raises:
        ValueError: if none of the forms that were asked for can, with every reason.
    """
    return _choose(device, layout, dtype, rows >= tuning.unpack_rows(device.architecture), requested(names))


@functools.lru_cache(maxsize=4096)
def _choose(device: Device, layout: Layout, dtype: torch.dtype, many: bool, wanted: tuple[Form, ...] | None) -> Form:
    for form in wanted or ((UNPACKED, *FORMS) if many else FORMS):
        if form.objection(device, layout, dtype) is None:
            return form
    reasons = "; ".join(f"{form.name} {form.objection(device, layout, dtype)}" for form in wanted or FORMS)
    raise ValueError(f"no form that was asked for can run {layout.name} of {layout.bits} bits here: {reasons}")
