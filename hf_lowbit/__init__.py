"""hf_lowbit: any Hugging Face model in 1 to 8 bits, loaded, run, saved and published in one line.

    from hf_lowbit import LowBitConfig
    model = AutoModelForCausalLM.from_pretrained(repo, quantization_config=LowBitConfig(bits=3))

Importing the package registers it with transformers. Where torch is still being imported (see :mod:`._autoload`), or
nothing of transformers has been imported yet, registration waits for ``transformers.quantizers``; public names are
loaded on first use.
"""

import importlib
import sys

from .version import __version__

_PUBLIC = {
    "LowBitConfig": "config",
    "LowBitHfQuantizer": "quantizer",
    "LowBitLinear": "linear",
    "LowBitEmbedding": "embedding",
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
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    from .config import QUANT_METHOD, LowBitConfig
    from .quantizer import LowBitHfQuantizer

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowBitConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LowBitHfQuantizer)


def _start() -> None:
    torch = sys.modules.get("torch")
    importing_torch = torch is not None and getattr(torch.__spec__, "_initializing", False)
    if importing_torch:
        return  # the entry point that is being run installs the hook, or is switched off
    from . import _autoload

    if _autoload.TARGET in sys.modules:
        register()
    else:
        _autoload.wait()


_start()
