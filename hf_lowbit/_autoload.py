"""Loads packed repos in processes that never import this package.

Transformers has no entry points for quantizers, but torch runs those of the group ``torch.backends`` when it is
imported. The one of this package puts a finder in front of ``sys.meta_path`` that waits for
``transformers.quantizers`` and registers when that has been imported. It costs one class and one list insertion, and
imports neither transformers nor anything else. It never raises, neither into ``import torch`` nor, should registering
fail, into ``import transformers``, which then gets a warning.

Switched off by ``HF_LOWBIT_AUTOLOAD=0``, or by torch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import importlib.util
import os
import sys
import warnings

TARGET = "transformers.quantizers"


class _Loader:
    """Passes everything on to the real loader, and registers after the module has run."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        from . import register

        try:
            register()
        except Exception as error:  # a process that never asked for this package must go on
            warnings.warn(f"hf_lowbit could not register with transformers: {error!r}", stacklevel=2)


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != TARGET:
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Finder]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def wait() -> None:
    """Registers when ``transformers.quantizers`` is imported."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def install() -> None:
    """The entry point of the group ``torch.backends``."""
    if os.environ.get("HF_LOWBIT_AUTOLOAD", "1") == "0":
        if getattr(sys.modules.get(__package__), "_imported_by_torch", False):
            del sys.modules[__package__]  # so that a user's own import, later, is a first one and registers
    elif TARGET not in sys.modules:
        wait()
