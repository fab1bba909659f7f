"""Portable kernels neither spill registers nor load packed weights in small pieces, at their default tiles.

Counted as in ``test_cost``: every format on an old and a new target of NVIDIA's and on both of AMD's; the widths that
take most registers on the other three; some with bfloat16 and with a symmetric grid, for which float16 and asymmetric
grids stand otherwise. How many instructions a weight takes is not limited here. Rows that load less than 16 bytes at a
time, or spill, are listed with what was measured, and expected to fail, strictly.

Listed are gradients of weights with a 1-bit plane: 16 bytes of it are 128 weights for a thread, and they load 8. Two
ways to load 16 were compiled. Two warps instead of four for the same tile spill 0, 7, 9 and 0 at 1, 3, 5 and 7 bits on
sm_120 and 8, 12, 33 and 53 on gfx1100; with half the rows of the gradient, which decodes every weight twice as often,
still 9 at 1 bit. Two blocks one after another, as sums over the inputs do, spill 57 at 1 bit and 239 at 7 on gfx1100.
The grouped kernel on sm_120 is listed because the load cannot be told from its line there (0 bits); it does not spill.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from test_cost import BENCHMARKS, SHARED_BYTES, count

sys.path.insert(0, str(BENCHMARKS))
from sass_report import Case, formats

pytestmark = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="counts are those of Triton 3.9.0")
TARGETS = ("sm_80", "sm_120", "gfx942", "gfx1100")
OTHERS = ("sm_89", "sm_90", "sm_100")
HEAVY = tuple(f"int:bits={bits},group_size=128,symmetric=False" for bits in (5, 6, 7))
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
        more = [(kernel, INT4, "fp16") for kernel in ("embedding", "grouped")]
        more += [(kernel, INT4, "bf16") for kernel in ("gemv", "gemm64", "input_gradient", "dequantize")]
        yield from _slow(
            target, [*more, ("gemv", HEAVY[0], "bf16"), ("gemm16", HEAVY[2].replace("False", "True"), "fp16")]
        )
    for target in OTHERS:
        yield from _slow(target, [(kernel, format, "fp16") for kernel in ("gemv", "gemm64") for format in HEAVY])


def _slow(target, cases):
    for kernel, format, dtype in cases:
        name = f"{target}-{kernel}-{format}-{dtype}"
        marks = [pytest.mark.slow]
        if (reason := NOT_REACHED.get((target, kernel, format))) is not None:
            marks.append(pytest.mark.xfail(strict=True, reason=f"measured: {reason}"))
        yield pytest.param(Case(target, kernel, format, dtype, "portable"), marks=marks, id=name)


@pytest.mark.parametrize("case", list(_parameters()))
def test_weights_are_loaded_16_bytes_at_a_time_and_nothing_spills(case):
    (found,) = count([case])
    assert isinstance(found, dict), found
    assert found["spills"] == 0
    assert found["load_bits"] == 128
    assert found["shared_bytes"] <= SHARED_BYTES[case.target]


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 64, 1024, 4096])
@pytest.mark.parametrize("target", TARGETS)
def test_butterflies_do_not_spill(target, block):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", _BUTTERFLIES, str(BENCHMARKS), target, str(block)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) == 0
