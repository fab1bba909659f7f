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
import re
import shutil
import time
from pydoc_data.topics import topics

import torch
from common import CACHE, Reference, model_folder, news_text, write_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_lowbit import LowBitConfig
from hf_lowbit.adapters.initialization import METHODS, Initialized, initialize
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.data import digest
from hf_lowbit.evaluate import evaluate, log_probabilities, make_windows

logging.disable_progress_bar()
# Topics that the methods' defaults were chosen on, and topics to calibrate on; all others are for evaluation.
CHOSEN_ON = {"assert", "assignment", "dict", "dynamic-features", "specialnames", "with"}
CALIBRATE_ON = re.findall(
    r"\S+",
    """
attribute-access attribute-references augassign booleans break callable-types calls comparisons compound customization
exprlists floating for formatstrings identifiers if import operator-summary pass power string-methods truth try types
typesmapping typesmethods typesmodules typesseq
""",
)


def articles() -> list[str]:
    """The news articles: every third from the first is what defaults were chosen on, from the second for evaluation,
    from the third for calibration."""
    return [line for line in news_text().splitlines() if line.strip()]


def calibration_documents() -> list[str]:
    """Documents to calibrate on."""
    return articles()[2::3] + [topics[name] for name in CALIBRATE_ON]


def evaluation_texts() -> dict[str, str]:
    """Texts by name, of documents that nothing was calibrated on and no default chosen on."""
    unseen = [topics[name] for name in sorted(topics) if name not in CHOSEN_ON.union(CALIBRATE_ON)]
    return {"news": "\n".join(articles()[1::3]), "docs": "\n".join(unseen)}


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
