"""Tensors whose memory ends, or begins, at a page that cannot be touched.

Memory that torch allocates is rounded up, so a kernel that reads a little past its end goes unnoticed. Here the first
byte outside ends the process by a segmentation fault, without any help from a compiler, and AddressSanitizer's build
of the kernels says where it was. On the other side of the tensor lie bytes with a value that :meth:`Guarded.check`
looks for.
"""

import ctypes
import mmap

import torch

CANARY = 0xA5
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Makes such tensors and keeps their memory until it is gone itself.

    Args:
        at_end: The page that cannot be touched is behind a tensor; before it otherwise.
    """

    def __init__(self, at_end: bool):
        self.at_end, self._kept = at_end, []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of ``tensor``, contiguous, aligned to nothing but its own elements."""
        size, page = tensor.nbytes, mmap.PAGESIZE
        inside = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[page : page + inside] = bytes([CANARY]) * inside
        for edge in (start, start + page + inside):
            if _libc.mprotect(edge, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = inside - size if self.at_end else 0
        self._kept.append((memory, page, inside, first, size))
        if size == 0:
            return tensor.clone()
        array = (ctypes.c_uint8 * size).from_address(start + page + first)
        return torch.frombuffer(array, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def check(self) -> None:
        """Raises AssertionError where a byte beside a tensor was overwritten."""
        for memory, page, inside, first, size in self._kept:
            rest = memory[page : page + first] + memory[page + first + size : page + inside]
            assert rest == bytes([CANARY]) * (inside - size), "a kernel wrote outside of a tensor"
