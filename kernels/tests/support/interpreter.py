"""Mends Triton's interpreter, so that what passes in it means something in bfloat16 too.

The stock interpreter (Triton 3.9) keeps bfloat16 as uint16 bit patterns and does arithmetic and sums on those
patterns; it rounds float32 to bfloat16 by cutting bits off, and float32 to smaller floats with a carry that is lost;
and autotuning between several configs asks for a GPU. :func:`mend` replaces the methods at fault: bfloat16 is widened
to float32, computed, and rounded to nearest even, as machines do. It also saves most of the time of a call of a
device function, which looks the whole language up again.

Not mended: atomics on bfloat16, inline assembly. Programs still run one after another, so a race stays invisible; and
reads out of bounds still succeed, which is why tests pad their buffers with canaries.

Call it before the first kernel runs, in a process where ``TRITON_INTERPRET=1`` was set before Triton was imported.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import autotuner, interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_UNARY = ("create_erf", "create_rsqrt")  # those that do not go through `unary_op`
_TERNARY = ("create_clampf", "create_fma")


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, uint16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bfloat16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle):
    return TensorHandle(widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _rounded(handle: TensorHandle) -> TensorHandle:
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(round_to_bfloat16(handle.data), tl.bfloat16)


def _in_float32(method):
    """``method`` of the builder with bfloat16 operands widened, and its result rounded back."""

    @functools.wraps(method)
    def wrapped(self, *arguments):
        if not any(_is_bfloat16(a) for a in arguments):
            return method(self, *arguments)
        return _rounded(method(self, *(_widened(a) for a in arguments)))

    return wrapped


def _cast(stock):
    def cast_impl(self, source, type):
        target = type.scalar
        if _is_bfloat16(source):
            source = _widened(source)
            if target == tl.float32:
                return source
        if target == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return stock(self, source, type)

    return cast_impl


def _convert(stock):
    """Float to float: NumPy rounds to nearest even; other rounding modes and 8-bit floats stay with the stock."""
    wide = (tl.bfloat16, tl.float16, tl.float32, tl.float64)

    def create_fp_to_fp(self, source, type, rounding_mode):
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and source.dtype.scalar in wide and type.scalar in wide:
            return self.cast_impl(source, type)
        return stock(self, source, type, rounding_mode)

    return create_fp_to_fp


def _dot(stock):
    def create_dot(self, a, b, d, *rest):
        result = stock(self, _widened(a), _widened(b), _widened(d), *rest)
        return _rounded(result) if _is_bfloat16(d) else result

    return create_dot


def _reduce(stock):
    """Sums, maxima and scans of bfloat16 are taken, and returned, in float32, as compiled ones are."""

    def widened(tensor):
        if not _is_bfloat16(tensor.handle):
            return tensor
        return tl.core.tensor(_widened(tensor.handle), tl.block_type(tl.float32, tensor.shape))

    def apply(self, input):
        return stock(self, tuple(map(widened, input)) if isinstance(input, tuple) else widened(input))

    return apply


def _patch_once(stock):
    """Device functions patch the language again at every call; in a launch it is patched already."""

    def patch(function):
        seen = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        done = not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if done else stock(function)

    return patch


@functools.cache
def mend() -> None:
    """Applies the replacements; once a process."""
    builder = InterpreterBuilder
    for name in ("binary_op", "unary_op", *_UNARY, *_TERNARY):
        setattr(builder, name, _in_float32(getattr(builder, name)))
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _convert(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    interpreter.ReduceScanOpInterface.apply = _reduce(interpreter.ReduceScanOpInterface.apply)
    if not hasattr(builder, "get_bf16"):  # before Triton 3.9
        builder.get_bf16 = lambda self, value: _rounded(self.get_fp32(value))
    if hasattr(interpreter, "_LangPatchScope"):  # since Triton 3.6
        interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    # Without a device there is nothing to time: every config is as good, and the first one is taken.
    autotuner.Autotuner._bench = lambda self, *arguments, config, **meta: [1.0, 1.0, 1.0]
