"""Timing on a device, shared by ``gpu_check.py`` and ``tune.py``: functions take turns, cold caches, medians.

Before every run a buffer larger than any cache is overwritten, so that weights come from memory, as they do in a model
whose layers are many. While the device is busy with that, the host has queued the run between two events: what is
measured is the device, not the launch. Functions are run in turn and not one after another, so that a clock that
changes changes all of them.
"""

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**29


def find_device() -> torch.device | None:
    """The GPU that torch finds, or None."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type in ("cuda", "xpu") else None


def medians(functions: dict[str, Callable], device: torch.device, rounds: int = 25) -> dict[str, float]:
    """Seconds of each function, the median of so many rounds after two that do not count; the same order every time.

    On the CPU, where kernels are interpreted, the host's clock is read: that is good for trying this file out only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    events = _HostClock if device.type == "cpu" else torch.get_device_module(device).Event
    options = {} if device.type == "cpu" else {"enable_timing": True}
    buffer = torch.empty(16 if device.type == "cpu" else FLUSH_BYTES, dtype=torch.uint8, device=device)
    for turn in range(rounds + 2):
        pairs = {}
        for name, function in functions.items():
            start, end = events(**options), events(**options)
            buffer.zero_()
            start.record()
            function()
            end.record()
            pairs[name] = (start, end)
        for name, (start, end) in pairs.items():
            end.synchronize()
            if turn >= 2:
                seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(values) for name, values in seconds.items()}


class _HostClock:
    """The interface of an event, by the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    def elapsed_time(self, end: "_HostClock") -> float:
        return 1000 * (end.at - self.at)
