"""What packed modules have in common: parameters laid out by a format, and their way back to floats."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from . import ops
from .formats import Format
from .low_rank import NAMES, LowRank
from .methods.base import Method

if TYPE_CHECKING:
    from .streamed import StreamedWeight


class PackedMixin:
    """Holds a packed weight as ``weight`` and its companions as ``weight_<what>``, frozen parameters of fixed dtype."""

    format: Format
    spec: str
    in_features: int
    backend: str
    method: Method | None = None
    """What packed it, to pack it again after a change; None where nobody said."""
    low_rank: LowRank | None = None
    """The float correction beside the packed weight, if there is one."""
    streamed: "StreamedWeight | None" = None
    """Where products take the packed weight from, where its layer is not in memory."""

    def register_packed(self, format: Format, shape: tuple[int, int], backend: str, device=None) -> None:
        """Creates the (uninitialised) parameters for a weight of ``shape`` (N, K)."""
        self.format, self.spec, self.backend = format, format.spec, backend
        self.packed_shape = tuple(shape)
        tensors = format.empty(shape, device=device)
        self.packed_names = tuple("weight" + suffix for suffix in tensors)
        self.dtypes = {"weight" + suffix: tensor.dtype for suffix, tensor in tensors.items()}
        for suffix, tensor in tensors.items():
            setattr(self, "weight" + suffix, nn.Parameter(tensor, requires_grad=False))

    def register_factors(self, low_rank: LowRank, device=None) -> None:
        """Creates the (uninitialised) factors of a low-rank correction."""
        self.low_rank = low_rank
        self.dtypes.update(dict.fromkeys(NAMES, low_rank.dtype))
        for name, shape in low_rank.shapes(self.packed_shape).items():
            factor = torch.empty(shape, dtype=low_rank.dtype, device=device)
            setattr(self, name, nn.Parameter(factor, requires_grad=False))

    def set_factors(self, factor_in: torch.Tensor, factor_out: torch.Tensor) -> None:
        """Sets the low-rank correction ``factor_out @ factor_in`` of (N, r) and (r, K), both of one dtype."""
        self.low_rank = LowRank(factor_in.shape[0], factor_in.dtype)
        self.dtypes.update(dict.fromkeys(NAMES, factor_in.dtype))
        for name, factor in zip(NAMES, (factor_in, factor_out), strict=True):
            setattr(self, name, nn.Parameter(factor.detach().contiguous(), requires_grad=False))

    def factors(self) -> list[torch.Tensor]:
        """The factors (r, K) and (N, r) of the low-rank correction, or nothing."""
        return [] if self.low_rank is None else self._restored(NAMES)

    def restore_dtypes(self) -> None:
        """Undoes casts of stored tensors, which do not ask what a parameter means; wider floats lose nothing."""
        self._restored(self.packed_names if self.streamed is None else ())  # which are then as their file has them
        self.factors()

    def _restored(self, names: tuple[str, ...]) -> list[torch.Tensor]:
        tensors, dtypes, parameters = [], self.dtypes, self._parameters
        for name in names:
            tensor = parameters[name] if name in parameters else getattr(self, name)
            if tensor.dtype is not dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])
            tensors.append(tensor)
        return tensors

    def fixed_names(self) -> tuple[str, ...]:
        """Names of the parameters whose dtype means something: the packed tensors, and the factors if there are any."""
        return self.packed_names + (NAMES if self.low_rank is not None else ())

    def companions(self) -> list[torch.Tensor]:
        """The stored tensors besides ``weight``, in the order in which ops take them."""
        return self._restored(self.packed_names[1:])

    def products(self) -> AbstractContextManager[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The packed weight and its companions for products, for as long as the context lasts."""
        return nullcontext((self.weight, self.companions())) if self.streamed is None else self.streamed.use()

    def stored(self) -> dict[str, torch.Tensor]:
        """All stored tensors by suffix; copies of them where they are streamed."""
        if self.streamed is not None:
            with self.products() as (weight, companions):
                tensors = [weight.clone(), *(tensor.clone() for tensor in companions)]
            return dict(zip(("", *self.format.suffixes()), tensors, strict=True))
        return {name.removeprefix("weight"): getattr(self, name) for name in self.packed_names}

    def set_packed(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the packed weight by ``tensors``, by suffix, as :meth:`Format.pack` returns them.

        Raises:
            ValueError: for a streamed weight, which is on disk.
        """
        if self.streamed is not None:
            raise ValueError(
                "the weight of a streamed layer cannot be changed (by merging an adapter into it, for instance): load "
                "the model without max_memory_bytes for that"
            )
        for suffix, tensor in tensors.items():
            setattr(self, "weight" + suffix, nn.Parameter(tensor, requires_grad=False))

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) in ``dtype``, the low-rank correction included."""
        if self.low_rank is None:
            return self.dequantize_packed(dtype)
        factor_in, factor_out = (factor.float() for factor in self.factors())
        return self.dequantize_packed(torch.float32).addmm_(factor_out, factor_in).to(dtype)

    def dequantize_packed(self, dtype: torch.dtype) -> torch.Tensor:
        """What the packed tensors alone stand for, (N, K) in ``dtype``."""
        with self.products() as (weight, companions):
            return ops.dequantize(weight, companions, self.spec, self.packed_shape[1], dtype, self.backend)

    def freeze_packed(self) -> None:
        """Switches gradients of the stored tensors off; loaders switch them on for float companions."""
        for name in self.fixed_names():
            getattr(self, name).requires_grad_(False)

    def _save_to_state_dict(self, *args, **kwargs):
        self.restore_dtypes()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn, recurse=True):
        # `.to(dtype)` and friends move the packed tensors but must not change what they mean.
        before = {name: getattr(self, name).data for name in self.fixed_names()}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        return self
