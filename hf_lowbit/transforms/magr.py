"""``preprocess="magr"``: weights with smaller extremes that give nearly the same output, before they are rounded.

Zhang et al., 2024 (MagR, arXiv 2406.00800). The range of a group decides its steps, and single large weights decide the
range. The outputs of a layer hardly depend on some combinations of its inputs, so extremes can be moved there:

    minimise over V:  tr((V - W) H (V - W)^T) / 2 + sum over rows and groups of  penalty * max |V|

with ``H = mean x^T x``. It is solved by proximal gradient steps, accelerated (Beck & Teboulle, 2009): a step against
the gradient, as long as the largest eigenvalue L of H allows, then the proximal map of the maximum. By Moreau's
decomposition that is what the projection of a group's values onto the l1 ball of radius ``penalty / L`` leaves of them.

The penalty is set so that this radius is ``strength`` times the sum of magnitudes that a group of average weights of
its row would have. It is for the basis and the groups in which codes are stored, and nothing is stored for it: what
follows sees an ordinary matrix.
"""

import torch

from ..formats import Format

STRENGTH, STEPS, DAMPING = 1e-5, 30, 0.01


@torch.no_grad()
def shrink_extremes(
    weight: torch.Tensor, moments: torch.Tensor, format: Format, strength: float = STRENGTH, steps: int = STEPS
) -> torch.Tensor:
    """``weight`` with smaller extremes, (N, K), float32.

    Args:
        weight: (N, K), floating point.
        moments: H (K, K), float32.
        format: Of the codes, which says what a group is.
        strength: Radius of the l1 ball, in parts of a group's mean sum of magnitudes.
        steps: How many steps are made.
    """
    W = weight.to(torch.float32)
    N, K = W.shape
    size = K if format.group_size == -1 else format.group_size
    level = moments.diagonal().mean()
    if not level > 0:
        return W
    H = moments + DAMPING * level * torch.eye(K, device=W.device)
    H = H / torch.linalg.matrix_norm(H, 2)
    radius = strength * size * W.abs().mean(1).view(N, 1, 1)
    found, ahead, t = W, W, 1.0
    for _ in range(steps):
        moved = torch.nn.functional.pad(ahead - (ahead - W) @ H, (0, -K % size)).view(N, -1, size)
        new = (moved - project(moved, radius)).view(N, -1)[:, :K]
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        found, ahead, t = new, new + (t - 1) / following * (new - found), following
    return found


def project(values: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The nearest point to ``values`` (..., g) whose magnitudes sum up to ``radius`` (..., 1) at most.

    Magnitudes are lowered by one threshold, at 0 at the least. It is sought by Newton's steps from below: what exceeds
    the threshold falls in pieces of straight lines, so they end, after few where the radius is small.
    """
    sizes = values.abs()
    threshold = (sizes.amax(-1, keepdim=True) - radius).clamp_min(0)
    while True:
        above = sizes > threshold
        next_one = ((sizes * above).sum(-1, keepdim=True) - radius) / above.sum(-1, keepdim=True).clamp_min(1)
        if not (next_one > threshold).any():
            return values.sign() * (sizes - threshold).clamp_min(0)
        threshold = torch.maximum(threshold, next_one)
