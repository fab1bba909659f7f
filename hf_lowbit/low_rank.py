"""A float correction of low rank beside a packed weight: the layer computes with ``W + out @ in``.

``in`` (r, K) and ``out`` (N, r) are the tensors ``weight_factor_in`` and ``weight_factor_out``. They are what merging
an adapter without loss leaves (:func:`hf_lowbit.adapters.merge`). The correction belongs to the weight: dequantizing
includes it, and so do bits per weight. Where it is written down, in ``low_rank`` of a repo's config, it has a text,
``rank=8,dtype=float32``.
"""

import re
from dataclasses import dataclass

import torch

NAMES = ("weight_factor_in", "weight_factor_out")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LowRank:
    """The rank r and the dtype of both factors."""

    rank: int
    dtype: torch.dtype

    @property
    def spec(self) -> str:
        """The text, which :func:`parse_low_rank` reads."""
        return f"rank={self.rank},dtype={str(self.dtype).removeprefix('torch.')}"

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Shapes of both tensors by name, for a weight of ``shape`` (N, K)."""
        return dict(zip(NAMES, ((self.rank, shape[1]), (shape[0], self.rank)), strict=True))

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of both, for a weight of ``shape`` (N, K)."""
        return self.rank * sum(shape) * self.dtype.itemsize


def described(spec: str, low_rank: LowRank | None) -> str:
    """The text of a format and of the correction beside it, for people."""
    return spec if low_rank is None else f"{spec} with {low_rank.spec}"


def parse_low_rank(text: str) -> LowRank:
    """What ``text`` stands for.

    Raises:
        ValueError: for any other text, quoting it.
    """
    match = re.fullmatch(r"rank=([1-9][0-9]{0,5}),dtype=(\w+)", text) if isinstance(text, str) else None
    if match is None or match[2] not in DTYPES:
        raise ValueError(
            f"{text!r} is not the text of a low-rank correction: use 'rank=8,dtype=float32', with a dtype of "
            f"{', '.join(DTYPES)}"
        )
    return LowRank(int(match[1]), DTYPES[match[2]])
