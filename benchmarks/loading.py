"""Loading: peak memory, seconds per billion weights and size on disk; and that memory does not grow with depth.

    python benchmarks/loading.py              # every method on the real model, and random models of growing depth
    python benchmarks/loading.py --peers      # beside bitsandbytes NF4 and torchao int4 (pip install
    'hf-lowbit[peers]')

Every row is a process of its own. Memory is anonymous resident memory (RssAnon) above that after the imports, sampled
every millisecond: mapped file pages, which the kernel can drop at any time, do not count. KL is against the float
model on news text.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import Reference, model_folder, write_results

LOWBIT = {
    "bfloat16": None,
    "rtn int4": {"bits": 4, "method": "rtn"},
    "rtn int4 minmax": {"bits": 4, "method": "rtn", "method_options": {"range": "minmax"}},
    "rtn int3": {"bits": 3, "method": "rtn"},
    "rtn int2": {"bits": 2, "method": "rtn"},
    "hqq int4": {"bits": 4, "method": "hqq"},
    "nf4": {"bits": 4, "format": "nf"},
    "mxfp4": {"bits": 4, "format": "fp4"},
    "lloyd4": {"bits": 4, "format": "codebook"},
    "ternary": {"bits": 1.58},
}
PEERS = ("bitsandbytes nf4", "torchao int4")


def anonymous_mb() -> float:
    """Anonymous resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("this kernel does not report RssAnon")


class Peak:
    """Samples :func:`anonymous_mb` in a thread; ``mb`` is the maximum so far."""

    def __enter__(self):
        self.mb, self.stop = anonymous_mb(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self):
        while not self.stop.wait(0.001):
            self.mb = max(self.mb, anonymous_mb())

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.mb = max(self.mb, anonymous_mb())


def quantization_config(name: str):
    """The config that ``name`` stands for."""
    if name == "bitsandbytes nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    if name == "torchao int4":
        from torchao.prototype.int4_opaque_tensor import Int4WeightOnlyOpaqueTensorConfig  # the one for CPUs
        from transformers import TorchAoConfig

        return TorchAoConfig(Int4WeightOnlyOpaqueTensorConfig(group_size=64))
    from hf_lowbit import LowBitConfig

    return LowBitConfig(**json.loads(name)) if name != "null" else None


def child(folder: str, name: str, reference: str | None) -> dict:
    """One row: loads, saves, evaluates."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import hf_lowbit.linear
    import hf_lowbit.quantizer  # noqa: F401  (imports are not loading)
    from hf_lowbit.evaluate import evaluate

    logging.disable_progress_bar()
    config = quantization_config(name)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool's memory is not the model's
    before = anonymous_mb()
    start = time.perf_counter()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    seconds = time.perf_counter() - start
    row = {"peak MB": peak.mb - before, "loaded MB": anonymous_mb() - before, "seconds": seconds}
    linears = sum(
        m.in_features * m.out_features
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    if config is not None:
        row["s per 10⁹ weights"] = seconds / linears * 1e9
    with tempfile.TemporaryDirectory() as saved:
        try:
            model.save_pretrained(saved)
            row["file MB"] = sum(f.stat().st_size for f in Path(saved).glob("*.safetensors")) / 1e6
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            row["file MB"] = f"cannot be saved ({type(error).__name__})"
    if reference:
        data = torch.load(reference)
        result = evaluate(model, data["windows"], lambda i: data["log_probabilities"][i], progress=False)
        row |= {"KL": result.kl, "± KL": result.kl_se, "top-1 %": 100 * result.top1, "perplexity": result.perplexity}
    return row


def run_child(folder: str, name: str, reference: str | None = None) -> dict:
    """:func:`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", folder, name, reference or ""]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def depth_rows() -> list[dict]:
    """Random Llamas of one layer size and growing depth at 4 bits: the peak above what stays is flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    for layers in (2, 8, 32):
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(
                hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
                num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True,
            )  # fmt: skip
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            model.save_pretrained(folder)
            largest = max(p.numel() * p.element_size() for p in model.parameters()) / 1e6
            del model
            row = run_child(folder, json.dumps(LOWBIT["rtn int4"]))
        row = {"model": f"random Llama, {layers} layers", "largest tensor MB": largest, **row}
        if "error" not in row:
            row["peak above loaded MB"] = row["peak MB"] - row["loaded MB"]
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, name, reference = args.child
        print(json.dumps(child(folder, name, reference or None)))
        return
    folder = model_folder(args.model)
    names = {name: json.dumps(options) for name, options in LOWBIT.items()}
    if args.peers:
        names = {n: names[n] for n in ("bfloat16", "rtn int4", "nf4")} | {n: n for n in PEERS}
    scratch = Path(tempfile.mkdtemp())
    try:
        made = Reference(folder, "news", args.windows)
        saved = scratch / "reference.pt"
        torch.save({"windows": made.windows, "log_probabilities": made.log_probabilities}, saved)
        del made
        rows = []
        for name, text in names.items():
            rows.append({"method": name, **run_child(folder, text, str(saved))})
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(scratch)
    command = "python benchmarks/loading.py" + (" --peers" if args.peers else "")
    note = (
        "SmolLM2-135M-Instruct, off its grid, bfloat16. Times include reading, on a shared machine. Memory includes "
        "what a first load brings in besides weights, about 30 MB for bfloat16, and not the pages of a mapped file."
    )
    write_results("peers" if args.peers else "loading", command, rows, note)
    if not args.peers:
        write_results(
            "loading_depth",
            command,
            depth_rows(),
            "Memory while quantizing on the fly, by depth; a first load of anything adds about 50 MB.",
        )


if __name__ == "__main__":
    main()
