"""The ops that packed modules call, as ``torch.library`` ops with fake implementations and gradients.

Each takes a packed weight as plain tensors: ``weight`` (N, lanes), int16, and its ``companions`` in the order of
:meth:`Format.suffixes`, with the text of the format, which makes them traceable by ``torch.compile`` and exportable.
They pick a kernel through :mod:`.backends`; autograd keeps packed tensors only. ``linears`` and ``linears_int8``,
several products of one ``x`` one after the other in one tensor, are for graphs of :mod:`.compiled`, without gradients.

Torch's dispatcher takes 10 to 20 microseconds for an op that is written in Python, as long as a kernel takes for the
layers of a small model. So where nothing needs it, a call goes straight to its kernel (:func:`_direct`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import requested_backend, select
from .formats.columns import PREFIX, split_columns
from .formats.outliers import PREFIX as OUTLIERS
from .formats.rotated import PREFIX as ROTATED
from .formats.rotated import TRANSFORMS

# `backend` has no default here: autograd would be given one input less whenever it is "auto".
_SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor[] companions, Tensor? bias, str format, int in_features,"
    " str backend) -> Tensor",
    "linear_int8": "(Tensor x, Tensor weight, Tensor[] companions, Tensor? bias, str format, int in_features,"
    " str backend) -> Tensor",
    "linears": "(Tensor x, Tensor[] weights, Tensor[] companions, str format, int in_features, str backend) -> Tensor",
    "linears_int8": "(Tensor x, Tensor[] weights, Tensor[] companions, str format, int in_features, str backend)"
    " -> Tensor",
    "input_gradient": "(Tensor gradient, Tensor weight, Tensor[] companions, str format, int in_features,"
    " str backend) -> Tensor",
    "dequantize": "(Tensor weight, Tensor[] companions, str format, int in_features, ScalarType dtype,"
    " str backend) -> Tensor",
    "embedding": "(Tensor index, Tensor weight, Tensor[] companions, str format, int in_features, ScalarType dtype,"
    " str backend) -> Tensor",
    "rotate": "(Tensor x, bool inverse, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"lowbit::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _check_features(x, in_features):
    torch._check(x.shape[-1] == in_features, lambda: f"input has {x.shape[-1]} features, the weight {in_features}")


def _linear(x, weight, companions, bias, format, in_features, backend):
    if x.shape[-1] != in_features:
        _check_features(x, in_features)
    kernel = select("linear", format, x.device.type, x.dtype, backend)
    return kernel.run(x, weight, companions, bias, format, in_features)


def _linear_int8(x, weight, companions, bias, format, in_features, backend):
    if x.shape[-1] != in_features:
        _check_features(x, in_features)
    kernel = select("linear_int8", format, x.device.type, x.dtype, backend)
    return kernel.run(x, weight, companions, bias, format, in_features)


def _joined(product, x, weights, companions, format, in_features, backend):
    each = len(companions) // max(1, len(weights))
    parts = [companions[i * each : (i + 1) * each] for i in range(len(weights))]
    pairs = zip(weights, parts, strict=True)
    return torch.cat([product(x, weight, own, None, format, in_features, backend) for weight, own in pairs], -1)


def _linears(x, weights, companions, format, in_features, backend):
    return _joined(_linear, x, weights, companions, format, in_features, backend)


def _linears_int8(x, weights, companions, format, in_features, backend):
    return _joined(_linear_int8, x, weights, companions, format, in_features, backend)


def _input_gradient(gradient, weight, companions, format, in_features, backend):
    kernel = select("input_gradient", format, gradient.device.type, gradient.dtype, backend)
    return kernel.run(gradient, weight, companions, format, in_features)


def _dequantize(weight, companions, format, in_features, dtype, backend):
    kernel = select("dequantize", format, weight.device.type, dtype, backend)
    return kernel.run(weight, companions, format, in_features, dtype)


def _embedding(index, weight, companions, format, in_features, dtype, backend):
    kernel = select("embedding", format, weight.device.type, dtype, backend)
    return kernel.run(index, weight, companions, format, in_features, dtype)


def _rotate(x, inverse, backend):
    wanted = requested_backend(backend)
    wanted = "torch" if wanted == "native" else wanted  # whose linear takes what plain PyTorch rotated
    return select("rotate", TRANSFORMS[0], x.device.type, x.dtype, wanted).run(x, inverse)


for _run in (_linear, _linear_int8, _linears, _linears_int8, _input_gradient, _dequantize, _embedding, _rotate):
    torch.library.impl(f"lowbit::{_run.__name__[1:]}", "CompositeExplicitAutograd", _run)


@torch.library.register_fake("lowbit::rotate")
def _(x, inverse, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("lowbit::linear_int8")
@torch.library.register_fake("lowbit::linear")
def _(x, weight, companions, bias, format, in_features, backend):
    _check_features(x, in_features)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("lowbit::linears_int8")
@torch.library.register_fake("lowbit::linears")
def _(x, weights, companions, format, in_features, backend):
    _check_features(x, in_features)
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@torch.library.register_fake("lowbit::input_gradient")
def _(gradient, weight, companions, format, in_features, backend):
    return gradient.new_empty((*gradient.shape[:-1], in_features))


@torch.library.register_fake("lowbit::dequantize")
def _(weight, companions, format, in_features, dtype, backend):
    return weight.new_empty((weight.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("lowbit::embedding")
def _(index, weight, companions, format, in_features, dtype, backend):
    return weight.new_empty((*index.shape, in_features), dtype=dtype)


def _save_packed(ctx, inputs, output):
    _, weight, companions, bias, ctx.format, ctx.in_features, ctx.backend = inputs
    ctx.save_for_backward(weight, *companions)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, gradient):
    weight, *companions = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.ops.lowbit.input_gradient(
            gradient, weight, companions, ctx.format, ctx.in_features, ctx.backend
        )
    if ctx.needs_input_grad[3]:
        bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return x_gradient, None, [None] * len(companions), bias_gradient, None, None, None


for _op in ("linear", "linear_int8"):
    torch.library.register_autograd(f"lowbit::{_op}", _linear_backward, setup_context=_save_packed)


def _save_packed_gradient(ctx, inputs, output):
    _, weight, companions, ctx.format, ctx.in_features, ctx.backend = inputs
    ctx.save_for_backward(weight, *companions)


def _input_gradient_backward(ctx, gradient):
    weight, *companions = ctx.saved_tensors
    again = torch.ops.lowbit.linear(gradient, weight, companions, None, ctx.format, ctx.in_features, ctx.backend)
    return again, None, [None] * len(companions), None, None, None


torch.library.register_autograd("lowbit::input_gradient", _input_gradient_backward, setup_context=_save_packed_gradient)


def _rotate_setup(ctx, inputs, output):
    _, ctx.inverse, ctx.backend = inputs


def _rotate_backward(ctx, gradient):
    return torch.ops.lowbit.rotate(gradient, not ctx.inverse, ctx.backend), None, None


torch.library.register_autograd("lowbit::rotate", _rotate_backward, setup_context=_rotate_setup)


def _direct(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a call needs nothing of torch's dispatcher: no gradient, and nobody who traces, transforms or watches."""
    return not (
        torch.compiler.is_compiling()  # first: what follows is not for a compiler to see
        or type(x) is not Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def rotate(x: Tensor, inverse: bool = False, backend: str = "auto") -> Tensor:
    """``x R``, or ``x R^T``, of (..., K), in its dtype: :func:`hf_lowbit.transforms.hadamard.rotate` by a kernel.

    Differentiable.
    """
    return _rotate(x, inverse, backend) if _direct(x, None) else torch.ops.lowbit.rotate(x, inverse, backend)


def _for_kernels(x, companions, format, backend):
    """What a kernel multiplies in the place of ``x`` and a rotated weight, or one with column factors, and as what."""
    if format.startswith(ROTATED):
        x, format = rotate(x, backend=backend), format.removeprefix(ROTATED)
    if format.startswith(PREFIX):
        x, companions, format = split_columns(x, companions, format)
    return x, companions, format


def _beside_outliers(product, x, weight, companions, bias, format, in_features, backend):
    """``product`` with the rest of the weight, plus that with the columns that are kept beside it."""
    *companions, outliers, index = companions
    y = product(x, weight, companions, bias, format.partition("+")[2], in_features, backend)
    return y + F.linear(x.index_select(-1, index), outliers.to(x.dtype))


def linear(
    x: Tensor,
    weight: Tensor,
    companions: list[Tensor],
    bias: Tensor | None,
    format: str,
    in_features: int,
    backend: str = "auto",
) -> Tensor:
    """``x @ W.T + bias`` with a packed ``W``.

    Args:
        x: (..., K), floating point; the result has its dtype. Differentiable.
        weight: (N, lanes), int16.
        companions: The other stored tensors of the format.
        bias: (N,) or None; cast to the dtype of ``x``. Differentiable.
        format: Text of the format.
        in_features: ``K``.
        backend: "auto" or the backend to force.

    Returns:
        (..., N).
    """
    if format.startswith(OUTLIERS):
        return _beside_outliers(linear, x, weight, companions, bias, format, in_features, backend)
    x, companions, format = _for_kernels(x, companions, format, backend)
    if _direct(x, bias):
        return _linear(x, weight, companions, bias, format, in_features, backend)
    return torch.ops.lowbit.linear(x, weight, companions, bias, format, in_features, backend)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    companions: list[Tensor],
    bias: Tensor | None,
    format: str,
    in_features: int,
    backend: str = "auto",
) -> Tensor:
    """:func:`linear` with ``x`` rounded to 8 bits as :mod:`.int8` defines it; faster and less exact.

    A row of ``x`` with anything that is not finite gives a row of NaN. The gradient is that of :func:`linear`.
    """
    if format.startswith(OUTLIERS):
        return _beside_outliers(linear_int8, x, weight, companions, bias, format, in_features, backend)
    x, companions, format = _for_kernels(x, companions, format, backend)
    if _direct(x, bias):
        return _linear_int8(x, weight, companions, bias, format, in_features, backend)
    return torch.ops.lowbit.linear_int8(x, weight, companions, bias, format, in_features, backend)


def input_gradient(
    gradient: Tensor,
    weight: Tensor,
    companions: list[Tensor],
    format: str,
    in_features: int,
    backend: str = "auto",
) -> Tensor:
    """``gradient @ W`` (..., K) for ``gradient`` (..., N): what :func:`linear` passes back to its ``x``.

    For callers that keep nothing for autograd; other arguments as in :func:`linear`.
    """
    if format.startswith(OUTLIERS):
        *companions, outliers, index = companions
        inner = input_gradient(gradient, weight, companions, format.partition("+")[2], in_features, backend)
        return inner.index_add(-1, index, gradient @ outliers.to(gradient.dtype))
    rotated, format = format.startswith(ROTATED), format.removeprefix(ROTATED)
    factors = None
    if format.startswith(PREFIX):
        factors, companions, format = split_columns(gradient.new_ones(in_features), companions, format)
    result = torch.ops.lowbit.input_gradient(gradient, weight, companions, format, in_features, backend)
    result = result if factors is None else result * factors
    return rotate(result, inverse=True, backend=backend) if rotated else result


def dequantize(
    weight: Tensor, companions: list[Tensor], format: str, in_features: int, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """``W`` (N, K) in ``dtype``; arguments as in :func:`linear`.

    Formats with something beside or around the codes of a kernel's format are put together in plain PyTorch.
    """
    if format.startswith((OUTLIERS, ROTATED, PREFIX)):
        backend = "torch"
    return torch.ops.lowbit.dequantize(weight, companions, format, in_features, dtype, backend)


def embedding(
    index: Tensor,
    weight: Tensor,
    companions: list[Tensor],
    format: str,
    in_features: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> Tensor:
    """``W[index]`` (..., K) in ``dtype`` for ``index`` (...), integer; other arguments as in :func:`linear`."""
    if _direct(index, None):
        return _embedding(index, weight, companions, format, in_features, dtype, backend)
    return torch.ops.lowbit.embedding(index, weight, companions, format, in_features, dtype, backend)
