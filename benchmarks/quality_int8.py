"""What activations in 8 bits cost: KL against the float model with and without them, and KL between these two.

    python benchmarks/quality_int8.py --windows 40 --text news

Linear layers only, the default methods; the model computes in float32.
"""

import argparse

import torch
from common import Reference, model_folder, write_results
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate, log_probabilities
from hf_lowbit.linear import LowBitLinear

logging.disable_progress_bar()
ROWS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 g128": {"bits": 4, "group_size": 128},
    "nf4 g64": {"bits": 4, "format": "nf"},
    "int3": {"bits": 3},
    "int2": {"bits": 2},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--text", default="news", choices=["news", "docs"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    folder = model_folder(args.model)
    reference = Reference(folder, args.text, args.windows)
    windows, rows = reference.windows, []
    for name, options in ROWS.items():
        config = LowBitConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        before = evaluate(model, windows, reference, progress=False)
        itself = [log_probabilities(model, window) for window in windows]
        for module in model.modules():
            if isinstance(module, LowBitLinear):
                module.activations = "int8"
        after = evaluate(model, windows, reference, progress=False)
        between = evaluate(model, windows, itself.__getitem__, progress=False)
        rows.append({
            "weights": name, "KL, float activations": before.kl, "KL, 8 bits": after.kl,
            "± KL": after.kl_se, "KL of 8 bits against float": between.kl, "± of it": between.kl_se,
            "same top-1 %": 100 * between.top1, "perplexity, float": before.perplexity,
            "perplexity, 8 bits": after.perplexity,
        })  # fmt: skip
        print(rows[-1], flush=True)
    if not args.print:
        command = f"python benchmarks/quality_int8.py --text {args.text} --windows {args.windows}"
        note = f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}, {len(windows)} windows of 512."
        write_results(f"quality_int8_{args.text}", command, rows, note)


if __name__ == "__main__":
    main()
