"""Budgets of bits against the same width everywhere: KL and top-1 of the whole model, by bits per weight.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --only 'budget 2.6' --print

Widths are searched on calibration text (documents apart from those of the evaluation) and, beside it, from the weights'
errors alone. All rows are rounded to nearest, linear layers only. "log-interpolated" is what the uniform rows below and
above a budget would have there, if the logarithm of KL were a straight line between them.
"""

import argparse
import math
import re
import time

import torch
from adapters import HeldOut, calibration_documents, evaluation_texts
from common import CACHE, model_folder, write_results
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.allocation import allocate
from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate

logging.disable_progress_bar()
BUDGETS = (2.6, 3.35, 4.31)
UNIFORM = (2, 3, 4, 5)


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

    def measure(name, options, seconds=None):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=LowBitConfig(embeddings="float", **options)
        )
        row = {"bits of": name, "bits per weight": model.hf_quantizer.coverage["bits_per_packed_weight"]}
        model = model.dequantize()
        for text, reference in references.items():
            r = evaluate(model, reference.windows, reference, progress=False)
            row |= {f"KL {text}": r.kl, f"± {text}": r.kl_se, f"top-1 % {text}": 100 * r.top1}
        row["seconds to search"] = seconds
        rows[name] = row
        print(row, flush=True)

    for bits in UNIFORM:
        if re.search(args.only, f"uniform {bits}"):
            measure(f"uniform {bits}", {"bits": bits})
    for kind, calibration in (("KL", data), ("weight errors", None)):
        for budget in BUDGETS:
            name = f"budget {budget}, by {kind}"
            if not re.search(args.only, name):
                continue
            start = time.perf_counter()
            found = allocate(folder, LowBitConfig(bits=budget, embeddings="float"), calibration=calibration)
            seconds = time.perf_counter() - start
            path = str(CACHE / "plan.json")
            found.save(path)
            measure(name, {"bits": path}, seconds)
    if not args.only:
        for budget in BUDGETS:
            below, above = rows[f"uniform {int(budget - 0.3)}"], rows[f"uniform {int(budget - 0.3) + 1}"]
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
            list(rows.values()),
            f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}, rtn in groups of 32; "
            f"{args.windows} windows of 512 tokens of each text.",
        )


if __name__ == "__main__":
    main()
