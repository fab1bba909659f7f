"""Packed models in several processes.

``fully_shard`` (FSDP2) takes packed tensors as they are: it shards integers by rows and gathers them as bytes.
``DistributedDataParallel`` sends every parameter from rank 0 to the others when it is made, and neither gloo nor NCCL
can send 16-bit integers ("Invalid scalar type"). Codes need not be sent: all processes load the same checkpoint, and
packing is deterministic. So they are named to DDP as parameters to ignore, by the attribute that it reads from the
module that it wraps, which a ``PeftModel`` passes on from the model inside it.
"""

from collections.abc import Iterator

from torch import nn

from .packed import PackedMixin

_PREFIXES = ("", "base_model.model.")  # of the model itself, and inside a PeftModel


class PackedCodes:
    """Names of the packed codes in ``model``, as they are when it is iterated over."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __iter__(self) -> Iterator[str]:
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, PackedMixin):
                yield from (f"{prefix}{name}.weight" for prefix in _PREFIXES)


def keep_codes_from_ddp(model: nn.Module) -> None:
    """Makes ``DistributedDataParallel`` leave the packed codes of ``model``, or of a PeftModel with it, alone."""
    model._ddp_params_and_buffers_to_ignore = PackedCodes(model)  # type: ignore[assignment]
