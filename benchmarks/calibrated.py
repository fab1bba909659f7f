"""Quality of calibrated methods beside data-free ones, and what quantizing takes: KL, top-1, perplexity, time, memory.

    python benchmarks/calibrated.py
    python benchmarks/calibrated.py --only 'gptq.*3' --windows 32 --evaluate 6 --print
    python benchmarks/calibrated.py --model gpt2-small --windows 24    # the model of second_model.py

Calibration and evaluation are different documents, each news and docs mixed (held_out.py). Linear layers only;
embeddings and the output head stay in float. Every row is one run of ``hf-lowbit quantize`` in a process of its own,
whose time and peak memory are what the table says; the packed repos are kept in ~/.cache/hf_lowbit_benchmarks, and a
second start with the same settings evaluates them again without quantizing. The model then computes in float32 with the
dequantized weights.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import CACHE, described, earlier_rows, model_folder, quick, write_results
from held_out import HeldOut, calibration_documents, evaluation_texts
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate
from hf_lowbit.inspection import inspect_repo

logging.disable_progress_bar()
INT64 = ("--group-size", "64", "--scale-dtype", "float16")
LOG64 = ("--group-size", "64", "--scale-dtype", "log8")
CALIBRATED = ("gptq", "awq", "signround", "eora")
LOG32 = ("--group-size", "32", "--scale-dtype", "log8")
# What `gptq int{bits} g32` takes, as a budget; where that is the least that groups of 32 can take, in groups of 64.
BUDGETS = {4: ("4.375", LOG32), 3: ("3.3464", LOG32), 2: ("2.3178", LOG64)}
OTHER_RANGES = {4: "weighted", 3: "weighted", 2: "mse"}  # than the default of gptq
STORED = {4: 3.96, 3: 3.08, 2: 2.03}
FEEDBACK = ("--method-option", "feedback=true")
TABLE32 = ("--format", "codebook", "--group-size", "32", "--scale-dtype", "e4m3")
# (Not the peak that the system reports of a child: that begins with its parent's.)
QUANTIZE = """
import sys
from hf_lowbit.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM")).split()[1]
    with open(sys.argv[3] + ".peak", "w") as file:
        file.write(peak)
"""


def settings() -> dict[str, tuple[str, ...]]:
    """Name and options of ``hf-lowbit quantize`` of every row."""
    rows = {}
    for bits in (4, 3, 2):
        width = ("--bits", str(bits))
        rows |= {
            f"rtn int{bits} g64": (*width, *INT64),
            f"hqq int{bits} g64": (*width, "--method", "hqq"),
            f"lloyd{bits} g32": (*width, *TABLE32),
            f"gptq int{bits} g64": (*width, "--method", "gptq", *INT64),
            f"gptq int{bits} g64, {OTHER_RANGES[bits]} ranges": (
                *(*width, "--method", "gptq", *INT64, "--method-option", f"range={OTHER_RANGES[bits]}"),
            ),
            f"gptq int{bits} g32": (*width, "--method", "gptq"),
            f"gptq, budget of int{bits} g32": ("--bits", BUDGETS[bits][0], "--method", "gptq", *BUDGETS[bits][1]),
            f"gptq table{bits} g32": (*width, "--method", "gptq", *TABLE32),
            f"gptq int{bits} g64, 8-bit scales": (*width, "--method", "gptq", *LOG64),
            f"gptq int{bits} g64, 8-bit scales, hadamard": (
                *(*width, "--method", "gptq", *LOG64, "--transform", "hadamard"),
            ),
            f"signround int{bits} g64": (*width, "--method", "signround", *INT64),
            f"signround int{bits} g64, 8-bit scales": (*width, "--method", "signround", *LOG64),
            f"signround int{bits} g64, 8-bit scales, {OTHER_RANGES[bits]} ranges": (
                *(*width, "--method", "signround", *LOG64, "--method-option", f"range={OTHER_RANGES[bits]}"),
            ),
            f"signround int{bits} g64, 8-bit scales, lwc": (
                *(*width, "--method", "signround", *LOG64, "--method-option", "lwc=true"),
            ),
            f"signround int{bits} g64, 8-bit scales, norms": (
                *(*width, "--method", "signround", *LOG64, "--method-option", "tune_norms=true"),
            ),
            f"gptq int{bits} g64, 8-bit scales, eora 16": (
                *(*width, "--method", "gptq", *LOG64, "--compensation", "eora"),
            ),
            f"gptq int{bits} g64, 8-bit scales, outliers 0.5 %": (
                *(*width, "--method", "gptq", *LOG64, "--outliers", "0.5"),
            ),
            f"awq int{bits} g64": (*width, "--method", "awq", *INT64),
            f"awq int{bits} g64, feedback": (*width, "--method", "awq", *FEEDBACK, *INT64),
            f"awq int{bits} g64, 8-bit scales, feedback": (*width, "--method", "awq", *FEEDBACK, *LOG64),
            f"magr gptq int{bits} g64": (*width, "--method", "gptq", "--preprocess", "magr", *INT64),
            f"gptq, {STORED[bits]} bits stored": (
                *("--method", "gptq", "--bits-stored", str(STORED[bits]), "--storage", "entropy"),
            ),
        }
    return rows


def quantize(source: str, name: str, options: tuple[str, ...], args: argparse.Namespace) -> tuple[Path, dict]:
    """The packed repo of row ``name``, made unless it was made so before, and what making it took."""
    command = ["quantize", source, *options, "--embeddings", "float", "--json"]
    if any(method in options for method in CALIBRATED):
        text = CACHE / "calibration.jsonl"
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in calibration_documents()))
        command += ["--calibration", str(text), "--windows", str(args.windows), "--length", str(args.length)]
    key = hashlib.sha256(json.dumps([command, args.windows, args.length]).encode()).hexdigest()[:16]
    folder = CACHE / "calibrated" / f"{re.sub(r'[^a-z0-9]+', '-', name)}-{key}"
    record = folder.with_name(folder.name + ".json")
    if record.exists() and folder.exists():
        return folder, json.loads(record.read_text())
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start, output = time.perf_counter(), folder.with_name(folder.name + ".out")
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", QUANTIZE, *command[:2], str(folder), *command[2:]], stdout=file, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name}: hf-lowbit quantize failed with exit code {process.returncode}")
    result = json.loads(output.read_text())
    output.unlink()
    peak = folder.with_name(folder.name + ".peak")
    billions = result["packed_weights"] / 1e9
    totals = inspect_repo(folder)["totals"]
    took = {
        "bits per weight": result["bits_per_packed_weight"],
        "bits stored": 8 * totals["stored_bytes"] / totals["packed_weights"],
        "seconds": time.perf_counter() - start,
        "CPU s per 10^9": (used.ru_utime + used.ru_stime) / billions,
        "peak MB": int(peak.read_text()) * 1024 / 1e6,
    }
    peak.unlink()
    record.write_text(json.dumps(took))
    return folder, took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder, repo, or name in the cache; default SmolLM2-135M-Instruct off its grid"
    )
    parser.add_argument("--only", default="", help="regular expression over row names")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--evaluate", type=int, default=16, help="evaluation windows of each text")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    source = model_folder(args.model)
    result = f"calibrated_{Path(args.model).name}" if args.model else "calibrated"
    texts = {name: HeldOut(source, text, args.evaluate) for name, text in evaluation_texts().items()}
    command = "python benchmarks/calibrated.py" + (f" --model {args.model}" if args.model else "")
    command += f" --windows {args.windows} --length {args.length} --evaluate {args.evaluate}"
    note = (
        f"Linear layers of {described(args.model)}; {args.windows} calibration windows "
        f"of {args.length} tokens, news and docs mixed; {args.evaluate} windows of 512 tokens of each text for "
        f"evaluation, of other documents. Quantizing: a process of its own, {torch.get_num_threads()} threads; seconds "
        "and peak memory with everything, the CPU seconds for 10^9 weights too. Where other work ran on the machine, "
        "CPU seconds say more than seconds."
    )
    rows = earlier_rows(result, command)
    for name, options in settings().items():
        if args.only and not re.search(args.only, name):
            continue
        folder, took = quantize(source, name, options, args)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=LowBitConfig(dequantize=True)
        )
        quick(model)
        row = {"method": name, "bits per weight": took["bits per weight"], "bits stored": took.get("bits stored")}
        for text, reference in texts.items():
            r = evaluate(model, reference.windows, reference, progress=False)
            row |= {
                f"KL {text}": r.kl,
                f"± {text}": r.kl_se,
                f"top-1 {text}": 100 * r.top1,
                f"ppl {text}": r.perplexity,
            }
        rows[name] = row | took
        print(rows[name], flush=True)
        if not args.print:
            write_results(result, command, [rows[n] for n in settings() if n in rows], note)


if __name__ == "__main__":
    main()
