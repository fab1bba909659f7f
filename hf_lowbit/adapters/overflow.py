"""Noticing float16 overflow while an adapter trains, without making an accelerator wait.

float16 ends at 65504. A value past it is infinite, the loss NaN, and no message says where it began. So the packed
layers under an adapter look at what they get and give in training, in float16 alone. On a CPU the answer is there at
once. On another device it is copied to the host beside the work that goes on, and read when the layer runs again: a
step late, by when it has long arrived, and never waited for.

Left out: compiled graphs, which cannot stop in the middle, evaluation, and adapters that are more than two factors
(DoRA and others), whose layers are PEFT's.
"""

import math

import torch


class OverflowWatch:
    """Of one layer. Call it with what the layer got and gave in a training step."""

    def __init__(self) -> None:
        self.pending: tuple[torch.Tensor, torch.Event] | None = None

    def __reduce__(self):
        return OverflowWatch, ()  # copies of a model watch for themselves

    def __call__(self, name: str, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> None:
        """Notes whether all is finite, and raises as soon as it is known that it was not.

        Args:
            name: Of the layer, for the message.
            x: (..., K), its input.
            a: (r, K), the adapter's first factor.
            b: (N, r), the second.
            y: (..., N), its output, float16.

        Raises:
            ValueError: naming the layer, what was not finite first, and what can be done.
        """
        if torch.compiler.is_compiling():
            return
        if self.pending is not None and self.pending[1].query():
            self._read(name, self.pending[0])
            self.pending = None
        if self.pending is None:
            found = _largest(x, a, b, y)
            if found.device.type == "cpu":
                self._read(name, found)
            else:
                event = torch.Event(found.device)
                self.pending = found.to("cpu", non_blocking=True), event
                event.record()

    @staticmethod
    def _read(name: str, found: torch.Tensor) -> None:
        x, a, b, y = found.tolist()
        if math.isfinite(y):
            return
        if not math.isfinite(x):
            what = "its input is not finite: something before it overflowed"
        elif not math.isfinite(a) or not math.isfinite(b):
            what = "its adapter is no longer finite: an earlier step overflowed, or its rate is too high"
        else:
            what = f"its output is past 65504, for inputs of at most {x:.3g}"
        raise ValueError(
            f"float16 overflow in training at {name or 'a packed layer'}: {what}. Train in bfloat16 (bf16=True, or "
            "dtype=torch.bfloat16) or in float32, from a checkpoint of before"
        )


@torch.no_grad()
def _largest(*tensors: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each of ``tensors``, float32; infinite or NaN where something in it is."""
    return torch.stack([torch.linalg.vector_norm(t, math.inf, dtype=torch.float32) for t in tensors])
