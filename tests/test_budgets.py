"""Budgets for several devices: read, refused, placed, and the same results. Accelerators are stood in for by the CPU,
whose copies and buffers are then those of an accelerator, and by ``meta``, which shows what is where."""

import itertools

import pytest
import torch
import transformers
from conftest import _TEXT, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from hf_lowbit import LowBitConfig, budgets, placement, quantizer
from hf_lowbit.adapters import lora
from hf_lowbit.budgets import check_present, read_budgets
from hf_lowbit.convert import quantize_folder
from hf_lowbit.placement import place
from hf_lowbit.storage.layers import BLOCK_BYTES, Extent, Field, Layer
from hf_lowbit.storage.reading import HUGE_BYTES, Speeds, decoders

LAYERS = 6
CONFIG = LowBitConfig(bits=4, method="rtn", method_options={"range": "minmax"})

# -- what is said ------------------------------------------------------------------------------------------------------


def test_sizes_by_device():
    assert read_budgets(None) == {}
    assert read_budgets("300MB") == read_budgets({"cpu": 300 * 10**6}) == {"cpu": 300 * 10**6}
    accelerator = torch.accelerator.current_accelerator() or torch.device("cuda")
    found = read_budgets({"cpu": "1GB", 0: "2GB", "1": "3GB", "xpu:2": 5})
    assert found == {"cpu": 10**9, f"{accelerator.type}:0": 2 * 10**9, f"{accelerator.type}:1": 3 * 10**9, "xpu:2": 5}
    assert LowBitConfig(max_memory_bytes={"cpu": "1GB", 0: "2GB"}).max_memory_bytes == {"cpu": "1GB", 0: "2GB"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "names no device: use a size, or"),
        ({"gpu": "1GB"}, "names 'gpu', which is no device: use 'cpu' for the host's memory and numbers"),
        ({"disk": "1GB"}, "what fits nowhere is read from disk"),
        ({"meta": "1GB"}, "names 'meta', which is no device"),
        ({True: "1GB"}, "names True, which is no device"),
        ({-1: "1GB"}, "names -1, which is no device"),
        ({0: "many"}, "'many' for 0 is no size: use bytes, or a text like '300MB'"),
        ({"cpu": "1GB", 1: 0}, "0 for 1 is no size"),
        ({0: "1GB", "0": "1GB"}, r"names \w+:0 twice: give each device one size"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_config(wanted, message):
    with pytest.raises(ValueError, match=message):
        LowBitConfig(max_memory_bytes=wanted)


def test_devices_that_are_not_here_are_refused():
    check_present(["cpu"])
    with pytest.raises(ValueError, match=r"names 'cuda:99', and torch finds .+ here: leave it out, or name one"):
        check_present(["cpu", "cuda:99"])


# -- what stays where --------------------------------------------------------------------------------------------------


def layer(i: int, size: int, stored: int | None = None) -> Layer:
    """``size`` blocks, coded in ``stored`` of them."""
    read, nbytes = (size if stored is None else stored) * BLOCK_BYTES, size * BLOCK_BYTES
    parts = () if stored is None else (("t", 0, read),)
    coded = frozenset() if stored is None else frozenset({"t"})
    fields = {"t": Field(0, (nbytes,), torch.uint8)}
    return Layer(f"l.{i}", (Extent("f", 0, read, 0, parts),), fields, nbytes, coded)


def in_blocks(sizes: dict) -> dict:
    return {key: size * BLOCK_BYTES for key, size in sizes.items()}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    outside=st.integers(0, 60),
    limits=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    host=st.none() | st.integers(1, 400),
)
def test_every_budget_holds_or_its_least_is_named(sizes, outside, limits, host):
    layers = [layer(i, size) for i, size in enumerate(sizes)]
    others = in_blocks({None: outside, **{entry.name: 1 for entry in layers}})
    wanted = in_blocks({f"cuda:{i}": n for i, n in enumerate(limits)} | ({} if host is None else {"cpu": host}))
    try:
        found = place(layers, others, wanted)
    except ValueError as error:
        text = str(error)
        name = "cpu" if "of the CPU's memory" in text else text.split(" of ")[1].split(",")[0]
        least = int(text.rsplit(" ", 1)[1])
        assert least > wanted[name]
        return
    assert found.devices == sorted(found.devices) and len(found.devices) == len(layers)  # runs, in order
    assert all(found.held.get(name, 0) <= limit for name, limit in wanted.items())
    assert not found.kept & found.stored
    held = dict.fromkeys(wanted, 0) | {"cuda:0": outside}  # by another count
    for i, size in enumerate(sizes):
        held[found.devices[i]] += 1 + (size if i in found.kept else 0)
    for name in held.keys() - {"cpu"}:
        run = [i for i, device in enumerate(found.devices) if device == name]
        held[name] += max((sizes[i] for i in run if i not in found.kept), default=0)
        assert held[name] * BLOCK_BYTES == found.held[name]
    streamed = [sizes[i] for i in range(len(sizes)) if i not in found.kept]
    buffers = min(2, len(streamed)) * max(streamed, default=0)
    assert found.held["cpu"] == BLOCK_BYTES * (buffers + sum(sizes[i] for i in found.stored))
    if sum(sizes) + len(sizes) + outside <= limits[0]:
        assert not streamed and set(found.devices) == {"cuda:0"}


def test_runs_are_in_proportion_and_the_host_takes_what_fits():
    layers, others = [layer(i, 10) for i in range(12)], in_blocks({None: 5})
    found = place(layers, others, in_blocks({"cuda:0": 45, "cuda:1": 20, "cpu": 20 + 35}))
    assert found.devices == ["cuda:0"] * 8 + ["cuda:1"] * 4
    # Three layers and one, with a buffer each.
    assert found.held == in_blocks({"cuda:0": 45, "cuda:1": 20, "cpu": 50})
    assert len(found.kept) == 4 and len(found.stored) == 3
    assert found.first == "cuda:0" and place(layers, others, in_blocks({"cpu": 200})).first == "cpu"
    coded = [layer(i, 10, 6) for i in range(12)]
    assert len(place(coded, others, in_blocks({"cuda:0": 45, "cpu": 500})).stored) == 9
    with pytest.raises(ValueError, match=rf"allows 0.0 MB of cuda:1, which is too small: .* is {10 * BLOCK_BYTES}$"):
        place(layers, others, in_blocks({"cuda:0": 45, "cuda:1": 9}))
    with pytest.raises(ValueError, match=rf"of the CPU's memory, which is too small: .* is {20 * BLOCK_BYTES}$"):
        place(layers, others, in_blocks({"cuda:0": 45, "cpu": 19}))


def test_coded_layers_stay_as_stored_or_decoded_by_what_a_pass_takes(monkeypatch):
    monkeypatch.setattr(placement, "QUICK_S", 0)
    layers = [layer(i, 10, 5) for i in range(12)]
    buffers = 2 * 10 + (decoders() + 1) * 5
    budget = in_blocks({"cpu": buffers + 40})
    decoded = place(layers, {}, budget, Speeds(disk=1e9, decoding=1e3))  # decoding is what a pass takes
    assert (len(decoded.kept), len(decoded.stored)) == (4, 0)
    for speeds in (Speeds(disk=1e3, decoding=1e9), None):
        stored = place(layers, {}, budget, speeds)
        assert (len(stored.kept), len(stored.stored)) == (0, 8)
        assert max(b - a for a, b in itertools.pairwise(sorted(stored.stored))) == 2  # evenly spread
    one = 10 * BLOCK_BYTES / (1e6 * decoders())  # what decoding a layer takes, and reading three of them
    both = place(layers, {}, budget, Speeds(disk=15 * BLOCK_BYTES / one, decoding=1e6))
    seconds = {}
    for kept in range(5):
        read, decode = 12 - kept - (40 - 10 * kept) // 5, 12 - kept
        seconds[kept] = max(read / 3, decode)
    assert len(both.kept) == min(seconds, key=lambda kept: (seconds[kept], -kept))
    assert decoded.held == stored.held == budget  # less than a huge page, so nothing is added


def test_buffers_become_whole_huge_pages_where_that_costs_no_layer():
    layers = [layer(i, HUGE_BYTES // BLOCK_BYTES + 1) for i in range(4)]
    least = 2 * layers[0].nbytes
    found = place(layers, {}, {"cpu": least + HUGE_BYTES})
    assert found.buffers == found.held["cpu"] == 3 * HUGE_BYTES and not found.kept
    assert place(layers, {}, {"cpu": least + 1}).held["cpu"] == least


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**_TEXT, "num_hidden_layers": LAYERS}, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "float")
    quantize_folder(folder / "float", folder / "raw", CONFIG, progress=False)
    load(folder / "raw", storage="entropy").save_pretrained(folder / "entropy")
    return folder


@pytest.fixture
def stand_in(monkeypatch):
    """``stand_in(**devices)``: torch's devices for names such as ``cuda_0``."""

    def put(**devices):
        named = {name.replace("_", ":"): torch.device(device) for name, device in devices.items()}
        monkeypatch.setattr(quantizer, "check_present", lambda names: None)
        monkeypatch.setattr(budgets, "torch_device", lambda name: named.get(name, torch.device("cpu")))
        monkeypatch.setattr(budgets, "_accelerator_type", lambda: "cuda")
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # which does not know meta

    return put


def load(folder, **options):
    if "max_memory_bytes" in options:
        options.setdefault("offload_folder", False)  # see test_streaming_laid.py
    config = {"quantization_config": LowBitConfig(**options)} if options else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)


def least(folder) -> int:
    """The smallest budget of the first accelerator."""
    with pytest.raises(ValueError, match=r"allows 0.0 MB of \w+:0, which is too small") as caught:
        load(folder, max_memory_bytes={0: 1})
    return int(str(caught.value).rsplit(" ", 1)[1])


def generate(model):
    return model.generate(**inputs("llama", 1), max_new_tokens=5, min_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("storage", ["raw", "entropy"])
@pytest.mark.parametrize("host", ["nothing", "a part", "all"])
def test_an_accelerator_with_a_budget_computes_the_same(packed, stand_in, storage, host):
    stand_in(cuda_0="cpu")
    folder = packed / storage
    smallest = least(folder)
    layers = load(folder, max_memory_bytes={0: smallest}).hf_quantizer.streaming.layers
    limits = {0: smallest + layers[0].nbytes}
    if host != "nothing":
        buffers = load(folder, max_memory_bytes=limits).hf_quantizer.streaming.placed.held["cpu"]
        sizes = sorted((entry.read_bytes for entry in layers), reverse=True)
        limits["cpu"] = buffers + sum(sizes[: 2 if host == "a part" else LAYERS])
    model = load(folder, max_memory_bytes=limits)
    found = model.hf_quantizer.streaming.report()
    assert found.layers_kept == 1 and found.layers_coded == {"nothing": 0, "a part": 2, "all": LAYERS - 1}[host]
    assert found.held["cuda:0"] <= limits[0] and found.held["cpu"] <= limits.get("cpu", found.held["cpu"])
    assert f"cuda:0 {found.held['cuda:0'] / 1e6:.1f} MB" in str(found)
    assert found.held["cuda:0"] <= found.held_bytes <= found.budget_bytes == sum(limits.values())
    expected = load(packed / "raw")
    assert torch.equal(generate(model), generate(expected))
    assert torch.equal(model(**inputs("llama")).logits, expected(**inputs("llama")).logits)
    found = model.hf_quantizer.streaming.report()
    assert (found.bytes_read == 0) == (host == "all")
    assert (found.bytes_decoded > 0) == (storage == "entropy")


def test_two_accelerators_compute_the_same_and_train(packed, stand_in):
    stand_in(cuda_0="cpu", cuda_1="cpu")
    smallest = least(packed / "raw")
    size = load(packed / "raw", max_memory_bytes="1GB").hf_quantizer.streaming.layers[0].nbytes
    model, expected = load(packed / "raw", max_memory_bytes={0: smallest, 1: 3 * size}), load(packed / "raw")
    placed = model.hf_quantizer.streaming.placed
    assert set(placed.devices) == {"cuda:0", "cuda:1"}
    targets = {module.streamed.target for module in model.modules() if getattr(module, "streamed", None) is not None}
    assert len(targets) == 2  # a buffer on each device, however many modules
    assert torch.equal(generate(model), generate(expected))
    gradients = []
    for peft in (model, expected):
        torch.manual_seed(0)
        options = {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "init_lora_weights": False}
        peft = get_peft_model(peft, LoraConfig(**options))
        out = peft(**inputs("llama"), labels=inputs("llama")["input_ids"])
        out.loss.backward()
        gradients.append({n: p.grad for n, p in peft.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[1].items():  # the same terms in another order
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-5, atol=1e-6)


def test_everything_that_computes_is_on_its_device(packed, stand_in, monkeypatch):
    """``meta`` refuses to be mixed with the CPU: whatever was left behind would raise."""
    stand_in(cuda_0="meta")
    smallest = least(packed / "raw")
    model = load(packed / "raw", max_memory_bytes={0: smallest, "cpu": 10**9})
    assert model.device.type == "meta"
    ids = inputs("llama")["input_ids"]
    assert model(ids.to("meta")).logits.device.type == "meta"
    layer = model.hf_quantizer.streaming.layers[0]
    assert {model.get_parameter(name).device.type for name in layer.fields} == {"cpu"}  # views of the file
    model.to("meta")
    assert {model.get_parameter(name).device.type for name in layer.fields} == {"cpu"}
    with pytest.raises(ValueError, match=r"streamed for meta, and its input is on cpu: move the model's inputs to"):
        model.model.layers[0].mlp.gate_proj(torch.zeros(1, 64))
    monkeypatch.setattr(lora, "note_layer", lambda *arguments: None)  # which looks at values
    peft = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert {p.device.type for n, p in peft.named_parameters() if "lora_" in n} == {"meta"}
    layers = [m for m in peft.modules() if isinstance(m, lora.LoraLowBitLinear)]
    assert {m.weight.device.type for m in layers} == {"meta"}  # by which PEFT places adapters, but never those on meta
    base = [m.get_base_layer().weight for m in layers]  # T5 casts activations to this dtype unless it is int8
    assert [(m.weight.shape, m.weight.dtype) for m in layers] == [(weight.shape, weight.dtype) for weight in base]


def test_inputs_follow_their_layers_from_device_to_device(packed, stand_in):
    stand_in(cuda_0="cpu", cuda_1="meta")
    smallest = least(packed / "raw")
    size = load(packed / "raw", max_memory_bytes="1GB").hf_quantizer.streaming.layers[0].nbytes
    model = load(packed / "raw", max_memory_bytes={0: smallest, 1: 3 * size})
    seen = []
    for entry in model.model.layers:
        entry.register_forward_hook(lambda module, args, out: seen.append(out.device.type))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # the norm takes it back to the first
        model(**inputs("llama"), use_cache=False)
    split = model.hf_quantizer.streaming.placed.devices.index("cuda:1")
    assert seen == ["cpu"] * split + ["meta"] * (LAYERS - split) and 0 < split < LAYERS


def test_absent_devices_and_device_maps_are_refused_before_loading(packed):
    with pytest.raises(ValueError, match="names 'cuda:99', and torch finds"):
        load(packed / "raw", max_memory_bytes={"cuda:99": "1GB"})
    with pytest.raises(ValueError, match="says itself where layers are, and device_map sends them to '0': drop"):
        config = LowBitConfig(max_memory_bytes={0: "1GB"})
        options = {"quantization_config": config, "device_map": {"": 0}}
        transformers.AutoModelForCausalLM.from_pretrained(packed / "raw", **options)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator here")
def test_on_an_accelerator_the_tokens_are_those_without_a_budget(packed):
    name = str(torch.accelerator.current_accelerator())
    expected, ids = load(packed / "raw").to(name), inputs("llama", 1)["input_ids"].to(name)
    model = load(packed / "raw", max_memory_bytes={0: least(packed / "raw"), "cpu": "1GB"})
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))
