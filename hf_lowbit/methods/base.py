"""The contract of a method: how codes are chosen.

A method gets a float weight ``(N, K)`` and a :class:`~hf_lowbit.formats.Format`, and returns a
:class:`~hf_lowbit.formats.Quantized`. It knows nothing of packing, files, modules or devices. Most data-free methods
only choose the *grid* and round to its nearest point: they subclass :class:`GridMethod` and write ``fit``, and are
then run in chunks of rows so that a huge matrix needs little extra memory. Any other method subclasses
:class:`Method`.

Options of a method are the keyword arguments of its constructor; ``LowBitConfig(method_options={...})`` is checked
against them.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..formats import Format, Quantized
from ..transforms.magr import shrink_extremes

if TYPE_CHECKING:
    from ..calibration import Block, Moments

PREPROCESSING = {"magr": shrink_extremes}


def preprocessing(text: Any) -> Callable[[torch.Tensor, torch.Tensor, Format], torch.Tensor]:
    """What ``preprocess=text`` stands for: "magr", or "magr:1e-4" where its strength is given.

    Raises:
        ValueError: for anything else.
    """
    name, colon, strength = text.partition(":") if isinstance(text, str) else (text, "", "")
    if name not in PREPROCESSING:
        raise ValueError(f"preprocess={text!r} is unknown: use {' or '.join(map(repr, PREPROCESSING))}")
    if not colon:
        return PREPROCESSING[name]
    try:
        number = float(strength)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError(f"preprocess={text!r} is not possible: use '{name}:' and a strength from 0 to 1, as 1e-5")
    return functools.partial(PREPROCESSING[name], strength=number)


# Weights of one chunk of rows in GridMethod. A method holds about ten float32 temporaries of this size: 10 MB, which
# also fit a processor's cache.
CHUNK_WEIGHTS = 2**18


class Method(ABC):
    """Base of all methods."""

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    """Names of the formats whose codes this method can choose."""
    needs_calibration: ClassVar[bool] = False
    preprocess: str | None = None
    """What is done to weights before, a text for :func:`preprocessing`; a config sets it."""

    def prepared(self, weight: torch.Tensor, format: Format, statistics: "Moments | None") -> torch.Tensor:
        """``weight`` (N, K) after :attr:`preprocess`, for which ``statistics`` of its inputs are needed.

        Both are in the basis in which ``format`` stores codes.
        """
        if self.preprocess is None:
            return weight
        if statistics is None:
            raise ValueError(f"preprocess={self.preprocess!r} needs calibration data: give calibration=")
        return preprocessing(self.preprocess)(weight, statistics.square, format)

    def check(self, format: Format) -> None:  # noqa: B027  (most can choose codes of every format of these names)
        """Raises ``ValueError`` if codes of ``format`` cannot be chosen; asked before any work."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, format: Format, statistics: Any = None) -> Quantized:
        """Chooses codes and scales for ``weight`` (N, K), floating point, on its device.

        Scales must be ones that the format can store (:meth:`Format.storable_scales`). ``weight`` is not changed. The
        result depends on the arguments alone.

        Args:
            weight: What to quantize.
            format: As what.
            statistics: For methods that need calibration, the :class:`~hf_lowbit.calibration.Moments` of the inputs.
        """


class BlockMethod(Method):
    """A method that starts layer by layer and then works on all its layers of a decoder block together."""

    needs_calibration = True

    def quantize(self, weight, format, statistics=None):
        """The start alone."""
        if statistics is None:
            raise ValueError(f"method {self.name!r} needs calibration data: give calibration=, such as a list of texts")
        return self.begin(weight, format, statistics)[0]

    @abstractmethod
    def begin(self, weight: torch.Tensor, format: Format, statistics: Any) -> tuple[Quantized, Any]:
        """The start of a layer, as :meth:`quantize` gives it, and what :meth:`train` needs of it."""

    @abstractmethod
    def train(self, block: "Block", states: dict[str, Any]) -> None:
        """Solves layers of ``block`` again, by :meth:`~hf_lowbit.calibration.Block.set`.

        Args:
            block: The block, whose layers all have a solution, with the float model's activations.
            states: What :meth:`begin` returned for each layer of this method, by its name in the block.
        """


class FactorMethod(Method):
    """A method that multiplies inputs by factors, which a calibration may fold into what makes them.

    Attributes:
        fold: Whether it may: True for factors that a layer has alone, "all" for those too that several layers share.
            :meth:`quantize` then gets the weight divided by the factors, and the format without any.
    """

    needs_calibration = True
    fold: bool | str

    @abstractmethod
    def factors(
        self,
        weights: list[torch.Tensor],
        format: Format,
        statistics: "Moments",
        possible: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Factors (K,), float32, of the one input that several layers read.

        Args:
            weights: Theirs, (N, K) each, float32.
            format: Of all of them, with factors.
            statistics: The :class:`~hf_lowbit.calibration.Moments` of the input.
            possible: Makes of a wish (K,) the factors that can be had; what is returned came out of it.
        """


class GridMethod(Method):
    """A method that chooses scales (and zeros, and levels) and then rounds every weight to the nearest point.

    Attributes:
        columns: What a squared error counts in each column, (K,) float32, or None where all count the same. Calibrated
            methods set it on a grid method that they start from; "rtn" with a searched range and "lloyd" look at it.
    """

    columns: torch.Tensor | None = None

    def column_groups(self, format: Format) -> torch.Tensor | None:
        """``columns`` by group for :meth:`Format.by_group`, (1, G, g); a shorter last group is filled up with zeros."""
        if self.columns is None:
            return None
        count = len(self.columns)
        size = count if format.group_size == -1 else format.group_size
        return torch.nn.functional.pad(self.columns, (0, -count % size)).view(1, -1, size)

    def prepare(self, weight: torch.Tensor, format: Format) -> torch.Tensor | None:
        """Levels (1, L) shared by the whole matrix, for formats that learn them per tensor."""
        return None

    @abstractmethod
    def fit(self, rows: torch.Tensor, format: Format, levels: torch.Tensor | None):
        """The grid of ``rows`` (n, K), float32: ``(scales (n, G), zeros (n, G) or None, levels (n, L) or None)``.

        Levels are returned only by formats with a table per row.
        """

    @torch.no_grad()
    def quantize(self, weight, format, statistics=None):
        size = max(1, CHUNK_WEIGHTS // max(1, weight.shape[1]))
        shared = self.prepare(weight, format)
        grids = [self.fit(rows.to(torch.float32), format, shared) for rows in weight.split(size)]
        scales, zeros, levels = (None if g[0] is None else torch.cat(g) for g in zip(*grids, strict=True))
        if scales is not None:
            scales = format.storable_scales(scales)  # over the whole matrix: some codecs have one range per tensor
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for i in range(0, weight.shape[0], size):
            part = slice(i, i + size)
            parts = (None if t is None else t[part] for t in (scales, zeros, levels))
            codes[part] = self.round(weight[part].to(torch.float32), format, shared, *parts)
        return Quantized(codes, scales, zeros, shared if levels is None else levels)

    def round(self, rows, format, shared, scales, zeros, levels) -> torch.Tensor:
        """Nearest codes (n, K) of ``rows`` (n, K)."""
        table = shared if levels is None else levels
        return format.by_group(lambda g, s, z: format.encode_groups(g, s, z, table), rows, scales, zeros)
