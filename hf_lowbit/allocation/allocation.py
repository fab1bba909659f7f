"""What a search for bits decided: a width for each layer, saved as JSON, read again, and replayed by ``bits=``."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..storage.shards import TEMPORARY

KIND = "hf_lowbit allocation"


@dataclass(frozen=True)
class Allocation:
    """Widths by layer.

    Attributes:
        layers: Width of each layer, by the full name of its module.
        budget: Bits per weight that were allowed, everything counted, on average over these layers.
        bits_per_weight: What they take.
        calibration: The record of the data that layers were measured on.
        damage: Sum over units of the divergence that each alone brings about: what the search minimised.
        uniform: The same for each width taken by all layers, with its bits per weight: ``{"3": [3.35, 1.2]}``.
    """

    layers: dict[str, int]
    budget: float
    bits_per_weight: float
    calibration: dict[str, Any]
    damage: float
    uniform: dict[str, list[float]]

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, beside and renamed."""
        path = Path(path)
        temporary = path.with_name(path.name + TEMPORARY)
        temporary.write_text(json.dumps({"kind": KIND, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def read_allocation(path: str | os.PathLike) -> Allocation:
    """The allocation in a file of :meth:`Allocation.save`.

    Raises:
        ValueError: for a file that is missing or holds something else, naming it and what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the plan {path} cannot be read ({error.strerror}): give a file of `hf-lowbit plan`"
        ) from None
    except ValueError as error:
        raise ValueError(f"the plan {path} is not JSON ({error}): it is truncated or damaged") from error
    if not isinstance(content, dict) or content.pop("kind", None) != KIND:
        raise ValueError(f"{path} is not a plan of bits per layer: make one by `hf-lowbit plan`")
    names = {f.name for f in fields(Allocation)}
    if content.keys() != names:
        raise ValueError(f"the plan {path} has not the fields {', '.join(sorted(names ^ content.keys()))} right")
    layers = content["layers"]
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"the plan {path} names no layers")
    for name, bits in layers.items():
        if isinstance(bits, bool) or bits not in range(1, 9):
            raise ValueError(f"the plan {path} gives {name!r} {bits!r} bits: use 1 to 8")
    if isinstance(content["budget"], bool) or not isinstance(content["budget"], (int, float)):
        raise ValueError(f"the plan {path} has budget={content['budget']!r}, which is not a number")
    return Allocation(**content)
