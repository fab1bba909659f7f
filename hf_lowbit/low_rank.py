"""A float correction of low rank beside a packed weight: the layer computes with ``W + out @ in``.

``in`` (r, K) and ``out`` (N, r) are the tensors ``weight_factor_in`` and ``weight_factor_out``. They are what merging
an adapter without loss leaves (:func:`hf_lowbit.adapters.merge`), and what ``compensation=`` makes with calibration.
The correction belongs to the weight: dequantizing includes it, and so do bits per weight. Where it is written down, in
``low_rank`` of a repo's config, it has a text, ``rank=8,dtype=float32``.
"""

import re
from dataclasses import dataclass

import torch

NAMES = ("weight_factor_in", "weight_factor_out")
SUFFIXES = tuple(name.removeprefix("weight") for name in NAMES)
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


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The closest matrix of rank ``rank`` to ``matrix`` (N, K) in the Frobenius norm, as factors.

    Computed in float64 from the eigenvectors of the smaller Gram matrix, much faster than a full SVD.

    Returns:
        ``B`` (N, r) and ``A`` (r, K), float64, with the singular values shared equally (Eckart and Young, 1936).
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    M = matrix.double() if tall else matrix.double().T
    vectors = torch.linalg.eigh(M.T @ M).eigenvectors[:, -rank:].flip(1)
    image = M @ vectors  # left singular vectors times singular values
    values = image.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    first, second = image / values.sqrt(), (vectors * values.sqrt()).T
    return (first, second) if tall else (second.T.contiguous(), first.T.contiguous())


def correction(error: torch.Tensor, square: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, K) and B (N, r), float32, that minimise ``tr((E - B A) S (E - B A)^T)``, see :mod:`.adapters.eora`.

    Args:
        error: E (N, K).
        square: S (K, K), symmetric and positive definite.
        rank: r.

    Raises:
        ValueError: if S is not positive definite in float64.
    """
    root, failed = torch.linalg.cholesky_ex(square.double())
    if failed:
        raise ValueError("the second moments of the inputs are not positive definite: raise damping above 0")
    B, A = low_rank(error.double() @ root, rank)
    A = torch.linalg.solve_triangular(root, A, upper=False, left=False)
    # Equal lengths again, so that one learning rate suits both.
    balance = (A.norm(dim=1) / B.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp_min(1e-30)
    return (A / balance[:, None]).float().contiguous(), (B * balance).float().contiguous()
