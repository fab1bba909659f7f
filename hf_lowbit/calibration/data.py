"""What a calibrated method looks at: text, as strings, a file, token ids or a data set, cut into equal windows; or, for
models that take something else, dicts of their inputs (:mod:`.samples`).

Documents are tokenized one by one, without special tokens, joined by the end-of-text token where the tokenizer has one,
and cut into windows of ``length`` tokens that do not overlap. If there are more windows than asked for, a fixed seed
chooses. Windows have no padding, so that every position counts the same and no attention mask is needed.

The defaults, 128 windows of 512 tokens, are 65,536 tokens: more than the input width of the widest layers in use, below
which a covariance of inputs has directions that no token has seen.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .samples import Samples, check_text, from_calls, from_text, is_call

logger = logging.get_logger(__name__)

WINDOWS, LENGTH = 128, 512
FIELDS = ("text", "messages", "content", "input_ids")


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    Args:
        source: One of

            - a list (or other iterable) of strings, one per document;
            - a list of token ids per document (lists of int, or 1-D integer tensors or arrays), or an integer tensor or
              array (documents, tokens);
            - a list of records: dicts with "text", "messages" (a chat) or "input_ids";
            - a file: ``.jsonl`` with a record per line; any other is plain text, a document for each run of lines
              between empty ones;
            - the name of a data set for the package ``datasets``, "name" or "name:config", of which the split
              "train" is read as a stream until there is enough;
            - for a model that takes images or sound, or an encoder-decoder, dicts of its inputs (``pixel_values``,
              ``input_features``, ``decoder_input_ids``, ...) as its processor returns them, one call of it each.
        windows: Number of windows, or of calls, at most; of calls the first ones are taken.
        length: Tokens in a window.
        seed: Chooses the windows where there are more.
        chat_template: Whether strings are put into the tokenizer's chat template, as one message of the user each.
    """

    source: Any
    windows: int = WINDOWS
    length: int = LENGTH
    seed: int = 0
    chat_template: bool = False

    @classmethod
    def of(cls, source: Any) -> "Calibration":
        """``source`` itself if it is a calibration, otherwise one of it with the defaults."""
        return source if isinstance(source, cls) else cls(source)

    def __deepcopy__(self, memo: dict) -> "Calibration":
        return self  # it is frozen, and a source may be a stream, which has no copy

    def record(self, given: torch.Tensor | Samples) -> dict[str, Any]:
        """What a packed repo says of the tokens (W, L) or other samples ``given``; no text and no file's name."""
        samples = Samples.of(given)
        length = samples.length if samples.tokens is None else samples.tokens.shape[1]
        if length is None:
            inputs = sorted({name for call in samples.calls for name in call})
            return {"kind": "inputs", "inputs": inputs, "windows": len(samples), "sha256": samples.digest()}
        kinds = {"_read_file": "file", "_read_dataset": "data set"}
        reader = getattr(self._reader(), "__name__", "")
        name = {"name": self.source} if reader == "_read_dataset" and not Path(self.source).exists() else {}
        return {
            "kind": kinds.get(reader, "documents"),
            **name,
            "windows": len(samples),
            "length": length,
            "seed": self.seed,
            "chat_template": self.chat_template,
            "sha256": samples.digest(),
        }

    def samples(self, model: Any, tokenizer: Any = None) -> Samples:
        """What ``model`` is to be run on.

        Args:
            model: A transformers model; its weights are not looked at.
            tokenizer: As in :meth:`tokens`.

        Raises:
            ValueError: as :meth:`tokens`, and for dicts that lack what the model needs or text for one that takes none.
        """
        documents = iter(self._documents())
        first = list(itertools.islice(documents, 1))
        documents = itertools.chain(first, documents)
        if not first or not is_call(first[0], model):
            if first:
                check_text(model)  # before any of it is tokenized
            return from_text(self._windows(documents, tokenizer), model)
        if self.windows < 1:
            raise ValueError(f"calibration with windows={self.windows}: use at least 1")
        samples = from_calls(documents, self.windows, model)
        if len(samples) < self.windows:
            logger.warning("calibration: %s gave %d calls, not %d", self._origin(), len(samples), self.windows)
        return samples

    def tokens(self, tokenizer: Any = None) -> torch.Tensor:
        """The windows, int64 (W, ``length``).

        Args:
            tokenizer: A transformers tokenizer; needed unless the source is token ids.

        Raises:
            ValueError: for a source that is empty, too short for one window, or of an unknown kind.
        """
        return self._windows(self._documents(), tokenizer)

    def _windows(self, documents: Iterable[Any], tokenizer: Any) -> torch.Tensor:
        if self.windows < 1 or self.length < 2:
            raise ValueError(
                f"calibration with windows={self.windows} of length={self.length}: use at least 1 of at least 2 tokens"
            )
        # Reading stops once there is eight times as much as is needed: enough to choose from, and an end for a stream.
        enough = 8 * self.windows * self.length
        separator = [] if getattr(tokenizer, "eos_token_id", None) is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for document in documents:
            found = self._tokenize(document, tokenizer)
            ids += ([*separator, *found] if ids else found) if found else []
            if len(ids) >= enough:
                break
        if not ids:
            raise ValueError(f"the calibration text is empty: {self._origin()} gave no tokens")
        count = len(ids) // self.length
        if count == 0:
            raise ValueError(
                f"the calibration text is too short: {self._origin()} gave {len(ids)} tokens, fewer than one window of "
                f"length={self.length}; give more text, or a smaller length"
            )
        windows = torch.tensor(ids[: count * self.length], dtype=torch.int64).view(count, self.length)
        if count < self.windows:
            logger.warning(
                "calibration: %s is enough for %d windows of %d tokens, not %d",
                self._origin(), count, self.length, self.windows,
            )  # fmt: skip
            return windows
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))[: self.windows]
        return windows[order.sort().values]

    def _origin(self) -> str:
        if isinstance(self.source, (str, Path)):
            return repr(str(self.source))
        return f"a {type(self.source).__name__}" + (
            f" of {len(self.source)}" if hasattr(self.source, "__len__") else ""
        )

    def _reader(self) -> Callable[[Any], Iterator[Any]]:
        """What reads documents from the source."""
        if isinstance(self.source, str) and not _is_file(self.source):
            return _read_dataset
        return _read_file if isinstance(self.source, (str, Path)) else iter

    def _documents(self) -> Iterator[Any]:
        if isinstance(self.source, Mapping) or not isinstance(self.source, (Iterable, Path)):
            hint = "a list of such dicts" if isinstance(self.source, Mapping) else "strings, token ids"
            raise ValueError(
                f"calibration cannot be read from a {type(self.source).__name__}: give {hint}, a file or the name of a "
                "data set"
            )
        return self._reader()(self.source)

    def _tokenize(self, document: Any, tokenizer: Any) -> list[int]:
        if isinstance(document, Mapping):
            field = next((f for f in FIELDS if f in document), None)
            if field is None:
                raise ValueError(
                    f"a calibration record has the fields {', '.join(document)}, none of {', '.join(FIELDS)}"
                )
            document = document[field]
        if isinstance(document, torch.Tensor) or hasattr(document, "__array__"):
            document = document.tolist()
        if isinstance(document, (list, tuple)) and all(isinstance(i, int) for i in document):
            return list(document)
        chat = isinstance(document, (list, tuple)) and all(isinstance(m, dict) for m in document)
        if not chat and not isinstance(document, str):
            raise ValueError(
                f"a calibration document is a {type(document).__name__}: give strings, lists of token ids (int), or "
                "records with one of the fields " + ", ".join(FIELDS)
            )
        if tokenizer is None:
            raise ValueError("the calibration text needs a tokenizer: give tokenizer=, or token ids instead of text")
        if isinstance(document, str) and not self.chat_template:
            return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"{type(tokenizer).__name__} has no chat template: give plain text, chat_template=False")
        messages = document if chat else [{"role": "user", "content": document}]
        return tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False, verbose=False
        )["input_ids"]


def digest(tokens: torch.Tensor | None) -> str | None:
    """SHA-256 of ``tokens`` (W, L), so that a run goes on only with the same text."""
    return None if tokens is None else Samples.of(tokens).digest()


def _is_file(source: str) -> bool:
    """Whether ``source`` is a file, or cannot be a data set since it looks like one.

    Raises:
        ValueError: for what can be neither.
    """
    if len(source) > 255 or "\n" in source:  # longer than a name may be
        raise ValueError(
            f"calibration= is one string, {source[:40]!r} and so on, which is read as the name of a file or of a data "
            "set: for text, give a list of it, calibration=[text]"
        )
    return Path(source).is_file() or source.endswith((".txt", ".jsonl"))


def _read_file(source: str | Path) -> Iterator[Any]:
    path = Path(source)
    if not path.is_file():
        found = "is a folder: give a file in it" if path.is_dir() else "does not exist"
        raise ValueError(f"calibration file {path} {found}")
    try:
        yield from _documents_of(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration file {path} is not text in UTF-8: {error}") from error


def _documents_of(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
            return
        paragraph: list[str] = []
        for line in file:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)


def _read_dataset(name: str) -> Iterator[Any]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"calibration {name!r} is not a file, and reading it as a data set needs `pip install datasets`"
        ) from error
    path, _, config = name.partition(":")
    try:
        return iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
    except (OSError, ValueError) as error:  # what datasets raises for one that it cannot find, load or read
        raise ValueError(
            f"calibration {name!r} is neither a file nor a data set that can be read (for text itself, give a list: "
            f"[text]): {error}"
        ) from error
