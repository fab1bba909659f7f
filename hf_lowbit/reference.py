"""The plain PyTorch backend: correct on every device, and the specification of every faster kernel.

A weight is dequantized a chunk of rows at a time and used at once, so that no more than :data:`CHUNK_WEIGHTS`
dequantized values are alive, whatever the size of the layer.
"""

import torch
import torch.nn.functional as F

from .backends import Kernel, register_kernel
from .formats import Format, parse_format

CHUNK_WEIGHTS = 2**22  # 16 MB of float32


def _chunks(format: Format, weight: torch.Tensor, companions: list[torch.Tensor], in_features: int, dtype: torch.dtype):
    """Yields (slice of rows, dequantized rows (n, K))."""
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    rows, size = weight.shape[0], max(1, CHUNK_WEIGHTS // in_features)
    if rows <= size:
        yield slice(0, rows), format.dequantize(stored, (rows, in_features), dtype)
        return
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        yield part, format.dequantize(format.select_rows(stored, part), (part.stop - start, in_features), dtype)


def linear(x, weight, companions, bias, format, in_features):
    """``x @ W.T + bias``; shapes as in :func:`hf_lowbit.ops.linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    outputs = [
        F.linear(x, rows, None if bias is None else bias[part])
        for part, rows in _chunks(parse_format(format), weight, companions, in_features, x.dtype)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


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
    result = torch.empty((weight.shape[0], in_features), dtype=dtype, device=weight.device)
    for part, rows in _chunks(parse_format(format), weight, companions, in_features, dtype):
        result[part] = rows
    return result


def embedding(index, weight, companions, format, in_features, dtype):
    """``W[index]``; shapes as in :func:`hf_lowbit.ops.embedding`."""
    format = parse_format(format)
    stored = dict(zip(("", *format.suffixes()), (weight, *companions), strict=True))
    flat = index.reshape(-1)
    rows = format.dequantize(format.select_rows(stored, flat), (flat.numel(), in_features), dtype)
    return rows.view(*index.shape, in_features)


for _op in (linear, input_gradient, dequantize, embedding):
    register_kernel(Kernel(backend="torch", op=_op.__name__, run=_op))
