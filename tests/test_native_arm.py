"""The NEON kernels, compiled by a cross compiler and run by an emulator of another processor; skipped without either.

On Debian: ``apt-get install g++-aarch64-linux-gnu qemu-user``. What is expected is computed here by plain PyTorch and
handed over in a file (``kernels/cpu/check.cpp`` reads it): decoded values bit by bit, products within the bounds of
``test_native.py`` and ``test_int8.py``. QEMU computes as the processor would; it says nothing about speed.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from test_int8 import bound as int8_bound
from test_native import bound, packed
from test_native_edges import SIZES, SPECS, code_bits

from hf_lowbit import native_backend as native
from hf_lowbit import reference
from hf_lowbit.formats import parse_format
from hf_lowbit.formats.scales import decode_scales

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR, "cmake") if shutil.which(name) is None]
KERNELS = Path(__file__).parent.parent / "kernels"


def case(spec: str, N: int, K: int, seed: int) -> bytes:
    """One case of the file: a random weight, three rows of activations, and what is expected of them."""
    weight, companions, text = packed(spec, N, K, seed)
    described, format = native._Described(weight, companions, text, K), parse_format(text)
    tensors = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    x = torch.randn(3, K)
    values = {dtype: reference.dequantize(weight, companions, text, K, dtype) for dtype in native.DTYPES}
    exact = values[torch.float32].double()
    in_8_bits = reference.linear_int8(x, weight, companions, None, text, K).double()
    none = torch.zeros(N)
    levels8, steps8 = described.int8_table[:2]
    scale_table = None
    if described.record.scale_table:
        every = {**tensors, "_scales": torch.arange(256, dtype=torch.uint8)}
        scale_table = decode_scales(every, format.scale_dtype)
    levels = described.levels if described.record.table else None
    record = described.record
    arrays = [
        *(weight, tensors.get("_scales"), scale_table, tensors.get("_zeros"), levels),
        *(format.unpack(tensors, (N, K)).codes.contiguous(), *values.values()),
        *(x, x.double() @ exact.T, bound(x.double(), exact, none.double(), torch.float32)),
        *(levels8, steps8, in_8_bits, int8_bound(x, weight, companions, none, text, K, in_8_bits, torch.float32)),
    ]
    head = (N, K, record.group, code_bits(spec), record.scale, record.zero, record.table)
    parts = [struct.pack("<7qdq", *head, record.fixed_zero, len(x))]
    for array in arrays:
        data = b"" if array is None else bytes(array.contiguous().view(torch.uint8).reshape(-1).numpy())
        parts.append(struct.pack("<q", len(data)) + data)
    return b"".join(parts)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not on this machine: {', '.join(MISSING)}")
def test_neon_kernels_give_what_plain_pytorch_gives(tmp_path):
    shapes = [(N, K) for N in SIZES for K in SIZES if N < 577]
    cases = [case(spec, N, K, seed) for spec in SPECS for seed, (N, K) in enumerate(shapes)]
    (tmp_path / "cases").write_bytes(struct.pack("<q", len(cases)) + b"".join(cases))
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", KERNELS, "-B", build, "-DLOWBIT_CHECK=ON", *options],
        ["cmake", "--build", build, "--target", "lowbit_check", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    command = [EMULATOR, build / "lowbit_check", tmp_path / "cases"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"{len(cases)} cases on neondot,neon,portable: 0 failures" in done.stdout
