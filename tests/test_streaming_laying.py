"""Coded layers that are read decoded from a scratch file: which part, the same results, and nothing left behind."""

import errno
import functools
import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import inputs
from peft import LoraConfig, get_peft_model
from test_streaming import LAYERS, LORA, generate, load, packed, report, smallest_budget, step  # noqa: F401

from hf_lowbit import LowBitConfig, placement
from hf_lowbit.budgets import check_folder
from hf_lowbit.storage import laying, scratch
from hf_lowbit.storage.layers import BLOCK_BYTES, Extent, Field, Layer
from hf_lowbit.storage.laying import Laying
from hf_lowbit.storage.reading import PIECE_BYTES, TRIAL_BYTES, Counts, Files, Speeds, decoders, measure
from hf_lowbit.storage.scratch import Scratch, file_system


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Not by speeds, which differ from run to run: nothing at once (test_streaming_laid.py), then half, then all."""
    monkeypatch.setattr("hf_lowbit.streaming.pass_seconds", lambda layers, *options: 0.0 if layers[0].coded else 1.0)
    monkeypatch.setattr(placement, "QUICK_S", 0)
    parts = iter([0.5] * 4 + [0.0] * 10**6)

    def plan(self, passed, seconds):
        self._choose(next(parts))

    monkeypatch.setattr(Laying, "plan", plan)
    return monkeypatch


@pytest.fixture
def said(monkeypatch):
    """The warnings."""
    found = []
    monkeypatch.setattr(laying.logger, "warning", lambda text, *arguments: found.append(text % arguments))
    return found


@pytest.fixture
def folder(tmp_path):
    """On a disk, for scratch files."""
    if file_system(tmp_path) in scratch.IN_MEMORY:
        pytest.skip("the folder for tests is in memory")
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def coded(packed, folder, layers: int = 1):  # noqa: F811
    """The coded model with a budget for about ``layers`` of its layers, laid out in ``folder``."""
    least, nbytes = sizes(packed / "entropy")
    return load(packed / "entropy", max_memory_bytes=least + layers * nbytes, offload_folder=folder and str(folder))


@functools.cache
def sizes(folder) -> tuple[int, int]:
    """The smallest budget, and the bytes of a layer."""
    whole = load(folder, max_memory_bytes=10**9).hf_quantizer.streaming
    return smallest_budget(folder), whole.layers[0].nbytes


def logits(model):
    return model(**inputs("llama")).logits


def cuts(model):
    return list(model.hf_quantizer.streaming.stream._state.laying.cuts.values())


def settle(model, passes: int = 12) -> None:
    """Runs until everything is laid that is going to be."""
    for _ in range(passes):
        logits(model)
        time.sleep(0.01)


# -- the same results --------------------------------------------------------------------------------------------------


def test_the_same_tokens_and_the_budget_and_nothing_left(packed, folder):  # noqa: F811
    model, expected = coded(packed, folder), load(packed / "raw")
    for _ in range(3):  # through all stages: coded, in part, decoded
        assert torch.equal(generate(model), generate(expected))
        assert torch.equal(logits(model), logits(expected))
    settle(model)
    found = report(model)
    assert found.held_bytes <= found.budget_bytes
    assert 0 < found.layers_laid == found.layers_streamed == len(cuts(model))
    written = sum(BLOCK_BYTES * -(-cut.layer.nbytes // BLOCK_BYTES) for cut in cuts(model))
    # Written in two parts, whose last and first block may be the same one.
    assert written <= found.bytes_written <= written + BLOCK_BYTES * len(cuts(model))
    assert found.pass_bytes == sum(cut.layer.nbytes for cut in cuts(model))
    assert list(folder.iterdir()) == []
    assert f"{found.layers_laid} of them laid decoded" in str(found) and "wrote 0." in str(found)
    model.hf_quantizer.streaming.reset()
    assert torch.equal(logits(model), logits(expected))
    found = report(model)
    whole = sum(layer.decoded_bytes for layer in model.hf_quantizer.streaming.layers) - sum(
        cut.decoded[-1] for cut in cuts(model)
    )
    assert found.bytes_written == 0 and found.bytes_decoded <= 2 * whole  # of layers in memory as they are stored


def test_a_part_stays_coded(packed, folder, always):  # noqa: F811
    always.setattr("hf_lowbit.storage.layers.STAGED_BYTES", (0, 2**22))  # a run for each tensor, as in large layers
    always.setattr(Laying, "plan", lambda self, passed, seconds: self._choose(0.5))
    model, expected = coded(packed, folder, 0), logits(load(packed / "raw"))
    settle(model, 8)
    model.hf_quantizer.streaming.reset()
    for _ in range(4):
        assert torch.equal(logits(model), expected)
    found, total = report(model), sum(cut.decoded[-1] for cut in cuts(model))
    assert found.layers_laid > 0 and found.bytes_written == 0
    assert 4 * 0.4 * total < found.bytes_decoded < 5 * 0.6 * total
    assert sum(x.read_bytes for x in model.hf_quantizer.streaming.layers) < found.pass_bytes
    assert found.pass_bytes < sum(cut.layer.nbytes for cut in cuts(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_has_the_same_gradients(packed, folder, checkpointing, monkeypatch):  # noqa: F811
    monkeypatch.setattr("hf_lowbit.adapters.lora.packed_with_low_rank", lambda *arguments: None)
    gradients = []
    for model in (load(packed / "raw"), coded(packed, folder, 2)):
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(**LORA))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        peft.train()
        for _ in range(1 if len(gradients) == 0 else 8):
            gradients.append(step(peft))
    assert report(model).layers_laid == report(model).layers_streamed > 1
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys() and len(found) == 2 * 7 * LAYERS
        assert all(torch.equal(gradient, found[name]) for name, gradient in gradients[0].items())


# -- faults ------------------------------------------------------------------------------------------------------------


def fill_up(monkeypatch, after: int) -> list[int]:
    """Has the disk full after so many writes; the places of those."""
    written, write = [], Files.write

    def full(self, name, data, begin):
        if len(written) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(begin)
        return write(self, name, data, begin)

    monkeypatch.setattr(Files, "write", full)
    return written


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_is_said_once_and_costs_nothing(packed, folder, always, said, after):  # noqa: F811
    model, expected = coded(packed, folder), logits(load(packed / "raw"))
    written = fill_up(always, after)
    for _ in range(12):
        assert torch.equal(logits(model), expected)
    assert len(said) == 1 and f"be laid decoded in {folder} (No space left on device)" in said[0]
    assert "give another offload_folder=, or False to have none" in said[0]
    assert len(written) == after and (report(model).layers_laid > 0) == (after > 0)


def test_no_more_than_half_of_what_is_free_is_taken(packed, folder, always, said):  # noqa: F811
    model = coded(packed, folder)
    always.setattr(scratch, "FREE_PART", scratch.shutil.disk_usage(folder).free // (2 * cuts(model)[0].layer.nbytes))
    settle(model)
    assert 1 <= report(model).layers_laid <= 3 and "half of what was free, are used up" in said[0]


def test_a_scratch_file_that_cannot_be_read_is_not_needed(packed, folder, always, said):  # noqa: F811
    model, expected = coded(packed, folder), logits(load(packed / "raw"))
    settle(model)
    assert report(model).layers_laid > 1
    read = Files.read

    def broken(self, name, into, begin):
        if name.startswith("the scratch file"):
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name, into, begin)

    always.setattr(Files, "read", broken)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert report(model).layers_laid == 0 and len(said) == 1 and "Input/output error" in said[0]


def test_the_default_folder_may_be_of_no_use(packed, always, said, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("not a folder")
    always.setenv("HF_LOWBIT_CACHE", str(tmp_path / "file"))
    model = coded(packed, None)
    settle(model)
    assert torch.equal(logits(model), logits(load(packed / "raw")))
    assert report(model).layers_laid == 0 and len(said) == 1 and "cannot be laid decoded in" in said[0]


def test_it_may_be_turned_off(packed, folder, always):  # noqa: F811
    always.setenv("HF_LOWBIT_CACHE", str(folder))
    model = load(packed / "entropy", max_memory_bytes=sizes(packed / "entropy")[0], offload_folder=False)
    assert model.hf_quantizer.streaming.stream._state.laying is None
    settle(model)
    assert report(model).layers_laid == report(model).bytes_written == 0 and list(folder.iterdir()) == []


def test_it_ends_with_the_writer_busy(packed, folder, always):  # noqa: F811
    model, written, ending = coded(packed, folder, 0), [], threading.Event()
    stream = model.hf_quantizer.streaming.stream
    threads, state = stream._threads, stream._state

    def slow(self, name, data, begin):
        written.append(begin)
        time.sleep(0.05)
        while ending.is_set() and not state.stopped:
            time.sleep(0.01)
        return BLOCK_BYTES  # of the many that a layer has

    always.setattr(Files, "write", slow)
    while not written:
        logits(model)
    ending.set()
    count = len(written)
    del model, stream
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    assert len(written) <= count + 1 and list(folder.iterdir()) == []


def test_the_space_is_given_back_with_the_model(packed, folder):  # noqa: F811
    def open_here():
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return [link for link in links if str(folder) in (os.path.realpath(link) if link.exists() else "")] + [
            link for link in links if link.is_symlink() and str(folder) in os.readlink(link)
        ]

    model = coded(packed, folder)
    settle(model)
    assert open_here()
    del model
    gc.collect()
    assert not open_here()


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [True, 3, "", ["folder"]])
def test_wrong_values_are_refused_with_the_config(wrong):
    with pytest.raises(ValueError, match=r"offload_folder=.* is no folder: give the path of one on a disk, False to"):
        LowBitConfig(max_memory_bytes="1MB", offload_folder=wrong)


def test_it_is_for_budgets_and_not_saved():
    with pytest.raises(ValueError, match="offload_folder= is for models under max_memory_bytes="):
        LowBitConfig(offload_folder="folder")
    config = LowBitConfig(max_memory_bytes="1MB", offload_folder="folder")
    assert "offload_folder" not in config.to_dict()
    assert config.get_loading_attributes()["offload_folder"] == "folder"
    for fine in (None, False, Path("folder")):
        check_folder(fine)


def test_folders_of_no_use_are_refused_before_anything_is_loaded(packed, tmp_path, monkeypatch):  # noqa: F811
    def refused(folder, message):
        with pytest.raises(ValueError, match=f"cannot be used: {message}; give an existing folder on a disk"):
            load(packed / "entropy", max_memory_bytes="1GB", offload_folder=folder)

    refused(tmp_path / "missing", "there is no such folder")
    if file_system(Path("/dev/shm")) == "tmpfs":
        refused("/dev/shm", r"it is memory \(tmpfs\), which would not be saved")

    def denied(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(scratch.tempfile, "TemporaryFile", denied)
    refused(tmp_path, "Permission denied")


# -- the choice --------------------------------------------------------------------------------------------------------


def made(count: int, parts: int = 4, size: int = 10**6, ratio: float = 0.5) -> list[Layer]:
    """Layers of ``parts`` tensors of ``size`` bytes each, coded in a part ``ratio`` of it."""
    stored = int(size * ratio)
    fields = {f"t{n}": Field(n * size, (size,), torch.uint8) for n in range(parts)}
    extents = tuple(Extent("f", n * stored, (n + 1) * stored, 0, ((f"t{n}", 0, stored),)) for n in range(parts))
    return [Layer(f"l.{i}", extents, fields, parts * size, frozenset(fields)) for i in range(count)]


def chosen(always, tmp_path, disk: float, decoding: float, computing_s: float, slowed: float = 1.0, ratio: float = 0.5):
    """The part that stays coded with a disk and decoders of these speeds, the disk ``slowed`` where all is decoded."""
    always.undo()
    layers = made(10, ratio=ratio)
    found = Laying(layers, {}, tmp_path, Files([]))
    found.failed = True  # nothing is written
    total, fraction = 40 * 10**6, 1.0
    for _ in range(40):
        read = total * (1 - fraction * (1 - ratio))
        reading_s = read / (disk * (1 - fraction * (1 - slowed)))
        decoding_s = fraction * total / decoding
        seconds = max(reading_s, computing_s + decoding_s / decoders())
        passed = Counts(
            bytes_read=int(read), reading_s=reading_s, bytes_decoded=int(fraction * total), decoding_s=decoding_s,
            waiting_s=seconds - computing_s,
        )  # fmt: skip
        found.plan(passed, seconds)
        fraction = found.fraction
    return fraction


def test_slow_disks_leave_all_coded_and_quick_ones_nothing(always, tmp_path):
    assert chosen(always, tmp_path, disk=2e8, decoding=1e9, computing_s=0.01) == 1
    assert chosen(always, tmp_path, disk=1e10, decoding=1e9, computing_s=0.1) == 0
    assert chosen(always, tmp_path, disk=2e9, decoding=1e9, computing_s=1.0) == 0  # all for computing


def test_between_them_reading_and_decoding_take_equally_long(always, tmp_path):
    disk, decoding = 1e9, 5e8
    fraction = chosen(always, tmp_path, disk, decoding, computing_s=0.005)
    reading_s = 4e7 * (1 - fraction / 2) / disk
    assert 0 < fraction < 1
    assert 0.005 + fraction * 4e7 / decoding / decoders() == pytest.approx(laying.SHARE * reading_s, rel=0.15)


def test_nothing_is_coded_where_decoding_slows_the_disk_down_by_more_than_it_saves(always, tmp_path):
    decoding = 4e7 / 0.04 / decoders()  # so that it takes as long as reading
    assert chosen(always, tmp_path, 1e9, decoding, computing_s=0.005, slowed=0.75, ratio=0.94) == 0


def test_little_gain_is_none(always, tmp_path):
    always.undo()
    for ratio, wanted in ((0.98, 0), (0.9, 1)):  # of the bytes, so also of the time: nothing else takes any
        found = Laying(made(10, ratio=ratio), {}, tmp_path, Files([]), Speeds(disk=1e8, decoding=1e12))
        assert found.fraction == wanted


def test_a_trial_before_the_first_pass_is_believed_until_passes_say_otherwise(always, tmp_path):
    always.undo()
    quick, slow = Speeds(disk=1e10, decoding=1e9), Speeds(disk=1e8, decoding=1e9)
    coded_pass = Counts(bytes_read=2 * 10**7, reading_s=0.02, bytes_decoded=4 * 10**7, decoding_s=0.04)

    def after_a_pass(speeds):
        found = Laying(made(10), {}, tmp_path, Files([]), speeds)
        found._open = lambda: None  # nothing is written
        found.plan(coded_pass, 0.04)
        return found, {cuts.target for cuts in found.cuts.values()}

    found, targets = after_a_pass(quick)
    assert found.fraction == 0 and targets == {0}  # what decoding beside it took from the disk is not its speed
    assert found.speeds == [1e10, pytest.approx(1.25e9)]  # (no less than an eighth of that)
    found, targets = after_a_pass(None)
    assert targets == {4}  # nobody else said so
    found, targets = after_a_pass(slow)
    assert targets == {4} and found.fraction == 1
    for _ in range(8):  # read decoded, it turns out to be quick
        found.plan(Counts(bytes_read=4 * 10**7, reading_s=0.004), 0.02)
    assert found.fraction == 0 and {cuts.target for cuts in found.cuts.values()} == {0}


def test_a_trial_quicker_than_passes_that_leave_the_processors_idle_was_wrong(always, tmp_path):
    always.undo()
    found = Laying(made(10, ratio=0.94), {}, tmp_path, Files([]), Speeds(disk=2.5e8, decoding=1e9))
    nbytes, seconds = 0.94 * 4e7, 0.94 * 4e7 / 2e8
    for _ in range(3):
        found.plan(Counts(bytes_read=int(nbytes), reading_s=seconds, bytes_decoded=4 * 10**7, decoding_s=0.04), seconds)
        assert found.fraction == 1 and found.speeds == [pytest.approx(2e8)] * 2


def test_a_disk_that_reads_ahead_while_nobody_asks_is_no_quicker(always, tmp_path):
    """Half of the reading is done before it is asked for, and the decoders are waited for besides."""
    always.undo()
    found = Laying(made(10), {}, tmp_path, Files([]), Speeds(disk=2e8, decoding=1e9))
    passed = Counts(bytes_read=2 * 10**7, reading_s=0.05, bytes_decoded=4 * 10**7, decoding_s=0.04, waiting_s=0.08)
    for _ in range(3):
        found.plan(passed, 0.1)
        assert found.fraction == 1 and found.speeds == [pytest.approx(2e8)] * 2
        assert found.computing_s <= 0.02 + 1e-9


def test_the_trial_leaves_out_what_a_disk_gives_at_once(tmp_path, monkeypatch):
    name, size = tmp_path / "f", 20 * PIECE_BYTES
    name.write_bytes(bytes(size))
    layers = [Layer("l", (Extent(str(name), n * PIECE_BYTES, (n + 1) * PIECE_BYTES, 0),), {}, 0) for n in range(20)]
    read, done = Files.read, []

    def slow(self, name, into, begin):
        time.sleep(0.002 if len(done) > 1 else 0)
        done.append(begin)
        return read(self, name, into, begin)

    monkeypatch.setattr(Files, "read", slow)
    assert measure(layers).disk < PIECE_BYTES / 0.002 and len(done) == TRIAL_BYTES // PIECE_BYTES


def test_loading_makes_the_trial(packed, folder, always):  # noqa: F811
    found = coded(packed, folder).hf_quantizer.streaming.stream._state.laying
    assert found.noted == [1, 0] and found.speeds[0] > 0 and found.decoding_s > 0


def test_parts_of_layers_add_up(tmp_path):
    found = Laying(made(7, parts=5), {}, tmp_path, Files([]))
    for fraction in (0.0, 0.1, 0.33, 0.5, 0.9, 1.0):
        spread = found._spread(fraction)
        assert sum(spread) == pytest.approx(fraction * 35, abs=0.5)
        assert max(spread) - min(spread) <= 1


def test_seconds_with_what_may_lie_decoded():
    speeds = Speeds(disk=1e9, decoding=1e9 / decoders())
    assert speeds.seconds(10**9, 3 * 10**9) == 3 and speeds.seconds(10**9, 10**9, 2 * 10**9) == 1
    found = speeds.seconds(10**9, 3 * 10**9, 2 * 10**9)  # half of it decoded: 1.5 s of reading, and of decoding
    assert found == pytest.approx(1.5)
    assert Speeds(1e9, 1e6).seconds(10**9, 3 * 10**9, 2 * 10**9) == pytest.approx(2, rel=0.01)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_scratch_file_without_direct_writes(folder, monkeypatch):
    monkeypatch.setattr(Scratch, "_open_direct", lambda self, number: None)
    forgotten, forget = [], Files.forget
    monkeypatch.setattr(Files, "forget", lambda self, *place: forgotten.append(place) or forget(self, *place))
    files = Files([])
    file = Scratch(folder, files)
    content = torch.arange(3 * BLOCK_BYTES).to(torch.uint8)
    assert file.write(content, BLOCK_BYTES, lambda: True) and not files.direct(file.name)
    assert forgotten == [(file.name, BLOCK_BYTES, 4 * BLOCK_BYTES)]
    found = torch.zeros_like(content)
    assert files.read(file.name, memoryview(found.numpy()), BLOCK_BYTES) == content.numel()
    assert torch.equal(found, content) and list(folder.iterdir()) == []
    assert not file.write(content, 0, lambda: False)
    file.close()
    assert not files.handles
