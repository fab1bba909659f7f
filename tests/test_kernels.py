"""The tests of the Triton kernels, in processes of their own: Triton is to interpret from its import on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "kernels/tests").glob("test_*.py")))
def test_kernels_in_the_interpreter(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", f"kernels/tests/{file}", "-q", "-n", "0", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
