"""The low-rank branch of a LoRA layer in training, with less kept for the backward pass.

PEFT casts a layer's input to the dtype of the adapter, float32 as a rule, and autograd keeps the copy: with a bfloat16
model that is more than everything else that is kept (153 of 335 MB for 256 tokens of SmolLM2-135M), and under autocast
every layer keeps a copy of its own too. Here the input is kept as it came, shared with the other layers that read it,
and cast again in the backward pass. The arithmetic is PEFT's: both products in the adapter's dtype or in autocast's,
added to the base layer's result and rounded once.

On CPUs, where all of it is float32, kernels do it (:mod:`hf_lowbit.native_low_rank`); their twin is the code here.
"""

import torch
from torch.autograd.function import once_differentiable

from .. import native_backend, native_low_rank
from ..backends import select
from ..linear import LowBitLinear


def add_low_rank(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``result + scaling * x @ a.T @ b.T`` in the dtype of ``result``.

    Args:
        result: (..., N), of the base layer. Differentiable once, as ``x``, ``a`` and ``b`` are.
        x: (..., K).
        a: (r, K).
        b: (N, r).
        scaling: Factor of the adapter.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    return _AddLowRank.apply(result, x, a, b, scaling, dtype)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, x, a, b, scaling, dtype):
        ctx.native = native_low_rank.serves(result, x, a, b, dtype)
        if ctx.native:
            out, hidden = native_low_rank.add(result, x, a, b, scaling)
            ctx.save_for_backward(x, hidden, a, b)
            ctx.scaling = scaling
            return out
        hidden = x.to(dtype) @ a.to(dtype).T
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scaling, ctx.dtype = scaling, dtype
        change = (hidden @ b.to(dtype).T).mul_(scaling)
        wider = torch.promote_types(dtype, result.dtype) == dtype
        return (change.add_(result) if wider else result + change).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, hidden, a, b = ctx.saved_tensors
        if ctx.native:
            found = native_low_rank.gradients(gradient, x, hidden, a, b, ctx.scaling, ctx.needs_input_grad[1:4])
            return gradient, *found, None, None
        rows = gradient.to(ctx.dtype).reshape(-1, gradient.shape[-1])
        # A thin matrix is multiplied up to four times faster with its long side contiguous.
        inner = (rows @ b.to(ctx.dtype).T.contiguous().T).mul_(ctx.scaling)
        need_x, need_a, need_b = ctx.needs_input_grad[1:4]
        x_gradient = (inner @ a.to(ctx.dtype)).to(x.dtype).view(x.shape) if need_x else None
        a_gradient = (inner.T @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(a.dtype) if need_a else None
        b_gradient = None
        if need_b:
            b_gradient = (hidden.reshape(-1, hidden.shape[-1]).T @ rows).mul_(ctx.scaling).T.contiguous().to(b.dtype)
        return gradient, x_gradient, a_gradient, b_gradient, None, None


def packed_with_low_rank(
    base: torch.nn.Module, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor | None:
    """``base(x) + scaling * x @ a.T @ b.T`` in one step by the CPU kernels, or None where they cannot or must not.

    Both gradients of ``x`` are then one tensor, and torch's dispatcher, which costs a tenth of a millisecond a call
    in training, is passed by. Nothing that was put around the layer is: where it has a hook, this gives None.

    Args:
        base: The layer (K to N); the other arguments are those of :func:`add_low_rank`.
    """
    if torch.compiler.is_compiling() or not isinstance(base, LowBitLinear) or not _is_plain(base):
        return None
    if torch.is_autocast_enabled(x.device.type) or x.shape[-1] != base.in_features or not x.numel():
        return None
    kernels = (select(op, base.spec, "cpu", x.dtype, base.backend) for op in ("linear", "input_gradient"))
    if not native_low_rank.serves(x, x, a, b, a.dtype) or any(kernel.backend != "native" for kernel in kernels):
        return None
    return _PackedWithLowRank.apply(x, a, b, scaling, base.spec, base.bias, base.weight, *base.companions())


def _is_plain(base: LowBitLinear) -> bool:
    """Whether a call of ``base`` is one product with its packed weight and nothing else."""
    return (
        type(base) is LowBitLinear
        and base.activations == "float"
        and base.low_rank is None
        and base.streamed is None
        and (base.bias is None or not base.bias.requires_grad)
        and base.weight.device.type == "cpu"
        and "forward" not in base.__dict__
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not torch.nn.modules.module._has_any_global_hook()
    )


class _PackedWithLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, scaling, spec, bias, weight, *companions):
        y = native_backend.linear(x, weight, list(companions), bias, spec, x.shape[-1])
        out, hidden = native_low_rank.add(y, x, a, b, scaling, in_place=True)
        ctx.save_for_backward(x, hidden, a, b, weight, *companions)
        ctx.scaling, ctx.spec = scaling, spec
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, hidden, a, b, weight, *companions = ctx.saved_tensors
        wanted, x_gradient = ctx.needs_input_grad[:3], None
        if wanted[0]:
            x_gradient = native_backend.input_gradient(gradient, weight, companions, ctx.spec, x.shape[-1])
        found = native_low_rank.gradients(gradient, x, hidden, a, b, ctx.scaling, wanted, x_gradient)
        return (*found, *[None] * (4 + len(companions)))
