"""A model larger than its budget computes the same bits, in any order of its layers, and says what went wrong."""

import copy
import errno
import gc
import itertools
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from conftest import _TEXT, inputs, logits
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open

from hf_lowbit import LowBitConfig, placement
from hf_lowbit.compress import compress_folder
from hf_lowbit.convert import quantize_folder
from hf_lowbit.storage import reading
from hf_lowbit.storage.content import Place
from hf_lowbit.storage.entropy import is_coded
from hf_lowbit.storage.layers import BLOCK_BYTES, Extent, Layer, Stored, lay_out_layer
from hf_lowbit.storage.reading import HUGE_BYTES, Counts, Files, Speeds, allocate, decoders, read_extent
from hf_lowbit.storage.shards import Layout
from hf_lowbit.streaming import Streaming

LAYERS = 8
LORA = {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": False}
CONFIG = LowBitConfig(bits=4, method="rtn", method_options={"range": "minmax"})


@pytest.fixture(autouse=True)
def two_buffers(monkeypatch):
    """Not a third one, which depends on how quick the disk is."""
    monkeypatch.setattr(placement, "QUICK_S", 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folders of one packed model of 8 layers: as converted, in several files, as saved, and coded."""
    folder = tmp_path_factory.mktemp("streaming")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_TEXT, "num_hidden_layers": LAYERS}, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "float")
    quantize_folder(folder / "float", folder / "raw", CONFIG, progress=False)
    quantize_folder(folder / "float", folder / "sharded", CONFIG, max_shard_size="40KB", progress=False)
    load(folder / "raw").save_pretrained(folder / "saved")
    load(folder / "raw", storage="entropy").save_pretrained(folder / "entropy")
    return folder


def load(folder, **options):
    if "max_memory_bytes" in options:
        options.setdefault("offload_folder", False)  # see test_streaming_laying.py
    config = {"quantization_config": LowBitConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


def streamed(folder, layers: int = 3):
    """The model with a budget for about ``layers`` of its layers besides the buffers."""
    least = smallest_budget(folder)
    whole = load(folder, max_memory_bytes=10**9).hf_quantizer.streaming
    return load(folder, max_memory_bytes=least + layers * whole.layers[0].nbytes)


def smallest_budget(folder) -> int:
    with pytest.raises(ValueError, match=r"max_memory_bytes=1 \(0.0 MB\) is too small: .* would do is \d+") as caught:
        load(folder, max_memory_bytes=1)
    return int(str(caught.value).rsplit(" ", 1)[1])


def report(model):
    return model.hf_quantizer.streaming.report()


def generate(model):
    return model.generate(**inputs("llama", 1), max_new_tokens=6, min_new_tokens=6, do_sample=False)


# -- the same results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["raw", "sharded", "saved", "entropy"])
def test_generates_the_same_tokens_within_the_budget(packed, storage):
    model, unlimited = streamed(packed / storage), load(packed / "raw")
    found = report(model)
    assert found.held_bytes <= found.budget_bytes
    assert found.layers_streamed >= 3 and found.layers_kept + found.layers_coded >= 2
    assert torch.equal(generate(model), generate(unlimited))
    assert torch.equal(model(**inputs("llama")).logits, unlimited(**inputs("llama")).logits)
    found = report(model)
    passes = 7
    read = found.bytes_read - found.wasted_bytes
    # The first layers of the next pass are read before anybody asks for them.
    assert passes * found.pass_bytes <= read <= (passes + 1) * found.pass_bytes
    assert found.waits <= passes * (found.layers_streamed + found.layers_coded)
    assert (found.bytes_decoded > 0) == (storage == "entropy")


def test_smallest_budget_is_enough_and_keeps_no_layer(packed):
    model = load(packed / "raw", max_memory_bytes=smallest_budget(packed / "raw"))
    assert report(model).layers_kept == 0 and report(model).layers_streamed == LAYERS
    assert torch.equal(generate(model), generate(load(packed / "raw")))


def test_nothing_is_streamed_where_everything_fits(packed):
    model = load(packed / "raw", max_memory_bytes={"cpu": "1GB"})
    found = report(model)
    assert (found.layers_kept, found.layers_streamed, found.bytes_read) == (LAYERS, 0, 0)
    assert model.hf_quantizer.is_compileable
    assert torch.equal(generate(model), generate(load(packed / "raw")))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_architectures(tmp_path, name, monkeypatch):
    auto, made = conftest.TINY[name]

    def longer(t):
        config = made(t)
        config.num_hidden_layers = 4
        return config

    monkeypatch.setitem(conftest.TINY, name, (auto, longer))
    quantize_folder(conftest.make_tiny(name, tmp_path / "float"), tmp_path / "packed", CONFIG, progress=False)
    with pytest.raises(ValueError, match="too small") as caught:
        conftest.load(name, tmp_path / "packed", quantization_config=LowBitConfig(max_memory_bytes=1))
    least = LowBitConfig(max_memory_bytes=int(str(caught.value).rsplit(" ", 1)[1]))
    model = conftest.load(name, tmp_path / "packed", quantization_config=least)
    assert report(model).layers_kept == 0 and report(model).layers_streamed >= 4
    assert torch.equal(logits(model, name), logits(conftest.load(name, tmp_path / "packed"), name))


def test_a_part_of_a_model_finds_its_tensors(packed):
    part = transformers.AutoModel.from_pretrained(
        packed / "raw", quantization_config=LowBitConfig(max_memory_bytes=smallest_budget(packed / "raw"))
    )
    assert report(part).layers_streamed >= 3
    whole = load(packed / "raw").model(**inputs("llama")).last_hidden_state
    assert torch.equal(part(**inputs("llama")).last_hidden_state, whole)


def test_what_was_decoded_is_not_copied_and_what_is_mapped_is(packed, monkeypatch):
    start = Streaming.start

    def noted(self, model):
        assert self._decoded == coded
        self._decoded = {"model.embed_tokens.weight"}  # too small here to be coded
        names = [name for name, _ in model.named_parameters() if name not in self.fields]
        before = {name: model.get_parameter(name).data_ptr() for name in names}
        start(self, model)
        same = {name for name in names if model.get_parameter(name).data_ptr() == before[name] != 0}
        assert same == self._decoded

    monkeypatch.setattr(Streaming, "start", noted)
    with safe_open(packed / "entropy" / "model.safetensors", "pt") as file:
        coded = {name for name in file.keys() if is_coded(file.get_tensor(name))}  # noqa: SIM118
    assert coded
    load(packed / "entropy", max_memory_bytes="1GB")


def test_layers_in_memory_lie_apart(packed):
    kept = sorted(streamed(packed / "raw", 3).hf_quantizer.streaming.placed.kept)
    assert len(kept) == 3 and min(b - a for a, b in itertools.pairwise(kept)) >= 2


def test_int8_activations_are_streamed_too(packed):
    least = smallest_budget(packed / "raw")
    model = load(packed / "raw", max_memory_bytes=least, activations="int8")
    unlimited = load(packed / "raw", activations="int8")
    assert torch.equal(model(**inputs("llama")).logits, unlimited(**inputs("llama")).logits)


def test_a_quick_disk_gets_a_buffer_more_where_it_fits(packed, monkeypatch):
    monkeypatch.setattr(placement, "QUICK_S", 10**6)
    least = smallest_budget(packed / "raw")
    for budget, slots in ((least, 2), (least + 10**5, 3)):
        model = load(packed / "raw", max_memory_bytes=budget)
        assert len(model.hf_quantizer.streaming.stream.buffers) == slots and report(model).held_bytes <= budget
        assert torch.equal(generate(model), generate(load(packed / "raw")))


def test_parts_of_coded_layers_fill_what_is_left_of_a_budget(packed, tmp_path, monkeypatch):
    from hf_lowbit.storage import layers

    monkeypatch.setattr(layers, "STAGED_BYTES", (0, 2**22))  # a run for each tensor, as in large layers
    monkeypatch.setattr("hf_lowbit.streaming.measure", lambda layer: Speeds(disk=1.0))
    least = smallest_budget(packed / "entropy")
    first = load(packed / "entropy", max_memory_bytes=least).hf_quantizer.streaming.layers[0]
    room = first.read_bytes + max(extent.nbytes for extent in first.extents) + 500
    model = load(packed / "entropy", max_memory_bytes=least + room)
    placed, found = model.hf_quantizer.streaming.placed, report(model)
    assert placed.extents and not {i for i, _ in placed.extents} & (placed.kept | placed.stored)
    assert found.budget_bytes - room < found.held_bytes <= found.budget_bytes
    expected = load(packed / "raw")
    model(**inputs("llama"))
    before = report(model)
    assert torch.equal(generate(model), generate(expected))
    after = report(model)
    read = after.bytes_read - after.wasted_bytes - before.bytes_read + before.wasted_bytes
    whole = sum(x.read_bytes for i, x in enumerate(model.hf_quantizer.streaming.layers) if i not in placed.kept)
    assert found.pass_bytes < whole
    assert 5 * found.pass_bytes <= read <= 7 * found.pass_bytes


# -- training ----------------------------------------------------------------------------------------------------------


def step(model):
    model.zero_grad()
    tokens = inputs("llama")["input_ids"]
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("storage", ["raw", "entropy"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gets_the_same_gradients_and_the_order_is_learned(packed, checkpointing, storage, monkeypatch):
    # A layer in memory and its adapter are else one product of the CPU kernels: the same sums, in another order.
    monkeypatch.setattr("hf_lowbit.adapters.lora.packed_with_low_rank", lambda *arguments: None)
    gradients = []
    for model in (load(packed / "raw"), streamed(packed / storage, 2)):
        torch.manual_seed(1)
        peft = get_peft_model(model, LoraConfig(**LORA))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        peft.train()
        gradients.append(step(peft))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 7 * LAYERS
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    step(peft)
    model.hf_quantizer.streaming.reset()
    step(peft)
    step(peft)
    found = report(model)
    assert found.wasted_bytes == 0
    # Forwards and backwards, but at each turn the layers that are still in the buffers.
    assert found.bytes_read <= 2 * 2 * found.pass_bytes
    assert all(tensor.device.type == "cpu" for tensor in get_peft_model_state_dict(peft).values())


def test_lora_gets_the_same_gradients_over_rotated_layers_with_outliers(packed, tmp_path):
    config = LowBitConfig(bits=4, method="rtn", transform="hadamard", outliers=3)
    quantize_folder(packed / "float", tmp_path / "rotated", config, progress=False)
    gradients = []
    for model in (load(tmp_path / "rotated"), streamed(tmp_path / "rotated", 2)):
        torch.manual_seed(1)
        gradients.append(step(get_peft_model(model, LoraConfig(**LORA)).train()))
    assert report(model).layers_streamed > 1 and len(gradients[0]) == 2 * 7 * LAYERS
    for name, gradient in gradients[0].items():
        # What the columns beside the codes pass back is added before what the adapter does, not after it.
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_nothing_of_a_streamed_layer_is_kept_for_the_backward(packed):
    model, saved = streamed(packed / "raw", 1), []
    get_peft_model(model, LoraConfig(**LORA))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(**inputs("llama"))
    buffers = model.hf_quantizer.streaming.stream.buffers
    places = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in buffers]
    assert saved and not [t for t in saved if any(first <= t.data_ptr() < last for first, last in places)]


# -- what may be done with such a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["raw", "entropy"])
def test_saves_and_dequantizes_what_is_stored(packed, storage, tmp_path):
    model, unlimited = streamed(packed / storage, 1), load(packed / "raw")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for (name, expected), found in zip(unlimited.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    first, second = (m.model.layers[0].self_attn.q_proj for m in (model, unlimited))
    assert first.streamed is not None
    assert torch.equal(first.dequantize(), second.dequantize())
    assert all(torch.equal(t, second.stored()[suffix]) for suffix, t in first.stored().items())


def test_what_cannot_be_done_says_so(packed):
    model = streamed(packed / "raw", 1)
    with pytest.raises(ValueError, match="streams its layers from disk for the CPU and cannot be moved to meta"):
        model.to("meta")
    model.to("cpu")
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"streamed cannot be copied or pickled.* use save_pretrained, or load it"):
            copying(model)
    peft = get_peft_model(model, LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"cannot be changed .*load the model without max_memory_bytes"):
        peft.merge_and_unload()


def test_a_compiled_model_leaves_its_graphs_for_streamed_layers(packed):
    model = streamed(packed / "raw", 1)
    expected = model(**inputs("llama")).logits
    assert torch.equal(torch.compile(model, backend="eager")(**inputs("llama")).logits, expected)


def test_scales_of_streamed_layers_are_not_trained(packed):
    from hf_lowbit.adapters.scales import train_scales

    with pytest.raises(ValueError, match=r"model.layers.\d.self_attn.q_proj is streamed.* without max_memory_bytes"):
        train_scales(streamed(packed / "raw", 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory_bytes": "many"}, "max_memory_bytes='many' is no size: use bytes, or a text like '300MB'"),
        ({"max_memory_bytes": -5}, "is no size"),
        ({"max_memory_bytes": True}, "is no size"),
        ({"max_memory_bytes": "1MB", "dequantize": True}, "keeps weights packed on disk: drop it"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**options)


def test_float_models_and_other_devices_are_refused(packed):
    with pytest.raises(ValueError, match="quantize to a folder first"):
        load(packed / "float", max_memory_bytes="1MB")
    with pytest.raises(ValueError, match="says itself where layers are, and device_map sends them to 'disk': drop"):
        transformers.AutoModelForCausalLM.from_pretrained(
            packed / "raw",
            quantization_config=LowBitConfig(max_memory_bytes="1MB"),
            device_map={"model": "disk", "lm_head": "cpu"},
        )


# -- faults ------------------------------------------------------------------------------------------------------------


def copied(packed, storage, tmp_path) -> Path:
    return Path(shutil.copytree(packed / storage, tmp_path / storage)) / "model.safetensors"


def test_a_file_truncated_while_in_use_is_named_and_the_next_use_tries_again(packed, tmp_path):
    file = copied(packed, "raw", tmp_path)
    model, content = streamed(file.parent, 0), file.read_bytes()
    expected = model(**inputs("llama")).logits
    last = model.hf_quantizer.streaming.layers[-1].extents[-1]
    with open(file, "rb+") as handle:
        handle.truncate(last.begin + 10)
    with pytest.raises(OSError, match=r"model.safetensors ends at byte \d+, inside model.layers.7: it was truncated"):
        model(**inputs("llama"))
    with open(file, "rb+") as handle:
        handle.write(content)
    assert torch.equal(model(**inputs("llama")).logits, expected)


def test_a_missing_shard_is_named_before_anything_is_streamed(packed, tmp_path):
    folder = Path(shutil.copytree(packed / "sharded", tmp_path / "sharded"))
    missing = sorted(folder.glob("*.safetensors"))[2]
    missing.unlink()
    with pytest.raises((OSError, ValueError), match=missing.name):
        load(folder, max_memory_bytes="1GB")


def test_a_disk_error_reaches_the_caller_with_its_place(packed, monkeypatch):
    model, real = streamed(packed / "raw", 0), Files.read

    def read(self, name, into, begin):
        if begin > 60_000:
            raise OSError(5, "Input/output error")
        return real(self, name, into, begin)

    monkeypatch.setattr(Files, "read", read)
    with pytest.raises(OSError, match=r"model.layers.\d cannot be read from byte \d+ of .*safetensors: Input/output"):
        model(**inputs("llama"))


def test_a_flipped_bit_of_a_coded_layer_is_named(packed, tmp_path):
    file = copied(packed, "entropy", tmp_path)
    model = streamed(file.parent, 0)
    layer = model.hf_quantizer.streaming.layers[3]
    extent = next(e for e in layer.extents if e.parts)
    with open(file, "rb+") as handle:
        handle.seek(extent.end - 9)
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ 4]))
    with pytest.raises(ValueError, match=r"model.layers.3\S+ in .*model.safetensors cannot be decoded: "):
        model(**inputs("llama"))


def test_threads_end_with_the_model(packed):
    model = streamed(packed / "entropy", 1)
    threads = model.hf_quantizer.streaming.stream._threads
    assert len(threads) >= 2 and all(thread.is_alive() for thread in threads)
    model(**inputs("llama"))
    del model
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)


# The first forward imports much, and what is imported may swallow an interrupt.
INTERRUPTED = """
import signal, sys, time, torch, transformers
from hf_lowbit import LowBitConfig
from hf_lowbit.storage.reading import Files
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=LowBitConfig(max_memory_bytes=int(sys.argv[2]))
)
model(torch.zeros(1, 4, dtype=torch.long))
def read(self, name, into, begin, real=Files.read):
    time.sleep(0.5)
    return real(self, name, into, begin)
Files.read = read
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they start in the background
print("running", flush=True)
while True:
    model(torch.zeros(1, 4, dtype=torch.long))
"""


def test_ctrl_c_ends_at_once(packed):
    command = [sys.executable, "-c", INTERRUPTED, str(packed / "raw"), str(smallest_budget(packed / "raw"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)  # one read and the end of Python; stuck threads would never end
    assert process.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt"), errors


# -- the files --------------------------------------------------------------------------------------------------------


def test_whole_blocks_are_read_past_the_cache_and_else_through_it(packed, monkeypatch):
    expected, read, seen = generate(load(packed / "raw")), Files.read, []

    def noted(self, name, into, begin):
        seen.append((begin % BLOCK_BYTES, len(into) % BLOCK_BYTES, self.direct(name)))
        return read(self, name, into, begin)

    monkeypatch.setattr(Files, "read", noted)
    model = streamed(packed / "raw", 1)
    seen.clear()
    assert torch.equal(generate(model), expected)
    if not seen[0][2]:
        pytest.skip("this file system has no reads past its cache")
    assert set(seen) == {(0, 0, True)}

    forgotten, forget = [], Files.forget
    monkeypatch.setattr(Files, "forget", lambda self, *place: forgotten.append(place) or forget(self, *place))
    monkeypatch.setattr(reading, "_open_direct", refuse_direct)  # at once, as some file systems do
    model = streamed(packed / "raw", 1)
    seen.clear()
    assert torch.equal(generate(model), expected) and {direct for *_, direct in seen} == {False} and forgotten


def test_a_file_system_that_refuses_a_direct_read_is_read_through_its_cache(tmp_path):
    content = torch.arange(3 * BLOCK_BYTES).to(torch.uint8)
    (tmp_path / "x").write_bytes(content.numpy().tobytes())
    files, layer = Files([str(tmp_path / "x")]), Layer("l.0", (), {}, 0)
    files.handles[str(tmp_path / "x"), True] = Refusing()
    extent, buffer, counts = (
        Extent(str(tmp_path / "x"), 100, 2 * BLOCK_BYTES + 7, 100),
        allocate(4 * BLOCK_BYTES),
        Counts(),
    )
    buffer.zero_()
    assert read_extent(files, layer, extent, buffer, 100, counts, lambda: True)
    assert not files.direct(str(tmp_path / "x")) and counts.bytes_read == extent.nbytes
    assert torch.equal(buffer[100 : 2 * BLOCK_BYTES + 7], content[100 : 2 * BLOCK_BYTES + 7])
    with pytest.raises(OSError, match=r"x ends at byte 12288, inside l.0: it was truncated"):
        read_extent(files, layer, Extent(extent.file, 8192, 12300, 0), buffer, 0, Counts(), lambda: True)


def refuse_direct(name, flags):
    raise OSError(errno.EINVAL, "refused")


class Refusing:
    """A file opened past the cache whose file system refuses every read."""

    def seek(self, place):
        pass

    def readinto(self, into):
        raise OSError(errno.EINVAL, "refused")

    def close(self):
        pass


@pytest.mark.parametrize("nbytes", [1, 5000, HUGE_BYTES - 1, HUGE_BYTES, 3 * HUGE_BYTES + 17])
def test_buffers_begin_at_blocks(nbytes):
    buffer = allocate(nbytes)
    assert buffer.numel() == nbytes and buffer.data_ptr() % (HUGE_BYTES if nbytes >= HUGE_BYTES else BLOCK_BYTES) == 0
    buffer.fill_(7)
    assert buffer[-1] == 7


# -- the layout of files -----------------------------------------------------------------------------------------------


def test_converted_layers_are_one_read_each(packed):
    layers = load(packed / "raw", max_memory_bytes="1GB").hf_quantizer.streaming.layers
    assert [len(layer.extents) for layer in layers] == [1] * LAYERS
    assert all(layer.extents[0].begin % 2 == 0 for layer in layers)
    saved = load(packed / "saved", max_memory_bytes="1GB").hf_quantizer.streaming.layers
    assert all(len(layer.extents) > 1 for layer in saved)


def test_a_part_of_the_layers_is_coded(packed, tmp_path):
    compress_folder(packed / "raw", tmp_path / "half", fraction=0.5, progress=False)
    model = load(tmp_path / "half", max_memory_bytes=smallest_budget(tmp_path / "half"))
    layers = model.hf_quantizer.streaming.layers
    assert [bool(layer.coded) for layer in layers] == [False, True] * (LAYERS // 2)
    assert torch.equal(generate(model), generate(load(packed / "raw")))
    found = report(model)
    disk, decoding = found.bytes_read / found.reading_s, decoders() * found.bytes_decoded / found.decoding_s
    assert 0.5 < found.coded_ratio < 1 and report(load(packed / "raw", max_memory_bytes="1GB")).coded_fraction is None
    assert found.coded_fraction == pytest.approx(min(1, 1 / (1 - found.coded_ratio + disk / decoding)))
    with pytest.raises(ValueError, match="fraction=0 is not possible: use a number above 0"):
        compress_folder(packed / "raw", tmp_path / "none", fraction=0)


def test_runs_of_coded_tensors_know_where_each_begins_and_ends(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(bytes(2 * 10**6))
    spans = {"a": (0, 5000), "b": (5003, 9000), "raw": (9000, 9100), "c": (9100, 10**6), "d": (10**6, 2 * 10**6)}
    tensors = {
        name: Stored(
            Place(file, "U8", (end - begin,), begin, end), (2 if name == "raw" else 1, 50), torch.uint8, name != "raw"
        )
        for name, (begin, end) in spans.items()
    }
    layer = lay_out_layer("m.layers.0", tensors)
    found = {n: (e.begin + first, e.begin + last) for e in layer.extents for n, first, last in e.parts}
    assert found == {name: span for name, span in spans.items() if name != "raw"}
    assert [e.parts and [n for n, *_ in e.parts] for e in layer.extents] == [["a", "b"], (), ["c"], ["d"]]
    ends = sorted((field.offset, field.offset + field.nbytes) for field in layer.fields.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends)) and ends[-1][1] <= layer.nbytes


def test_a_layout_with_odd_sizes_stays_aligned(tmp_path):
    tensors = {
        "m.layers.0.a": torch.arange(3, dtype=torch.uint8),
        "m.layers.1.b": torch.arange(3, dtype=torch.int16),
        "m.layers.1.c": torch.arange(3.0),
    }
    layout = Layout({name: tensor.to("meta") for name, tensor in tensors.items()}, {"format": "pt"})
    assert all(layout.places[name] % tensor.itemsize == 0 for name, tensor in tensors.items())
    layout.write(tmp_path / "x.safetensors", tensors.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        assert all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
