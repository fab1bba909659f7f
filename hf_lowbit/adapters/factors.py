"""What every method that makes low-rank factors has in common."""

from dataclasses import dataclass

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
    """Refuses a rank that the layer ``name`` cannot have, and a layer that is to have a correction besides.

    Raises:
        ValueError: naming the layer.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(planned.shape):
        rows, columns = planned.shape
        raise ValueError(f"rank={rank!r} is not possible for {name} of {rows}x{columns}: use 1 to {min(rows, columns)}")
    if planned.low_rank is not None:
        raise ValueError(
            f"{name} is to get a correction by compensation=, and the adapter is one itself: drop compensation="
        )
