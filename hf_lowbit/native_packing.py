"""Packing by the CPU kernels: the lanes of a format's own ``pack_codes``, bit by bit, ten times as fast and more.

The formats stay the specification, and serve wherever this cannot: other devices, ``meta`` and other kinds of tensors,
a missing library, or a user who asks for another backend by the environment variable. Nothing is remembered and no
second copy is made.
"""

import torch

from .backends import requested_backend
from .formats.base import Format
from .native_backend import library, unavailable


def pack_rows(format: Format, codes: torch.Tensor, packed: torch.Tensor) -> bool:
    """Writes the lanes of ``codes`` (N, K), uint8, to ``packed`` (N, lanes), contiguous; False if it cannot.

    Raises:
        RuntimeError: if the library refuses.
    """
    plain = type(codes) is torch.Tensor and codes.device.type == "cpu" and codes.dtype == torch.uint8
    if not (plain and format.packs_natively and codes.numel() and requested_backend("auto") in ("auto", "native")):
        return False
    if unavailable() is not None:
        return False
    codes, bits = codes.contiguous(), 0 if format.name == "ternary" else int(format.bits)
    rows, inputs = codes.shape
    if refused := library().lowbit_pack(
        codes.data_ptr(), packed.data_ptr(), rows, inputs, bits, torch.get_num_threads()
    ):
        raise RuntimeError(f"a CPU kernel refused to pack {rows} x {inputs} codes of {format.spec} (error {refused})")
    return True
