"""The plain PyTorch backend: correct on every device, and the specification of every faster kernel.

A weight is dequantized a chunk of rows at a time and used at once, so that no more than :data:`CHUNK_WEIGHTS`
dequantized values are alive, whatever the size of the layer. On CPUs a chunk is decoded in blocks of
:data:`BLOCK_WEIGHTS`, whose temporaries stay in the cache: that takes 2 ms instead of 5 for 900,000 weights.
"""

import torch
import torch.nn.functional as F

from .backends import Kernel, register_kernel
from .formats import Format, parse_format
from .formats.base import Tensors
from .formats.lookup import LookupFormat
from .int8 import dequantize_activations, int8_levels, quantize_activations
from .transforms.hadamard import rotate

CHUNK_WEIGHTS = 2**22  # 16 MB of float32
BLOCK_WEIGHTS = 2**18


def _chunks(format: Format, weight: torch.Tensor, companions: list[torch.Tensor], in_features: int, dtype: torch.dtype):
    """Yields (slice of rows, dequantized rows (n, K))."""
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    for part in _row_slices(weight.shape[0], CHUNK_WEIGHTS // in_features):
        yield part, _decode(format, stored, part, in_features, dtype)


def _row_slices(rows: int, size: int, start: int = 0):
    """Slices of at most ``size`` rows, at least one, that cover ``start`` to ``rows``."""
    size = max(1, size)
    return [slice(first, min(first + size, rows)) for first in range(start, rows, size)]


def _decode(format: Format, stored: Tensors, rows: slice, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized ``rows`` (n, K) of a weight."""
    weights = BLOCK_WEIGHTS if stored[""].device.type == "cpu" else CHUNK_WEIGHTS
    blocks = _row_slices(rows.stop, weights // in_features, rows.start)
    if len(blocks) == 1:
        return format.dequantize(format.select_rows(stored, rows), (rows.stop - rows.start, in_features), dtype)
    result = torch.empty((rows.stop - rows.start, in_features), dtype=dtype, device=stored[""].device)
    for part, block in zip(result.split(blocks[0].stop - blocks[0].start), blocks, strict=True):
        part.copy_(format.dequantize(format.select_rows(stored, block), tuple(part.shape), torch.float32))
    return result


def linear(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias``; shapes as in :func:`hf_lowbit.ops.linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    outputs = [
        F.linear(x, rows, None if bias is None else bias[part])
        for part, rows in _chunks(parse_format(format), weight, companions, in_features, x.dtype)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _decode_int8(format: Format, stored: Tensors, rows: slice, in_features: int) -> torch.Tensor:
    """The ``rows`` (n, K) of a weight for activations in 8 bits, float32: levels of tables are rounded, too."""
    if not isinstance(format, LookupFormat):
        return _decode(format, stored, rows, in_features, torch.float32)
    quantized = format.unpack(format.select_rows(stored, rows), (rows.stop - rows.start, in_features))
    levels, steps = int8_levels(format.table(quantized.levels, stored[""].device))
    quantized.levels = levels * steps
    return format.decode(quantized)


def linear_int8(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias`` with ``x`` in 8 bits (:mod:`.int8`), summed in float32; shapes as in :func:`linear`."""
    format, N = parse_format(format), weight.shape[0]
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    rounded = dequantize_activations(*quantize_activations(x, format.group_size), format.group_size)
    bias = torch.zeros(N, device=x.device) if bias is None else bias.to(x.dtype).to(torch.float32)
    outputs = [
        F.linear(rounded, _decode_int8(format, stored, part, in_features), bias[part])
        for part in _row_slices(N, CHUNK_WEIGHTS // in_features)
    ]
    return torch.cat(outputs, dim=-1).to(x.dtype)


def input_gradient(gradient, weight, companions, format, in_features):
    """``gradient @ W``; shapes as in :func:`hf_lowbit.ops.input_gradient`."""
    result = None
    for part, rows in _chunks(parse_format(format), weight, companions, in_features, gradient.dtype):
        share = gradient[..., part] @ rows
        if result is None and part.stop < weight.shape[0]:
            share = share.to(torch.promote_types(share.dtype, torch.float32))  # many shares: add in float32
        result = share if result is None else result.add_(share)
    return result.to(gradient.dtype)


def dequantize(weight, companions, format, in_features, dtype):
    """``W``; shapes as in :func:`hf_lowbit.ops.dequantize`."""
    format = parse_format(format)
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    return _decode(format, stored, slice(0, weight.shape[0]), in_features, dtype)


def embedding(index, weight, companions, format, in_features, dtype):
    """``W[index]``; shapes as in :func:`hf_lowbit.ops.embedding`."""
    format = parse_format(format)
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    flat = index.reshape(-1)
    rows = format.dequantize(format.select_rows(stored, flat), (flat.numel(), in_features), dtype)
    return rows.view(*index.shape, in_features)


for _op in (linear, linear_int8, input_gradient, dequantize, embedding, rotate):
    register_kernel(Kernel(backend="torch", op=_op.__name__, run=_op))
