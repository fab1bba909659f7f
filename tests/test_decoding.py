"""The shorter loop for ``generate``: the tokens of transformers' own, whatever is asked for, in fewer of its steps."""

import functools

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, StaticCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_lowbit import decode
from hf_lowbit.compiled import GRAPH
from hf_lowbit.repeated import Repeated, _Call

TOKENS = 12
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=6),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64),
}
GREEDY = {"do_sample": False, "max_new_tokens": TOKENS}
CASES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5, "max_new_tokens": TOKENS},
    "several": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": TOKENS},
    "processors": {**GREEDY, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "one token": {**GREEDY, "max_new_tokens": 1},
    "scores": {**GREEDY, "return_dict_in_generate": True, "output_scores": True},
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="sdpa").eval()
    with torch.no_grad():  # so that tokens differ from one to the next
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 1, length: int = 5) -> dict:
    ids = torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def tokens_of(model, given: dict, static: bool, **options):
    cache = StaticCache(config=model.config, max_cache_len=32) if static else None
    torch.manual_seed(3)
    result = model.generate(**given, past_key_values=cache, **options)
    return result if isinstance(result, torch.Tensor) else result.sequences


@pytest.fixture
def prepared(monkeypatch):
    """How often transformers prepared the inputs of a token."""
    count = []

    def counting(model):
        prepare = model.prepare_inputs_for_generation

        @functools.wraps(prepare)  # transformers looks at its arguments
        def counted(*args, **kwargs):
            count.append(1)
            return prepare(*args, **kwargs)

        monkeypatch.setattr(model, "prepare_inputs_for_generation", counted)
        return count

    return counting


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_as_without_it(family, case, static):
    model, given = model_of(family), prompt(batch=2)
    expected = tokens_of(model, given, static, **CASES[case])
    found = tokens_of(model, given, static, **CASES[case], custom_generate=decode)
    assert torch.equal(found, expected)
    assert len(set(found[0, 5:].tolist())) > 2 or case == "one token"


@pytest.mark.parametrize("batch", [1, 2])
def test_inputs_are_prepared_three_times_with_a_static_cache(prepared, batch):
    model = model_of("llama")
    count = prepared(model)
    assert tokens_of(model, prompt(batch), True, **GREEDY, custom_generate=decode).shape == (batch, 5 + TOKENS)
    assert len(count) == 3


@pytest.mark.parametrize(("family", "static"), [("mistral", True), ("llama", False)])
def test_inputs_are_always_prepared_where_masks_change_otherwise(prepared, family, static):
    model = model_of(family)
    count = prepared(model)
    tokens_of(model, prompt(), static, **GREEDY, custom_generate=decode)
    assert len(count) == TOKENS


def test_sequences_end_where_they_should(prepared):
    model, given = model_of("llama"), prompt(batch=2)
    free = tokens_of(model, given, True, **GREEDY)
    end = int(free[1, 5 + 4])
    expected = tokens_of(model, given, True, **GREEDY, eos_token_id=end)
    assert torch.equal(tokens_of(model, given, True, **GREEDY, eos_token_id=end, custom_generate=decode), expected)
    assert not torch.equal(expected, free)
    last = prompt()
    end = int(tokens_of(model, last, True, **GREEDY)[0, 5 + 4])
    found = tokens_of(model, last, True, **GREEDY, eos_token_id=end, custom_generate=decode)
    assert found.shape[1] <= 5 + 5 and int(found[0, -1]) == end


def test_own_criteria_and_streamers_see_every_token():
    class Three(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 5 + 3)

    class Kept(BaseStreamer):
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    model, kept = model_of("llama"), Kept()
    options = {**GREEDY, "stopping_criteria": StoppingCriteriaList([Three()])}
    found = tokens_of(model, prompt(), True, **options, custom_generate=functools.partial(decode, streamer=kept))
    assert found.shape == (1, 8) and kept.ended
    assert torch.equal(torch.cat([value.flatten() for value in kept.values]), found[0, 5:])


def test_a_second_answer_goes_on_in_the_same_cache():
    """The mask's places are those of the cache, not of the tokens given."""
    model, given = model_of("llama"), prompt()
    cache = StaticCache(config=model.config, max_cache_len=40)
    results = []
    for options in ({}, {"custom_generate": decode}):
        cache.reset()
        first = model.generate(**given, past_key_values=cache, **GREEDY, **options)
        more = torch.cat([first, torch.tensor([[7, 8, 9]])], 1)
        results.append(
            model.generate(more, attention_mask=torch.ones_like(more), past_key_values=cache, **GREEDY, **options)
        )
    assert torch.equal(*results)


def test_beams_are_refused():
    with pytest.raises(ValueError, match=r"num_beams is 3.*leave out custom_generate"):
        tokens_of(model_of("llama"), prompt(), True, **GREEDY, num_beams=3, custom_generate=decode)


def test_a_graph_is_asked_once_for_changes(monkeypatch):
    """With graphs of torch's tracer, run as they are, so that nothing is compiled."""
    torch._dynamo.reset()
    model, given = model_of("llama"), prompt()
    expected = tokens_of(model, given, True, **GREEDY)
    eager = model.forward
    compile = lambda backend: torch.compile(eager, backend=backend, fullgraph=True, dynamic=False)  # noqa: E731
    graph = Repeated(model, compile, lambda graph, inputs: graph.forward)

    def forward(input_ids=None, **kwargs):
        return (graph if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **kwargs)

    vars(forward)[GRAPH] = graph
    model.forward = forward
    asked, repeated = [], []
    again, repeat = _Call.again, _Call.repeat
    monkeypatch.setattr(_Call, "again", lambda *args: asked.append(1) or again(*args))
    monkeypatch.setattr(_Call, "repeat", lambda *args: repeated.append(1) or repeat(*args))
    cache = StaticCache(config=model.config, max_cache_len=32)
    for _ in range(2):
        cache.reset()
        asked.clear(), repeated.clear()
        found = model.generate(**given, past_key_values=cache, **GREEDY, custom_generate=decode)
        assert torch.equal(found, expected)
    # Two steps with transformers' inputs, which are compared, and the question whether the rest can be repeated.
    assert len(asked) <= 3
    assert len(repeated) >= TOKENS - 1 - 2
