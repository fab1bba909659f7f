"""Steps after error feedback: other scales for the codes, other codes for the scales, less error of the output.

With ``E = Q - W`` and ``H = mean x^T x`` the error is ``tr(E H E^T)``, a sum over rows. Neither step here can see more
of it than one kind of variable at a time, and each is exact in that: :func:`fit_scales` solves for the scales of all
groups of a row together, :func:`descend` moves one column after the other to its best points (coordinate descent, as in
QuantEase, arXiv 2309.01885). Both keep zero points and levels.
"""

from dataclasses import replace

import torch

from ..formats import Format, Quantized

BLOCK = 128


def refine(W: torch.Tensor, H: torch.Tensor, format: Format, found: Quantized) -> Quantized:
    """``found`` after one step of each kind, in the rows whose error that lowers.

    Where all scales of a matrix share a range in the file, there is one choice for all rows.

    Args:
        W: Weight (N, K), float32.
        H: Moments (K, K), float32, positive definite.
        format: The format.
        found: Codes, and the grid that they are on.
    """
    other = descend(W, H, format, fit_scales(W, H, format, found))
    old, new = (((E @ H) * E).sum(1, keepdim=True) for E in (format.decode(q) - W for q in (found, other)))
    if found.scales is None or other.scales is None:
        return replace(found, codes=torch.where(new < old, other.codes, found.codes))
    if not format.rounds_scales_alone:
        return other if new.sum() < old.sum() else found
    parts = (torch.where(new < old, *pair) for pair in ((other.codes, found.codes), (other.scales, found.scales)))
    return replace(found, **dict(zip(("codes", "scales"), parts, strict=True)))


def fit_scales(W: torch.Tensor, H: torch.Tensor, format: Format, found: Quantized) -> Quantized:
    """``found`` with the storable scales nearest to those of least error for its codes; arguments as in :func:`refine`.

    A row's error is ``(w - s u) H (w - s u)^T`` with u the values of its codes at scale one and one factor s for each
    group: G normal equations with G unknowns. A trace of a pull to the old scales settles groups without a say.
    """
    if found.scales is None:
        return found
    (N, G), K = found.scales.shape, W.shape[1]
    size = K if format.group_size == -1 else format.group_size
    units = format.decode(replace(found, scales=torch.ones_like(found.scales)))
    right, fill = (units * (W @ H)), -K % size
    units, right = (torch.nn.functional.pad(t, (0, fill)).view(N, G, size) for t in (units, right))
    blocks = torch.nn.functional.pad(H, (0, fill, 0, fill)).view(G, size, G, size)
    scales = torch.empty_like(found.scales)
    for rows in torch.arange(N, device=W.device).split(max(1, 2**24 // (G * K))):  # 64 MB of floats
        u = units[rows]
        matrix = torch.einsum("ngi,gihj,nhj->ngh", u, blocks, u)
        pull = 1e-4 * matrix.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12
        matrix += torch.diag_embed(pull.expand(-1, G))
        scales[rows] = torch.linalg.solve(matrix, right[rows].sum(-1) + pull * found.scales[rows])
    possible = scales.isfinite()
    if not format.signed_scales:
        possible &= torch.where(found.scales < 0, -scales, scales) > 0  # a group that was turned around stays so
    return replace(found, scales=format.storable_scales(torch.where(possible, scales, found.scales)))


def descend(W: torch.Tensor, H: torch.Tensor, format: Format, found: Quantized, block: int = BLOCK) -> Quantized:
    """``found`` after each column in turn took the codes that are best given all others; as :func:`refine`.

    With ``E = Q - W`` the best value of column i is ``q_i - (E H)_i / H_ii``.
    """
    N, K = W.shape
    size = K if format.group_size == -1 else format.group_size
    weight, codes = W.T.contiguous(), found.codes.T.contiguous()
    error = format.decode(found).T - weight
    for begin in range(0, K, block):
        end = min(begin + block, K)
        slope = H[begin:end] @ error
        for i in range(begin, end):
            group = slice(i // size, i // size + 1)
            scales, zeros = (None if t is None else t[:, group] for t in (found.scales, found.zeros))
            best = weight[i] + error[i] - slope[i - begin] / H[i, i]
            code = format.encode_groups(best.view(N, 1, 1), scales, zeros, found.levels)
            change = format.decode_groups(code, scales, zeros, found.levels).view(N) - weight[i] - error[i]
            codes[i] = code.view(N)
            error[i] += change
            slope[i - begin + 1 :].addr_(H[i + 1 : end, i], change)
    return replace(found, codes=codes.T.contiguous())
