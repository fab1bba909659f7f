"""The command that settles things on a GPU: tried out in the interpreter, and honest where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / arguments[0]), *map(str, arguments[1:])]
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


def test_every_step_in_the_interpreter(tmp_path):
    steps = [f"--only={step}" for step in ("subnormals", "races", "sanitizer", "speed")]  # "problems" is this folder
    done = run("gpu_check.py", "--interpret", "--rounds", 1, "--output", tmp_path, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_interpreter.json").read_text())
    assert found["environment"]["interpreted"] and found["environment"]["kind"] == "nvidia sm_90"
    assert {step: result["passed"] for step, result in found["steps"].items()} == {
        **{"subnormals": True, "races": True, "sanitizer": None, "speed": True},
    }
    # Two numbers of rows, two dtypes; the choice, and every form that runs with 1, 2 and 4 splits.
    assert found["steps"]["races"]["runs"] == 2 * ((1 + 3 * 3) + (1 + 2 * 3))
    forms = {row["form"] for row in found["steps"]["speed"]["rows"]}
    assert {"torch bf16", "magic bf16", "portable bf16", "subnormal fp16", "lop3 fp16", "unpacked fp16"} <= forms
    table = (tmp_path / "gpu_interpreter.md").read_text()
    assert "- races: passed" in table and "| format | M | N | K | form | us | times torch | GB/s |" in table


def test_a_difference_is_seen_and_fails(device, monkeypatch):
    if device != "cpu":
        pytest.skip("about the check itself")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check
    import lowbit_kernels
    from lowbit_kernels import forms
    from support.inline_asm import emulate_inline_asm

    emulate_inline_asm()
    check = gpu_check.Check(interpret=True, small=True, minutes=1, rounds=1)
    check.record = forms.Device("amd", "gfx942")
    stock, seen = lowbit_kernels.linear, []

    def sometimes_wrong(*arguments, **options):
        seen.append(stock(*arguments, **options))
        return seen[-1] if len(seen) % 5 else seen[-1].nextafter(seen[-1] + 1)

    monkeypatch.setattr(lowbit_kernels, "linear", sometimes_wrong)
    result = gpu_check.races(check)
    assert result["passed"] is False and len(result["different"]) == len(seen) // 5
    assert result["different"][0].startswith("4 bits, torch.float16, 5 rows, chosen: 1 of 1")


def test_a_step_that_breaks_is_a_failed_step_and_no_end(device, monkeypatch, capsys):
    if device != "cpu":
        pytest.skip("about the check itself")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check
    import lowbit_kernels
    from lowbit_kernels import forms

    check = gpu_check.Check(interpret=True, small=True, minutes=1, rounds=1)
    check.record = forms.Device("amd", "gfx942")

    def broken(*arguments, form=None, **options):
        if form == "portable":
            raise RuntimeError("an illegal memory access")
        return torch.ones(1)

    monkeypatch.setattr(lowbit_kernels, "linear", broken)
    result = gpu_check.speed(check)
    assert result["passed"] is False and len(result["failed"]) == 2  # of two dtypes
    assert set(result["failed"].values()) == {"RuntimeError: an illegal memory access"}
    assert {row["form"] for row in result["rows"]} == {"torch bf16", "unpacked bf16", "unpacked fp16"}
    monkeypatch.setattr(gpu_check, "subnormals", lambda check: 1 / 0)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda check: {"passed": None})
    monkeypatch.setattr(gpu_check, "interpreted", lambda: check.record)
    assert gpu_check.main(["--interpret", "--only", "subnormals", "--only", "sanitizer"]) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "FAILED: subnormals" in printed


def test_without_a_gpu_it_says_so(device):
    if device != "cpu":
        pytest.skip("there is a GPU")
    done = run("gpu_check.py")
    assert done.returncode == 2 and "needs a GPU and a build of torch that supports it; torch finds none" in done.stderr
