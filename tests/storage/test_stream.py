"""The stream alone: any order of layers by any thread, what it learns, and buffers that are filled anew meanwhile."""

import threading
import time

import pytest
import torch

from hf_lowbit.storage.content import Place
from hf_lowbit.storage.entropy import encode
from hf_lowbit.storage.layers import Stored, lay_out_layer
from hf_lowbit.storage.reading import Files
from hf_lowbit.storage.stream import LayerStream


def made_stream(
    tmp_path, count: int, slots: int, coded: bool = False, kept=(), extents=()
) -> tuple[LayerStream, list[dict]]:
    """A stream of ``count`` layers of two tensors, the second one ``coded``, and their tensors by name."""
    generator, data, layers, contents = torch.Generator().manual_seed(count), b"", [], []
    for i in range(count):
        tensors = {
            name: torch.randn(200 + i, 32, generator=generator).to(torch.bfloat16) for name in ("first", "second")
        }
        stored = {}
        for name, tensor in tensors.items():
            is_coded = coded and name == "second"
            lies = encode(tensor) if is_coded else tensor.view(torch.uint8)
            place = Place(tmp_path / "bytes", "", (), len(data), len(data) + lies.numel())
            stored[name] = Stored(place, tuple(tensor.shape), tensor.dtype, is_coded)
            data += lies.numpy().tobytes()
        layers.append((f"l.{i}", stored))
        contents.append(tensors)
    (tmp_path / "bytes").write_bytes(data)
    return LayerStream([lay_out_layer(*layer) for layer in layers], slots, kept, extents), contents


def holds(stream: LayerStream, slot: int, index: int, contents: list[dict]) -> bool:
    """Whether buffer ``slot`` holds layer ``index``."""
    layer, buffer = stream.forms[index], stream.buffers[slot]
    return all(torch.equal(field.view(buffer), contents[index][name]) for name, field in layer.fields.items())


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    ("coded", "kept", "extents"), [(False, (), ()), (True, (), ()), (True, (1, 2, 4), ((0, 0), (3, 1)))]
)
def test_any_order_by_any_thread_gives_the_right_layer(tmp_path, slots, coded, kept, extents):
    stream, contents = made_stream(tmp_path, 6, slots, coded, kept, extents)
    wrong = []

    def walk(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randint(0, 6, (300,), generator=generator).tolist():
            with stream.use(index) as slot:
                if not holds(stream, slot, index, contents):
                    wrong.append(index)

    threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    stream.close()
    with pytest.raises(RuntimeError, match="threads that read layers have ended"):
        [stream.use(index).__enter__() for index in (0, 3, 5)]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 3, 2, 1], [3, 4]], ids=str)
def test_a_cycle_is_learned(tmp_path, order):
    """After it was seen, nothing is read for nothing."""
    stream, _ = made_stream(tmp_path, 5, 2)
    for number in range(4):
        for index in order:
            with stream.use(index):
                pass
        if number == 1:
            time.sleep(0.05)  # what is being read for nothing
            stream.reset()
    assert stream.counts.wasted_bytes == 0


def test_a_buffer_is_free_after_as_many_uses_as_the_last_time(tmp_path):
    layers, _ = made_stream(tmp_path, 6, 2)

    def walk(uses):
        for index in range(6):
            for _ in range(uses):
                with layers.use(index):
                    held = [slot.layer for slot in layers._state.slots]
                    assert index in held
        return sorted(slot.layer for slot in layers._state.slots)

    assert walk(3) == [0, 5]  # nobody knows yet that the last layer is not used again
    assert walk(3) == [0, 1]
    assert walk(4) == [0, 5]  # whose last use found it gone, and waited for it
    assert walk(4) == [0, 1]


def test_a_layer_in_memory_waits_for_what_is_being_read_into_its_buffer(tmp_path, monkeypatch):
    stream, contents = made_stream(tmp_path, 4, 2, coded=True, kept=(0,))
    go_on, arrived, read = threading.Event(), threading.Event(), Files.read
    extent = stream.forms[2].extents[0]

    def slow(self, name, into, at):
        if at not in (extent.begin, extent.blocks[0]):
            return read(self, name, into, at)
        go_on.wait(60)
        found = read(self, name, into, at)
        arrived.set()
        return found

    with stream.use(2), stream.use(3):  # and layer 0 into the buffer of layer 2
        pass
    first, second = stream._state.slots
    end = time.monotonic() + 60
    while not first.ready and time.monotonic() < end:
        time.sleep(0.001)
    monkeypatch.setattr(Files, "read", slow)
    with stream.use(1):  # and layer 2 into that of layer 0
        assert (first.layer, second.layer) == (2, 1)
    threading.Timer(0.2, go_on.set).start()
    with stream.use(0) as slot:  # instead of which layer 0 is asked for again
        assert stream.buffers[slot] is first.buffer and arrived.wait(60)
        assert holds(stream, slot, 0, contents)
