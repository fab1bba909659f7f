"""Settles on a GPU machine, in one command, what cannot be settled without one.

    python kernels/benchmarks/gpu_check.py

It answers, and writes to ``benchmarks/results/gpu_<device>.md`` and ``.json`` as it goes:

1. subnormals: whether the tensor cores keep float16 subnormals, which the form "subnormal" builds on. If they do not,
   it recommends ``HF_LOWBIT_FORM=lop3,magic,portable``.
2. problems: ``pytest kernels/tests -m gpu``, the list of problems that the interpreter runs elsewhere.
3. races: weights and inputs for which every order of summing is exact, so that any form, any number of programs to a
   sum and any repetition has to give the same bits, while another stream keeps the device busy.
4. sanitizer: 3. again under ``compute-sanitizer`` (memcheck and racecheck), where that is installed.
5. speed: each form against ``torch.nn.functional.linear`` in bfloat16, in turn, cold caches, medians.

``--only`` picks some of them. ``--interpret`` tries all of it out, tiny, in Triton's interpreter: no number of speed
means anything there, and nothing is written to the results. Without a GPU it ends with code 2, with a failed check
with code 1.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "kernels" / "tests"), str(ROOT / "kernels" / "torch-ext"), str(Path(__file__).parent)]
STEPS = ("subnormals", "problems", "races", "sanitizer", "speed")
ROWS = (1, 4, 16, 64, 512)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
FORMATS = (
    *(f"int:bits={bits},group_size=128" for bits in (1, 2, 3, 4, 8)),
    *("nf:bits=4,group_size=64", "fp4:bits=4", "ternary:bits=1.58"),
)
LOP3 = "HF_LOWBIT_FORM=lop3,magic,portable"


class Check:
    """The device, how much to do on it, and what the steps are called with."""

    def __init__(self, interpret: bool, small: bool, minutes: float, rounds: int):
        import torch
        from timing import find_device

        self.interpret, self.small, self.minutes, self.rounds = interpret, small or interpret, minutes, rounds
        self.device = torch.device("cpu") if interpret else find_device()
        if self.device is not None:
            from lowbit_kernels import forms

            self.record = forms.describe(self.device)

    @property
    def name(self) -> str:
        import torch

        return "interpreter" if self.interpret else torch.get_device_module(self.device).get_device_name(self.device)


def environment(check: Check) -> dict:
    """What the results depend on."""
    import torch
    import triton

    return {
        **{"device": check.name, "kind": str(check.record), "interpreted": check.interpret},
        **{"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        **{"triton": triton.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")},
    }


def subnormals(check: Check) -> dict:
    """Multiplies every subnormal number up to 255 * 2**-24 by 1 on a tensor core; exact if they are kept."""
    import torch
    from probe import subnormal_kernel

    out = torch.empty(16, 16, dtype=torch.float32, device=check.device)
    subnormal_kernel[(1,)](out)
    expected = torch.arange(256, dtype=torch.float32).view(16, 16) * 2.0**-24
    kept = torch.equal(out.cpu(), expected)
    return {"passed": kept, "advice": None if kept else f"tensor cores flush float16 subnormals: set {LOP3}"}


def problems(check: Check) -> dict:
    """Runs the tests that have a GPU marker; under the interpreter three of them."""
    some = ["kernels/tests/test_kernels.py", "-k", "linear_w4_g64_M1_N1_K1 or linear_w4_g64_M5_N1_K1"]
    what = some if check.interpret else ["kernels/tests", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *what, "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith("FAILED")]
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed[:50]}


def exact_problem(text: str, M: int, N: int, K: int, dtype, device):
    """``(x, weight, companions, expected)`` where all sums are of integers below 2**24: exact in every order."""
    import torch

    from hf_lowbit import reference
    from hf_lowbit.formats import Quantized, parse_format

    format, generator = parse_format(text), torch.Generator().manual_seed(M * 7919 + N + K)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    levels, groups = 2**format.bits, format.groups(K)
    codes = integers(levels, N, -(-K // 64) * 64).to(torch.uint8)
    scales = torch.full((N, groups), 2.0**-4)
    stored = format.pack(Quantized(codes, scales, integers(levels, N, groups).float(), None))
    weight, companions = stored[""], [stored[suffix] for suffix in format.suffixes()]
    x = (integers(5, M, K) - 2).to(dtype)
    values = reference.dequantize(weight, companions, format.spec, K, torch.float64)
    expected = (x.double() @ values.T).to(dtype)
    return x.to(device), weight.to(device), [c.to(device) for c in companions], expected.to(device)


def races(check: Check) -> dict:
    """Bits of every form, split and repetition against those of float64."""
    import torch
    from lowbit_kernels import fast, forms, linear, parse
    from lowbit_kernels.tiles import linear_tiles

    different, runs = [], 0
    N, K, repeats = (32, 512, 1) if check.small else (1024, 4096, 40)
    widths = (4,) if check.interpret else (3, 4, 8) if check.small else range(1, 9)
    for bits in widths:
        spec = f"int:bits={bits},group_size=128,scale_dtype=float16,symmetric=False,zeros=int"
        layout = parse(spec)
        for dtype in (torch.float16, torch.bfloat16):
            for M in (1, 5) if check.small else (1, 4, 7, 16, 33):
                x, weight, companions, expected = exact_problem(spec, M, N, K, dtype, check.device)
                arguments = (x, weight, companions, None, spec, K)
                calls = {"chosen": lambda a=arguments: linear(*a)}
                for name, reason in forms.explain(check.record, layout, dtype):
                    for split in (1, 2, 4) if reason is None else ():
                        if name == "portable":
                            size = linear_tiles(M, N, K, layout)
                            size = type(size)(size.rows, size.outputs, size.inputs, split, size.warps)
                            calls[f"portable, split {split}"] = lambda a=arguments, s=size: linear(*a, tiles=s)
                        elif name != "unpacked":
                            calls[f"{name}, split {split}"] = lambda a=arguments, n=name, s=split: fast.fast_linear(
                                *a, form=n, split=s
                            )
                for name, call in calls.items():
                    stop, wrong = _keep_busy(check.device), []
                    error = _failure(
                        lambda c=call, e=expected, w=wrong: w.extend(not torch.equal(c(), e) for _ in range(repeats))
                    )
                    stop()
                    runs += len(wrong)
                    if error or any(wrong):
                        found = error or f"{sum(wrong)} of {repeats} runs differ"
                        different.append(f"{bits} bits, {dtype}, {M} rows, {name}: {found}")
    return {"passed": not different, "runs": runs, "different": different}


def _failure(call) -> str | None:
    """Why ``call`` does not run on this device, or None; what it launched is waited for."""
    import torch
    from triton.errors import TritonError

    try:
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
    except (RuntimeError, ValueError, TritonError, torch.AcceleratorError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _keep_busy(device):
    """Queues work on another stream, so that programs come in another order; returns a function that waits for it."""
    import torch

    if device.type == "cpu":
        return lambda: None
    module = torch.get_device_module(device)
    stream = module.Stream(device)
    with module.stream(stream):
        noise = torch.randn(2048, 2048, device=device)
        for _ in range(20):
            noise = (noise @ noise).tanh()
    return stream.synchronize


def sanitizer(check: Check) -> dict:
    """The races again, under the tools of ``compute-sanitizer``."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or check.interpret:
        return {"passed": None, "summary": "compute-sanitizer is not installed" if tool is None else "not interpreted"}
    found = {}
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--only", "subnormals"]
        command += ["--only", "races", "--small"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found[kind] = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK" in line][-1:]
        found[kind] += [f"code {done.returncode}"]
    return {"passed": all("code 0" in lines for lines in found.values()), "summary": found}


def speed(check: Check) -> dict:
    """Medians of each form and of torch, on each shape, format and number of rows, until the minutes are over."""
    import torch
    from lowbit_kernels import forms, linear, parse
    from problems import packed
    from timing import medians

    from hf_lowbit.formats import parse_format

    end, rows, left_out, failed = time.monotonic() + 60 * check.minutes, [], 0, {}
    shapes, counts = (((32, 128),), (1,)) if check.small else (SHAPES, ROWS)
    for text in FORMATS[3:4] if check.small else FORMATS:
        spec = parse_format(text).spec
        for N, K in shapes:
            if time.monotonic() > end:
                left_out += 1
                continue
            weight, companions = packed(parse_format(text), N, K, check.device)
            size = sum(t.nbytes for t in (weight, *companions))
            plain = torch.randn(N, K, device=check.device, dtype=torch.bfloat16)
            for M in counts:
                x = torch.randn(M, K, device=check.device, dtype=torch.bfloat16)
                calls = {"torch bf16": lambda x=x, plain=plain: torch.nn.functional.linear(x, plain)}
                for dtype in (torch.bfloat16, torch.float16):
                    for name, reason in forms.explain(check.record, parse(spec), dtype):
                        if reason is None:
                            short = str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
                            arguments = (x.to(dtype), weight, companions, None, spec, K)
                            calls[f"{name} {short}"] = lambda a=arguments, n=name: linear(*a, form=n)
                errors = {name: error for name, call in calls.items() if (error := _failure(call))}
                failed |= {f"{text} {N}x{K}, {M} rows, {name}": error for name, error in errors.items()}
                calls = {name: call for name, call in calls.items() if name not in errors}
                taken = medians(calls, check.device, check.rounds)
                for name, seconds in taken.items():
                    rows.append(
                        {
                            **{"format": text, "M": M, "N": N, "K": K, "form": name, "us": seconds * 1e6},
                            "times torch": taken["torch bf16"] / seconds,
                            "GB/s": (plain.nbytes if name == "torch bf16" else size) / seconds / 1e9,
                        }
                    )
                print(f"  {text} {N}x{K} M={M}: {', '.join(f'{n} {s * 1e6:.1f} us' for n, s in taken.items())}")
    return {"passed": not failed, "left_out_for_time": left_out, "failed": failed, "rows": rows}


def write(path: Path, found: dict) -> None:
    """``path``.json and ``path``.md, each written beside and renamed."""
    table = found["steps"].get("speed", {}).get("rows", [])
    lines = ["`python kernels/benchmarks/gpu_check.py`", ""]
    lines += [", ".join(f"{k} {v}" for k, v in found["environment"].items() if v is not None), ""]
    for step, result in found["steps"].items():
        state = {True: "passed", False: "**FAILED**", None: "not run"}[result["passed"]]
        rest = {k: v for k, v in result.items() if k not in ("passed", "rows") and v}
        lines.append(f"- {step}: {state}{f' ({json.dumps(rest)})' if rest else ''}")
    if table:
        lines += ["", "| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
        cells = ([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in table)
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in (("json", json.dumps(found, indent=1)), ("md", "\n".join(lines))):
        part = path.with_name(f"{path.name}.{ending}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path.with_name(f"{path.name}.{ending}"))


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=STEPS, default=[], help="this step; several may be given")
    parser.add_argument("--interpret", action="store_true", help="try it out in the interpreter, tiny")
    parser.add_argument("--small", action="store_true", help="less of everything; nothing is written by default")
    parser.add_argument("--minutes", type=float, default=20, help="time for the step 'speed'")
    parser.add_argument("--rounds", type=int, default=25, help="runs of each form in a median")
    parser.add_argument("--output", type=Path, help="folder of the results [default: benchmarks/results]")
    given = parser.parse_args(arguments)
    if given.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: unset it, or try things out with --interpret")
    check = Check(given.interpret, given.small, given.minutes, given.rounds)
    if check.device is None:
        print("gpu_check needs a GPU and a build of torch that supports it; torch finds none", file=sys.stderr)
        return 2
    if given.interpret:
        check.record = interpreted()
    output = given.output or (None if check.small else RESULTS)
    found = {"environment": environment(check), "steps": {}}
    for step in [s for s in STEPS if s in given.only or not given.only]:
        print(f"{step} ...", flush=True)
        try:
            result = globals()[step](check)
        except Exception:  # the other steps are still worth running; this one failed
            result = {"passed": False, "error": traceback.format_exc(limit=-4)}
        found["steps"][step] = result
        print(f"  {json.dumps({k: v for k, v in result.items() if k != 'rows'})}", flush=True)
        if output is not None:
            write(output / f"gpu_{re.sub(r'[^a-z0-9]+', '_', check.name.lower()).strip('_')}", found)
    failed = [step for step, result in found["steps"].items() if result["passed"] is False]
    print(f"FAILED: {', '.join(failed)}" if failed else "nothing failed")
    return int(bool(failed))


def interpreted():
    """Mends the interpreter, gives it inline assembly and declares its device an H100, so that all forms run."""
    from lowbit_kernels import forms
    from support.inline_asm import emulate_inline_asm
    from support.interpreter import mend

    mend()
    emulate_inline_asm()
    record = forms.Device("nvidia", "sm_90", 132)
    forms.describe = lambda device: record
    return record


if __name__ == "__main__":
    sys.exit(main())
