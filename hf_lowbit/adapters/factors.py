"""Low-rank factors, and what every method that makes them has in common."""

from dataclasses import dataclass

import torch

from ..calibration import LayerHook


@dataclass
class LowRankHook(LayerHook):
    """A method that gives every layer factors A (r, K) and B (N, r).

    Args:
        rank: r.
    """

    rank: int

    def check(self, name, planned):
        check_rank(name, planned, self.rank)


def check_rank(name: str, planned, rank: int) -> None:
    """Refuses a rank that the layer ``name`` cannot have.

    Raises:
        ValueError: if it is below 1 or above the layer's smaller dimension.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(planned.shape):
        rows, columns = planned.shape
        raise ValueError(f"rank={rank!r} is not possible for {name} of {rows}x{columns}: use 1 to {min(rows, columns)}")


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
    """A (r, K) and B (N, r), float32, that minimise ``tr((E - B A) S (E - B A)^T)``, see :mod:`.eora`.

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
