"""Portable kernels neither spill registers nor load packed weights in small pieces, at their default tiles.

Counted as in ``test_cost``, for four of the seven targets: an old and a new one of NVIDIA's, and both of AMD's. float16
and asymmetric grids stand for the rest, and how many instructions a weight takes is not limited here. Rows that load
less than 16 bytes at a time, or spill, are listed with what was measured, and expected to fail, strictly. 16 bytes of a
1-bit plane are 128 weights for a thread: too many after a plane of 4 bits, and in gradients always.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from test_cost import BENCHMARKS, count

sys.path.insert(0, str(BENCHMARKS))
from sass_report import Case, formats

pytestmark = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="counts are those of Triton 3.9.0")
TARGETS = ("sm_80", "sm_120", "gfx942", "gfx1100")
KERNELS = ("gemv", "gemm16", "gemm64", "input_gradient", "dequantize")
INT4 = "int:bits=4,group_size=128,symmetric=False"
QUICK = (("sm_80", "gemv"), ("gfx942", "gemv"))
_MISSED = json.loads(Path(__file__).with_name("portable_not_reached.json").read_text())
NOT_REACHED = {tuple(key): f"loads of {bits} bits, {spills} spills" for *key, bits, spills in _MISSED}
_BUTTERFLIES = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import sass_report as report, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path.insert(0, str(report.KERNELS))
from lowbit_kernels.hadamard import butterfly_kernel
target, block = sys.argv[2], int(sys.argv[3])
constants = {"BLOCK": block, "STAGES": block.bit_length() - 1, "BLOCK_R": max(1, 1024 // block)}
signature = {"x": "*fp16", "out": "*fp16", "rows": "i32", "scale": "fp32", **dict.fromkeys(constants, "constexpr")}
source = ASTSource(butterfly_kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in (0, 1)})
amd = target in report.AMD
made = GPUTarget("hip", target, report.AMD[target]) if amd else GPUTarget("cuda", int(target[3:]), 32)
compiled = triton.compile(source, target=made, options={"num_warps": 4})
if amd:
    print(int(re.search(r"\\.vgpr_spill_count:\\s+(\\d+)", compiled.asm["amdgcn"])[1]))
else:
    text = report._tool(triton.knobs.nvidia.nvdisasm.path, compiled.asm["cubin"], "-c")
    print(len(re.findall(r"\\b(?:STL|LDL)\\b", text)))
"""


def _parameters():
    for target in TARGETS:
        for kernel in KERNELS:
            for format in formats():
                if "symmetric=True" in format:
                    continue
                key, marks = (target, kernel, format), []
                if format != INT4 or (target, kernel) not in QUICK:
                    marks.append(pytest.mark.slow)
                if key in NOT_REACHED:
                    marks.append(pytest.mark.xfail(strict=True, reason=f"measured: {NOT_REACHED[key]}"))
                yield pytest.param(Case(target, kernel, format, "fp16", "portable"), marks=marks, id="-".join(key))
        for kernel in ("embedding", "grouped"):
            yield pytest.param(
                Case(target, kernel, INT4, "fp16", "portable"), marks=pytest.mark.slow, id=f"{target}-{kernel}"
            )


@pytest.mark.parametrize("case", list(_parameters()))
def test_weights_are_loaded_16_bytes_at_a_time_and_nothing_spills(case):
    (found,) = count([case])
    assert isinstance(found, dict), found
    assert found["spills"] == 0
    assert found["load_bits"] == 128


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 64, 1024, 4096])
@pytest.mark.parametrize("target", TARGETS)
def test_butterflies_do_not_spill(target, block):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", _BUTTERFLIES, str(BENCHMARKS), target, str(block)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) == 0
