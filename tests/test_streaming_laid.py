"""Coded layers laid decoded in a scratch file while a model is loaded: the same results, and the room of a raw repo."""

import errno
import gc
import os

import pytest
import torch
from conftest import inputs
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from test_budgets import least, stand_in  # noqa: F401
from test_streaming import LAYERS, LORA, generate, load, packed, report, smallest_budget, step  # noqa: F401
from test_streaming_laying import fill_up, folder, made, sizes  # noqa: F401

from hf_lowbit import placement, streaming
from hf_lowbit.compress import compress_folder
from hf_lowbit.placement import place
from hf_lowbit.storage import laid, laying, scratch, stream
from hf_lowbit.storage.entropy import is_coded
from hf_lowbit.storage.laid import as_decoded
from hf_lowbit.storage.layers import BLOCK_BYTES, aligned
from hf_lowbit.storage.laying import WORTH, Laying, pass_seconds
from hf_lowbit.storage.reading import Files, Speeds, decoders
from hf_lowbit.storage.scratch import Scratch


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Everything is laid, whatever the speeds are."""
    monkeypatch.setattr(placement, "QUICK_S", 0)
    monkeypatch.setattr(streaming, "pass_seconds", lambda layers, kept, speeds: 0.0)
    return monkeypatch


@pytest.fixture
def said(monkeypatch):
    """The warnings."""
    found = []
    for module in (laying, stream):
        monkeypatch.setattr(module.logger, "warning", lambda text, *arguments: found.append(text % arguments))
    return found


def coded(packed, folder, layers: int = 1):  # noqa: F811
    smallest, nbytes = sizes(packed / "entropy")
    return load(packed / "entropy", max_memory_bytes=smallest + layers * nbytes, offload_folder=str(folder))


def logits(model):
    return model(**inputs("llama")).logits


def test_it_is_streamed_as_a_raw_repo(packed, folder):  # noqa: F811
    for layers in (0, 2, LAYERS):
        model, expected = coded(packed, folder, layers), load(packed / "raw")
        raw = load(packed / "raw", max_memory_bytes=report(model).budget_bytes)
        placed, same = (m.hf_quantizer.streaming.placed for m in (model, raw))
        assert (placed.slots, placed.stored, placed.extents) == (same.slots, set(), set())
        assert len(placed.kept) >= len(same.kept)
        before = report(model)
        assert before.layers_laid == before.layers_streamed == LAYERS - len(placed.kept)
        assert (before.layers_laid > 0) == (layers < LAYERS) and before.held_bytes <= before.budget_bytes
        # A tensor begins at a line of the cache here, and in a file where the one before it ends.
        more = 64 * sum(len(layer.fields) for layer in model.hf_quantizer.streaming.layers)
        assert before.pass_bytes <= report(raw).pass_bytes + more
        forms = [] if (found := model.hf_quantizer.streaming.stream) is None else found.forms
        assert before.bytes_written == sum(aligned(form.nbytes, BLOCK_BYTES) for form in forms)
        assert torch.equal(generate(model), generate(expected)) and torch.equal(logits(model), logits(expected))
        after = report(model)
        assert after.bytes_written == before.bytes_written and after.bytes_decoded == 0
        assert f"{before.layers_laid} of them laid decoded" in str(after) and list(folder.iterdir()) == []


def test_training_has_the_same_gradients(packed, folder, at_once):  # noqa: F811
    at_once.setattr("hf_lowbit.adapters.lora.packed_with_low_rank", lambda *arguments: None)
    gradients = []
    for model in (load(packed / "raw"), coded(packed, folder)):
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(**LORA)).train()
        gradients.append(step(peft))
    assert report(model).layers_laid > 1
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7 * LAYERS
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_it_is_saved_as_it_is_stored(packed, folder, tmp_path):  # noqa: F811
    model = coded(packed, folder, 0)
    model.save_pretrained(tmp_path / "saved")
    streaming_of, kept = model.hf_quantizer.streaming, model.hf_quantizer.streaming.placed.kept
    streamed = [layer for i, layer in enumerate(streaming_of.layers) if i not in kept]
    with (
        safe_open(packed / "entropy" / "model.safetensors", "pt") as source,
        safe_open(tmp_path / "saved" / "model.safetensors", "pt") as saved,
    ):
        assert set(source.keys()) == set(saved.keys())
        for name in (name for layer in streamed for name in layer.coded):
            assert torch.equal(source.get_tensor(name), saved.get_tensor(name)) and is_coded(saved.get_tensor(name))
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_of_a_repo_coded_in_part_that_part_is_laid(packed, folder, tmp_path):  # noqa: F811
    compress_folder(packed / "raw", tmp_path / "half", fraction=0.5, progress=False)
    model = load(tmp_path / "half", max_memory_bytes=smallest_budget(tmp_path / "half"), offload_folder=str(folder))
    layers, found = model.hf_quantizer.streaming.layers, model.hf_quantizer.streaming.stream
    kept = model.hf_quantizer.streaming.placed.kept
    assert report(model).layers_laid == sum(bool(layer.coded) for i, layer in enumerate(layers) if i not in kept)
    assert 0 < report(model).layers_laid < len(found.forms)
    assert torch.equal(logits(model), logits(load(packed / "raw"))) and report(model).bytes_decoded == 0


@pytest.mark.parametrize("host", [False, True])
def test_an_accelerator_computes_the_same(packed, folder, stand_in, host):  # noqa: F811
    stand_in(cuda_0="cpu")
    limits = {0: least(packed / "entropy")} | ({"cpu": 5 * sizes(packed / "entropy")[1]} if host else {})
    model = load(packed / "entropy", max_memory_bytes=limits, offload_folder=str(folder))
    found = report(model)
    assert found.layers_laid == found.layers_streamed + found.layers_coded == LAYERS
    assert (found.layers_coded > 0) == host
    assert all(found.held[name] <= limit for name, limit in model.hf_quantizer.streaming.limits.items())
    assert torch.equal(generate(model), generate(load(packed / "raw"))) and report(model).bytes_decoded == 0


# -- faults ------------------------------------------------------------------------------------------------------------


def decodes(model, packed) -> bool:  # noqa: F811
    """Whether the model computes what it should, from layers that it decodes."""
    return torch.equal(logits(model), logits(load(packed / "raw"))) and report(model).bytes_decoded > 0


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_gets_full_leaves_the_layers_as_they_are(packed, folder, at_once, said, after):  # noqa: F811
    fill_up(at_once, after)
    at_once.setattr(Laying, "plan", lambda self, passed, seconds: self._choose(0.0))
    model = coded(packed, folder)
    assert report(model).layers_laid == report(model).bytes_written == 0 and not open_in(folder)
    assert decodes(model, packed)
    for _ in range(8):
        logits(model)
    assert len(said) == 1 and "No space left on device" in said[0]  # by who tries it again


def open_in(folder) -> list[str]:  # noqa: F811
    """The files of ``folder`` that this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link) and str(folder) in os.readlink(link)]


def test_a_file_without_room_for_all_is_not_begun(packed, folder, at_once):  # noqa: F811
    free = scratch.shutil.disk_usage(folder).free
    at_once.setattr(scratch, "FREE_PART", free // (2 * sizes(packed / "entropy")[1]))
    at_once.setattr(Scratch, "write", lambda *arguments: pytest.fail("something was written"))
    at_once.setattr(Laying, "plan", lambda self, passed, seconds: None)
    assert decodes(coded(packed, folder), packed)


def test_a_scratch_file_that_is_slower_than_the_repo_is_left(packed, folder, at_once):  # noqa: F811
    asked = []

    def seconds(layers, kept, speeds):
        if not layers[0].coded:
            asked.append(speeds.disk)
        return 0.0 if layers[0].coded or speeds.disk > 1.0 else 1.0

    at_once.setattr(streaming, "pass_seconds", seconds)
    at_once.setattr(laid, "reading_speed", lambda layers, files: 0.5)
    at_once.setattr(Laying, "plan", lambda self, passed, seconds: None)
    model = coded(packed, folder)
    assert len(asked) == 2 and asked[0] > 1.0 and asked[1] == 0.5
    assert report(model).layers_laid == 0 and not open_in(folder) and decodes(model, packed)


def test_a_scratch_file_that_fails_later_is_not_needed(packed, folder, at_once, said):  # noqa: F811
    model, expected, read = coded(packed, folder), logits(load(packed / "raw")), Files.read

    def broken(self, name, into, begin):
        if name.startswith("the scratch file"):
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name, into, begin)

    assert torch.equal(logits(model), expected) and report(model).layers_laid > 1
    at_once.setattr(Files, "read", broken)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert report(model).layers_laid == 0 and report(model).bytes_decoded > 0
    assert len(said) == 1 and "Input/output error" in said[0] and "with another offload_folder=" in said[0]


def test_damaged_data_are_said_while_loading(packed, folder, tmp_path):  # noqa: F811
    compress_folder(packed / "raw", tmp_path / "damaged", progress=False)
    last = load(tmp_path / "damaged", max_memory_bytes=10**9).hf_quantizer.streaming.layers[-2]
    extent = next(extent for extent in last.extents if extent.parts)
    with open(extent.file, "r+b") as file:
        file.seek(extent.begin + extent.parts[0][2] - 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 255]))
    smallest = smallest_budget(tmp_path / "damaged")
    with pytest.raises(ValueError, match=rf"{last.name}\..* cannot be decoded"):
        load(tmp_path / "damaged", max_memory_bytes=smallest, offload_folder=str(folder))
    gc.collect()
    assert not open_in(folder)


def test_it_can_be_interrupted(packed, folder, at_once):  # noqa: F811
    write, written = Scratch.write, []

    def interrupted(self, data, begin, wanted):
        written.append(begin)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(self, data, begin, wanted)

    at_once.setattr(Scratch, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        coded(packed, folder)
    gc.collect()
    assert not open_in(folder) and list(folder.iterdir()) == []


def test_the_space_is_given_back_with_the_model(packed, folder):  # noqa: F811
    model = coded(packed, folder)
    logits(model)
    assert open_in(folder)
    del model
    gc.collect()
    assert not open_in(folder)


def test_laying_takes_no_more_than_the_budget(packed, folder, at_once):  # noqa: F811
    taken, allocate = [], laid.allocate
    at_once.setattr(laid, "allocate", lambda nbytes: taken.append(nbytes) or allocate(nbytes))
    model = coded(packed, folder, 0)
    found = model.hf_quantizer.streaming
    others = sum(streaming._other_bytes(model, found.fields).values())
    assert others + taken[0] + max(layer.staged_bytes for layer in found.layers) <= found.limits["cpu"]


# -- the choice --------------------------------------------------------------------------------------------------------


def chosen(speeds: Speeds, ratio: float = 0.5) -> bool:
    """Whether layers that are read whole, coded in a part ``ratio``, are better laid at once."""
    layers = made(10, ratio=ratio)
    return pass_seconds([as_decoded(layer) for layer in layers], set(), speeds) <= WORTH * pass_seconds(
        layers, set(), speeds
    )


def test_it_is_for_disks_that_are_quicker_than_decoding():
    assert chosen(Speeds(disk=1e10, decoding=1e9))
    assert not chosen(Speeds(disk=2e8, decoding=1e9)) and not chosen(Speeds(disk=2e8, decoding=1e9), ratio=0.94)
    assert chosen(Speeds(disk=2e8, decoding=1e9), ratio=0.98)  # next to nothing to gain
    assert chosen(Speeds(disk=1.5e9, decoding=1e9 * 2 / decoders(), computing_s=0.1))  # which needs the processors
    assert not chosen(Speeds(disk=1e9, decoding=2e9 * 2 / decoders()))


def test_coded_layers_in_memory_hold_the_reader_up():
    layers, speeds = made(10), Speeds(disk=1e9, decoding=1e12)
    kept = {(i, number) for i in range(5) for number in range(4)}
    assert pass_seconds(layers, kept, speeds) == pytest.approx(5 * 2e6 / 1e9, rel=0.01)
    slow = Speeds(disk=1e9, decoding=1e9 / decoders())
    least_s = 5 * 4e6 * laying.BESIDE / 1e9  # to decode what is in memory, while nothing is read
    assert pass_seconds(layers, kept, slow) >= least_s + 5 * 4e6 / 1e9 * 0.5


def test_computing_is_measured_on_a_layer(packed, folder, at_once):  # noqa: F811
    asked = []
    at_once.setattr(streaming, "pass_seconds", lambda layers, kept, speeds: asked.append(speeds) or 0.0)
    coded(packed, folder)
    assert all(0 < speeds.computing_s < 10 for speeds in asked) and len(asked) == 4


def test_without_a_folder_nothing_is_laid(packed, at_once):  # noqa: F811
    at_once.setattr(streaming, "lay", lambda *arguments: pytest.fail("it was"))
    smallest, _ = sizes(packed / "entropy")
    assert decodes(load(packed / "entropy", max_memory_bytes=smallest, offload_folder=False), packed)


def test_decoded_layers_need_less_room():
    layers = made(10)
    placed = [place(some, {None: 0}, {"cpu": 20 * 10**6}) for some in (layers, [as_decoded(x) for x in layers])]
    assert placed[1].buffers < placed[0].buffers and len(placed[1].kept) >= len(placed[0].kept)
