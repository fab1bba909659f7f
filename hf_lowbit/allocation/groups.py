"""Layers that get the same width: those that read the same input, so that engines can run them as one matrix."""

import re

# What is fused, by the last part of the name; the members found beside each other in one module are one unit.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("fc1", "fc1_gate"),
)
_SET_OF = {name: names for names in SIBLINGS for name in names}


def tie(names: list[str]) -> list[list[str]]:
    """``names`` of modules in units of one width, in the order of their first members.

    Experts of one layer that lie in a list (``experts.0.up_proj``, ``experts.1.up_proj``) are one unit as well: a
    router may send anything to any of them, and few tokens see each.
    """
    units: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        place, _, leaf = re.sub(r"(?<=experts\.)\d+(?=\.)", "*", name).rpartition(".")
        units.setdefault((place, _SET_OF.get(leaf, (leaf,))), []).append(name)
    return list(units.values())
