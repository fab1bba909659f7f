"""The packed embedding: rows are dequantized as they are looked up."""

import copy

import torch
from torch import nn

from . import ops
from .formats import Format
from .packed import PackedMixin


class LowBitEmbedding(PackedMixin, nn.Embedding):
    """An embedding whose table stays packed; made by :meth:`like`.

    ``weight_like`` is an empty parameter that carries the dtype of the rows it returns. It is saved, and it comes
    first, because ``PreTrainedModel.dtype`` reads the first float parameter.
    """

    @classmethod
    def like(cls, module: nn.Embedding, format: Format, backend: str = "auto") -> "LowBitEmbedding":
        """An uninitialised packed table in the place of ``module``, on its device.

        A subclass of ``nn.Embedding`` whose own forward calls ``super().forward`` (a scaled embedding, as in Gemma)
        keeps it: the result is then an instance of a class that inherits from both.
        """
        packed = copy.copy(module)
        packed.__dict__ = module.__dict__.copy()
        packed._parameters = {}
        original = type(module)
        packed.__class__ = cls if original is nn.Embedding else type(f"LowBit{original.__name__}", (original, cls), {})
        like = torch.empty(0, dtype=module.weight.dtype, device=module.weight.device)
        packed.weight_like = nn.Parameter(like, requires_grad=False)
        packed.float_class = original
        packed.register_packed(format, tuple(module.weight.shape), backend, module.weight.device)
        # Transformers must not initialise codes that the checkpoint lacks, but only it can fill buffers of a subclass.
        packed._is_hf_initialized = original is nn.Embedding
        return packed

    @property
    def in_features(self) -> int:
        return self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` (...), integer, to rows (..., embedding_dim)."""
        dtype = self.weight_like.dtype
        rows = ops.embedding(input, self.weight, self.companions(), self.spec, self.embedding_dim, dtype, self.backend)
        if self.low_rank is None:
            return rows
        factor_in, factor_out = self.factors()
        return (rows + nn.functional.embedding(input, factor_out) @ factor_in).to(dtype)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The plain embedding with the dequantized table in ``dtype``."""
        plain = copy.copy(self)
        plain.__dict__ = {k: v for k, v in self.__dict__.items() if not k.startswith("packed_")}
        plain._parameters = {"weight": nn.Parameter(self.dequantize(dtype or self.weight_like.dtype))}
        plain.__class__ = self.float_class
        for name in ("format", "spec", "backend", "method", "low_rank", "float_class", "_is_hf_initialized"):
            plain.__dict__.pop(name, None)
        return plain

    def extra_repr(self) -> str:
        bits = self.format.bits_per_weight(self.packed_shape)
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.spec} ({bits:.2f} bits per weight)"
