"""How much a quantized model differs from the float one: perplexity, KL divergence and top-1 agreement on a text.

The text is tokenized once and cut into fixed, non-overlapping windows; every window is one forward pass without a BOS
token, and all its predictions but the one after its last token count. Standard errors are over windows, which are
nearly independent, unlike tokens. Perplexity alone hides harm, since gains and losses cancel; KL(reference || model)
does not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

POSITIONS = 64
"""Positions compared at a time: temporaries of a whole window and a large vocabulary cost more than the arithmetic."""


@dataclass(frozen=True)
class Evaluation:
    """Results with standard errors (``_se``) over windows; the last four are None without a reference.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token; its error by the delta method.
        tokens: Number of predictions.
        windows: Number of windows.
        kl: Mean KL(reference || model) per position, in nats.
        top1: Share of positions where both models' most likely token is the same.
    """

    perplexity: float
    perplexity_se: float
    tokens: int
    windows: int
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def make_windows(tokenizer, text: str, length: int = 512, limit: int | None = None) -> torch.Tensor:
    """Cuts ``text`` into windows of ``length`` tokens.

    Args:
        tokenizer: A transformers tokenizer.
        text: Plain text; what is left after the last whole window is dropped.
        length: Tokens in a window, at least 2.
        limit: At most that many windows, spread evenly over the text.

    Returns:
        int64 (W, ``length``).

    Raises:
        ValueError: if the text is too short for one window.
    """
    if length < 2:
        raise ValueError(f"length={length} leaves nothing to predict: use at least 2")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}: use a longer text or length="
        )
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    if limit is not None and limit < count:
        windows = windows[torch.linspace(0, count - 1, limit).round().long()]
    return windows


@torch.inference_mode()
def next_token_logits(model, window: torch.Tensor) -> torch.Tensor:
    """Logits of the next token (L - 1, vocabulary), in the model's dtype, for one ``window`` (L,)."""
    return model(window[None].to(model.device), use_cache=False).logits[0, :-1]


def log_probabilities(model, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, float32 (L - 1, vocabulary), for one ``window`` (L,)."""
    return torch.log_softmax(next_token_logits(model, window).float(), dim=-1)


def evaluate(model, windows: torch.Tensor, reference=None, progress: bool = True) -> Evaluation:
    """Evaluates a causal language model.

    Args:
        model: The model; its dtype is used as it is.
        windows: int64 (W, L), from :func:`make_windows`.
        reference: The unquantized model of the same vocabulary, or a function from a window's number to its
            :func:`log_probabilities` (for comparing many models with one reference), or None.
        progress: Whether to show a progress bar.

    Returns:
        The results; a model that produces NaN gives NaN.
    """
    rows = []
    for i in tqdm(range(len(windows)), desc="Evaluating", disable=not progress, unit="window"):
        logits = next_token_logits(model, windows[i])
        targets = windows[i, 1:].to(logits.device)
        expected = None if reference is None else _reference(reference, windows, i)
        if expected is not None and expected.shape != logits.shape:
            raise ValueError(f"the reference has a vocabulary of {expected.shape[-1]}, the model of {logits.shape[-1]}")
        sums = torch.zeros(3, dtype=torch.float64)
        for part in range(0, len(logits), POSITIONS):
            chunk = slice(part, part + POSITIONS)
            sums += _compare(logits[chunk], targets[chunk], None if expected is None else expected[chunk])
        rows.append((sums / len(logits)).tolist())
    values = torch.tensor(rows, dtype=torch.float64)
    means = values.mean(0).tolist()
    errors = (values.std(0) / math.sqrt(len(rows))).tolist() if len(rows) > 1 else [math.nan] * len(means)
    perplexity = math.exp(means[0]) if means[0] < 700 else math.inf
    counts = {"tokens": windows.shape[0] * (windows.shape[1] - 1), "windows": windows.shape[0]}
    compared = {}
    if reference is not None:
        compared = {"kl": means[1], "kl_se": errors[1], "top1": means[2], "top1_se": errors[2]}
    return Evaluation(perplexity, perplexity * errors[0], **counts, **compared)


def _reference(reference: Any | Callable[[int], torch.Tensor], windows: torch.Tensor, i: int) -> torch.Tensor:
    if isinstance(reference, torch.nn.Module):
        return log_probabilities(reference, windows[i])
    return reference(i)


@torch.inference_mode()
def _compare(logits: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> torch.Tensor:
    """Sums over positions, float64 (3,): negative log-likelihood, KL and agreements (0 without ``expected``)."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    sums = [-logp.gather(1, targets[:, None]).double().sum(), torch.zeros(()), torch.zeros(())]
    if expected is not None:
        expected = expected.to(logp.device)
        sums[1] = (expected - logp).mul_(expected.exp()).sum(-1).double().sum()
        sums[2] = (expected.argmax(-1) == logp.argmax(-1)).double().sum()
    return torch.stack([s.double().cpu() for s in sums])
