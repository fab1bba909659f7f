"""What the benchmarks share: the model, the texts, the reference and how results are written."""

import functools
import importlib.util
import json
import platform
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit.evaluate import log_probabilities, make_windows
from hf_lowbit.smollm import sample_text, save_smollm2
from hf_lowbit.version import __version__

RESULTS = Path(__file__).parent / "results"
CACHE = Path.home() / ".cache" / "hf_lowbit_benchmarks"


def model_folder(model: str | None) -> str:
    """A folder or repo, a model of that name in the cache, or SmolLM2-135M-Instruct off its grid (written once)."""
    if model and (CACHE / model).is_dir():
        return str(CACHE / model)
    return model or str(save_smollm2(CACHE / "smollm2-off-grid"))


def described(model: str | None) -> str:
    """What a result says of the model that ``model_folder`` gives."""
    about = Path(model_folder(model), "described.txt")
    return about.read_text() if about.exists() else model or "SmolLM2-135M-Instruct, off its grid"


def news_text() -> str:
    """300 news articles, "Lee's background corpus", out of the package gensim."""
    spec = importlib.util.find_spec("gensim")
    if spec is None:
        raise ModuleNotFoundError("the news text comes with the package gensim: pip install 'hf-lowbit[bench]'")
    return (Path(spec.submodule_search_locations[0]) / "test/test_data/lee_background.cor").read_text("utf-8")


TEXTS = {"news": news_text, "docs": sample_text}


def quick(model):
    """``model``, float32, with its linear layers through oneDNN: on AMD's processors MKL, which PyTorch takes for them,
    reaches less than half the speed. Results are the same up to rounding."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.forward = functools.partial(_through_onednn, module)
    return model


def _through_onednn(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")


class Reference:
    """The float model's log-probabilities on one text, computed once: (windows, function for ``evaluate``)."""

    def __init__(self, folder: str, text: str, limit: int, length: int = 512):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.windows = make_windows(tokenizer, TEXTS[text](), length, limit)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.log_probabilities = [log_probabilities(model, window) for window in self.windows]

    def __call__(self, i: int) -> torch.Tensor:
        return self.log_probabilities[i]


def environment() -> dict:
    """What a result depends on besides the code."""
    import transformers

    return {
        "hf_lowbit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def earlier_rows(name: str, command: str) -> dict[str, dict]:
    """What an earlier run of the same command has written, by method: with --only a long run goes on."""
    file = RESULTS / f"{name}.json"
    data = json.loads(file.read_text()) if file.exists() else {}
    return {row["method"]: row for row in data.get("rows", []) if data["command"] == command and "error" not in row}


def write_results(name: str, command: str, rows: list[dict], note: str = "") -> None:
    """Writes ``results/NAME.json`` and ``results/NAME.md``, a table with the command that made it."""
    RESULTS.mkdir(exist_ok=True)
    data = {"command": command, "environment": environment(), "note": note, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"`{command}`", "", note, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    lines += ["", ", ".join(f"{k} {v}" for k, v in environment().items())]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
