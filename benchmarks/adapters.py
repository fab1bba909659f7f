"""What an adapter gives back of what packing loses, before any training: KL by method of initialisation.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --bits 2 --methods eora,apiq-bw --windows 32 --print

Calibration, evaluation and what the methods' defaults were chosen on are three different sets of documents. Each has
news articles and topics of the Python reference ("docs"), and calibration mixes them, as one would for a model that is
to read both. The model computes in float32 with the dequantized weights plus the adapter's product. Packed repos and
adapters are kept in ~/.cache/hf_lowbit_benchmarks/adapters, to be finetuned, and used again by the next run.
"""

import argparse
import json
import shutil
import time

import torch
from common import CACHE, model_folder, write_results
from held_out import HeldOut, calibration_documents, evaluation_texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.initialization import METHODS, Initialized, initialize
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.data import digest
from hf_lowbit.evaluate import evaluate

logging.disable_progress_bar()


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


def start(source: str, method: str, bits: int, options: argparse.Namespace) -> tuple[Initialized, dict]:
    """The packed repo and its adapter, made unless they were made so before, and what making them took."""
    calibration = Calibration(calibration_documents(), options.windows, options.length)
    settings = {"bits": bits, "method": method, "rank": options.rank, "options": options.options}
    if method not in ("zeros", "loftq"):
        settings["calibration"] = digest(calibration.tokens(AutoTokenizer.from_pretrained(source)))
    folder = CACHE / "adapters" / (f"int{bits}-{method}-r{options.rank}" + (".trial" if options.print else ""))
    record = folder.with_name(folder.name + ".json")
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("settings") == settings:
        return Initialized(folder, folder / "adapter"), found["took"]
    shutil.rmtree(folder, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    made = initialize(
        source,
        LowBitConfig(bits=bits, rules={".*(embed_tokens|lm_head)": None}),
        destination=folder,
        method=method,
        rank=options.rank,
        calibration=calibration,
        method_options=options.options,
    )
    took = {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
    record.write_text(json.dumps({"settings": settings, "took": took}))
    return made, took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--bits", default="2,3")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the method, as JSON")
    parser.add_argument("--evaluate", type=int, default=16, help="evaluation windows of each text")
    parser.add_argument("--print", action="store_true", help="do not write results/, nor touch the folders kept")
    args = parser.parse_args()
    source = model_folder(args.model)
    texts = {name: HeldOut(source, text, args.evaluate) for name, text in evaluation_texts().items()}
    command = (
        f"python benchmarks/adapters.py --windows {args.windows} --length {args.length} --evaluate {args.evaluate}"
    )
    note = (
        f"Rank {args.rank}, before any training, {args.model or 'SmolLM2-135M-Instruct, off its grid'}; bits per "
        f"weight without the adapter; {args.windows} calibration windows of {args.length} tokens, news and docs mixed, "
        f"{args.evaluate} windows of 512 of each text for evaluation, of documents that nothing was calibrated on and "
        "no default was chosen on. zeros and loftq use no calibration text. Elsewhere on the machine other work ran: "
        "CPU seconds, one thread, say more than seconds."
    )
    rows = []
    for bits in map(int, args.bits.split(",")):
        for method in args.methods.split(","):
            made, took = start(source, method, bits, args)
            model, stored = load_merged(made)
            row = {"bits": bits, "method": method, **took, "bits per weight": stored}
            for name, reference in texts.items():
                r = evaluate(model, reference.windows, reference, progress=False)
                row |= {f"KL {name}": r.kl, f"± {name}": r.kl_se, f"ppl {name}": r.perplexity}
            rows.append(row)
            print(row, args.options or "", flush=True)
            if not args.print:
                write_results("adapters", command, rows, note)


if __name__ == "__main__":
    main()
