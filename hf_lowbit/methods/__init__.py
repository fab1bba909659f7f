"""Methods: how codes are chosen. One method, one file; :mod:`.base` is the contract.

Every module of this package is searched for subclasses of :class:`Method`, so a new file is found without being listed.
``docs/adding_a_method.md`` walks through one.
"""

import functools
import importlib
import inspect
import pkgutil

from .base import PREPROCESSING, BlockMethod, FactorMethod, GridMethod, Method, preprocessing

# What `method=None` means for each format. Measured by benchmarks/quality.py; see docs/methods.md.
BEST = {"int": "rtn", "nf": "rtn", "fp4": "rtn", "ternary": "rtn", "codebook": "lloyd", "nested": "nested"}

__all__ = [
    "BEST",
    "PREPROCESSING",
    "BlockMethod",
    "FactorMethod",
    "GridMethod",
    "Method",
    "make_method",
    "methods",
    "preprocessing",
]


@functools.cache
def methods() -> dict[str, type[Method]]:
    """All methods by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Method) and not inspect.isabstract(cls) and cls.__module__ == module.__name__:
                found[cls.name] = cls
    return found


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of method ``name``: its constructor's keyword arguments."""
    return dict(inspect.signature(methods()[name]).parameters)


def make_method(name: str, options: dict | None = None) -> Method:
    """An instance of method ``name``.

    Raises:
        ValueError: for an unknown method, option or value, naming what there is.
    """
    if name not in methods():
        raise ValueError(f"method={name!r} is unknown: use one of {', '.join(sorted(methods()))}")
    known = method_options(name)
    for option in options or {}:
        if option not in known:
            raise ValueError(f"method {name!r} has no option {option!r}: it takes {', '.join(known) or 'none'}")
    return methods()[name](**(options or {}))
