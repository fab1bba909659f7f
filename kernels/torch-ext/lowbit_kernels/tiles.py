"""How a problem is cut among programs: one record a kernel, one rule each.

The rules are plain arithmetic over the shape. They aim at enough programs to fill a GPU and at tiles that keep their
registers; the files read by :mod:`.tuning` go before them, and a caller who knows better passes a :class:`Tiles`.

In the portable kernels a thread loads 16 bytes of the narrowest plane at a time, if the tile has that many for every
thread: the rules count in threads, and warps follow from how wide the device's are. 16 bytes of a 1-bit plane are 128
weights; after a plane of 4 bits they are decoded in two parts (``Layout.sum_parts``), in gradients in four.
"""

from dataclasses import dataclass, replace

from .fast import FastTiles
from .layout import Layout

GEMV_ROWS = 4  # up to so many rows of x, multiplying in registers beats a tile of tl.dot padded to 16
SMALL_GROUP = 32  # up to so many weights, the scales of a step take registers that a tile of usual size needs
_MULTIPROCESSORS = 128  # of a large GPU


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tile of one program.

    Args:
        rows: Rows of x (``linear``, ``input_gradient``) or of the result (``dequantize``, ``embedding``).
        outputs: Rows of W.
        inputs: 16-bit lanes a step (``linear``, ternary rows), or inputs; of others than ternary, whole blocks of 64.
        split: Programs that share the inputs of one output tile (``linear``).
        warps: Warps a program.
        stages: Steps whose loads are under way at a time; Triton's own number if None.
    """

    rows: int
    outputs: int
    inputs: int
    split: int = 1
    warps: int = 4
    stages: int | None = None

    @property
    def pipelined(self) -> dict[str, int]:
        """``stages`` as an option of a launch."""
        return {} if self.stages is None else {"num_stages": self.stages}


def wants_registers(rows: int, layout: Layout, full: bool = False) -> bool:
    """Whether a product with ``rows`` of x a program, left to NVIDIA's assembler, saves registers and spills a few."""
    return rows <= GEMV_ROWS or layout.ternary or 0 < layout.group <= SMALL_GROUP or (full and layout.bits in (5, 7))


def _power(n: int, low: int, high: int) -> int:
    """The least power of two that is not below ``n``, between ``low`` and ``high``."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def linear_tiles(M: int, N: int, K: int, layout: Layout, warp: int = 32, full: bool = False) -> Tiles:
    """For ``x`` (M, K), float32 if ``full``, and a weight (N, K), on a device with ``warp`` threads in a warp."""
    gemv, small = M <= GEMV_ROWS, 0 < layout.group <= SMALL_GROUP
    # A 1-bit plane after another takes registers, and so does ternary (0 bits).
    most = {0: 32, 3: 32, 5: 16 if small else 32, 7: 16}.get(layout.bits, 64)
    most = 16 if full else most
    rows, outputs, lanes, threads = (_power(M, 1, 4), 16, 32, 64) if gemv else (_power(M, 16, most), 64, 16, 128)
    if not layout.ternary:
        lanes = max(layout.lanes, lanes * layout.planes[0] // layout.planes[-1])
        if full and not gemv:  # without tensor cores a thread holds what it multiplies: half as many inputs at a time
            fewer = max(layout.lanes, 16) * layout.sum_parts
            outputs, lanes = outputs * lanes // fewer, fewer
    programs, steps = -(-M // rows) * -(-N // outputs), -(-layout.row_lanes(K) // lanes)
    split = _shares(programs, steps, 2 * _MULTIPROCESSORS)
    return Tiles(rows, outputs, lanes, split, threads // warp)


def grouped_tiles(
    M: int, N: int, K: int, layout: Layout, warp: int = 32, nvidia: bool = True, full: bool = False
) -> Tiles:
    """:func:`linear_tiles` for about M rows an expert: kernels that hold more addresses, and spill from some widths on.

    The exceptions were found by counting in compiled code; nothing here was timed.
    """
    tiles = replace(linear_tiles(M, N, K, layout, warp, full), split=1)
    small, rdna, gemv = 0 < layout.group <= SMALL_GROUP, not nvidia and warp == 32, M <= GEMV_ROWS
    exceptions = {
        (7, small and nvidia and not gemv and not full): {"outputs": 128, "warps": 8, "stages": 2},
        (3, small and rdna and gemv): {"outputs": 32, "warps": 4},
        (7, not small and rdna and gemv): {"outputs": 32, "warps": 4},
        (7, small and rdna and gemv): vars(replace(linear_tiles(GEMV_ROWS + 1, N, K, layout, warp, full), split=1)),
    }
    return replace(tiles, **exceptions.get((layout.bits, True), {}))


def fast_split(
    M: int, N: int, K: int, layout: Layout, tiles: FastTiles, multiprocessors: int = 0, resident: int = 4
) -> int:
    """How many programs of :func:`.fast.fast_kernel` share the inputs of one output tile.

    ``resident`` programs for each multiprocessor, four being what registers and shared memory leave room for in most
    compiled code; but no more shares than are written and read again with a quarter of the traffic of the weights.
    """
    programs, steps = -(-M // tiles.rows) * -(-N // tiles.outputs), -(-K // (64 * tiles.blocks * tiles.spans))
    worth = K * layout.bits // (256 * M)  # 8 bytes a share and row against bits / 8 a weight
    return _shares(programs, min(steps, worth), resident * (multiprocessors or _MULTIPROCESSORS))


def _shares(programs: int, most: int, fill: int) -> int:
    """The greatest power of two up to ``most`` with which ``programs`` times it are not more than ``fill``."""
    split = 1
    while split * 2 <= most and programs * split * 2 <= fill:
        split *= 2
    return split


def along(N: int, outputs: int, apart: int) -> int:
    """Programs of so many outputs that N rows of W take; each has neighbours, or every ``apart``-th row."""
    return -(-N // (outputs * max(1, apart))) * max(1, apart)


def along_inputs(K: int, inputs: int, layout: Layout, apart: int) -> int:
    """Programs of so many ``inputs`` that rows of K take, of kernels whose output runs along them.

    Ternary rows are counted in lanes, with those of other rows that ``apart`` rows may begin behind.
    """
    return -(-(layout.row_lanes(K) + 8 - 8 // max(1, apart) if layout.ternary else K) // inputs)


def at_most(split: int, steps: int) -> int:
    """``split``, or the greatest power of two that leaves every program one of so many steps."""
    return min(split, 1 << (max(1, steps).bit_length() - 1))


def gradient_tiles(M: int, N: int, K: int, layout: Layout, warp: int = 32, full: bool = False) -> Tiles:
    """For a gradient (M, N), float32 if ``full``, and a weight (N, K)."""
    least = 0 if layout.ternary else layout.planes[-1]
    if full:  # as in linear_tiles; a quarter of the outputs is decoded at a time, where the weight is in planes
        rows = 8 if least <= 1 and warp == 32 else 16
        outputs, inputs = (16, 64) if layout.ternary else (64, 256 if least == 1 else 128)
        return Tiles(rows, outputs, inputs, 1, 128 // warp)
    sizes = {8: (64, 32, 64), 4: (32, 64, 64), 2: (32, 64, 128), 1: (64, 128, 128), 0: (16, 16, 64)}
    rows, outputs, inputs = sizes[least]
    return Tiles(_power(M, 16, rows), outputs, inputs, 1, 128 // warp)


def grouped_gradient_tiles(
    M: int, N: int, K: int, layout: Layout, warp: int = 32, nvidia: bool = True, full: bool = False
) -> Tiles:
    """:func:`gradient_tiles` for about M rows an expert, see :func:`grouped_tiles`."""
    tiles, rdna = gradient_tiles(M, N, K, layout, warp, full), not nvidia and warp == 32
    return replace(tiles, rows=16) if layout.name in ("nf", "codebook") and rdna and not full else tiles


def row_tiles(R: int, K: int, layout: Layout, warp: int = 32, nvidia: bool = True, full: bool = False) -> Tiles:
    """For R rows of K values; more rows than there are where fewer would leave threads less than 16 bytes to load.

    RDNA has no registers left for float32 from small groups of 7 bits in two warps; one alone is laid out otherwise.
    """
    narrow = full and layout.bits == 7 and 0 < layout.group <= SMALL_GROUP and not nvidia and warp == 32
    threads = 32 if narrow else 64
    values = threads * (8 if layout.ternary else 128 // layout.planes[-1])
    inputs = _power(layout.row_lanes(K) if layout.ternary else K, 64, values // _power(R, 1, 8))
    return Tiles(values // inputs, 1, inputs, 1, threads // warp)
