"""One kernel that asks the tensor cores a question; see ``gpu_check.py``."""

import triton
import triton.language as tl


@triton.jit
def subnormal_kernel(out):
    """``out`` (16, 16), float32: entry (i, j) is the float16 of the bits ``16 * i + j``, taken through ``tl.dot``."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    bits = (16 * i + j).to(tl.int16)
    one = tl.where(i == j, 1.0, 0.0).to(tl.float16)
    tl.store(out + 16 * i + j, tl.dot(bits.to(tl.float16, bitcast=True), one))
