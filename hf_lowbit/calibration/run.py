"""The folder of a run: a file for each finished block, written beside and renamed, and read again on the way on."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..low_rank import SUFFIXES
from ..plan import Packed
from ..storage.shards import TEMPORARY, explained, sync_folder
from .block import Solution

TUNED = "tuned:"  # begins the names of parameters that are not packed
TOKENS = "tokens"  # key in a block file's metadata: tokens that each layer saw


@dataclass
class Run:
    """A run in the folder ``work``; calling it with a module's name gives its packed tensors, or None.

    Attributes:
        work: The folder.
        layers: For each block, the full names of its solved modules.
        planned: What was planned for each of them.
        identity: Hash of all that the result depends on.
    """

    work: Path
    layers: list[list[str]]
    planned: dict[str, Packed]
    identity: str = ""
    _open: dict[int, dict[str, Solution]] = field(default_factory=dict)

    def __post_init__(self):
        self._block_of = {name: i for i, names in enumerate(self.layers) for name in names}

    def path(self, index: int) -> Path:
        """The file of block ``index``."""
        return self.work / f"block-{index:05d}.safetensors"

    def finished(self, index: int) -> bool:
        """Whether block ``index`` is solved."""
        return self.path(index).is_file()

    def write(self, index: int, solutions: dict[str, Solution], tuned: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the solutions of a block, by full module name, and tuned parameters by theirs, beside and renames."""
        tensors = {TUNED + name: value.contiguous() for name, value in (tuned or {}).items()}
        counts = {name: s.tokens for name, s in solutions.items() if s.tokens is not None}
        for name, s in solutions.items():
            tensors.update({f"{name}.weight{suffix}": t.contiguous() for suffix, t in s.tensors.items()})
            if s.lora_a is not None and s.lora_b is not None:
                tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = s.lora_a.contiguous(), s.lora_b.contiguous()
        path = self.path(index)
        temporary = path.with_name(path.name + TEMPORARY)
        with explained(path, sum(t.nbytes for t in tensors.values())):
            save_file(tensors, temporary, {TOKENS: json.dumps(counts)} if counts else None)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)

    def read(self, index: int) -> dict[str, Solution]:
        """The solutions of a finished block, by full module name.

        Raises:
            ValueError: if the file does not hold what was planned, naming it.
        """
        tensors, counts, found = load_file(self.path(index)), self._tokens(index), {}
        for name in self.layers[index]:
            planned = self.planned[name]
            expected = planned.format.tensors(planned.shape)
            stored: dict[str, torch.Tensor] = {}
            for suffix, (shape, dtype) in expected.items():
                tensor = tensors.get(f"{name}.weight{suffix}")
                if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                    raise ValueError(f"{self.path(index)} is damaged at {name}.weight{suffix}: remove it and go on")
                stored[suffix] = tensor
            found[name] = Solution(stored, tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B"))
            found[name].tokens = counts.get(name)
            if planned.low_rank is not None:
                shapes = planned.low_rank.shapes(planned.shape).values()
                for factor, shape in zip("AB", shapes, strict=True):
                    if tuple(getattr(tensors.get(f"{name}.lora_{factor}"), "shape", ())) != shape:
                        raise ValueError(f"{self.path(index)} is damaged at {name}.lora_{factor}: remove it and go on")
        return found

    def __call__(self, name: str) -> dict[str, torch.Tensor] | None:
        index = self._block_of.get(name)
        if index is None:
            return None
        if index not in self._open:
            self._open.clear()  # one block at a time
            self._open[index] = self.read(index)
        solution, low_rank = self._open[index][name], self.planned[name].low_rank
        if low_rank is None:
            return solution.tensors
        assert solution.lora_a is not None and solution.lora_b is not None
        factors = (factor.to(low_rank.dtype) for factor in (solution.lora_a, solution.lora_b))
        return {**solution.tensors, **dict(zip(SUFFIXES, factors, strict=True))}

    def parameter(self, name: str) -> torch.Tensor | None:
        """The new value, float32, of a parameter that is not packed, by its full name, or None."""
        return self.parameters.get(name)

    @functools.cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """All of them, once the run is finished."""
        return {name: t for i in range(len(self.layers)) if self.finished(i) for name, t in self.tuned(i).items()}

    def tuned(self, index: int) -> dict[str, torch.Tensor]:
        """Those of a finished block."""
        with safe_open(self.path(index), "pt") as file:
            keys = [key for key in file.keys() if key.startswith(TUNED)]  # noqa: SIM118  (it is no dict)
            return {key.removeprefix(TUNED): file.get_tensor(key) for key in keys}

    def tokens(self) -> dict[str, int]:
        """For each module whose solution rests on calibration, how many tokens it saw."""
        found = {}
        for index in range(len(self.layers)):
            found.update(self._tokens(index) if self.layers[index] else {})
        return found

    def _tokens(self, index: int) -> dict[str, int]:
        with safe_open(self.path(index), "pt") as file:
            return json.loads((file.metadata() or {}).get(TOKENS, "{}"))

    def solutions(self) -> Iterator[tuple[str, Solution]]:
        """Every module's solution, a block at a time."""
        for index in range(len(self.layers)):
            yield from (self.read(index) if self.layers[index] else {}).items()
