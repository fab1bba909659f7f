"""The packed linear layer."""

import torch
from torch import nn

from . import ops
from .formats import Format
from .packed import PackedMixin


class LowBitLinear(PackedMixin, nn.Linear):
    """A linear layer whose weight stays packed. A subclass of ``nn.Linear``, so that PEFT and others find it.

    Args:
        in_features: ``K``.
        out_features: ``N``.
        bias: Whether there is a bias (N,), kept in float.
        format: How the weight is stored.
        dtype: Dtype of the bias, and of the weight that :meth:`to_float` gives.
        transposed: Whether the float weight was (K, N), as in transformers' ``Conv1D``.
        backend: "auto" or the backend to force.
        activations: "float", or "int8" to round inputs to 8 bits (:mod:`.int8`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: Format,
        *,
        dtype=None,
        device=None,
        transposed: bool = False,
        backend: str = "auto",
        activations: str = "float",
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.activations = activations
        # The bias comes first: `PreTrainedModel.dtype` reads the first float parameter.
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        self.register_packed(format, (out_features, in_features), backend, device)
        self._is_hf_initialized = True  # transformers must not initialise codes that the checkpoint lacks

    @classmethod
    def like(
        cls, module: nn.Module, format: Format, backend: str = "auto", activations: str = "float"
    ) -> "LowBitLinear":
        """An uninitialised packed layer in the place of ``module``, an ``nn.Linear`` or ``Conv1D``, on its device."""
        transposed = not isinstance(module, nn.Linear)
        out_features, in_features = reversed(module.weight.shape) if transposed else module.weight.shape
        packed = cls(
            in_features,
            out_features,
            module.bias is not None,
            format,
            dtype=module.weight.dtype,
            device=module.weight.device,
            transposed=transposed,
            backend=backend,
            activations=activations,
        )
        return packed.train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` (..., K) to (..., N), in the dtype of ``x`` (or of autocast)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not x.is_floating_point():
            raise TypeError(
                f"a packed linear got an input of {x.dtype}: the model casts it to `weight.dtype`, that is that of the "
                "packed codes; keep this layer in float by a rule {name: None}"
            )
        run = ops.linear if self.activations == "float" else ops.linear_int8
        if self.streamed is not None:
            y = self.streamed.linear(self, x, run)
        else:
            y = run(x, self.weight, self.companions(), self.bias, self.spec, self.in_features, self.backend)
        for factor in self.factors():
            x = nn.functional.linear(x.to(factor.dtype), factor)
        return y if self.low_rank is None else (y + x).to(y.dtype)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The plain ``nn.Linear`` (or ``Conv1D``) with the dequantized weight in ``dtype``, on the same device."""
        dtype = dtype or torch.float32
        weight = self.dequantize(dtype)
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                plain = Conv1D(self.out_features, self.in_features)
            plain.weight = nn.Parameter(weight.T.contiguous())
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
            plain.weight = nn.Parameter(weight)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(dtype))
        return plain.train(self.training)

    def extra_repr(self) -> str:
        bits = self.format.bits_per_weight(self.packed_shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec} ({bits:.2f} bits per weight)"
        )
