"""The low-rank branch of a LoRA layer in training, with less kept for the backward pass.

PEFT casts a layer's input to the dtype of the adapter, float32 as a rule, and autograd keeps the copy: with a bfloat16
model that is more than everything else that is kept (153 of 335 MB for 256 tokens of SmolLM2-135M), and under autocast
every layer keeps a copy of its own too. Here the input is kept as it came, shared with the other layers that read it,
and cast again in the backward pass. The arithmetic is PEFT's: both products in the adapter's dtype or in autocast's,
added to the base layer's result and rounded once.
"""

import torch
from torch.autograd.function import once_differentiable


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
