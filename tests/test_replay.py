"""What solved parts of a block gave is not computed again, and that changes nothing."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import hf_lowbit
from hf_lowbit import LowBitConfig
from hf_lowbit.calibration import Calibration
from hf_lowbit.calibration.replay import Replay

IDS = Calibration([[(7 * i + j * j) % 90 + 4 for j in range(24)] for i in range(4)], 4, 24)


def quantized(folder, out, limit=None, **settings):
    config = LowBitConfig(bits=3, group_size=32, **{"method": "gptq", **settings})
    repo = hf_lowbit.quantize(folder, config, output=out, calibration=IDS, max_activation_bytes=limit)
    return load_file(repo.folder / "model.safetensors")


TRAINED = {"method": "signround", "method_options": {"steps": 3}, "compensation": "eora"}
CASES = [("llama", {}), ("gpt2", {}), ("bert-mlm", {}), ("t5", {}), ("llama", TRAINED)]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=["llama", "gpt2", "bert", "t5", "llama-trained"])
def test_the_result_is_the_same_bit_for_bit(name, settings, tiny, tmp_path):
    kept = quantized(tiny(name), tmp_path / "kept", **settings)
    anew = quantized(tiny(name), tmp_path / "anew", limit=2**40, **settings)
    assert kept.keys() == anew.keys() and all(torch.equal(kept[k], anew[k]) for k in kept)


@pytest.mark.parametrize("limit", [None, 2**40])
def test_the_attention_is_computed_once_when_it_is_solved(limit, tiny, tmp_path, monkeypatch):
    attention, calls = transformers.models.llama.modeling_llama.LlamaAttention, []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    quantized(tiny("llama"), tmp_path / "out", limit)
    blocks = transformers.AutoConfig.from_pretrained(tiny("llama")).num_hidden_layers
    # Two batches: to query, key and value, to the output projection, and whole for gate and up; then for down and for
    # the outputs only if nothing is kept. Once more for the order of the layers, and once for the
    # order of the blocks.
    assert len(calls) == 1 + blocks * (1 + 2 * (3 if limit is None else 5))


class Twice(nn.Module):
    """A block that writes into what its first part gives, and runs its second part twice, around the third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(3))

    def forward(self, x):
        return self.b(self.c(self.b(self.a(x).mul_(2)))) + x


class Solved:
    solution = True


@torch.no_grad()
def test_parts_that_run_twice_and_outputs_that_are_written_into():
    torch.manual_seed(0)
    block, x, windows = Twice(), torch.randn(2, 3, 4), torch.arange(2)
    expected, layers = block(x), {f"{name}.0": Solved() for name in "abc"}
    replay = Replay(block, layers)
    layers["c.0"].solution = None
    stop = block.c[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), replay.during(windows, x.numel(), "c.0"):
        block(x)
    stop.remove()
    assert set(replay.kept) == {"a", "b"}  # the second run of b was not reached
    layers["c.0"].solution = True
    for _ in range(2):
        with replay.during(windows, x.numel()):
            assert torch.equal(block(x), expected)
    assert set(replay.kept) == {"a"} and "b" not in replay.parts
    with replay.during(windows + 2, x.numel(), "c.0"):  # another batch, of which nothing is known
        assert torch.equal(block(2 * x), Twice.forward(block, 2 * x))
    assert "forward" not in vars(block.a)


@torch.no_grad()
def test_nothing_is_kept_that_is_large_or_comes_after_what_is_not_solved():
    block, x = Twice(), torch.randn(2, 3, 4)
    layers = {f"{name}.0": Solved() for name in "abc"}
    replay = Replay(block, layers)
    with replay.during(torch.arange(2), x.numel() - 1, "c.0"):
        block(x)
    assert not replay.kept
    layers["a.0"].solution = None
    with replay.during(torch.arange(2), x.numel(), "c.0"):
        block(x)
    assert not replay.kept
