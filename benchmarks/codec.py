"""Sizes and speeds of coded storage on real weights: this package's coder beside zstd, zipnn and memcpy.

    python benchmarks/codec.py [--model FOLDER] [--layers 6] [--repetitions 9]

Weights are the gate projections of a few layers, one below the other, packed as the row says; "kept in bfloat16" is
what stays in float. Sizes are in bits a weight (packed tensor alone): Shannon's order-0 entropy of the codes, what a
Huffman code of the same symbols would take (without tables or blocks), what is stored, and zstd at level 1. Speeds are
GB of packed output a second of one core: processor time, the best of some repetitions, all candidates in turn in one
process so that they see the same machine. zipnn is for floats (`pip install --no-deps zipnn`; left out where it is
not installed).
"""

import argparse
import heapq
import time
from pathlib import Path

import numpy as np
import torch
from common import model_folder, write_results
from safetensors import safe_open

from hf_lowbit import LowBitConfig, native_backend
from hf_lowbit.storage import entropy

CODERS = (b"avx512", b"avx2", b"neon", b"portable")  # extensions of avx512 share its coder
KINDS = {
    "int4, groups of 32": {"bits": 4, "method": "rtn"},
    "int4 symmetric, groups of 128": {"bits": 4, "method": "rtn", "symmetric": True, "group_size": 128},
    "int3 symmetric, groups of 128": {"bits": 3, "method": "rtn", "symmetric": True, "group_size": 128},
    "int2, groups of 64": {"bits": 2, "method": "rtn", "group_size": 64, "scale_dtype": "float16"},
    "nf4, groups of 64": {"format": "nf", "bits": 4, "method": "rtn"},
    "ternary": {"bits": 1.58},
    "one step a row, 4 bits": {"bits_stored": 4.0},
    "one step a row, 3 bits": {"bits_stored": 3.0},
    "one step a row, 2 bits": {"bits_stored": 2.0},
}


def weights(folder: str, layers: int) -> torch.Tensor:
    """The gate projections of the first ``layers`` layers, (layers * N, K), bfloat16."""
    found = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = [n for n in handle.keys() if n.endswith("mlp.gate_proj.weight")]  # noqa: SIM118
            found += [handle.get_tensor(name) for name in names]
    return torch.cat(found[:layers]).bfloat16()


def huffman_bits(counts: np.ndarray) -> float:
    """Mean length of a Huffman code's words: no code of whole bits takes fewer."""
    heap = [int(c) for c in counts if c]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return max(1.0, total / int(counts.sum()))


def best(candidates: dict, repetitions: int) -> dict[str, float]:
    """The least seconds of processor time of each, threads of its own included, all in turn."""
    seconds = dict.fromkeys(candidates, float("inf"))
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
            run()
            seconds[name] = min(seconds[name], time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) - start)
    return seconds


def forced(isa: bytes, coded: torch.Tensor, out: torch.Tensor):
    """Decodes with the kernels of one instruction set."""

    def run():
        native_backend.library().lowbit_force_isa(isa)
        entropy.decode(coded, out, threads=1)

    return run


def zipnn_decoder(tensor: torch.Tensor):
    """``(bytes, function)`` of zipnn for a tensor of bfloat16, or None where it is not installed."""
    try:
        import zipnn
    except ImportError:
        return None
    coder = zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
    coded = coder.compress(bytearray(tensor.view(torch.uint8).numpy().tobytes()))
    if bytes(coder.decompress(coded)) != tensor.view(torch.uint8).numpy().tobytes():
        raise AssertionError("zipnn gives other bytes back")
    return len(coded), lambda: coder.decompress(coded)


def row(kind: str, tensor: torch.Tensor, count: int, bits, codes: torch.Tensor | None, repetitions: int) -> dict:
    """Sizes and speeds for one packed tensor of ``count`` weights; ``codes`` where it has any."""
    import zstandard

    symbols = entropy.symbols_for("", tensor.dtype, bits)
    coded = entropy.encode(tensor, symbols)
    raw = tensor.view(torch.uint8).numpy().reshape(tensor.shape[0], -1)
    counts = entropy.count_symbols(raw, symbols)
    per_weight, lower = counts.sum() / count, 8 if tensor.dtype == torch.bfloat16 else 0
    packed = zstandard.ZstdCompressor(level=1).compress(raw.tobytes())
    out, copy = torch.empty_like(tensor), tensor.clone()
    unpack, other = zstandard.ZstdDecompressor(), zipnn_decoder(tensor) if tensor.dtype == torch.bfloat16 else None
    isas = [isa for isa in native_backend.library().lowbit_isas().split(b",") if isa in CODERS]
    candidates = {isa.decode(): forced(isa, coded, out) for isa in isas}
    candidates["zstd"] = lambda: unpack.decompress(packed, max_output_size=tensor.nbytes)
    if other is not None:
        candidates["zipnn"] = other[1]
    candidates["memcpy"] = lambda: copy.copy_(tensor)
    seconds = best(candidates, repetitions)
    assert torch.equal(out.view(torch.uint8), tensor.view(torch.uint8))
    of_codes = None if codes is None else entropy.entropy(np.bincount(codes.reshape(-1).numpy()))
    bound = of_codes if of_codes is not None else entropy.entropy(counts) + lower
    return {
        "weights": kind,
        "raw": 8 * tensor.nbytes / count,
        "entropy": bound,
        "huffman": huffman_bits(counts) * per_weight + lower,
        "coded": 8 * coded.nbytes / count,
        "above entropy": f"{8 * coded.nbytes / count / bound - 1:+.2%}",
        "as bytes": 8 * entropy.encode(tensor, 0).nbytes / count if symbols else None,
        "zstd": 8 * len(packed) / count,
        "zipnn": None if other is None else 8 * other[0] / count,
        **{f"{name} GB/s": tensor.nbytes / s / 1e9 for name, s in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    floats = weights(model_folder(arguments.model), arguments.layers)
    rows = []
    for kind, options in KINDS.items():
        format, method = LowBitConfig(**options).resolve()
        packed = format.pack(method.quantize(floats.float(), format))[""]
        codes = format.unpack_codes(packed, floats.shape[1])
        rows.append(row(kind, packed, floats.numel(), format.bits, codes, arguments.repetitions))
    rows.append(row("kept in bfloat16", floats, floats.numel(), None, None, arguments.repetitions))
    write_results("codec", f"python benchmarks/codec.py --layers {arguments.layers}", rows, __doc__.split("\n\n")[2])


if __name__ == "__main__":
    main()
