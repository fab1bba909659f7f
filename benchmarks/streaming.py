"""Models larger than the memory they may have: streamed layers beside disk offload.

    python benchmarks/streaming.py                        # a Llama of 1.2 billion random weights, a third of its size
    python benchmarks/streaming.py --small                # SmolLM2-135M
    python benchmarks/streaming.py --bits 3               # at 3 bits instead of 4
    python benchmarks/streaming.py --small --bits-stored 3   # rate-aware codes, of which coding leaves 3 bits
    python benchmarks/streaming.py --bits-stored 2.8         # the same of the large model
    python benchmarks/streaming.py --disks 1000 --only ours --tokens 4

Rows are written over those of the same model and disk, and beside the others that are on record for the same weights
and budget.

Every row is a process of its own that decodes greedily with 16 tokens of prompt; its time for a token is the median of
the second half of them ("first half" is that of the first, while coded layers are laid decoded in a scratch file, from
which the second half then reads them; rows without it are medians of all), and so are its bytes and times of waiting.
Memory is anonymous memory above what the process had before loading, sampled every 2 ms; that of the unlimited run,
whose weights are mapped from their file, is what computing itself needs, and the streamed runs may need it besides
their budget. While they decode, private writable memory has a hard limit (RLIMIT_DATA) of --constant
above what is mapped after loading.

Disks are simulated: every read, and every write to a scratch file, takes its bytes divided by the speed, in ours where
a piece is read and in accelerate's disk offload where a tensor is. "none" is the disk as it is, without the system's
cache, which a limited memory would not have: ours reads past it, and in offload pages are dropped before each tensor.
Such rows compare with the speed of the same reads without a model, the median of five passes. "coded in part" is what
`hf-lowbit compress --fraction auto` made of the packed model by the speed of that disk, so it has no rows for others.

"times that" is a token's time over that of reading its bytes. Where computing takes longer than reading, that is no
bound; "times the longer" compares with the longer of reading and the time of a token with all in memory.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from common import RESULTS, model_folder, write_results
from cpu_models import FOLDER, large_folder, packed_folder

PROMPT, AHEAD_BYTES = 16, 2**22
# Name: what is loaded, and how.
CONTESTANTS = {
    "ours, all in memory": ("packed", "memory"),
    "ours, streamed": ("packed", "stream"),
    "ours, streamed, coded": ("coded", "stream"),
    "ours, streamed, coded in part": ("auto", "stream"),
    "disk offload, packed": ("packed", "offload"),
    "disk offload, bf16": ("float", "offload in bf16"),
}


# -- in the process of a contestant ------------------------------------------------------------------------------------


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) * 1024


class Peak(threading.Thread):
    """The most anonymous memory since it was started."""

    def __init__(self):
        super().__init__(daemon=True)
        self.nbytes, self.ended = 0, threading.Event()

    def run(self):
        while not self.ended.wait(0.002):
            self.nbytes = max(self.nbytes, status("RssAnon"))


class Disk:
    """A disk of ``speed`` bytes a second that reads ahead by one piece, as a system does for files read in order."""

    def __init__(self, speed: float):
        self.speed, self.free = speed, 0.0

    def take(self, nbytes: int) -> None:
        """Waits until ``nbytes`` more would have been read."""
        self.free = max(self.free, time.perf_counter() - AHEAD_BYTES / self.speed) + nbytes / self.speed
        time.sleep(max(0.0, self.free - time.perf_counter()))


def simulate_disk(speed: float | None) -> None:
    """Makes every read of ours and of accelerate take its bytes divided by ``speed``, in bytes a second."""
    from accelerate.utils import OffloadedWeightsLoader

    from hf_lowbit.storage.reading import Files

    read, write, item = Files.read, Files.write, OffloadedWeightsLoader.__getitem__

    def slow_read(self, name, into, begin):
        found = read(self, name, into, begin)
        disk.take(found)
        return found

    def slow_write(self, name, data, begin):
        done = write(self, name, data, begin)
        disk.take(done)
        return done

    def slow_item(self, key):
        tensor = item(self, key)
        disk.take(tensor.nbytes)
        return tensor

    def uncached_item(self, key):
        for file in {info["safetensors_file"] for info in self.index.values() if "safetensors_file" in info}:
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return item(self, key)

    if speed is None:
        OffloadedWeightsLoader.__getitem__ = uncached_item
    else:
        disk = Disk(speed)
        Files.read, Files.write, OffloadedWeightsLoader.__getitem__ = slow_read, slow_write, slow_item


def load(folder: str, how: str, budget: int, offload_to: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    from hf_lowbit import LowBitConfig

    options = {"dtype": torch.float32}
    if how == "stream":
        options["quantization_config"] = LowBitConfig(max_memory_bytes=budget)
    if how.startswith("offload"):
        count = AutoConfig.from_pretrained(folder).num_hidden_layers
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        options["device_map"] = {**places, **{f"model.layers.{i}": "disk" for i in range(count)}}
        options["offload_folder"] = offload_to
        options["dtype"] = torch.bfloat16 if how == "offload in bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def child(folder, how, budget, constant, speed, tokens, threads) -> dict:
    import resource

    torch.set_num_threads(threads)
    import accelerate  # noqa: F401
    import transformers

    import hf_lowbit.streaming  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    simulate_disk(speed)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before, peak = status("RssAnon"), Peak()
    peak.start()
    model = load(folder, how, budget, folder + ".offload")
    limit = None
    if how == "stream":
        limit = status("VmData") + constant
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    times: list[float] = []
    marks = []

    def note(input_ids, scores):
        times.append(time.perf_counter())
        if how == "stream":
            marks.append(model.hf_quantizer.streaming.report())
        return scores

    ids = torch.randint(10, 40000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    processors = transformers.LogitsProcessorList([note])
    out = model.generate(ids, logits_processor=processors, **options)
    peak.ended.set()
    peak.join()
    taken, half = [b - a for a, b in itertools.pairwise(times)], tokens // 2
    found = {
        "s/token": statistics.median(taken[half:] or taken),
        "first half": statistics.median(taken[:half] or taken),
        "anonymous MB": (peak.nbytes - before) / 1e6,
        "hard limit": limit is not None,
        "tokens": out[0, PROMPT:].tolist(),
    }
    if how == "stream":
        report = model.hf_quantizer.streaming.report()
        print(report, file=sys.stderr)
        first, last = marks[min(half, tokens - 2)], marks[-1]

        def each(key):
            return (getattr(last, key) - getattr(first, key)) / (tokens - 1 - min(half, tokens - 2))

        nbytes = each("bytes_read") - each("wasted_bytes")
        found.update(
            {
                "held MB": report.held_bytes / 1e6,
                "layers in memory": report.layers_kept + report.layers_coded,
                "layers read": report.layers_streamed,
                "laid decoded": report.layers_laid,
                "MB written": report.bytes_written / 1e6,
                "MB/token": nbytes / 1e6,
                "waiting s/token": each("waiting_s"),
                "decoding s/token": each("decoding_s"),
            }
        )
        reads = speed or disk_speed(model.hf_quantizer.streaming.stream)
        found["MB/token / speed"] = nbytes / reads
        found["times that"] = found["s/token"] / found["MB/token / speed"] if nbytes else None
    return found


def disk_speed(stream) -> float:
    """Bytes a second of the same reads as those of ``stream`` without a model, one after another."""
    from hf_lowbit.storage.layers import BLOCK_BYTES
    from hf_lowbit.storage.reading import Counts, allocate, read_extent

    files, layers = stream.files, stream.forms
    buffer, speeds = allocate(max(max(layer.nbytes, layer.staged_bytes) for layer in layers)), []
    for _ in range(5):
        counts, start = Counts(), time.perf_counter()
        for layer in layers:
            for extent in layer.extents:
                place = extent.begin % BLOCK_BYTES if extent.parts else extent.offset
                read_extent(files, layer, extent, buffer, place, counts, lambda: True)
        speeds.append(counts.bytes_read / (time.perf_counter() - start))
    return statistics.median(speeds)


# -- all of them -------------------------------------------------------------------------------------------------------


def packed(source: str, name: str, bits_stored: float | None) -> str:
    """``source`` in the bits that ``name`` ends with, or in codes of 8 that coding makes ``bits_stored``, made once."""
    if bits_stored is None or (FOLDER / name).exists():
        return packed_folder(source, name)
    from hf_lowbit import LowBitConfig
    from hf_lowbit.convert import quantize_folder

    quantize_folder(source, FOLDER / name, LowBitConfig(bits_stored=bits_stored), progress=False)
    return str(FOLDER / name)


def coded_folder(packed: str, fraction: float | str = 1.0) -> str:
    """``packed`` with entropy-coded tensors, made once, or each time where speeds decide what is coded."""
    from hf_lowbit.compress import compress_folder

    folder = Path(packed + ("-coded" if fraction == 1.0 else f"-coded-{fraction}"))
    if fraction != 1.0:
        shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        found = compress_folder(packed, folder, "entropy", fraction=fraction, progress=False)
        print(found, flush=True)
    return str(folder)


def merged(name: str, note: str, rows: list[dict]) -> list[dict]:
    """``rows`` and those on record of other models and disks, of the same weights and budget, which ``note`` has."""
    file = RESULTS / f"{name}.json"
    data = json.loads(file.read_text()) if file.exists() else {"note": note, "rows": []}
    earlier = data["rows"] if data["note"] == note else []
    found = {(row["disk MB/s"], row["model"]): row for row in [*earlier, *rows]}
    order = list(CONTESTANTS)

    def place(row):
        disk = {"": -1.0, "none": float("inf")}.get(row["disk MB/s"])
        return float(row["disk MB/s"]) if disk is None else disk, order.index(row["model"])

    return sorted(found.values(), key=place)


def run(*arguments) -> dict:
    threads = arguments[-1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        return {"error": result.stderr.strip().splitlines()[-1][:200]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="SmolLM2-135M instead of 1.2 billion random weights")
    parser.add_argument("--disks", default="200,1000,none", help="speeds in MB/s, or none for the disk as it is")
    parser.add_argument("--fraction", type=float, help="budget as a part of the packed model: 1/3; 1/2 with --small")
    parser.add_argument("--constant", type=int, default=96, help="MB that computing may take besides, hard limit")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--bits-stored", type=float, help="bits of rate-aware codes, instead of fixed ones")
    parser.add_argument("--only", default="", help="regular expression over contestants")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    parser.add_argument("--print", action="store_true", help="do not write results/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*json.loads(args.child))))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = model_folder(None) if args.small else large_folder()
    name = f"int{args.bits}" if args.bits_stored is None else f"ecsq{args.bits_stored:g}"
    name = name if args.small else f"large-{name}"
    folders = {"float": source, "packed": packed(source, name, args.bits_stored)}
    folders["coded"] = coded_folder(folders["packed"])
    if args.prepare:
        return
    torch.set_num_threads(args.threads)
    if "none" in args.disks.split(",") and re.search(args.only, "ours, streamed, coded in part"):
        folders["auto"] = coded_folder(folders["packed"], "auto")
    size = sum(file.stat().st_size for file in Path(folders["packed"]).glob("*.safetensors"))
    fraction = args.fraction or (1 / 2 if args.small else 1 / 3)  # whose embedding alone is nearly a third
    budget, rows, reference, computing = int(fraction * size), [], None, None
    for disk in args.disks.split(","):
        speed = None if disk == "none" else float(disk) * 1e6
        for name, (what, how) in CONTESTANTS.items():
            if not re.search(args.only, name) or (how == "memory" and reference is not None):
                continue
            if what == "auto" and speed is not None:
                continue
            constant = args.constant * 10**6
            found = run(folders[what], how, budget, constant, speed, args.tokens, args.threads)
            tokens = found.pop("tokens", None)
            if how == "memory":
                reference, computing = tokens, found.get("s/token")
            if computing is not None and found.get("times that") is not None:
                found["times the longer"] = found["s/token"] / max(found["MB/token / speed"], computing)
            row = {"model": name, "disk MB/s": "" if how == "memory" else disk, "tokens": args.tokens, **found}
            if what != "float" and tokens is not None and reference is not None:
                row["same tokens"] = tokens == reference
            rows.append(row)
            print(row, flush=True)
    if not args.print:
        kind = "_rate_aware" if args.bits_stored is not None else "" if args.bits == 4 else f"_int{args.bits}"
        name = f"streaming{'_small' if args.small else ''}{kind}"
        what = "" if args.bits == 4 else f"--bits {args.bits} "
        what = what if args.bits_stored is None else f"--bits-stored {args.bits_stored:g} "
        note = (
            f"{'SmolLM2-135M-Instruct' if args.small else '1.2 billion random weights'}, packed {size / 1e6:.1f} MB, "
            f"budget {budget / 1e6:.1f} MB. Disks are simulated but for none, see the text of the benchmark."
        )
        rows = merged(name, note, rows)
        disks = ",".join(dict.fromkeys(row["disk MB/s"] for row in rows if row["disk MB/s"]))
        options = f"{'--small ' if args.small else ''}{what}--disks {disks} --threads {args.threads}"
        write_results(name, f"python benchmarks/streaming.py {options}", rows, note)


if __name__ == "__main__":
    main()
