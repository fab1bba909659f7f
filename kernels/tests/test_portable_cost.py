"""Portable kernels neither spill registers nor load packed weights in small pieces, at their default tiles.

Counted as in ``test_cost``: every kernel and width on all targets with float16 and asymmetric grids, and some with
bfloat16 or a symmetric grid. How many instructions a weight takes is not limited here.
"""

import sys

import pytest
import triton
from test_cost import BENCHMARKS, SHARED_BYTES, count

sys.path.insert(0, str(BENCHMARKS))
from sass_report import AMD, HADAMARD, NVIDIA, PORTABLE_ROWS, ROWS, Case, formats

pytestmark = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="counts are those of Triton 3.9.0")
INT4 = "int:bits=4,group_size=128,symmetric=False"
INT7 = INT4.replace("4", "7", 1)
QUICK = {
    *(("sm_80", kernel, INT4, "fp16") for kernel in ("gemv", "grouped")),
    *(
        ("gfx942", "gemv", INT4, "fp16"),
        ("sm_80", "input_gradient", INT7, "fp16"),
        ("sm_80", "hadamard", "block=64", "fp16"),
    ),
}


def _parameters():
    asymmetric = [format for format in formats() if "symmetric=True" not in format]
    for target in (*NVIDIA, *AMD):
        cases = [(kernel, format, "fp16") for kernel in (*ROWS, *PORTABLE_ROWS) for format in asymmetric]
        cases += [(kernel, INT4, "bf16") for kernel in ("gemv", "gemm64", "dequantize")]
        cases += [(kernel, INT7, "bf16") for kernel in ("gemv", "input_gradient")]
        cases += [("gemm16", INT7.replace("False", "True"), "fp16")]
        small = [f"int:bits={bits},group_size=32" for bits in (4, 7)]
        cases += [
            (kernel, format, "fp16")
            for kernel in ("gemv", "gemm64", "input_gradient", "dequantize")
            for format in small
        ]
        cases += [("hadamard", f"block={n}", dtype) for n in HADAMARD for dtype in ("fp16", "bf16")]
        for kernel, format, dtype in cases:
            key = (target, kernel, format, dtype)
            marks = [] if key in QUICK else [pytest.mark.slow]
            yield pytest.param(Case(*key, "portable"), marks=marks, id="-".join(key))


@pytest.mark.parametrize("case", list(_parameters()))
def test_weights_are_loaded_16_bytes_at_a_time_and_nothing_spills(case):
    found = count(case)
    assert isinstance(found, dict), found
    assert found["spills"] == 0
    assert found["load_bits"] == 128
    assert found["shared_bytes"] <= SHARED_BYTES[case.target]
