"""Bits where they matter: a width for each layer so that the whole stays within a budget. Start at :mod:`.budget`."""

from .allocation import Allocation, read_allocation
from .budget import allocate

__all__ = ["Allocation", "allocate", "read_allocation"]
