"""Single linear layers on a CPU: packed formats beside float and other packages' kernels.

    python benchmarks/cpu_layers.py                      # 4096 x 4096 and 11008 x 4096, 1 to 512 rows, 2 threads
    python benchmarks/cpu_layers.py --shapes 512x512 --rows 1 --only 'int4|fp32' --print

All contestants take turns in one process, and so does a read of 256 MB, by which packed bytes a second are judged;
figures are medians over the rounds. A contestant has copies of its weight that are larger together than a cache, and
each call takes the next one, as the layers of a model do. Every shape and number of rows is written when it is done; a
run that was stopped goes on after the last one. With `--again` what an earlier run has is measured once more, in the
places of the contestants that `--only` names: every line says when it was measured, and its ratios are to the fp32 and
the bandwidth of that time, which stay in the table while anything refers to them.
"""

import argparse
import copy
import itertools
import json
import re
import statistics
import time

import torch
from common import RESULTS, write_results
from torch.ao.quantization import quantize_dynamic

from hf_lowbit import LowBitConfig
from hf_lowbit.formats import Quantized
from hf_lowbit.linear import LowBitLinear

BEYOND_CACHE = 192e6  # bytes of all copies of a weight
READ = 2**28
LEAST = 0.02  # seconds of a contestant in a round
OURS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 g128": {"bits": 4, "group_size": 128},
    "nf4": {"bits": 4, "format": "nf"},
    "int3": {"bits": 3},
    "int3 g128": {"bits": 3, "group_size": 128},
    "int2": {"bits": 2},
    "int2 g128": {"bits": 2, "group_size": 128},
    "ternary": {"bits": 1.58},
    "int1": {"bits": 1},
}
INPUTS = {"fp32": (torch.float32, "float"), "bf16": (torch.bfloat16, "float"), "int8": (torch.float32, "int8")}


def packed(options: dict, shape: tuple[int, int], activations: str) -> LowBitLinear:
    """A layer of random codes, whose values make no difference to time."""
    format, _ = LowBitConfig(**options).resolve()
    N, K = shape
    codes = torch.randint(0, 3 if format.name == "ternary" else 2**format.bits, shape, dtype=torch.uint8)
    scales = torch.rand((N, format.groups(K))) * 0.01 + 0.01
    zeros = None
    if format.name == "int" and not format.symmetric:
        zeros = format.storable_zeros(torch.rand(scales.shape) * format.max_code)
    tensors = format.pack(Quantized(codes, format.storable_scales(scales), zeros, None))
    layer = LowBitLinear(K, N, False, format, activations=activations)
    layer.set_packed(tensors)
    return layer


class Contestant:
    """A layer in as many copies as exceed the cache, and the dtype of its input."""

    def __init__(self, make, dtype: torch.dtype, nbytes: float):
        first, copies = make(), max(1, min(64, int(BEYOND_CACHE / nbytes)))
        self.layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        self.next, self.dtype, self.nbytes, self.times = itertools.cycle(self.layers), dtype, nbytes, []

    def run(self, x: torch.Tensor) -> None:
        """Calls for at least :data:`LEAST` seconds; keeps the seconds of one."""
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < LEAST:
            next(self.next)(x)
            calls += 1
        self.times.append((time.perf_counter() - start) / calls)


class Int4Pack:
    """torch's own 4-bit kernel, bfloat16, groups of 32."""

    def __init__(self, N: int, K: int):
        codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
        self.weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.rand(K // 32, N, 2).to(torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.weight, 32, self.scales)


def bitsandbytes_nf4(linear: torch.nn.Linear, dtype: torch.dtype):
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


def contestants(shape: tuple[int, int], only: str) -> dict[str, Contestant]:
    """All whose name matches, by name; packages that are missing are left out with a line that says so."""
    (N, K), found = shape, {}
    plain = torch.nn.Linear(K, N, bias=False)

    def add(name, make, dtype, nbytes):
        if not re.search(only, name) and name != "fp32":
            return
        try:
            found[name] = Contestant(make, dtype, nbytes)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)

    add("fp32", lambda: torch.nn.Linear(K, N, bias=False), torch.float32, 4 * N * K)
    add("bf16", lambda: torch.nn.Linear(K, N, bias=False, dtype=torch.bfloat16), torch.bfloat16, 2 * N * K)
    for (format, options), (inputs, (dtype, activations)) in itertools.product(OURS.items(), INPUTS.items()):
        nbytes = LowBitConfig(**options).resolve()[0].nbytes(shape)
        add(f"{format}, {inputs} x", lambda o=options, a=activations: packed(o, shape, a), dtype, nbytes)
    add("torch int4pack, bf16 x", lambda: Int4Pack(N, K), torch.bfloat16, N * K * (0.5 + 4 / 32))
    add("torch dynamic int8", lambda: quantize_dynamic(torch.nn.Sequential(plain)), torch.float32, N * K)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"bitsandbytes nf4, {str(dtype).removeprefix('torch.')} x"
        add(name, lambda d=dtype: bitsandbytes_nf4(plain, d), dtype, N * K * 0.5625)
    return found


class Reader:
    """How fast memory is read: the sum of 256 MB of float32, or their product with themselves, whichever is faster."""

    def __init__(self):
        self.data, self.ways = torch.zeros(READ // 4), {"sum": [], "dot": []}

    def run(self) -> None:
        for name, call in (("sum", self.data.sum), ("dot", lambda: torch.dot(self.data, self.data))):
            start = time.perf_counter()
            call()
            self.ways[name].append(READ / (time.perf_counter() - start))

    def rate(self) -> float:
        """Bytes a second."""
        return max(statistics.median(rates) for rates in self.ways.values())


@torch.inference_mode()
def measure(shape: tuple[int, int], rows: int, found: dict[str, Contestant], rounds: int, began: str) -> list[dict]:
    reader, x = Reader(), torch.randn(rows, shape[1])
    inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for contestant in found.values():
        contestant.times.clear()
        for layer in contestant.layers:  # what is prepared at a first call is not a product's time
            layer(inputs[contestant.dtype][:1])
    for _ in range(rounds):
        reader.run()
        for contestant in found.values():
            contestant.run(inputs[contestant.dtype])
    base, results = statistics.median(found["fp32"].times), []
    for name, contestant in found.items():
        seconds = statistics.median(contestant.times)
        rate = contestant.nbytes / seconds
        results.append({
            "measured": began, "shape": f"{shape[0]}x{shape[1]}", "rows": rows, "kernel": name, "ms": 1e3 * seconds,
            "times fp32": base / seconds, "GB/s": rate / 1e9, "of read bandwidth": rate / reader.rate(),
            "read GB/s": reader.rate() / 1e9,
        })  # fmt: skip
    return results


def merged(earlier: list[dict], measured: list[dict]) -> list[dict]:
    """``measured`` in the place of the same lines of earlier runs, of which fp32 stays while others refer to it."""
    key, base = (lambda r: (r["shape"], r["rows"])), (lambda r: (r["measured"], r["shape"], r["rows"]))
    new = {(*key(row), row["kernel"]) for row in measured}
    kept = [row for row in earlier if row["kernel"] == "fp32" or (*key(row), row["kernel"]) not in new]
    referred = {base(row) for row in kept if row["kernel"] != "fp32"}
    kept = [row for row in kept if row["kernel"] != "fp32" or base(row) in referred]
    order = list(dict.fromkeys(key(row) for row in [*earlier, *measured]))
    return sorted(kept + measured, key=lambda row: order.index(key(row)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="outputs x inputs")
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--only", default="", help="regular expression over contestants")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what an earlier run has once more")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command, began = (
        f"python benchmarks/cpu_layers.py --threads {args.threads} --rounds {args.rounds}",
        time.strftime("%Y-%m-%d %H:%M"),
    )
    file = RESULTS / "cpu_layers.json"
    earlier = json.loads(file.read_text()) if file.exists() and not args.print else {}
    results = earlier.get("rows", []) if earlier.get("command") == command else []
    results = [{"measured": earlier["environment"]["date"], **row} for row in results]
    for shape in [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]:
        wanted = [int(r) for r in args.rows.split(",")]
        done = {row["rows"] for row in results if row["shape"] == f"{shape[0]}x{shape[1]}" and not args.again}
        found = contestants(shape, args.only) if set(wanted) - done else {}
        for rows in [r for r in wanted if r not in done]:
            measured = measure(shape, rows, found, args.rounds, began)
            results = merged(results, measured)
            for row in measured:
                print(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
            if not args.print:
                note = (
                    "Beside fp32 `nn.Linear` in the same rounds; GB/s count packed bytes with scales and zero points. "
                    "Lines that were measured at the same time are of one run, and their ratios to its own fp32."
                )
                write_results("cpu_layers", command, results, note)


if __name__ == "__main__":
    main()
