"""Loads packed repos, and adapters for them, in processes that never import this package.

Transformers has no entry points for quantizers, nor PEFT for layers, but torch runs those of the group
``torch.backends`` when it is imported. The one of this package puts a finder in front of ``sys.meta_path`` that waits
for ``transformers.quantizers`` and three modules of PEFT and registers with each when that has been imported. It costs
one class and one list insertion, and imports neither transformers nor anything else. It never raises, neither
into ``import torch`` nor, should registering fail, into ``import transformers`` or ``import peft``, which then gets a
warning.

Switched off by ``HF_LOWBIT_AUTOLOAD=0``, or by torch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

import importlib
import importlib.util
import os
import sys
import warnings

TARGETS = (
    "transformers.quantizers",
    "peft.tuners.lora.config",
    "peft.utils.quantization_utils",
    "peft.tuners.tuners_utils",
)
_waiting: set[str] = set()


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
        register(module.__name__)


class _Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname not in _waiting:
            return None
        _waiting.discard(fullname)
        if not _waiting:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Finder]
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register(target: str) -> None:
    """Registers with ``target``, one of TARGETS, which has been imported; a failure becomes a warning."""
    import hf_lowbit

    try:
        if target == TARGETS[0]:
            hf_lowbit.register()
        else:
            importlib.import_module("hf_lowbit.adapters.register").HOOKS[target](sys.modules[target])
    except Exception as error:  # a process that never asked for this package must go on
        name = target.partition(".")[0]
        warnings.warn(f"hf_lowbit could not register with {name}: {error!r}", stacklevel=2)


def wait() -> None:
    """Registers with each of TARGETS that is not imported yet when it is."""
    _waiting.update(target for target in TARGETS if target not in sys.modules)
    if _waiting and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def install() -> None:
    """The entry point of the group ``torch.backends``."""
    if os.environ.get("HF_LOWBIT_AUTOLOAD", "1") == "0":
        if getattr(sys.modules.get(__package__), "_imported_by_torch", False):
            del sys.modules[__package__]  # so that a user's own import, later, is a first one and registers
    else:
        wait()
