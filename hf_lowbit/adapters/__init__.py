"""Adapters on packed models: PEFT's layers, starting points that make up for what packing lost, and merging.

PEFT's layers are registered by importing :mod:`hf_lowbit`, or by nothing at all (:mod:`hf_lowbit._autoload`). The
functions here are loaded on first use.
"""

import importlib

_PUBLIC = {"initialize": "initialization", "merge": "merging"}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
