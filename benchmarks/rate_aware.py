"""GPTQ that aims at stored bits (``method="gptq", bits_stored=...``): KL by what coded files take, and by memory.

    python benchmarks/rate_aware.py
    python benchmarks/rate_aware.py --bits 3.08 --windows 24 --evaluate 6 --print

Calibration and evaluation are different documents, each news and docs mixed (held_out.py). Linear layers only;
embeddings and the output head stay in float. "bits stored" is what the packed layers take in the files of the repo,
written with ``storage="entropy"``: codes, steps, column factors and tables. The repos are kept in
~/.cache/hf_lowbit_benchmarks, and a second start with the same settings evaluates them without quantizing. The model
computes in float32 with the dequantized weights.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from common import CACHE, earlier_rows, model_folder, quick, write_results
from held_out import HeldOut, calibration_documents, evaluation_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.data import digest
from hf_lowbit.evaluate import evaluate
from hf_lowbit.inspection import inspect_repo

logging.disable_progress_bar()


def quantize(source: str, bits: float, args: argparse.Namespace) -> tuple[Path, dict]:
    """The repo at ``bits`` stored, made unless it was made so before, and what making it took."""
    calibration = Calibration(calibration_documents(), args.windows, args.length)
    settings = {"bits": bits, "calibration": digest(calibration.tokens(AutoTokenizer.from_pretrained(source)))}
    folder = CACHE / "rate-aware" / f"{bits}-{args.windows}"
    record = folder.with_name(folder.name + ".json")
    found = json.loads(record.read_text()) if record.exists() and folder.exists() else {}
    if found.get("settings") == settings:
        return folder, found["took"]
    shutil.rmtree(folder, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    config = LowBitConfig(method="gptq", bits_stored=bits, embeddings="float", storage="entropy")
    hf_lowbit.quantize(source, config, output=folder, calibration=calibration)
    took = {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
    record.write_text(json.dumps({"settings": settings, "took": took}))
    return folder, took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--bits", default="3.96,3.08,2.03")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--evaluate", type=int, default=16, help="evaluation windows of each text")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    source = model_folder(args.model)
    texts = {name: HeldOut(source, text, args.evaluate) for name, text in evaluation_texts().items()}
    command = f"python benchmarks/rate_aware.py --length {args.length} --evaluate {args.evaluate}"
    note = (
        f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}; calibration windows of {args.length} "
        f"tokens, news and docs mixed, as many as --windows says; {args.evaluate} windows of 512 tokens of each text "
        "for evaluation, of other documents. Where other work ran on the machine, CPU seconds say more than seconds."
    )
    rows = earlier_rows("rate_aware", command)
    for bits in map(float, args.bits.split(",")):
        folder, took = quantize(source, bits, args)
        totals = inspect_repo(folder)["totals"]
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=LowBitConfig(dequantize=True)
        )
        quick(model)
        name = f"{bits:g} bits, --windows {args.windows}"
        row = {
            "method": name,
            "bits stored": 8 * totals["stored_bytes"] / totals["packed_weights"],
            "bits in memory": totals["bits_per_packed_weight"],
        }
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
            write_results("rate_aware", command, [rows[name] for name in sorted(rows)], note)


if __name__ == "__main__":
    main()
