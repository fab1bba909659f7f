"""Size against quality for the user's own model: ``hf-lowbit tradeoff``, :func:`measure_tradeoff`.

A packed model has two sizes: in memory, and entropy-coded in its files. A finer grid of one step a row costs more
memory than groups of the same error, and fewer bytes once it is coded, because its codes are further from uniform. So
which setting is best depends on which size counts ("On the Compressibility of Quantized Large Language Models", Mao et
al., 2024), and on the model. Here each setting is quantized to a coded repo, both sizes are read from its files, and
the model is loaded from it and compared with the float one. Each row is written when it is there, so that a run that
was stopped goes on.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .demo import INSTALL_HINT, float_model, is_installed, write_beside

GROUPS: list[dict[str, Any]] = [{"bits": bits} for bits in (2, 3, 4, 5, 6)]
ROWS: list[dict[str, Any]] = [{"bits": bits, "group_size": "row"} for bits in (3, 4, 5, 6)]
STORED: list[dict[str, Any]] = [{"bits_stored": bits} for bits in (2.0, 2.5, 3.0, 3.5, 4.0, 5.0)]
SETTINGS: list[dict[str, Any]] = [*GROUPS, *ROWS, *STORED]
"""Without calibration: scales for groups, scales for rows, and one step a row for a given size of the files."""
CALIBRATED: list[dict[str, Any]] = [{**setting, "method": "gptq"} for setting in (*GROUPS[:3], *STORED[:5:2])]
"""What comes to them with calibration."""


def measure_tradeoff(
    model: str | os.PathLike,
    output: str | os.PathLike,
    settings: Iterable[dict[str, Any]] | None = None,
    *,
    text: str,
    calibration: Any = None,
    windows: int = 12,
    length: int = 512,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Quantizes a causal language model by each of ``settings`` and measures sizes and quality.

    Args:
        model: Folder or Hub id of a float model.
        output: Folder for ``tradeoff.json`` and ``tradeoff.png``; packed models are removed again.
        settings: Arguments of ``LowBitConfig``; by default :data:`SETTINGS`, with calibration also :data:`CALIBRATED`.
        text: What to evaluate on; it should not be that of the calibration.
        calibration: As in :func:`hf_lowbit.quantize`, for settings that need it.
        windows: The most windows of text.
        length: Tokens in a window.
        say: Called with a line at every step.

    Returns:
        What ``tradeoff.json`` holds: ``model``, ``protocol``, ``rows``, ``float`` (perplexity and bytes of the float
        model) and ``plot``. A row has ``name``, ``setting``, ``method``, ``bits_in_memory`` and ``bits_stored`` (per
        packed weight, everything counted), ``memory_bytes`` (packed and kept in float), ``file_bytes``,
        ``on_frontier`` (whether no other row has both smaller files and a lower KL), ``seconds`` and the fields of
        :class:`hf_lowbit.evaluate.Evaluation`.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for settings that are not possible or need a calibration that is not given, a model that is
            quantized already, a text that is too short, and an ``output`` with results of something else.
    """
    from transformers import AutoTokenizer

    from .config import LowBitConfig
    from .evaluate import make_windows

    if not is_installed("matplotlib"):
        raise ModuleNotFoundError(f"the plot needs matplotlib: {INSTALL_HINT}")
    settings = list(settings or [*SETTINGS, *(CALIBRATED if calibration is not None else [])])
    configs = [LowBitConfig(**setting, storage="entropy") for setting in settings]
    for setting, config in zip(settings, configs, strict=True):
        if _calibrates(config) and calibration is None:
            raise ValueError(f"{_name(setting)} needs calibration: give calibration= (--calibration TEXT)")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    source = float_model(model, output, say)
    tokens = make_windows(AutoTokenizer.from_pretrained(source), text, length, windows)
    seen = hashlib.sha256(text.encode()).hexdigest()
    protocol = {"model": str(model), "text_sha256": seen, "windows": len(tokens), "length": length}
    file = output / "tradeoff.json"
    result = _earlier(file, protocol) or {"protocol": protocol, "float": None, "rows": []}
    done = {_name(row["setting"]) for row in result["rows"]}
    left = [(s, c) for s, c in zip(settings, configs, strict=True) if _name(s) not in done]
    reference = _load(source) if left or result["float"] is None else None
    if result["float"] is None:
        result["float"] = _float_row(reference, source, tokens)
    for number, (setting, config) in enumerate(left, 1):
        say(f"{_name(setting)}: quantizing and measuring ({number} of {len(left)})")
        row = _measure(source, setting, config, calibration if _calibrates(config) else None, reference, tokens, output)
        result["rows"].append(row)
        _mark_frontier(result["rows"])
        write_beside(file, lambda part: part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))
    result["plot"] = str(output / "tradeoff.png")
    plot(result["rows"], Path(result["plot"]))
    return {"model": str(model), "results": str(file), **result}


def _calibrates(config) -> bool:
    return config.needs_calibration or config.seeks_allocation


def _name(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def _earlier(file: Path, protocol: dict) -> dict | None:
    """What a run that was stopped has left in ``file``."""
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("protocol") != protocol:
        raise ValueError(f"{file} has results of another model, text or number of windows: choose another folder")
    return found


def _load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto").eval()


def _float_row(model, folder: Path, tokens) -> dict:
    from .evaluate import evaluate

    measured = evaluate(model, tokens, progress=False)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"memory_bytes": nbytes, "perplexity": measured.perplexity, "perplexity_se": measured.perplexity_se}


def _measure(source: Path, setting: dict, config, calibration, reference, tokens, output: Path) -> dict:
    """The row of one setting; the packed model lies beside the results for as long as this runs."""
    from .evaluate import evaluate
    from .inspection import inspect_repo
    from .quantization import quantize

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=output, prefix="packed-") as work:
        folder = Path(work) / "model"
        quantize(source, config, output=folder, calibration=calibration)
        seconds = time.perf_counter() - start
        found = inspect_repo(folder)
        quality = evaluate(_load(folder), tokens, reference, progress=False).to_dict()
    totals = found["totals"]
    return {
        "name": _name(setting),
        "setting": setting,
        "method": config.method,
        "bits_in_memory": totals["bits_per_packed_weight"],
        "bits_stored": 8 * totals["stored_bytes"] / totals["packed_weights"],
        "memory_bytes": totals["packed_bytes"] + totals["kept_bytes"],
        "file_bytes": totals["file_bytes"],
        "seconds": seconds,
        **quality,
    }


def _mark_frontier(rows: list[dict]) -> None:
    """Sets ``on_frontier``: whether no other row has files as small, and a KL as low, one of them strictly."""
    for row in rows:
        mine = (row["file_bytes"], row["kl"])
        others = [(other["file_bytes"], other["kl"]) for other in rows if other is not row]
        row["on_frontier"] = not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)


def series(row: dict) -> str:
    """The curve that a row belongs to: its method and what its setting says besides a number of bits."""
    setting = row["setting"]
    rest = {key: value for key, value in setting.items() if key not in ("bits", "bits_stored", "method")}
    kind = ["one step a row"] if "bits_stored" in setting else []
    return ", ".join([row["method"], *kind, *([_name(rest)] if rest else [])])


def plot(rows: list[dict], file: Path) -> None:
    """KL divergence over megabytes, as a PNG: filled marks for files, which are coded, hollow ones for memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(series(row) for row in rows):
        members = sorted((row for row in rows if series(row) == name), key=lambda row: row["file_bytes"])
        kl = [row["kl"] for row in members]
        (line,) = axis.plot([row["file_bytes"] / 1e6 for row in members], kl, marker="o", label=name)
        memory = [row["memory_bytes"] / 1e6 for row in members]
        axis.plot(memory, kl, marker="o", fillstyle="none", linestyle=":", color=line.get_color())
    axis.set_yscale("log")
    axis.set_xlabel("MB: filled, coded files; hollow, in memory")
    axis.set_ylabel("KL divergence to the float model (nats)")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    write_beside(file, lambda part: figure.savefig(part, dpi=150))
    pyplot.close(figure)
