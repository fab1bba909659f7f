"""Two processes over gloo share a calibration: the same bits as from one, and what is left when one of them dies."""

import os
import subprocess
import sys

import calibration_worker as worker
import pytest
import torch
from conftest import load
from safetensors.torch import load_file

from hf_lowbit.calibration.processes import Processes


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    """Folder with what two processes made, one of which was killed in the end."""
    folder = tmp_path_factory.mktemp("shared")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", worker.__file__, str(folder), *(f"{n}={tiny(n)}" for n in worker.JOBS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_LOWBIT_CACHE": str(folder / "cache")}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0 and (folder / "loaded-1.pt").is_file(), done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", list(worker.JOBS))
def test_two_processes_give_the_bits_of_one(name, shared, tiny, tmp_path):
    alone = worker.run(name, tiny(name), tmp_path / "out")
    mine, expected = (load_file(f / "model.safetensors") for f in (shared / name, alone.folder))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key], tensor) for key, tensor in expected.items())
    assert not list(shared.glob(f"{name}.*"))


def test_each_process_does_its_part_of_the_batches(shared):
    counts = [int((shared / f"counted-{rank}.txt").read_text()) for rank in (0, 1)]
    assert counts[0] >= counts[1] >= 0.6 * counts[0]  # 4 batches of 7 windows, and 5 of 5 calls of different lengths


def test_from_pretrained_in_every_process_gives_the_whole_model(shared):
    expected = load("llama", shared / "llama").state_dict()
    for rank in (0, 1):
        loaded = torch.load(shared / f"loaded-{rank}.pt")
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_one_process_goes_on_where_one_of_two_was_killed(shared, tiny):
    first, second = (shared / "killed.calibration" / f"block-0000{i}.safetensors" for i in (0, 1))
    finished, seen, enter = first.stat().st_mtime_ns, [], worker.Stream.enter
    assert not second.exists() and not (shared / "killed").exists()

    def note(self, index):
        seen.append(first.stat().st_mtime_ns)
        return enter(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.Stream, "enter", note)
        worker.run("llama", tiny("llama"), shared / "killed")
    assert set(seen) == {finished}
    mine, expected = (load_file(shared / n / "model.safetensors") for n in ("killed", "llama"))
    assert all(torch.equal(mine[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_contiguous_and_whole(count):
    for items in range(8):
        shares = [Processes(count, i).share(range(items)) for i in range(count)]
        assert [i for share in shares for i in share] == list(range(items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and len(shares[0]) == max(map(len, shares))
