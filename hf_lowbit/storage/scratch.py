"""A file without a name, for bytes that are needed as long as this process lives.

The file is deleted before anything is written to it (where the system can, it never has a name at all), so that nothing
is left behind however the process ends. Like the files of a repo it is written and read past the system's cache, which
else would take memory that is none of the budget's; where the file system refuses that, every run of bytes is written
out before the next one, and dropped from the cache.

A folder in memory (tmpfs) is refused: what lies there takes the memory that was to be saved.
"""

import contextlib
import errno
import io
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants

from ..budgets import Folder, check_folder
from .layers import BLOCK_BYTES
from .reading import PIECE_BYTES, Files

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems that are memory."""
FREE_PART = 2
"""Of the free space, one part in so many may be used."""


def find_folder(option: Folder) -> Path | None:
    """The folder that ``offload_folder=`` asks for, or None; one that was named has to be of use.

    Raises:
        ValueError: for a folder that was named and is missing, in memory or not writable, with the cure.
    """
    check_folder(option)
    if option is False:
        return None
    if option is None:
        return Path(os.environ.get("HF_LOWBIT_CACHE") or Path(constants.HF_HOME, "hf_lowbit")) / "scratch"
    folder = Path(option)
    try:
        if not folder.is_dir():
            raise OSError(errno.ENOENT, "there is no such folder")
        Scratch(folder, Files([])).close()
    except OSError as error:
        raise ValueError(
            f"offload_folder={str(option)!r} cannot be used: {error.strerror}; give an existing folder on a disk where "
            "you may write, or False to write nothing"
        ) from error
    return folder


class Scratch:
    """A file in ``folder``, made if it is missing, that nobody else sees, open among ``files``.

    Attributes:
        name: By which it is open, and for messages.
        room: Bytes that it may take, of what was free when it was made.

    Raises:
        OSError: where no such file can be made, with the reason in ``strerror``.
    """

    def __init__(self, folder: Path, files: Files):
        if not (hasattr(os, "pwrite") and os.path.isdir("/proc/self/fd")):
            raise OSError(errno.ENOSYS, "this system has no files without names")
        folder.mkdir(parents=True, exist_ok=True)
        if (kind := file_system(folder)) in IN_MEMORY:
            raise OSError(errno.EINVAL, f"it is memory ({kind}), which would not be saved")
        self.files, self.name = files, f"the scratch file in {folder}"
        self.room = shutil.disk_usage(folder).free // FREE_PART
        handle = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (until close)
        assert isinstance(handle, io.FileIO)
        files.handles[self.name, False] = handle
        if hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # file systems without that refuse to open, or to write
                self._open_direct(handle.fileno())

    def _open_direct(self, number: int) -> None:
        again = io.FileIO(os.open(f"/proc/self/fd/{number}", os.O_RDWR | os.O_DIRECT), "r+")
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            try:
                os.pwrite(again.fileno(), block, 0)
            except OSError:
                again.close()
                raise
        self.files.handles[self.name, True] = again

    def write(self, data: torch.Tensor, begin: int, wanted: Callable[[], bool]) -> bool:
        """Writes ``data``, uint8 in whole blocks, from ``begin`` on, for as long as ``wanted()``; whether all of it.

        Raises:
            OSError: if the disk is full or fails.
        """
        view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
        while done < len(view):
            if not wanted():
                return False
            done += self.files.write(self.name, view[done : done + PIECE_BYTES], begin + done)
        if not self.files.direct(self.name):
            os.fsync(self.files.handles[self.name, False].fileno())
            self.files.forget(self.name, begin, begin + done)
        return True

    def close(self) -> None:
        """Gives its space back."""
        for direct in (True, False):
            if handle := self.files.handles.pop((self.name, direct), None):
                handle.close()


def file_system(folder: Path) -> str | None:
    """The kind of file system that ``folder`` is on, "ext4", where the system tells."""
    device = os.stat(folder).st_dev
    number, found = f"{os.major(device)}:{os.minor(device)}", None
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                found = after.split()[0]
    return found
