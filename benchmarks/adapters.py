"""What an adapter gives back of what packing loses, before any training: KL by method of initialisation.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --bits 2 --methods eora,apiq-bw --windows 32 --print

Calibration is on two of every three news articles, evaluation on the others ("news") and on the Python reference
("docs", another kind of text than the calibration's). The model computes in float32 with the dequantized weights plus
the adapter's product. Packed repos and adapters are kept in ~/.cache/hf_lowbit_benchmarks/adapters, to be finetuned.
"""

import argparse
import json
import shutil
import time

import torch
from common import CACHE, Reference, model_folder, news_text, write_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.initialization import METHODS, initialize
from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate, log_probabilities, make_windows
from hf_lowbit.smollm import sample_text

logging.disable_progress_bar()


def split_news() -> tuple[list[str], str]:
    """Articles to calibrate on, and the text of the others."""
    articles = [line for line in news_text().splitlines() if line.strip()]
    return [a for i, a in enumerate(articles) if i % 3], "\n".join(articles[::3])


class HeldOut(Reference):
    """The float model's log-probabilities on ``text``."""

    def __init__(self, folder: str, text: str, limit: int, length: int = 512):
        self.windows = make_windows(AutoTokenizer.from_pretrained(folder), text, length, limit)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.log_probabilities = [log_probabilities(model, window) for window in self.windows]


def load_merged(made):
    """The float32 model with the dequantized weights plus the adapter's product, and the packed bits per weight."""
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    bits = model.hf_quantizer.coverage["bits_per_packed_weight"]
    model = model.dequantize()
    factors = load_file(made.adapter / "adapter_model.safetensors")
    for key in [k for k in factors if ".lora_A." in k]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        model.get_submodule(name).weight.data += factors[key.replace(".lora_A.", ".lora_B.")] @ factors[key]
    return model, bits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--bits", default="2,3")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the method, as JSON")
    parser.add_argument("--evaluate", type=int, default=12, help="evaluation windows of each text")
    parser.add_argument("--print", action="store_true", help="do not write results/, nor keep the folders")
    args = parser.parse_args()
    source = model_folder(args.model)
    documents, news = split_news()
    texts = {"news": HeldOut(source, news, args.evaluate), "docs": HeldOut(source, sample_text(), args.evaluate)}
    rows = []
    for bits in map(int, args.bits.split(",")):
        for method in args.methods.split(","):
            destination = CACHE / "adapters" / (f"int{bits}-{method}-r{args.rank}" + (".trial" if args.print else ""))
            calibrated = method not in ("zeros", "loftq")
            settings = [args.options, args.evaluate, *([args.windows, args.length] if calibrated else [])]
            record = destination.with_name(destination.name + ".json")  # a run that was stopped goes on after it
            if record.exists() and (found := json.loads(record.read_text()))["settings"] == settings:
                rows.append(found["row"])
                continue
            shutil.rmtree(destination, ignore_errors=True)
            start = time.perf_counter(), time.process_time()
            made = initialize(
                source,
                LowBitConfig(bits=bits),
                destination=destination,
                method=method,
                rank=args.rank,
                calibration=Calibration(documents, args.windows, args.length),
                method_options=args.options,
            )
            row = {
                "bits": bits,
                "method": method,
                "seconds": time.perf_counter() - start[0],
                "CPU seconds": time.process_time() - start[1],
            }
            model, row["bits per weight"] = load_merged(made)
            for name, reference in texts.items():
                r = evaluate(model, reference.windows, reference, progress=False)
                row |= {f"KL {name}": r.kl, f"± {name}": r.kl_se, f"ppl {name}": r.perplexity}
            rows.append(row)
            print(row, args.options or "", flush=True)
            if args.print:
                shutil.rmtree(destination)
            else:
                record.write_text(json.dumps({"settings": settings, "row": row}))
    if not args.print:
        command = f"python benchmarks/adapters.py --windows {args.windows} --length {args.length}"
        write_results(
            "adapters",
            command,
            rows,
            f"Rank {args.rank}, before any training, {args.model or 'SmolLM2-135M-Instruct, off its grid'}; bits per "
            f"weight without the adapter; {args.windows} calibration windows of {args.length} tokens, "
            f"{args.evaluate} held-out windows of 512 of each text.",
        )


if __name__ == "__main__":
    main()
