"""Where the tests of the kernels run: Triton's interpreter on the CPU, or with ``pytest kernels/tests -m gpu`` a GPU.

The choice is made before Triton is imported, for the whole process: run this folder by itself.
"""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "torch-ext"), str(HERE.parent / "benchmarks")]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: everything that can run on a GPU, there")
    if any(HERE not in (path := Path(a.split("::")[0]).resolve()).parents and path != HERE for a in config.args):
        raise pytest.UsageError("kernels/tests choose Triton's interpreter for the process: run them alone")
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.option.markexpr == "gpu" and "device" in item.fixturenames:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device():
    """The device that kernels run on: "cpu" under the interpreter, mended."""
    import torch

    if os.environ.get("TRITON_INTERPRET") != "1":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found is not None else pytest.skip("torch finds no GPU")
    from support.interpreter import mend

    torch.set_num_threads(1)
    mend()
    return "cpu"


@pytest.fixture
def buffers(monkeypatch):
    """All that ``torch.empty`` gave to the kernels: NaN inside, so that nothing stays unwritten unseen."""
    import torch
    from problems import guard

    made, stock = [], torch.empty

    def empty(*arguments, **options):
        new = stock(*arguments, **options)
        if not new.is_floating_point():
            return new
        made.append(guard(new.fill_(float("nan"))))
        return made[-1]

    monkeypatch.setattr(torch, "empty", empty)
    return made
