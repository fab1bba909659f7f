"""What calibrated methods know of a linear layer's inputs: second moments and token counts.

For a layer ``y = x W^T`` the squared error of the output over all tokens is a quadratic form of the weight's error,
``sum |x E^T|^2 = tr(E S E^T)`` with ``S = sum x^T x``. So S (K, K) is all that GPTQ, EoRA and layer-wise ApiQ need, and
the tokens themselves need not be kept. Layers that share an input (query, key and value) share one S.

Where the layers before are quantized already, x is what the quantized model computes, and a method that corrects for
their error too needs ``C = mean r^T x`` with r the float model's input at the same token: ``W' S = W C`` gives the
weight whose output is nearest to the float model's.
"""

import torch

from ..formats import Format


class Moments:
    """Mean second moments of the inputs of one or several layers, float32.

    Attributes:
        square: ``mean x^T x`` (K, K).
        cross: ``mean r^T x`` (K, K), or None if it was not asked for.
        tokens: Number of tokens counted.
    """

    def __init__(self, in_features: int, cross: bool = False, device: torch.device | str = "cpu"):
        def zeros():
            return torch.zeros(in_features, in_features, device=device)

        self.square, self.tokens = zeros(), 0
        self.cross: torch.Tensor | None = zeros() if cross else None

    def add(self, x: torch.Tensor, r: torch.Tensor | None = None) -> None:
        """Counts tokens ``x`` (..., K) and, for cross moments, the float model's inputs ``r`` at the same tokens."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        total = self.tokens + len(x)
        # A running mean: sums of a long calibration would lose what a single window adds.
        keep, take = self.tokens / total, 1 / total
        self.square.addmm_(x.T, x, beta=keep, alpha=take)
        if self.cross is not None:
            assert r is not None
            r = r.detach().reshape(-1, r.shape[-1]).float()
            self.cross.addmm_(r.T, x, beta=keep, alpha=take)
        self.tokens = total

    def damped(self, damping: float) -> torch.Tensor:
        """``square`` with ``damping`` times its mean diagonal added to the diagonal; the identity without tokens."""
        identity = torch.eye(len(self.square), device=self.square.device)
        level = self.square.diagonal().mean()
        if not level > 0:
            return identity
        return self.square + damping * level * identity

    def turned(self, format: Format) -> "Moments":
        """The moments of the inputs in the basis in which ``format`` stores its codes."""
        if format.inner is format:
            return self
        result = Moments(0, device=self.square.device)
        result.tokens, result.square = self.tokens, format.turn(format.turn(self.square).T).T
        result.cross = None if self.cross is None else format.turn(format.turn(self.cross).T).T
        return result

    def scaled(self, factors: torch.Tensor) -> "Moments":
        """The moments of the inputs times ``factors`` (K,)."""
        result = Moments(0, device=self.square.device)
        result.tokens, result.square = self.tokens, self.square * factors * factors[:, None]
        result.cross = None if self.cross is None else self.cross * factors * factors[:, None]
        return result

    def output_error(self, weight: torch.Tensor, other: torch.Tensor) -> float:
        """Mean over tokens of ``|x V^T - x W^T|^2`` for ``weight`` W and ``other`` V (N, K)."""
        E = other - weight
        return float(((E @ self.square) * E).sum(dtype=torch.float64))
