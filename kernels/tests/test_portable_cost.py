"""Portable kernels neither spill registers nor load packed weights in small pieces, at their default tiles.

Counted as in ``test_cost``: the whole matrix of ``benchmarks/sass_cases.py``, for all targets. How many instructions a
weight takes is not limited here.
"""

import pytest
import triton
from sass_cases import TERNARY, Case, cases
from test_cost import sound

pytestmark = pytest.mark.skipif(triton.__version__ != "3.9.0", reason="counts are those of Triton 3.9.0")
INT4 = "int:bits=4,group_size=128,symmetric=False"
INT7 = INT4.replace("4", "7", 1)
QUICK = {
    *(Case("sm_80", kernel, INT4, "fp16", "portable") for kernel in ("gemv", "grouped")),
    *(
        Case("gfx942", "gemv", INT4, "fp16", "portable"),
        Case("gfx942", "gemm16", "int:bits=6,group_size=32", "fp32", "portable"),
        Case("gfx1100", "input_gradient", TERNARY, "fp16", "portable"),
        Case("sm_80", "input_gradient", INT7, "fp16", "portable"),
        Case("sm_80", "gemv", TERNARY, "fp16", "portable"),
        Case("sm_80", "hadamard", "block=64", "fp16", "portable"),
        Case("sm_80", "entropy", "rans", "u8", "portable"),
    ),
}


def _parameters():
    for case in cases():
        if case.form == "portable":
            marks = [] if case in QUICK else [pytest.mark.slow]
            yield pytest.param(case, marks=marks, id="-".join(vars(case).values()))


@pytest.mark.parametrize("case", list(_parameters()))
def test_weights_are_loaded_16_bytes_at_a_time_and_nothing_spills(case):
    sound(case)


def test_quick_cases_are_in_the_matrix():
    assert set(cases()) >= QUICK
