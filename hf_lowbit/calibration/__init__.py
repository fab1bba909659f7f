"""Running a float model block by block, so that methods see their layers' inputs. Start at :mod:`.pipeline`."""

from .block import Block, Layer, Solution
from .data import Calibration
from .hook import Hook, LayerHook
from .pipeline import calibrate
from .planned import Planned, planned_hook
from .run import Run
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
