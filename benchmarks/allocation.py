"""Budgets of bits against one width everywhere, at the same whole bits per weight: KL and top-1 of the whole model.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --only ' 3' --print

Each budget is what the uniform width above it takes, to the byte. Nothing is below 2 bits, so that a budget of what 2
bits take in groups of 32 leaves no choice in these groups: it is searched in groups of 64, where 2 bits take less.
All rows are rounded to nearest, linear layers only. Widths are searched on calibration text, of documents apart from
those of the evaluation. Seconds to search are those of this call: what was measured before is not measured again.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import torch
from common import earlier_rows, model_folder, quick, write_results
from held_out import HeldOut, calibration_documents, evaluation_texts
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.allocation import allocate
from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate

logging.disable_progress_bar()
GROUPS = {4: 32, 3: 32, 2: 64}  # of the budget beside each uniform width in groups of 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens of each text to evaluate on")
    parser.add_argument("--calibrate", type=int, default=32, help="windows to calibrate on; the search takes 4 of them")
    parser.add_argument("--length", type=int, default=512, help="tokens in one of them")
    parser.add_argument("--only", default="", help="regular expression over row names")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    folder = model_folder(args.model)
    references = {name: HeldOut(folder, text, args.windows) for name, text in evaluation_texts().items()}
    data = Calibration(calibration_documents(), windows=args.calibrate, length=args.length)
    command = (
        f"python benchmarks/allocation.py --windows {args.windows} --calibrate {args.calibrate} --length {args.length}"
    )
    rows = earlier_rows("allocation", command)

    def load(bits, group):
        config = LowBitConfig(bits=bits, group_size=group, scale_dtype="log8", embeddings="float")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)

    def measure(name, model, seconds=None):
        row = {"method": name, "bits per weight": model.hf_quantizer.coverage["bits_per_packed_weight"]}
        model = quick(model.dequantize())
        for text, reference in references.items():
            r = evaluate(model, reference.windows, reference, progress=False)
            row |= {f"KL {text}": r.kl, f"± {text}": r.kl_se, f"top-1 % {text}": 100 * r.top1}
        rows[name] = row | {"seconds to search": seconds}
        print(rows[name], flush=True)
        if not args.print:
            write_results(
                "allocation",
                command,
                sorted(rows.values(), key=lambda row: (-round(row["bits per weight"], 2), "budget" in row["method"])),
                f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}, rounded to nearest, 8-bit "
                f"scales; {args.windows} windows of 512 tokens of each text.",
            )

    for bits, group in GROUPS.items():
        uniform, budget = f"uniform {bits} g32", f"budget of {bits} g32, in g{group}"
        if not (re.search(args.only, uniform) or re.search(args.only, budget)):
            continue
        model = load(bits, 32)
        size = model.hf_quantizer.coverage["bits_per_packed_weight"]
        if re.search(args.only, uniform):
            measure(uniform, model)
        del model
        if re.search(args.only, budget):
            start = time.perf_counter()
            config = LowBitConfig(bits=size, group_size=group, scale_dtype="log8", embeddings="float")
            found = allocate(folder, config, calibration=data)
            seconds = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as temporary:
                plan = Path(temporary, "plan.json")
                found.save(plan)
                measure(budget, load(str(plan), group), seconds)


if __name__ == "__main__":
    main()
