"""Several processes that share one calibration, as ``accelerate launch`` starts them.

All of them call the same functions with the same arguments and compute the same result: each runs its part of the
batches through a block, and what comes out is exchanged, so that from there on every process has what one alone would
have. Only the main process writes; all read the folder that it writes to.

What is exchanged is exchanged unchanged, but for the sums of moments. These are float64 sums of float32 products, with
29 bits to spare: the order of the summands shows in the float32 result only where a sum lies within 2^-29 of the middle
between two float32 numbers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """All processes of this run.

    Attributes:
        count: How many there are.
        index: Which of them this is; 0 is the main process.
    """

    count: int = 1
    index: int = 0

    @classmethod
    def current(cls) -> "Processes":
        """Those that a launcher started together with this one, or this one alone."""
        launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
        if launched and not (distributed.is_available() and distributed.is_initialized()):
            PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_world_size(), distributed.get_rank())

    def share(self, items: Sequence[T], index: int | None = None) -> Sequence[T]:
        """The part of ``items`` that this process (or process ``index``) is to do, which is contiguous."""
        index = self.index if index is None else index
        first, end = (-(-i * len(items) // self.count) for i in (index, index + 1))
        return items[first:end]

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Replaces each tensor by the sum of all processes' tensors."""
        for tensor in tensors if self.count > 1 else ():
            moved = _movable(tensor)
            distributed.all_reduce(moved)
            tensor.copy_(moved)

    def spread(self, tensor: torch.Tensor, batches: list[torch.Tensor]) -> None:
        """Fills in the rows of ``tensor`` that the other processes computed, each its share of ``batches``."""
        for index in range(self.count) if self.count > 1 else ():
            numbers = self.share(batches, index)
            if len(numbers):
                rows = tensor[int(numbers[0][0]) : int(numbers[-1][-1]) + 1]
                moved = _movable(rows)
                distributed.broadcast(moved, index)
                rows.copy_(moved)

    def gather(self, value: T) -> list[T]:
        """Every process' ``value``, in their order."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, or raises, in the main process, which alone does it, for all of them."""
        if self.count == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.index == 0:
            try:
                answer[0] = work()
            except Exception as error:
                answer[1] = error
        distributed.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def each(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in this process, which begins when the main process is done with its own."""
        found: list[T] = []
        self.first(lambda: found.append(work()))
        return found[0] if found else work()


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as one that can be sent: contiguous, and where the processes' backend takes it."""
    only_gpu = distributed.get_backend() == "nccl" and tensor.device.type == "cpu"
    return (tensor.to(torch.device("cuda", torch.cuda.current_device())) if only_gpu else tensor).contiguous()
