"""hf_lowbit: any Hugging Face model in 1 to 8 bits, loaded, run, saved and published in one line.

    from hf_lowbit import LowBitConfig
    model = AutoModelForCausalLM.from_pretrained(repo, quantization_config=LowBitConfig(bits=3))

Importing the package registers it with transformers and PEFT. Where torch is still being imported (see
:mod:`._autoload`), or nothing of them has been imported yet, registration waits until it is; public names are loaded on
first use.
"""

import importlib
import sys

from .version import __version__

_PUBLIC = {
    "LowBitConfig": "config",
    "LowBitHfQuantizer": "quantizer",
    "LowBitLinear": "linear",
    "LowBitEmbedding": "embedding",
    "quantize": "quantization",
    "compile_decoding": "compiled",
    "decode": "decoding",
}
__all__ = [*_PUBLIC, "__version__", "register"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


def register() -> None:
    """Makes the quantization method "lowbit" known to transformers; calling it again does nothing."""
    importlib.import_module(".quantizer", __name__)  # which registers what it defines


_imported_by_torch = False


def _start() -> None:
    global _imported_by_torch
    torch = sys.modules.get("torch")
    _imported_by_torch = torch is not None and getattr(torch.__spec__, "_initializing", False)
    if _imported_by_torch:
        return  # the entry point that is being run installs the hook, or is switched off
    from . import _autoload

    for target in _autoload.TARGETS:
        if target in sys.modules:
            _autoload.register(target)
    _autoload.wait()


_start()
