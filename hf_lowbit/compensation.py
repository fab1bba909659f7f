"""``compensation="eora"``: a correction of low rank beside every packed layer, made while a model is calibrated.

Liu et al., 2024 (arXiv 2410.21271); the mathematics and its account are in :mod:`hf_lowbit.adapters.eora`, which makes
the same correction as an adapter that can be trained. Here it belongs to the weight (:mod:`hf_lowbit.low_rank`): bits
per weight count it, and dequantizing includes it.

It is made when a layer's codes are chosen, for the inputs that the quantized layers before it leave, and the layers
after it see what it corrects. Where a method trains a block as a whole, all corrections of the block follow that.
Factors are bfloat16: float16 cannot hold every input that large models have, and what rounding the factors loses is a
half percent of a correction.
"""

from typing import TYPE_CHECKING, Any

import torch

from .low_rank import LowRank, correction

if TYPE_CHECKING:
    from .calibration import Layer, Moments, Solution
    from .config import LowBitConfig

KINDS = ("eora",)
RANK, DTYPE, DAMPING = 16, torch.bfloat16, 0.01


def resolve_compensation(config: "LowBitConfig", overrides: dict[str, Any] | None = None) -> LowRank | None:
    """The correction that ``config``, changed by ``overrides`` (a rule), asks for beside a layer, or None.

    Raises:
        ValueError: for one that is unknown, or that does not go with the other options.
    """
    options = {"compensation": config.compensation, "compensation_rank": config.compensation_rank, **(overrides or {})}
    kind, rank = options["compensation"], options["compensation_rank"]
    if kind in (None, "none"):
        if rank is not None and "compensation_rank" in (config.given if overrides is None else overrides):
            raise ValueError(
                f"compensation_rank={rank!r} is of no use without a compensation: give compensation='eora'"
            )
        return None
    if kind not in KINDS:
        raise ValueError(f"compensation={kind!r} is unknown: use {' or '.join(map(repr, KINDS))}")
    rank = RANK if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"compensation_rank={rank!r} is not possible: use a whole number from 1")
    format, method = config.resolve(overrides)
    if format.name == "nested":
        raise ValueError(f"compensation={kind!r} does not go with format 'nested': a correction fits one width only")
    if getattr(method, "bits_stored", None) is not None:
        raise ValueError(f"compensation={kind!r} does not go with bits_stored=, which knows of codes alone: drop one")
    if config.bits not in (1.58, int(config.bits)) and config.layers is None:
        raise ValueError(
            f"compensation={kind!r} does not go with the budget bits={config.bits!r}, which knows of codes alone: "
            "use a whole number"
        )
    return LowRank(rank, DTYPE)


def check_compensation(name: str, low_rank: LowRank, shape: tuple[int, int]) -> None:
    """Raises ``ValueError`` for a rank that the layer ``name`` of ``shape`` (N, K) cannot have."""
    if low_rank.rank > min(shape):
        raise ValueError(
            f"compensation_rank={low_rank.rank} is not possible for {name} of {shape[0]}x{shape[1]}: use at most "
            f"{min(shape)}, or a rule {{{name!r}: {{'compensation': 'none'}}}}"
        )


def compensated(layer: "Layer", solution: "Solution", moments: "Moments") -> "Solution":
    """``solution`` with the correction that the plan wants for ``layer``, rounded as it is stored; unchanged without.

    Args:
        layer: The layer.
        solution: Its codes.
        moments: Of its inputs.
    """
    low_rank = layer.planned.low_rank
    if low_rank is None:
        return solution
    error = layer.weight - layer.value(solution)
    A, B = correction(error, moments.damped(DAMPING), low_rank.rank)
    solution.lora_a, solution.lora_b = (t.to(low_rank.dtype).float() for t in (A, B))
    return solution
