"""How a problem is cut among programs: one record a kernel, one rule each.

The rules are plain arithmetic over the shape, the same on every device. They aim at enough programs to fill a GPU and
at tiles that keep their registers; a caller who knows better passes a :class:`Tiles`.
"""

from dataclasses import dataclass

from .layout import Layout

GEMV_ROWS = 4  # up to so many rows of x, multiplying in registers beats a tile of tl.dot padded to 16
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tile of one program.

    Args:
        rows: Rows of x (``linear``, ``input_gradient``) or of the result (``dequantize``, ``embedding``).
        outputs: Rows of W.
        inputs: 16-bit lanes a step (``linear``), or inputs.
        split: Programs that share the inputs of one output tile (``linear``).
        warps: Warps a program.
    """

    rows: int
    outputs: int
    inputs: int
    split: int = 1
    warps: int = 4


def _power(n: int, low: int, high: int) -> int:
    """The least power of two that is not below ``n``, between ``low`` and ``high``."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def linear_tiles(M: int, N: int, K: int, layout: Layout) -> Tiles:
    """For ``x`` (M, K) and a weight (N, K)."""
    gemv = M <= GEMV_ROWS
    rows, outputs, lanes = (_power(M, 1, 4), 16, 64) if gemv else (_power(M, 16, 64), 64, 32)
    programs, steps = -(-M // rows) * -(-N // outputs), -(-layout.row_lanes(K) // lanes)
    split = 1
    while split * 2 <= steps and programs * split * 2 <= _PROGRAMS:
        split *= 2
    return Tiles(rows, outputs, lanes, split)


def gradient_tiles(M: int, N: int, K: int) -> Tiles:
    """For a gradient (M, N) and a weight (N, K)."""
    return Tiles(_power(M, 16, 64), 32, 64)


def row_tiles(R: int, K: int) -> Tiles:
    """For R rows of K values."""
    return Tiles(_power(R, 1, 8), 1, 256)
