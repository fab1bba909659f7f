"""What the model is run on to calibrate it: one call after the other, each a dict of its inputs.

A text model is called with a window of token ids. Any other is called with what the user gives, dicts as its processor
returns them. An encoder-decoder that gets text alone reads a window with its encoder and writes the same window with
its decoder, which gets it shifted by one place behind the start token, as in training.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TOKENS_OF = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "special_tokens_mask"}
RANKS = {"input_ids": 2, "decoder_input_ids": 2, "labels": 2, "attention_mask": 2, "decoder_attention_mask": 2}
RANKS |= {"token_type_ids": 2, "pixel_values": 4, "input_features": 3, "input_values": 2}


@dataclass
class Samples:
    """Calls of a model.

    Attributes:
        calls: The inputs of each by name, with a batch dimension.
        tokens: (W, L), int64, where these are all: windows of text for a model that takes nothing else.
        length: L, where the calls were made of windows of text.
    """

    calls: list[dict[str, torch.Tensor]]
    tokens: torch.Tensor | None = None
    length: int | None = None

    @classmethod
    def of(cls, tokens: "torch.Tensor | Samples") -> "Samples":
        """Windows of token ids (W, L), for a model of text."""
        if isinstance(tokens, Samples):
            return tokens
        return cls([{"input_ids": window[None]} for window in tokens], tokens)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, numbers: torch.Tensor) -> "Samples":
        return Samples([self.calls[i] for i in numbers.tolist()], None if self.tokens is None else self.tokens[numbers])

    def fullest(self) -> dict[str, torch.Tensor]:
        """The first of the calls with the most inputs."""
        return max(self.calls, key=len)

    def digest(self) -> str:
        """SHA-256 of all inputs, so that a run goes on only with the same ones."""
        if self.tokens is not None:
            return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
        found = hashlib.sha256()
        for call in self.calls:
            for name, value in sorted(call.items()):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def check(self, model) -> None:
        """Raises ``ValueError`` for inputs that ``model`` cannot take, naming them."""
        text, main = model.config.get_text_config(decoder=True), model.main_input_name
        limit, size = getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", 0) or 0
        if limit and self.tokens is not None and self.tokens.shape[1] > limit:
            raise ValueError(
                f"calibration windows of {self.tokens.shape[1]} tokens are longer than the model's {limit} positions: "
                "use a smaller length"
            )
        for number, call in enumerate(self.calls):
            if main not in call and "inputs_embeds" not in call:
                raise ValueError(
                    f"calibration input {number} has {', '.join(call)}, but {type(model).__name__} needs {main}: give "
                    "dicts as its processor or tokenizer returns them"
                )
            for name in {"input_ids", "decoder_input_ids"} & set(call) if size else ():
                low, high = int(call[name].min()), int(call[name].max())
                if not 0 <= low <= high < size:
                    raise ValueError(
                        f"calibration tokens go from {low} to {high}, the model's vocabulary from 0 to {size - 1}: use "
                        "the model's own tokenizer"
                    )


def check_text(model: Any) -> None:
    """Raises ``ValueError`` if ``model`` takes something else than text."""
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, not text: in Python, give calibration=, an "
            "iterable of dicts as its processor returns them, to hf_lowbit.quantize or LowBitConfig; on the command "
            "line, a .jsonl file with such a dict of nested lists on every line"
        )


def from_text(tokens: torch.Tensor, model: Any) -> Samples:
    """The calls of ``model`` for windows of text, int64 (W, L).

    Raises:
        ValueError: for a model that takes something else than text.
    """
    check_text(model)
    if not model.config.is_encoder_decoder:
        return Samples.of(tokens)
    calls = [{"input_ids": w[None], "decoder_input_ids": shifted(w[None], model.config)} for w in tokens]
    return Samples(calls, length=tokens.shape[1])


def samples_of(given: torch.Tensor | Samples, model: Any) -> Samples:
    """Samples themselves, or those of windows of text (W, L) for ``model``, as :func:`from_text`."""
    return given if isinstance(given, Samples) else from_text(given, model)


def is_call(document: Any, model: Any) -> bool:
    """Whether ``document`` is a dict of inputs of ``model``, and not a record with text."""
    if not isinstance(document, Mapping):
        return False
    more = [n for n, v in document.items() if n not in TOKENS_OF and _is_numbers(v)]
    ids, main = document.get("input_ids"), model.main_input_name
    if main != "input_ids" or model.config.is_encoder_decoder or not model.can_generate():
        return bool(more) or main in document
    return bool(more) or (ids is not None and _tensor("input_ids", ids).ndim > 1)


def from_calls(documents: Iterable[Any], count: int, model: Any) -> Samples:
    """The first ``count`` of ``documents``, each a dict of inputs of ``model``.

    A dimension for the batch is added where a tensor lacks it; what is no tensor is left out. Where an encoder-decoder
    gets nothing for its decoder, that reads ``labels``, or else the ids that the encoder gets, shifted by one place.

    Raises:
        ValueError: for something else than a dict, naming it.
    """
    calls: list[dict[str, torch.Tensor]] = []
    for number, document in enumerate(documents):
        if len(calls) == count:
            break
        if not isinstance(document, Mapping):
            raise ValueError(f"calibration input {number} is a {type(document).__name__}, the first one was a dict")
        call = {name: _tensor(name, value) for name, value in document.items() if _is_numbers(value)}
        labels = call.pop("labels", None)
        if model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(call):
            target = call.get("input_ids") if labels is None else labels
            if target is None:
                raise ValueError(
                    f"calibration input {number} has {', '.join(call)} and nothing for the decoder: give "
                    "decoder_input_ids or labels, such as the ids of the transcript"
                )
            call["decoder_input_ids"] = shifted(target, model.config)
        calls.append(call)
    return Samples(calls)


def shifted(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """``ids`` (b, L) behind the decoder's start token, without the last one; -100 becomes padding."""
    text = config.get_text_config(decoder=True)
    known = [getattr(c, f"{n}_token_id", None) for n in ("decoder_start", "bos", "pad") for c in (config, text)]
    start = next((i for i in known if i is not None), 0)
    pad = next((i for c in (config, text) if (i := getattr(c, "pad_token_id", None)) is not None), 0)
    behind = torch.cat([ids.new_full((len(ids), 1), start), ids[:, :-1]], 1)
    return behind.masked_fill(behind == -100, pad)


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_numbers(value[0])
    return isinstance(value, (torch.Tensor, int, float)) or hasattr(value, "__array__")


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "__array__"):
        value = torch.stack([torch.as_tensor(v) for v in value])
    found = torch.as_tensor(value).detach().cpu()
    return found[None] if found.ndim == RANKS.get(name, 0) - 1 else found
