"""Quality of every data-free method at 2, 3 and 4 bits: KL, top-1 and perplexity against the float model, by bits per
weight: in memory, and in a repo with ``storage="entropy"``.

    python benchmarks/quality.py --windows 40 --text news
    python benchmarks/quality.py --only 'hqq|rtn int3' --print

Linear layers only; embeddings and the output head stay in float. The model computes in float32 with the dequantized
weights.
"""

import argparse
import math
import re
import time

import torch
from common import Reference, model_folder, write_results
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate
from hf_lowbit.packed import PackedMixin
from hf_lowbit.storage.stored import store

logging.disable_progress_bar()
MINMAX = {"range": "minmax"}


def settings() -> dict[str, dict]:
    """Name and LowBitConfig arguments of every row."""
    rows = {}
    g64 = {"group_size": 64, "scale_dtype": "float16"}
    for bits in (4, 3, 2):
        rows |= {
            f"int{bits} (default: g32, 8-bit scales)": {"bits": bits},
            f"rtn int{bits} g64 minmax": {"bits": bits, **g64, "method_options": MINMAX},
            f"rtn int{bits} g64 mse": {"bits": bits, **g64, "method_options": {"range": "mse"}},
            f"rtn int{bits} g64": {"bits": bits, **g64},
            f"rtn int{bits} g64 symmetric": {"bits": bits, **g64, "symmetric": True},
            f"rtn int{bits} g64 float zeros": {"bits": bits, **g64, "zeros": "float"},
            f"hqq int{bits} g64": {"bits": bits, "method": "hqq"},
            f"nf{bits} g64": {"bits": bits, "format": "nf"},
            f"nf{bits} g32": {"bits": bits, "format": "nf", "group_size": 32},
            f"lloyd{bits} per tensor g64": {"bits": bits, "format": "codebook"},
            f"lloyd{bits} per row": {"bits": bits, "format": "codebook", "codebook": "row"},
        }  # fmt: skip
    for bits in (4.38, 4, 3.35, 3, 2.32, 2):
        rows[f"ecsq {bits} bits stored"] = {"bits_stored": bits}
    rows |= {
        "mxfp4 g32": {"bits": 4, "format": "fp4"},
        "nvfp4 g16": {"bits": 4, "format": "fp4", "group_size": 16, "scale_dtype": "e4m3"},
        "ternary row": {"bits": 1.58},
        "int1 g64": {"bits": 1},
        "int5": {"bits": 5},
        "int6": {"bits": 6},
        "int8": {"bits": 8},
    }
    return rows


def coded_bits(model) -> float:
    """Bits per packed weight of ``model`` in files with ``storage="entropy"``."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedMixin)}
    nbytes = sum(
        store(f"weight{suffix}", tensor.detach(), layer.format.bits, "entropy").nbytes
        for layer in layers.values()
        for suffix, tensor in layer.stored().items()
    )
    return 8 * nbytes / sum(math.prod(layer.packed_shape) for layer in layers.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--text", default="news", choices=["news", "docs"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--only", default="", help="regular expression over row names")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    folder = model_folder(args.model)
    reference = Reference(folder, args.text, args.windows)
    rows = []

    def measure(name, model, bits, coded):
        r = evaluate(model, reference.windows, reference, progress=False)
        rows.append({
            "method": name, "bits per weight": bits, "bits stored": coded, "KL": r.kl, "± KL": r.kl_se,
            "top-1 %": 100 * r.top1, "perplexity": r.perplexity, "± ppl": r.perplexity_se,
        })  # fmt: skip
        print(rows[-1], flush=True)

    if not args.only:
        measure(
            "float (bfloat16 weights)", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 16.0, None
        )
    for name, options in settings().items():
        if args.only and not re.search(args.only, name):
            continue
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=LowBitConfig(embeddings="float", **options)
        )
        seconds, bits = time.perf_counter() - start, model.hf_quantizer.coverage["bits_per_packed_weight"]
        coded = coded_bits(model)
        measure(name, model.dequantize(), bits, coded)
        rows[-1]["seconds to load"] = seconds
    if not args.print:
        command = f"python benchmarks/quality.py --text {args.text} --windows {args.windows}"
        write_results(
            f"quality_{args.text}",
            command,
            rows,
            f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}"
            f", {len(reference.windows)} windows of {reference.windows.shape[1]} tokens.",
        )


if __name__ == "__main__":
    main()
