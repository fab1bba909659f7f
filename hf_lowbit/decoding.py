"""A shorter loop for ``generate``: ``model.generate(**inputs, past_key_values=cache, custom_generate=decode)``.

transformers makes the inputs of every token anew (a mask over the whole cache, positions), and a compiled model looks
for changes of itself before every token (:mod:`.repeated`): together more than a fifth of a token's time in a small
model. With a static cache the inputs change little: the token, positions by one, and one more place that the mask
shows. So they are made twice as transformers does it, and if the second differs from the first in just that way, later
ones are made by changing these tensors. The model is looked at once, since nothing but this loop runs between.

Everything else is transformers' own: processors, stopping criteria, streamers, and :meth:`_sample` itself where more is
asked for than tokens. Left out: beams and assistants.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GRAPH = "lowbit_graph"  # where compile_decoding leaves the graph with the function that it replaces ``forward`` with
_CHANGING = ("input_ids", "position_ids", "attention_mask")


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Generates greedily or by sampling, the same tokens as ``generate`` without it; what ``custom_generate`` calls.

    It gains with a ``StaticCache`` and one token at a time, most in a compiled model. A processor, criterion or
    streamer that changes the model is noticed by the next ``generate``. transformers hands no streamer on to a loop
    that is not its own: give ``functools.partial(decode, streamer=streamer)``, which sees new tokens only.

    Returns:
        Tokens, int64 (batch, length), or what ``generate`` returns with ``return_dict_in_generate``.

    Raises:
        ValueError: If beams are asked for.
    """
    if generation_config.num_beams not in (None, 1):
        raise ValueError(
            f"decode: num_beams is {generation_config.num_beams}, and this loop follows one beam: leave out "
            "custom_generate, or set num_beams=1"
        )
    more = (
        generation_config.return_dict_in_generate or generation_config.is_assistant or model.config.is_encoder_decoder
    )
    if more or synced_gpus or "inputs_embeds" in model_kwargs:
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )
    ids = input_ids
    unfinished = torch.ones(len(ids), dtype=torch.long, device=ids.device)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor.to(ids.device) if ends else None
    step = _Step(model, model_kwargs)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        scores = logits_processor(ids, outputs.logits[:, -1].to(ids.device, torch.float32))
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], -1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(ids, None)
        if not unfinished.any():
            break
        outputs = step(outputs, ids)
    if streamer is not None:
        streamer.end()
    return ids


class _Step:
    """The model's outputs for one token after another."""

    def __init__(self, model: Any, model_kwargs: dict):
        self._model, self._kwargs = model, model_kwargs
        self._inputs: dict[str, Any] = {}
        self._place: int | None = None  # in the mask, of the last token, once it is known how inputs change
        self._repeat: Callable | None = None
        self._steps = 0

    def __call__(self, outputs: Any, ids: Tensor) -> Any:
        """Outputs for the last of ``ids`` (batch, length), after ``outputs`` for those before."""
        self._steps += 1
        if self._place is None:
            update, prepare = self._model._update_model_kwargs_for_generation, self._model.prepare_inputs_for_generation
            self._kwargs = update(outputs, self._kwargs, is_encoder_decoder=False)
            inputs = prepare(ids, next_sequence_length=1, **self._kwargs)
            if self._steps == 2 and not _windows(self._kwargs.get("past_key_values")):
                self._place = _shown(self._inputs, inputs)
            if self._place is not None:  # these are changed from now on, and nobody else's
                inputs |= {k: inputs[k].clone() for k in _CHANGING if isinstance(inputs.get(k), Tensor)}
            self._inputs = {**inputs, "return_dict": True}
        else:
            self._advance(ids)
        if self._repeat is not None:
            return self._repeat(self._inputs)
        result = self._model(**self._inputs)
        graph = getattr(self._model.forward, GRAPH, None)
        if graph is not None and self._place is not None:
            self._repeat = graph.repeater(self._inputs)
        return result

    def _advance(self, ids: Tensor) -> None:
        assert self._place is not None
        self._place += 1
        self._inputs["input_ids"].copy_(ids[:, -1:])
        if self._inputs.get("position_ids") is not None:
            self._inputs["position_ids"].add_(1)
        mask = self._inputs["attention_mask"]
        mask[..., self._place] = mask[..., self._place - 1]


def _windows(cache: Any) -> bool:
    """Whether a layer of the cache forgets, so that masks will hide again what they show."""
    return any(getattr(cache, "is_sliding", (True,)))


def _shown(before: dict[str, Any], after: dict[str, Any]) -> int | None:
    """The place that the mask of ``after`` shows and that of ``before`` does not, if inputs change as foreseen."""
    if {*before} != {*after, "return_dict"}:
        return None
    for name in after.keys() - {*_CHANGING}:
        old, new = before[name], after[name]
        if new is not old and not (type(new) in (bool, int, str) and new == old):
            return None
    ids, positions, mask = map(before.get, _CHANGING)
    new_ids, new_positions, new_mask = map(after.get, _CHANGING)
    if ids is None or new_ids is None or ids.shape != new_ids.shape or new_ids.shape[1] != 1:
        return None
    if (
        not (isinstance(mask, Tensor) and isinstance(new_mask, Tensor))
        or mask.ndim != 4
        or mask.shape != new_mask.shape
    ):
        return None
    if new_positions is not None and (positions is None or not torch.equal(positions + 1, new_positions)):
        return None
    places = torch.ne(mask, new_mask).flatten(0, -2).any(0).nonzero().flatten().tolist()
    if len(places) != 1 or places[0] == 0:
        return None
    # All rows see the new token as they saw the one before.
    return places[0] if torch.equal(new_mask[..., places[0]], mask[..., places[0] - 1]) else None
