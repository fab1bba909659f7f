"""What ``test_shared_calibration.py`` starts in two processes: :func:`run`, which the test also calls alone; and a run
in which one process is killed.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from conftest import load

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration, Moments
from hf_lowbit.calibration.stream import Stream

COUNT, LENGTH = 7, 24  # windows that two processes cannot halve


def text():
    windows = torch.randint(4, 160, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
    return Calibration(list(windows), COUNT, LENGTH)


def calls():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 160, (1, length), generator=generator) for length in (12, 12, 9, 12, 12)]
    return Calibration([{"input_ids": i, "decoder_input_ids": i[:, :5]} for i in ids], len(ids))


JOBS = {
    "llama": (lambda: LowBitConfig(bits=3, method="gptq"), text),
    "t5": (lambda: LowBitConfig(bits=3, method="signround", method_options={"steps": 3}), calls),
    "qwen3": (lambda: LowBitConfig(bits=3, method="gptq", transform="hadamard-folded"), text),
    "gemma3": (lambda: LowBitConfig(bits=3, method="awq", method_options={"fold": "all"}), text),
}


def run(name, folder, output):
    config, data = JOBS[name]
    return hf_lowbit.quantize(folder, config(), output=output, calibration=data())


def main():
    output, folders = Path(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[2:])
    torch.set_num_threads(1)
    counted, add = [], Moments.add
    Moments.add = lambda self, x, r=None: counted.append(len(x)) or add(self, x, r)
    for name in JOBS:
        run(name, folders[name], output / name)
    # from_pretrained in both, each of which has the whole model afterwards.
    model = load("llama", folders["llama"], quantization_config=LowBitConfig(bits=3, method="gptq", calibration=text()))
    rank = torch.distributed.get_rank()
    torch.save(model.state_dict(), output / f"loaded-{rank}.pt")
    (output / f"counted-{rank}.txt").write_text(str(len(counted)))
    enter = Stream.enter

    def stop(self, index):
        if index == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return enter(self, index)

    Stream.enter = stop
    run("llama", folders["llama"], output / "killed")


if __name__ == "__main__":
    main()
