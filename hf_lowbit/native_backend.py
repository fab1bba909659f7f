"""The ``native`` backend: kernels in C++ for CPUs, called through a C interface.

``kernels/cpu`` builds one shared library that knows nothing of torch; this module finds it beside the Triton kernels,
describes a packed weight to it by plain pointers, and registers what it can run. One row of activations is multiplied
while the weight is decoded, more rows, and gradients, with decoded panels. Where that is slower than torch's own matrix
product (:data:`FEW_ROWS` says from how many rows on), rows of the weight are decoded into a buffer of
:data:`BUFFER_BYTES` and handed to it. All is float32 whatever the dtype, since half precision is slow on most CPUs, but
from :data:`FEW_BFLOAT16_ROWS` rows on bfloat16 where the processor multiplies it.

Threads are those of torch's OpenMP where its library has libgomp's interface, else a pool of the library's own.

Where the library is missing (no compiler when the package was installed), or is that of another version, the backend
says so and plain PyTorch serves.
"""

import ctypes
import functools
import sys
import threading
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F

from . import __path__ as _package_path
from . import native_codec
from .backends import Kernel, register_kernel
from .formats import KERNEL_FORMATS, Format, parse_format
from .formats.lookup import LookupFormat
from .formats.scales import decode_scales
from .int8 import int8_levels

LIBRARY = "liblowbit_cpu.so"
VERSION = 4
FEW_ROWS = {"portable": 3, **dict.fromkeys(("avx512bf16", "avx512vbmi", "avx512vnni", "avx512"), sys.maxsize)}
"""Rows of activations from which torch's float32 product is faster than panels, by instruction set; others: 64.

Measured on Zen 5 with two threads, 4096 x 4096 at 4 bits: panels of AVX-512 are twice as fast as torch at 64 to 512
rows (``benchmarks/cpu_layers.py``); those of AVX2, forced by ``lowbit_force_isa``, 1.25 times at 64 and 0.9 times at
256, and plain loops far slower at 8. Not measured on other processors.
"""
FEW_GRADIENT_ROWS = {**FEW_ROWS, "avx2": sys.maxsize}
"""The same of gradients. Panels of AVX2, forced, take 0.73 to 0.84 of torch's time at 64 and 256 rows."""
FEW_BFLOAT16_ROWS = 32  # from which bfloat16 is multiplied as such, where the processor does that (also in the library)
CALL_ROWS = 256  # of one call, so that float32 activations stay in the last cache while panel after panel meets them
BUFFER_BYTES = 2**21  # what a core's second cache holds, more or less
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SCALES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
_STREAM, _FLOAT16_ZERO = 1, 2
_SHARED, _BY_ROW = 1, 2
_BAD_ARGUMENT = -2
_buffers = threading.local()


class _Weight(ctypes.Structure):
    """``lowbit_weight`` of ``kernels/cpu/lowbit_cpu.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "scale_table", "zeros", "levels")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "group")),
        *((name, ctypes.c_int32) for name in ("bits", "scale", "zero", "table")),
        ("fixed_zero", ctypes.c_float),
    ]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found = [path for folder in _package_path if (path := Path(folder) / "lowbit_kernels" / LIBRARY).is_file()]
    if not found:
        return None, "was not built: install a C++ compiler (gcc or clang) and this package again"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"its library cannot be loaded: {error}"
    if library.lowbit_version() != VERSION:
        return None, "its library is that of another version: install this package again"
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.lowbit_linear.argtypes = [pointer, pointer, pointer, pointer, number, flag, flag]
    library.lowbit_linear_int8.argtypes = [pointer, pointer, pointer, pointer, pointer, pointer, number, flag, flag]
    library.lowbit_dequantize.argtypes = [pointer, pointer, number, number, pointer, flag, flag]
    library.lowbit_input_gradient.argtypes = [pointer, pointer, pointer, number, flag, flag]
    library.lowbit_low_rank.argtypes = [*[pointer] * 5, number, flag, flag]
    library.lowbit_low_rank_gradients.argtypes = [*[pointer] * 8, number, flag, flag]
    library.lowbit_pack.argtypes = library.lowbit_unpack.argtypes = [pointer, pointer, number, number, flag, flag]
    native_codec.declare(library)
    library.lowbit_isa.restype = library.lowbit_isas.restype = ctypes.c_char_p
    library.lowbit_force_isa.argtypes = [ctypes.c_char_p]
    library.lowbit_use_openmp.argtypes = [pointer]
    openmp = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if openmp is not None:
        library.lowbit_use_openmp(ctypes.cast(openmp, pointer))
    return library, None


def library() -> ctypes.CDLL:
    """The library; only where :func:`unavailable` gives no reason."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"the CPU kernels {reason}")
    return loaded


def unavailable() -> str | None:
    """What is missing on this machine, or None."""
    return _load()[1]


class _Described:
    """A packed weight as the library sees it, with all that its pointers point to but ``weight`` itself."""

    def __init__(self, weight: torch.Tensor, companions: list[torch.Tensor], spec: str, in_features: int):
        format = parse_format(spec)
        self.key = _key(weight, companions, spec, in_features)
        tensors = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
        for suffix, (shape, dtype) in format.tensors((weight.shape[0], in_features)).items():
            if tensors[suffix].shape != shape or tensors[suffix].dtype != dtype:
                raise ValueError(
                    f"a packed weight of {weight.shape[0]} x {in_features} in {spec} has `weight{suffix}` of shape "
                    f"{tuple(shape)} and {dtype}, not {tuple(tensors[suffix].shape)} and {tensors[suffix].dtype}"
                )
        tensors = {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
        self.record = _Weight(codes=tensors[""].data_ptr(), rows=weight.shape[0], inputs=in_features)
        self.record.group = max(0, format.group_size)
        self.record.bits = int(format.bits) if format.name != "ternary" else 0
        kept = [t for t in tensors.values() if t is not weight]  # which would keep itself alive: it is the key
        self.alive = [*kept, *self._scales(tensors, format), *self._grid(tensors, format)]
        self.pointer = ctypes.addressof(self.record)

    def _scales(self, tensors: dict[str, torch.Tensor], format: Format) -> list[torch.Tensor]:
        scales = tensors.get("_scales")
        if scales is None:
            return []
        self.record.scales, self.record.scale = scales.data_ptr(), _SCALES[scales.dtype]
        if scales.dtype != torch.uint8:
            return []
        table = decode_scales({**tensors, "_scales": torch.arange(256, dtype=torch.uint8)}, format.scale_dtype)
        self.record.scale_table = table.data_ptr()
        return [table]

    def _grid(self, tensors: dict[str, torch.Tensor], format: Format) -> list[torch.Tensor]:
        if isinstance(format, LookupFormat):
            self.levels = levels = (
                format.table(tensors.get("_codebook"), torch.device("cpu")).to(torch.float32).contiguous()
            )
            self.record.levels = levels.data_ptr()
            self.record.table = _BY_ROW if "_scales" not in tensors else _SHARED
            return [levels]
        zeros = tensors.get("_zeros")
        if zeros is None:
            self.record.fixed_zero = getattr(format, "fixed_zero", 0)
            return []
        self.record.zeros = zeros.data_ptr()
        self.record.zero = _STREAM if zeros.dtype == torch.uint8 else _FLOAT16_ZERO
        return []

    @functools.cached_property
    def int8_table(self) -> tuple[torch.Tensor | None, torch.Tensor | None, int | None, int | None]:
        """Levels in 8 bits and steps as the library wants them, and where they lie; nothing without a table."""
        if not self.record.table:
            return None, None, None, None
        levels, steps = int8_levels(self.levels)
        levels = (levels.to(torch.int16) + 128).to(torch.uint8).contiguous()
        return levels, steps, levels.data_ptr(), steps.data_ptr()


_described: dict[int, tuple[weakref.ref, _Described]] = {}  # by id of the weight


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _key(weight: torch.Tensor, companions: list[torch.Tensor], spec: str, in_features: int) -> tuple:
    """What a description depends on: where the tensors lie, and how often those that it copies were changed."""
    return (spec, in_features, weight.data_ptr(), *[(t.data_ptr(), _version(t)) for t in companions])


def describe(weight: torch.Tensor, companions: list[torch.Tensor], spec: str, in_features: int) -> _Described:
    """The description of a packed weight, remembered for as long as ``weight`` lives and nothing of it changes."""
    found = _described.get(id(weight))
    if found is not None and found[0]() is weight and found[1].key == _key(weight, companions, spec, in_features):
        return found[1]
    described = _Described(weight, companions, spec, in_features)
    number = id(weight)
    _described[number] = weakref.ref(weight, lambda _: _described.pop(number, None)), described
    return described


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"a CPU kernel refused its arguments (error {code})")


def _threads() -> int:
    return torch.get_num_threads()


def _buffer(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, columns) of ``dtype``, uninitialised; overwritten by the next call in this thread."""
    kept, size = getattr(_buffers, "kept", None), rows * columns * dtype.itemsize
    if kept is None or kept.numel() < size:
        kept = _buffers.kept = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8)
    return kept[:size].view(dtype).view(rows, columns)


def _decoded(weight: _Described, rows: int, in_features: int, dtype: torch.dtype):
    """Yields (first, last, decoded rows (last - first, K)), all rows in turn, in one buffer."""
    size = max(1, BUFFER_BYTES // dtype.itemsize // in_features)
    run, threads = library().lowbit_dequantize, _threads()
    for first in range(0, rows, size):
        last = min(first + size, rows)
        part = _buffer(last - first, in_features, dtype)
        _check(run(weight.pointer, None, first, last - first, part.data_ptr(), DTYPES[dtype], threads))
        yield first, last, part


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype many rows of ``dtype`` are multiplied."""
    return dtype if dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


@functools.cache
def _multiplies_tiles() -> bool:
    """Whether this processor has a unit for small matrices, which torch uses and the library does not."""
    return torch.cpu._is_amx_tile_supported()


def _for_torch(weight: _Described, rows: int, product: torch.dtype, few: dict[str, int]) -> bool:
    """Whether torch multiplies decoded rows of ``weight``, in ``product``, and so many ``rows``; ``few``: FEW_ROWS."""
    isa, ternary = library().lowbit_isa().decode(), weight.record.bits == 0
    if product == torch.bfloat16:
        return rows >= FEW_BFLOAT16_ROWS and (ternary or isa != "avx512bf16" or _multiplies_tiles())
    # Ternary weights are decoded in an order of their own, in which panels cost far less than whole rows.
    return rows >= few.get(isa, 64) and not ternary


def linear(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias``; shapes as in :func:`hf_lowbit.ops.linear`."""
    described, N = describe(weight, companions, format, in_features), weight.shape[0]
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], N))
    rows = x.numel() // in_features
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    product = _product_dtype(x.dtype)
    if not _for_torch(described, rows, product, FEW_ROWS):
        pointer = None if bias is None else bias.data_ptr()
        dtype, run, size = DTYPES[x.dtype], library().lowbit_linear, x.element_size()
        most = CALL_ROWS if product == torch.float32 else max(1, rows)
        for first in range(0, rows, most):
            some = min(most, rows - first)
            start, end = x.data_ptr() + first * in_features * size, out.data_ptr() + first * N * size
            _check(run(described.pointer, start, pointer, end, some, dtype, _threads()))
        return out
    inputs, outputs = x.view(rows, in_features).to(product), out.view(rows, N)
    bias = None if bias is None else bias.to(product)
    for first, last, part in _decoded(described, N, in_features, product):
        outputs[:, first:last] = F.linear(inputs, part, None if bias is None else bias[first:last])
    return out


def linear_int8(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias`` with ``x`` in 8 bits; shapes as in :func:`hf_lowbit.ops.linear_int8`."""
    described = describe(weight, companions, format, in_features)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    pointer, rows = None if bias is None else bias.data_ptr(), x.numel() // in_features
    _, _, levels, steps = described.int8_table
    run, dtype = library().lowbit_linear_int8, DTYPES[x.dtype]
    _check(run(described.pointer, levels, steps, x.data_ptr(), pointer, out.data_ptr(), rows, dtype, _threads()))
    return out


def input_gradient(gradient, weight, companions, format, in_features):
    """``gradient @ W``; shapes as in :func:`hf_lowbit.ops.input_gradient`."""
    described, N = describe(weight, companions, format, in_features), weight.shape[0]
    rows, dtype = gradient.numel() // max(1, N), _product_dtype(gradient.dtype)
    if not _for_torch(described, rows, dtype, FEW_GRADIENT_ROWS):
        gradient, out = gradient.contiguous(), gradient.new_empty((*gradient.shape[:-1], in_features))
        run = library().lowbit_input_gradient
        _check(run(described.pointer, gradient.data_ptr(), out.data_ptr(), rows, DTYPES[gradient.dtype], _threads()))
        return out
    flat = gradient.reshape(rows, N).to(dtype)
    total = torch.zeros((rows, in_features))
    for first, last, part in _decoded(described, N, in_features, dtype):
        if dtype == torch.float32:
            total.addmm_(flat[:, first:last], part)
        else:  # shares are added in float32
            total += flat[:, first:last] @ part
    return total.to(gradient.dtype).view(*gradient.shape[:-1], in_features)


def dequantize(weight, companions, format, in_features, dtype):
    """``W``; shapes as in :func:`hf_lowbit.ops.dequantize`. Equal to plain PyTorch bit by bit."""
    described, N = describe(weight, companions, format, in_features), weight.shape[0]
    out = torch.empty((N, in_features), dtype=dtype)
    run = library().lowbit_dequantize
    _check(run(described.pointer, None, 0, N, out.data_ptr(), DTYPES[dtype], _threads()))
    return out


def embedding(index, weight, companions, format, in_features, dtype):
    """``W[index]``; shapes as in :func:`hf_lowbit.ops.embedding`. Equal to plain PyTorch bit by bit."""
    described, rows = describe(weight, companions, format, in_features), index.to(torch.int64).contiguous()
    out = torch.empty((*index.shape, in_features), dtype=dtype)
    run = library().lowbit_dequantize
    code = run(described.pointer, rows.data_ptr(), 0, rows.numel(), out.data_ptr(), DTYPES[dtype], _threads())
    if code == _BAD_ARGUMENT:
        raise IndexError(f"index out of range: {rows.min()} to {rows.max()} in a table of {weight.shape[0]} rows")
    _check(code)
    return out


for _op in (linear, linear_int8, input_gradient, dequantize, embedding):
    register_kernel(
        Kernel(
            backend="native",
            op=_op.__name__,
            run=_op,
            formats=KERNEL_FORMATS,
            devices=frozenset({"cpu"}),
            dtypes=frozenset(DTYPES),
            unavailable=unavailable,
        )
    )
