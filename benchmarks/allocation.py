"""Budgets of bits against the same width everywhere: KL and top-1 of the whole model, by bits per weight.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --only 'budget 2.6' --print

Widths are searched on calibration text, documents apart from those of the evaluation.
All rows are rounded to nearest, linear layers only; each width is quantized once, and a plan takes each
layer at its width. Seconds to search are those of this call: what was measured before is not measured again.
"log-interpolated" is what the uniform rows below and above a budget would have there, if the logarithm of KL were a
straight line between them.
"""

import argparse
import functools
import itertools
import math
import re
import time

import torch
from adapters import HeldOut, calibration_documents, evaluation_texts
from common import model_folder, write_results
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.allocation import allocate
from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate

logging.disable_progress_bar()
BUDGETS = (2.6, 3.35, 4.31)
UNIFORM = (2, 3, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens of each text to evaluate on")
    parser.add_argument("--calibrate", type=int, default=4, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens in one of them")
    parser.add_argument("--only", default="", help="regular expression over row names")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    folder = model_folder(args.model)
    references = {name: HeldOut(folder, text, args.windows) for name, text in evaluation_texts().items()}
    data = Calibration(calibration_documents(), windows=args.calibrate, length=args.length)
    rows = {}

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @functools.cache
    def quantized(bits: int) -> tuple[dict[str, torch.Tensor], float]:
        """Dequantized weights of all layers at one width, and their bits per weight."""
        config = LowBitConfig(bits=bits, embeddings="float")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        names, size = list(model.hf_quantizer.plan.packed), model.hf_quantizer.coverage["bits_per_packed_weight"]
        model = model.dequantize()
        return {name: model.get_submodule(name).weight.data for name in names}, size

    def measure(name, widths, size, seconds=None):
        if not re.search(args.only, name):
            return
        for layer, bits in widths.items():
            plain.get_submodule(layer).weight.data = quantized(bits)[0][layer]
        row = {"bits of": name, "bits per weight": size}
        for text, reference in references.items():
            r = evaluate(plain, reference.windows, reference, progress=False)
            row |= {f"KL {text}": r.kl, f"± {text}": r.kl_se, f"top-1 % {text}": 100 * r.top1}
        row["seconds to search"] = seconds
        rows[name] = row
        print(row, flush=True)

    for budget in BUDGETS:
        start = time.perf_counter()
        found = allocate(folder, LowBitConfig(bits=budget, embeddings="float"), calibration=data)
        seconds = time.perf_counter() - start
        measure(f"budget {budget}", found.layers, found.bits_per_weight, seconds)
    for bits in UNIFORM:
        weights, size = quantized(bits)
        measure(f"uniform {bits}", dict.fromkeys(weights, bits), size)
    if not args.only:
        for budget in BUDGETS:
            uniform = [rows[f"uniform {bits}"] for bits in UNIFORM]
            below, above = next(p for p in itertools.pairwise(uniform) if budget < p[1]["bits per weight"])
            low, high = below["bits per weight"], above["bits per weight"]
            share = (budget - low) / (high - low)
            row = {"bits of": f"log-interpolated {budget}", "bits per weight": budget}
            for text in references:
                logs = math.log(below[f"KL {text}"]), math.log(above[f"KL {text}"])
                row[f"KL {text}"] = math.exp(logs[0] + share * (logs[1] - logs[0]))
            rows[row["bits of"]] = row
    if not args.print:
        write_results(
            "allocation",
            f"python benchmarks/allocation.py --windows {args.windows} --calibrate {args.calibrate} "
            f"--length {args.length}",
            sorted(rows.values(), key=lambda row: row["bits per weight"]),
            f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}, rtn in groups of 32; "
            f"{args.windows} windows of 512 tokens of each text.",
        )


if __name__ == "__main__":
    main()
