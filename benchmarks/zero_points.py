"""Why a grid must contain zero: what float zero points cost, and in which weights.

    python benchmarks/zero_points.py --bits 3

The same weights are rounded on grids with an integer zero point (zero is a code) and with a float one (it is not), as
HQQ uses. Then 2 % of the input columns of every matrix are put back exactly: those with the smallest root mean square,
the largest, or random ones. What helps most shows where the damage is.
"""

import argparse

import torch
from common import Reference, model_folder, write_results
from transformers import AutoModelForCausalLM

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate

SHARE = 0.02
GRIDS = {
    "rtn minmax, integer zeros": {"zeros": "int", "method_options": {"range": "minmax"}},
    "rtn minmax, float zeros": {"zeros": "float", "method_options": {"range": "minmax"}},
    "hqq, float zeros": {"method": "hqq", "zeros": "float"},
    "hqq with fitted scale, float zeros": {"method": "hqq", "zeros": "float", "method_options": {"fit_scale": True}},
}


def columns(weight: torch.Tensor, which: str) -> torch.Tensor:
    """Indices of the columns of ``weight`` (N, K) to put back."""
    count = max(1, int(SHARE * weight.shape[1]))
    if which == "random":
        return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))[:count]
    order = weight.square().mean(0).argsort()
    return order[:count] if which == "smallest" else order[-count:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--windows", type=int, default=6)
    args = parser.parse_args()
    folder = model_folder(args.model)
    reference = Reference(folder, "news", args.windows)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    floats = [m.weight.data for m in linears]
    rows = []
    for name, options in GRIDS.items():
        config = LowBitConfig(bits=args.bits, embeddings="float", group_size=64, scale_dtype="float16", **options)
        format, method = config.resolve()
        quantized = [format.decode(method.quantize(w, format)) for w in floats]
        error = sum(((q - w).square().mean() / w.var()).item() for q, w in zip(quantized, floats, strict=True))
        row = {"grid": f"int{args.bits} g64, {name}", "relative squared error": error / len(floats)}
        for which in (None, "smallest", "random", "largest"):
            for linear, q, w in zip(linears, quantized, floats, strict=True):
                linear.weight.data = q
                if which is not None:
                    linear.weight.data = q.clone()
                    index = columns(w, which)
                    linear.weight.data[:, index] = w[:, index]
            kl = evaluate(model, reference.windows, reference, progress=False).kl
            row["KL" if which is None else f"KL, {which} columns exact"] = kl
        rows.append(row)
        print(row, flush=True)
    note = f"{SHARE:.0%} of the columns of every linear layer, by root mean square over rows; {args.windows} windows."
    write_results(f"zero_points_int{args.bits}", f"python benchmarks/zero_points.py --bits {args.bits}", rows, note)


if __name__ == "__main__":
    main()
