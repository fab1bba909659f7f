"""Running a float model block by block, so that methods see their layers' inputs. Start at :mod:`.pipeline`."""

from .data import Calibration
from .pipeline import Block, Hook, Layer, LayerHook, Run, Solution, calibrate
from .planned import Planned, planned_hook
from .statistics import Moments

__all__ = [
    "Block",
    "Calibration",
    "Hook",
    "Layer",
    "LayerHook",
    "Moments",
    "Planned",
    "Run",
    "Solution",
    "calibrate",
    "planned_hook",
]
