"""The packed weight of a module whose layer is streamed (:mod:`.streaming`): there only while it is used."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .linear import LowBitLinear
from .ops import input_gradient
from .storage.stream import LayerStream


class DeviceBuffer:
    """The memory of an accelerator that its streamed layers are copied to, one at a time.

    A copy takes its place in the order of what the device computes: it begins when the layer before has been
    computed, and has ended when the host goes on, which may then fill its own buffer with another layer.

    Args:
        nbytes: Of the largest layer.
        device: Where.
    """

    def __init__(self, nbytes: int, device: torch.device):
        self.buffer, self.device = torch.empty(nbytes, dtype=torch.uint8, device=device), device
        self.lock, self.layer = threading.RLock(), -1

    @contextmanager
    def use(self, stream: LayerStream, layer: int) -> Iterator[int]:
        """The number of the buffer, 0, that holds ``layer`` of ``stream`` while the context lasts."""
        with self.lock:
            if self.layer != layer:
                self.layer = -1
                with stream.use(layer) as slot:
                    nbytes = min(self.buffer.numel(), stream.buffers[slot].numel())
                    self.buffer[:nbytes].copy_(stream.buffers[slot][:nbytes])
                self.layer = layer
            yield 0


class StreamedWeight:
    """The packed weight of one module, which is in memory only while it is used.

    Args:
        stream: Of its layer.
        layer: The layer's number there.
        views: For each buffer of the stream (or the one of the accelerator), the packed tensors in it, in the order
            of the format.
        target: The buffer of the accelerator that computes the layer, if one does.
    """

    def __init__(self, stream: LayerStream, layer: int, views: list[list[Tensor]], target: DeviceBuffer | None = None):
        self.stream, self.layer, self.views, self.target = stream, layer, views, target
        self.device = torch.device("cpu") if target is None else target.device

    @contextmanager
    def use(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The weight and its companions, for as long as the context lasts."""
        with self.stream.use(self.layer) if self.target is None else self.target.use(self.stream, self.layer) as slot:
            weight, *companions = self.views[slot]
            yield weight, companions

    def linear(self, module: LowBitLinear, x: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """``run``, an op of :mod:`.ops`, with the packed weight of ``module``; differentiable."""
        if x.device != self.device:
            raise ValueError(
                f"this layer is streamed for {self.device}, and its input is on {x.device}: move the model's inputs to "
                "model.device"
            )
        bias = module.bias
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _StreamedLinear.apply(x, bias, module, run)
        with self.use() as (weight, companions):
            return run(x, weight, companions, bias, module.spec, module.in_features, module.backend)


class _StreamedLinear(torch.autograd.Function):
    """The product with a streamed weight, of which nothing is saved: the backward reads it again."""

    @staticmethod
    def forward(ctx, x, bias, module, run):
        ctx.module, ctx.bias_dtype = module, None if bias is None else bias.dtype
        with module.streamed.use() as (weight, companions):
            return run(x, weight, companions, bias, module.spec, module.in_features, module.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x_gradient = bias_gradient = None
        module = ctx.module
        if ctx.needs_input_grad[0]:
            with module.streamed.use() as (weight, companions):
                x_gradient = input_gradient(
                    gradient, weight, companions, module.spec, module.in_features, module.backend
                )
        if ctx.needs_input_grad[1]:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return x_gradient, bias_gradient, None, None
