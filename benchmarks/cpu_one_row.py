"""One row of activations on one thread: what a call costs, what decoding costs, and how close memory is.

    python benchmarks/cpu_one_row.py

Three questions that `cpu_layers.py` cannot keep apart. A layer of 64 x 64 is all call. A weight of 128 x 4096, which
stays in a core's second cache, is all arithmetic. One of 48 MB is read from memory, beside torch's sum over as many
bytes. The kernels of `avx512vnni`, which multiply a row in float32 (or in strips of 16 rows, with activations in 8
bits), and those of `avx512vbmi`, which do it in integers, take turns; a time is the thread's own, the least of many, so
that other processes hardly show.
"""

import time

import torch
from common import write_results
from cpu_layers import OURS, packed

from hf_lowbit import LowBitConfig
from hf_lowbit import native_backend as native

SETS = ("avx512vnni", "avx512vbmi")
FORMATS = ("int8", "int4", "int3", "int2")
K, CACHED_ROWS, STREAMED = 4096, 128, 48e6


def seconds(call, calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - start) / calls


def least(layers: list, x: torch.Tensor, calls: int, rounds: int, beside=None) -> list[float]:
    """Seconds of ``layers[0](x)`` by instruction set, then of ``beside()``."""
    best = [float("inf")] * (len(SETS) + 1)
    for _ in range(rounds):
        for i, name in enumerate(SETS):
            native.library().lowbit_force_isa(name.encode())
            best[i] = min(best[i], seconds(lambda: layers[0](x), calls))
        if beside is not None:
            best[-1] = min(best[-1], seconds(beside, 1))
    return best


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    have = native.library().lowbit_isas().decode().split(",")
    if missing := set(SETS) - set(have):
        raise SystemExit(f"this processor has no {', '.join(missing)}: it has {', '.join(have)}")
    results, x, data = [], torch.randn(1, K), torch.zeros(int(STREAMED / 4))
    for name in FORMATS:
        format = LowBitConfig(**OURS[name]).resolve()[0]
        bits = 8 * format.nbytes((CACHED_ROWS, K)) / (CACHED_ROWS * K)
        rows = int(STREAMED / (K * bits / 8))
        for activations in ("float", "int8"):
            shapes = (64, 64), (CACHED_ROWS, K), (rows, K)
            small, cached, streamed = ([packed(OURS[name], shape, activations)] for shape in shapes)
            call = least(small, x[:, :64], 4, 1000)
            core = least(cached, x, 4, 100)
            memory = least(streamed, x, 1, 15, data.sum)
            for i, isa in enumerate(SETS):
                results.append({
                    "weights": name, "activations": activations, "kernels": isa, "µs a call": 1e6 * call[i],
                    "ns a weight in cache": 1e9 * (core[i] - call[i]) / (CACHED_ROWS * K),
                    "GB/s in cache": CACHED_ROWS * K * bits / 8e9 / (core[i] - call[i]),
                    "GB/s from memory": rows * K * bits / 8e9 / memory[i],
                    "of a read": rows * K * bits / STREAMED / 8 * memory[-1] / memory[i],
                })  # fmt: skip
                print(" ".join(f"{v:.3g}" if isinstance(v, float) else v for v in results[-1].values()), flush=True)
    note = "One thread, least of many by its own clock; GB/s count packed bytes with scales and zero points."
    write_results("cpu_one_row", "python benchmarks/cpu_one_row.py", results, note)


if __name__ == "__main__":
    main()
