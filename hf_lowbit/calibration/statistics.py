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
from .processes import Processes

STRIP = 256  # rows of a symmetric matrix that are computed together, from the diagonal on


class Moments:
    """Mean second moments of the inputs of one or several layers.

    The products of each batch are float32, as wide as what they are made of; they are summed in float64, so that a long
    calibration loses nothing of a single window, and the order of the batches does not show.

    Attributes:
        square: ``mean x^T x`` (K, K), float32.
        cross: ``mean r^T x`` (K, K), float32, or None if it was not asked for.
        tokens: Number of tokens counted.
    """

    def __init__(self, in_features: int, cross: bool = False, device: torch.device | str = "cpu"):
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # which mps has not
        self.tokens = 0
        self._sums: list[torch.Tensor] = [
            torch.zeros(in_features, in_features, dtype=dtype, device=device) for _ in range(2 if cross else 1)
        ]
        self._means: list[torch.Tensor | None] = []

    @property
    def square(self) -> torch.Tensor:
        square = self._mean(0)
        assert square is not None
        return square

    @square.setter
    def square(self, value: torch.Tensor) -> None:
        self._means = [value, None]

    @property
    def cross(self) -> torch.Tensor | None:
        return self._mean(1)

    @cross.setter
    def cross(self, value: torch.Tensor | None) -> None:
        self._means = [self.square, value]

    def _mean(self, index: int) -> torch.Tensor | None:
        if not self._means:
            means = [(total / max(self.tokens, 1)).float() for total in self._sums]
            for _, part in _strips(len(means[0])):
                means[0][part.stop :, part] = means[0][part, part.stop :].T
            self._means, self._sums = [*means, None][:2], []  # type: ignore[list-item]
        return self._means[index]

    def add(self, x: torch.Tensor, r: torch.Tensor | None = None) -> None:
        """Counts tokens ``x`` (..., K) and, for cross moments, the float model's inputs ``r`` at the same tokens.

        Not after the means have been looked at.
        """
        assert not self._means
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for begin, part in _strips(x.shape[1]):
            self._sums[0][part, begin:] += x[:, part].T @ x[:, begin:]
        if len(self._sums) > 1:
            assert r is not None
            self._sums[1] += r.detach().reshape(-1, r.shape[-1]).float().T @ x
        self.tokens += len(x)

    def add_others(self, processes: Processes) -> None:
        """Counts what the other processes counted."""
        processes.add(self._sums)
        self.tokens = sum(processes.gather(self.tokens))

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


def _strips(size: int) -> list[tuple[int, slice]]:
    return [(begin, slice(begin, begin + STRIP)) for begin in range(0, size, STRIP)]
