"""Loading a coded repo beside the raw one: from a warm cache, and through a reader of 200 MB/s.

    python benchmarks/loading_coded.py [--model FOLDER] [--repetitions 5] [--options '{"bits_stored": 3.0}']

Every load is a process of its own that loads the model and computes one token, so that pages of a mapped file are
counted, too; seconds are those inside the process after the imports. "warm" has the files in the page cache. For
"200 MB/s" the safetensors files are first copied to memory at that speed and loaded from there: reading and decoding
one after the other, the worst case for the coder. Repositories take turns; the median of all turns is given.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import CACHE, model_folder, write_results

from hf_lowbit import LowBitConfig
from hf_lowbit.compress import compress_folder
from hf_lowbit.convert import quantize_folder

LOAD = """
import sys, time
import torch
from transformers import AutoModelForCausalLM
import hf_lowbit.adapters.register  # what importing takes is not measured
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(torch.tensor([[1]]))
print(time.perf_counter() - start)
"""
PIECE = 2**20


def load(folder: Path) -> float:
    """Seconds to load the model in ``folder`` and compute a token."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def load_slowly(folder: Path, rate: float) -> float:
    """Seconds to read the files of ``folder`` at ``rate`` bytes a second and load the model from memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, memory)
        start, read = time.perf_counter(), 0
        for path in folder.glob("*.safetensors"):
            with open(path, "rb") as source, open(Path(memory) / path.name, "wb") as target:
                while piece := source.read(PIECE):
                    target.write(piece)
                    read += len(piece)
                    time.sleep(max(0.0, start + read / rate - time.perf_counter()))
        return time.perf_counter() - start + load(Path(memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--options", default='{"bits_stored": 3.0}')
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rate", type=float, default=200e6)
    arguments = parser.parse_args()
    options, folder = (
        json.loads(arguments.options),
        CACHE / f"coded-{arguments.options.translate({34: None, 32: None})}",
    )
    folders = {storage: folder / storage for storage in ("raw", "entropy", "zstd")}
    if not folders["raw"].exists():
        quantize_folder(model_folder(arguments.model), folders["raw"], LowBitConfig(**options))
    for storage in ("entropy", "zstd"):
        if not folders[storage].exists():
            compress_folder(folders["raw"], folders[storage], storage)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(arguments.repetitions):
        for storage, where in folders.items():
            seconds.setdefault((storage, "warm"), []).append(load(where))
            seconds.setdefault((storage, "slow"), []).append(load_slowly(where, arguments.rate))
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [
        {
            "storage": storage,
            "MB": sum(p.stat().st_size for p in where.glob("*.safetensors")) / 1e6,
            "warm s": medians[storage, "warm"],
            "of raw": medians[storage, "warm"] / medians["raw", "warm"],
            f"{arguments.rate / 1e6:.0f} MB/s, s": medians[storage, "slow"],
            "of raw there": medians[storage, "slow"] / medians["raw", "slow"],
        }
        for storage, where in folders.items()
    ]
    command = f"python benchmarks/loading_coded.py --repetitions {arguments.repetitions}"
    write_results("loading_coded", command, rows, f"{arguments.options}. " + __doc__.split("\n\n")[2])


if __name__ == "__main__":
    main()
