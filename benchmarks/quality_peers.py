"""Quality of other packages' quantizers beside ours, by whole bits per weight: KL, top-1 and perplexity.

    python benchmarks/quality_peers.py
    python benchmarks/quality_peers.py --only 'hqq|llama.cpp' --evaluate 2 --print
    python benchmarks/quality_peers.py --model gpt2-small --windows 24    # the model of second_model.py

The model, the texts and the windows are those of calibrated.py, and so are the documents that calibrated peers see.
Every row is a process of its own, in which a package quantizes the linear layers and gives back what it would multiply
with, as floats; the same float32 model then computes with these. So only the choice of codes is compared, not a
package's arithmetic. Bits count what the package keeps for a layer: codes with their padding, scales, zero points.
A package that is missing or refuses is a row that says why. Rows of ours that need calibration are taken from the
results of calibrated.py and rate_aware.py where these evaluated on the same windows.

llama.cpp has K-quants and i-quants for rows of a multiple of 256 weights only, and puts other types where they do not
fit: rows of 576, most of SmolLM2's, get IQ4_NL, Q5_0 and the like. Rows "llama.cpp X" are files as llama.cpp makes
them; rows "X, rows joined" have four rows of a matrix quantized as one, which every type fits and no file can hold: a
superblock then spans two rows, its subblocks do not. An importance matrix (imatrix) is the mean square of every input
of a layer over the calibration windows.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CACHE, RESULTS, described, earlier_rows, model_folder, quick, write_results
from held_out import HeldOut, calibration_documents, evaluation_texts
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_lowbit.calibration import Calibration
from hf_lowbit.evaluate import evaluate

FOLDER = CACHE / "peers"
GROUP = 64
Weights = dict[str, torch.Tensor]  # by name of the layer, float32 (N, K)


def rows() -> dict[str, tuple]:
    """Name of every row: the function that makes it and its arguments."""
    made = {"bitsandbytes NF4 g64, double quantized": (bitsandbytes, "nf4")}
    made |= {f"hqq {bits} bits g64": (hqq, bits, 1) for bits in (4, 3, 2)}
    made |= {f"hqq {bits} bits g64, axis 0": (hqq, bits, 0) for bits in (4, 3, 2)}
    for kind in ("Q4_0", "IQ4_NL", "Q4_K", "Q3_K", "Q2_K"):
        made[f"llama.cpp {kind}"] = (llama_cpp, kind, False)
    for kind in ("IQ4_NL", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "IQ2_XXS"):
        made[f"llama.cpp {kind}, imatrix"] = (llama_cpp, kind, True)
    for kind in ("Q4_K", "Q3_K", "Q2_K"):
        made[f"{kind}, rows joined"] = (ggml, kind, False)
    for kind in ("Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "IQ2_XXS"):
        made[f"{kind}, rows joined, imatrix"] = (ggml, kind, True)
    made |= {f"auto-round {bits} bits g64": (auto_round, bits) for bits in (4, 3, 2)}
    made |= {f"gptqmodel {bits} bits g64": (gptqmodel, bits) for bits in (4, 3, 2)}
    table = {"format": "codebook", "group_size": 32, "scale_dtype": "e4m3"}
    made |= {f"ours, int{bits} without data (default)": (ours, bits, {}) for bits in (4, 3, 2)}
    made |= {f"ours, table{bits} without data": (ours, bits, table) for bits in (4, 3, 2)}
    return made


# -- what all peers start from -----------------------------------------------------------------------------------------


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers inside the blocks."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return {name: m for name, m in found.items() if m is not model.get_output_embeddings()}


def straight(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's own weight (N, K), or back: Conv1D has it the other way round."""
    return (weight.T if isinstance(module, Conv1D) else weight).contiguous()


@functools.cache
def weights_of(source: str) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return {name: straight(m, m.weight.detach()) for name, m in linear_layers(model).items()}


def windows_of(source: str, args: argparse.Namespace) -> torch.Tensor:
    """The windows that calibrated rows see, int64 (W, L)."""
    data = Calibration(calibration_documents(), windows=args.windows, length=args.length)
    return data.tokens(AutoTokenizer.from_pretrained(source))


def importance(source: str, args: argparse.Namespace) -> Weights:
    """Mean square of every input of every layer, computed once."""
    path = FOLDER / f"imatrix-{Path(source).name}-{args.windows}-{args.length}.safetensors"
    if path.exists():
        return load_file(path)
    model = quick(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    sums: Weights = {}

    def add(name):
        def hook(module, inputs):
            squares = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + squares

        return hook

    for name in weights_of(source):
        model.get_submodule(name).register_forward_pre_hook(add(name))
    windows = windows_of(source, args)
    with torch.inference_mode():
        for window in windows:
            model.base_model(window[None], use_cache=False)
    means = {name: (total / windows.numel()).float() for name, total in sums.items()}
    save_file(means, path)
    return means


# -- peers: weights as floats and bits per weight ----------------------------------------------------------------------


def bitsandbytes(source, args, kind):
    from bitsandbytes import functional

    made, stored = {}, 0
    for name, weight in weights_of(source).items():
        codes, state = functional.quantize_4bit(weight, blocksize=GROUP, compress_statistics=True, quant_type=kind)
        made[name] = functional.dequantize_4bit(codes, state).float()
        stored += codes.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return made, stored, ""


def hqq(source, args, bits, axis):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    made, stored = {}, 0
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    for name, weight in weights_of(source).items():
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight
        layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
        made[name] = layer.dequantize().float()
        stored += layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
    return made, stored, ""


def llama_cpp(source, args, kind, weighted):
    import gguf
    import llama_cpp as library

    config = AutoConfig.from_pretrained(source)
    architecture = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    original = {}
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        plain, packed = Path(folder, "plain.gguf"), Path(folder, "packed.gguf")
        writer = gguf.GGUFWriter(plain, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
        writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
        writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", 1e-5))
        writer.add_vocab_size(config.vocab_size)
        # (Rows of q and k keep transformers' order: a quantizer does not see the order of rows.)
        for name, weight in weights_of(source).items():
            original[names.get_name(name) + ".weight"] = name
            writer.add_tensor(names.get_name(name) + ".weight", weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        params = library.llama_model_quantize_default_params()
        suffix = "_S" if kind in ("Q4_K", "Q3_K") else ""
        params.ftype, params.pure = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}{suffix}"), True
        params.nthread = torch.get_num_threads()
        if weighted:
            means = importance(source, args)
            entries = (library.llama_model_imatrix_data * (len(original) + 1))()  # the last one is empty: the end
            for entry, (tensor, name) in zip(entries, original.items(), strict=False):
                entry.name, entry.size = tensor.encode(), means[name].numel()
                entry.data = ctypes.cast(means[name].data_ptr(), ctypes.POINTER(ctypes.c_float))
            params.imatrix = entries
        failed = library.llama_model_quantize(str(plain).encode(), str(packed).encode(), ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama_model_quantize fails with {failed}")
        made, stored, types = {}, 0, {}
        for tensor in gguf.GGUFReader(packed).tensors:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            made[original[tensor.name]] = torch.from_numpy(weight.copy()).float()
            stored += int(tensor.n_bytes)
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + weight.size
    weights = sum(types.values())
    return made, stored, ", ".join(f"{100 * n / weights:.0f} % {type}" for type, n in types.items())


def ggml(source, args, kind, weighted):
    import gguf
    import llama_cpp as library

    lib = ctypes.CDLL(str(Path(library.__file__).parent / "lib" / "libggml-base.so"))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    type, joined, made, stored = gguf.GGMLQuantizationType[kind], 4, {}, 0
    means = importance(source, args) if weighted else {}
    for name, weight in weights_of(source).items():
        rows, columns = weight.shape[0] // joined, weight.shape[1] * joined
        per_block, size = gguf.GGML_QUANT_SIZES[type]
        if weight.shape[0] % joined or columns % per_block:
            raise ValueError(f"{name}: {joined} rows of {weight.shape[1]} are no whole blocks of {per_block}")
        packed = torch.empty(rows, columns // per_block * size, dtype=torch.uint8)
        mean = means[name].repeat(joined) if weighted else None
        lib.ggml_quantize_chunk(
            type, weight.data_ptr(), packed.data_ptr(), 0, rows, columns, None if mean is None else mean.data_ptr()
        )
        made[name] = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), type)).float().view(weight.shape)
        stored += packed.nbytes
    return made, stored, "no file can hold it"


def auto_round(source, args, bits):
    from auto_round import AutoRound

    windows = windows_of(source, args)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tuner = AutoRound(
        model, tokenizer=AutoTokenizer.from_pretrained(source),
        scheme=f"W{bits}A16", group_size=GROUP, sym=False, iters=args.iters, batch_size=args.batch,
        dataset=[window[None] for window in windows], nsamples=len(windows), seqlen=args.length, device_map="cpu",
    )  # fmt: skip
    model, _ = tuner.quantize()
    layers = {name: model.get_submodule(name) for name in weights_of(source)}
    made = {name: straight(layer, layer.weight.detach().float()) for name, layer in layers.items()}
    weights = sum(weight.numel() for weight in made.values())
    stored = weights * (bits + (16 + bits) / GROUP) / 8  # 16-bit scales, zero points as wide as codes
    return made, stored, f"{args.iters} steps of {args.batch} windows a block"


def gptqmodel(source, args, bits):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it does not start on two cores, where it takes one
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=False, desc_act=True, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(source, config, backend=BACKEND.TORCH)
    ids = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows_of(source, args)]
    model.quantize(ids, batch_size=2)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # (what it holds now has zero points as in the file)
        model.save(folder)
        stored = 0
        for file in Path(folder).glob("*.safetensors"):
            tensors = load_file(file).items()
            stored += sum(t.nbytes for n, t in tensors if n.endswith((".qweight", ".qzeros", ".scales", ".g_idx")))
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
        layers = {name: model.model.get_submodule(name) for name in weights_of(source)}
        made = {name: layer.dequantize_weight().T.float() for name, layer in layers.items()}
    return made, stored, "act-order"


def ours(source, args, bits, options):
    from hf_lowbit import LowBitConfig

    config = LowBitConfig(bits=bits, embeddings="float", **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config)
    made_of = model.hf_quantizer.coverage["bits_per_packed_weight"]
    model = model.dequantize()
    layers = {name: model.get_submodule(name) for name in weights_of(source)}
    made = {name: straight(layer, layer.weight.detach()) for name, layer in layers.items()}
    return made, made_of * sum(weight.numel() for weight in made.values()) / 8, "groups of 32"


# -- rows --------------------------------------------------------------------------------------------------------------


def child(name: str, source: str, output: str, args: argparse.Namespace) -> None:
    """Makes the row ``name``: weights in ``output``, the rest of it in ``output.json``."""
    make, *arguments = rows()[name]
    start = time.process_time()
    try:
        made, stored, note = make(source, args, *arguments)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        Path(output + ".json").write_text(json.dumps({"why not": f"{type(error).__name__}: {error}"[:300]}))
        raise
    if made.keys() != weights_of(source).keys():
        raise RuntimeError(f"{name} gives back other layers than it was given")
    weights = sum(math.prod(weight.shape) for weight in made.values())
    row = {"bits per weight": 8 * stored / weights, "CPU seconds": time.process_time() - start, "made of": note}
    save_file({layer: weight.contiguous() for layer, weight in made.items()}, output)
    Path(output + ".json").write_text(json.dumps(row))


def measured_by_us(args: argparse.Namespace) -> dict[str, dict]:
    """Rows of calibrated.py and rate_aware.py that were evaluated on the same windows."""
    found = {}
    for name in (f"calibrated_{args.model}",) if args.model else ("calibrated", "rate_aware"):
        file = RESULTS / f"{name}.json"
        data = json.loads(file.read_text()) if file.exists() else {"command": "", "rows": []}
        if f"--evaluate {args.evaluate}" not in data["command"]:
            continue
        for row in data["rows"]:
            kept = {key: value for key, value in row.items() if key.startswith(("KL ", "± ", "top-1 ", "ppl "))}
            memory = row.get("bits per weight", row.get("bits in memory"))
            bits = row.get("bits stored") or memory
            note = f"coded on disk; {memory:.2f} bits in memory" if bits < memory - 1 else ""
            label = f"ours, {row['method']}" if name != "rate_aware" else f"ours, gptq bits_stored {row['method']}"
            found[label] = {"method": label, "bits per weight": bits} | kept | {"made of": note}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name in the cache; default SmolLM2-135M-Instruct off its grid")
    parser.add_argument("--only", default="", help="regular expression over row names")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    parser.add_argument("--evaluate", type=int, default=12, help="evaluation windows of each text")
    parser.add_argument("--iters", type=int, default=64, help="auto-round's steps for a block")
    parser.add_argument("--batch", type=int, default=2, help="windows in one of them")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.child:
        child(*args.child, args)
        return
    source = model_folder(args.model)
    references = {name: HeldOut(source, text, args.evaluate) for name, text in evaluation_texts().items()}
    model = quick(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    options = ["--windows", args.windows, "--length", args.length, "--evaluate", args.evaluate]
    options = [str(o) for o in (*options, "--iters", args.iters, "--batch", args.batch)]
    result = f"quality_peers_{Path(args.model).name}" if args.model else "quality_peers"
    options_named = [*(["--model", args.model] if args.model else []), *options]
    command = f"python benchmarks/quality_peers.py {' '.join(options_named)}"
    note = (
        f"Linear layers of {described(args.model)}; {args.windows} calibration windows "
        f"of {args.length} tokens where a method needs data, news and docs mixed; {args.evaluate} windows of 512 "
        "tokens of each text for evaluation, of other documents. CPU seconds with reading the weights."
    )
    done = earlier_rows(result, command)
    for name in rows():
        if not re.search(args.only, name):
            continue
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            output = str(Path(folder, "weights.safetensors"))
            call = [sys.executable, __file__, *options, "--child", name, source, output]
            threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            code = subprocess.run(call, env=threads, stdout=subprocess.DEVNULL, check=False).returncode
            row = {"method": name}
            with contextlib.suppress(FileNotFoundError):
                row |= json.loads(Path(output + ".json").read_text())
            if code:
                row.setdefault("why not", f"exit code {code}")
            else:
                for layer, weight in load_file(output).items():
                    module = model.get_submodule(layer)
                    module.weight.data = straight(module, weight)
                took = {key: row.pop(key) for key in ("CPU seconds", "made of")}
                for text, reference in references.items():
                    r = evaluate(model, reference.windows, reference, progress=False)
                    row |= {f"KL {text}": r.kl, f"± {text}": r.kl_se, f"top-1 {text}": 100 * r.top1}
                    row[f"ppl {text}"] = r.perplexity
                row |= took
        done[name] = row
        print(row, flush=True)
        if not args.print:
            table = (done | measured_by_us(args)).values()
            table = sorted(table, key=lambda row: row.get("bits per weight", 0.0), reverse=True)
            write_results(result, command, table, note)


if __name__ == "__main__":
    main()
