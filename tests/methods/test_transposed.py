"""A weight may be a transposed view (GPT-2 keeps its linear layers so): it is not changed, and nothing else changes."""

import pytest
import torch

from hf_lowbit.calibration import Moments
from hf_lowbit.formats import parse_format
from hf_lowbit.methods import make_method

CASES = [
    ("rtn", {}, "int:bits=3"),
    ("hqq", {}, "int:bits=3"),
    ("lloyd", {}, "codebook:bits=3"),
    ("ecsq", {"bits_stored": 3.0}, "int:bits=8,group_size=-1,symmetric=True"),
    ("nested", {}, "nested:bits=4"),
    ("gptq", {}, "int:bits=3"),
    ("gptq", {"bits_stored": 3.0}, "int_columns:bits=8,group_size=-1"),
    ("awq", {}, "int:bits=3"),
    ("awq", {"feedback": True}, "int:bits=3"),
    ("signround", {}, "int:bits=3"),
]


@pytest.mark.parametrize(("name", "options", "format"), CASES, ids=[f"{n}-{'-'.join(o)}" for n, o, _ in CASES])
def test_a_transposed_weight_gives_the_same_codes_and_stays(name, options, format):
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(64, 96, generator=generator)  # as Conv1D has it, (K, N)
    # Inputs of few directions, as after LayerNorm in a model that has learnt little: much of the error is fed back.
    inputs = torch.randn(512, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    moments = Moments(64)
    moments.add(inputs + 0.01 * torch.randn(512, 64, generator=generator))
    method, format, before = make_method(name, options), parse_format(format), kept.clone()
    statistics = moments if method.needs_calibration else None
    found, expected = (method.quantize(weight, format, statistics) for weight in (kept.T, kept.T.contiguous()))
    assert torch.equal(kept, before)
    for tensor in ("codes", "scales", "zeros", "levels", "columns"):
        one, other = getattr(found, tensor), getattr(expected, tensor)
        assert (one is None and other is None) or torch.equal(one, other), tensor
