"""A nested repo at each of its widths, beside the same width quantized directly: KL, top-1 and bits per weight.

    python benchmarks/nested.py
    python benchmarks/nested.py --widths 3,4 --print

The nested code is made once; each width is its first bits. "direct" is ``LowBitConfig(bits=...)``, rounding to nearest
in groups of 32 with zero points. Linear layers only.
"""

import argparse
import re

import torch
from common import earlier_rows, model_folder, quick, write_results
from held_out import HeldOut, evaluation_texts
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate
from hf_lowbit.formats.nested import NestedFormat

logging.disable_progress_bar()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--windows", type=int, default=6, help="windows of 512 tokens of each text to evaluate on")
    parser.add_argument("--widths", default="2,3,4,5,6,7,8")
    parser.add_argument("--seed", type=int, default=3, help="width that is chosen freely")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    folder = model_folder(args.model)
    references = {name: HeldOut(folder, text, args.windows) for name, text in evaluation_texts().items()}
    command = f"python benchmarks/nested.py --windows {args.windows} --seed {args.seed}"
    rows = earlier_rows("nested", command)

    def load(**options):
        config = LowBitConfig(embeddings="float", **options)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)

    def measure(name, model, bits, stored=None):
        row = {"method": name, "bits per weight": bits, "stored": stored}
        quick(model)
        for text, reference in references.items():
            r = evaluate(model, reference.windows, reference, progress=False)
            row |= {f"KL {text}": r.kl, f"± {text}": r.kl_se, f"top-1 % {text}": 100 * r.top1}
        rows[name] = row
        print(row, flush=True)
        if not args.print:
            write_results(
                "nested",
                command,
                sorted(rows.values(), key=lambda row: int(re.search(r"\d", row["method"])[0])),
                f"Linear layers of {args.model or 'SmolLM2-135M-Instruct, off its grid'}, {args.windows} windows of "
                "512 tokens of each text; bits per weight in memory (for the nested repo also as stored), all counted.",
            )

    nested = load(format="nested", method_options={"seed": args.seed})
    packed = {name: m for name, m in nested.named_modules() if isinstance(getattr(m, "format", None), NestedFormat)}
    weights = sum(m.packed_shape[0] * m.packed_shape[1] for m in packed.values())
    stored = 8 * sum(m.format.nbytes(m.packed_shape) for m in packed.values()) / weights
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for bits in map(int, args.widths.split(",")):
        size = 0
        for name, module in packed.items():
            part = module.format.at(bits)
            tensors = {suffix: module.stored()[suffix] for suffix in part.tensors(module.packed_shape)}
            plain.get_submodule(name).weight.data = part.dequantize(tensors, module.packed_shape)
            size += part.codebook.nbytes(module.packed_shape)
        measure(f"nested, first {bits} bits", plain, 8 * size / weights, stored)
        direct = load(bits=bits)
        size = direct.hf_quantizer.coverage["bits_per_packed_weight"]
        measure(f"direct {bits} bits", direct.dequantize(), size)


if __name__ == "__main__":
    main()
