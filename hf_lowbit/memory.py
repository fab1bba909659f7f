"""Gives freed memory back to the system while a model is loaded.

Loading frees one float tensor after another and keeps small packed ones that were allocated between them. The C
library of Linux holds on to the gaps, so that a process may keep much more than the packed model needs.
``malloc_trim`` returns them; it costs the page faults of what is allocated next, so it runs once for every
:data:`INTERVAL` bytes freed.
"""

import ctypes
import functools

INTERVAL = 2**25  # bytes of float weights between two calls


@functools.cache
def _malloc_trim():
    """glibc's ``malloc_trim``, or None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


class FreedMemory:
    """Counts freed bytes and gives memory back when there are enough."""

    def __init__(self):
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """Notes ``nbytes`` that are about to be freed."""
        self.nbytes += nbytes
        if self.nbytes >= INTERVAL:
            self.give_back()

    def give_back(self) -> None:
        """Returns unused heap pages to the system, where the C library can."""
        self.nbytes = 0
        if (trim := _malloc_trim()) is not None:
            trim(0)
