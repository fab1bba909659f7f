"""The command line, ``hf-lowbit``; ``optimum-cli lowbit`` is the same app.

A command is a thin function over the library: it returns a JSON-able dict, which ``--json`` prints on stdout as it is
and :mod:`.tables` shows as tables otherwise. Under ``--json`` everything else that is printed goes to stderr. What the
library refuses is one line on stderr and exit code 1 (2 for wrong usage), unless ``--debug`` asks for the traceback.

The options that say how to quantize are written once, in :data:`QUANTIZATION`, and shared by every command that takes
them. Torch and transformers are imported inside the commands, so that ``hf-lowbit --help`` is quick.
"""

import contextlib
import functools
import json
import math
import re
import sys
import time
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer import Argument, Option
from typer.core import TyperGroup

from .version import __version__

FAILURES = (ValueError, RuntimeError, OSError, ImportError)


class Group(TyperGroup):
    """Turns what the library raises into one line on stderr and an exit code."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail(
                "interrupted: run the same command again to resume (quantize and tradeoff keep what is finished; other "
                "commands start over)"
            )
            raise typer.Exit(130) from None
        except FAILURES as error:
            if ctx.params["debug"]:
                raise
            _fail(f"error: {' '.join(str(error).split()) or type(error).__name__}")
            raise typer.Exit(1) from None


def _fail(line: str) -> None:
    Console(stderr=True).print(Text(line, style="bold red"), soft_wrap=True)


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of ``hf-lowbit``."""
    app()


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
):
    """Any Hugging Face model in 1 to 8 bits: quantize, inspect, run, evaluate and publish it."""


# -- how to quantize ---------------------------------------------------------------------------------------------------

QUANTIZATION = {
    "bits": Annotated[
        str | None,
        Option(help="1 to 8; 1.58 for ternary weights; a budget such as 2.6; or a file of `plan`. [default: 4]"),
    ],
    "bits_stored": Annotated[
        str | None, Option(help="Bits per weight once entropy-coded, such as 3.0; method ecsq, or gptq if you say so.")
    ],
    "format": Annotated[str | None, Option(help="int, nf, fp4, codebook, ternary or nested. [default: int]")],
    "method": Annotated[
        str | None,
        Option(help="rtn, hqq, lloyd, ecsq, gptq, awq or signround. [default: the best that needs no calibration]"),
    ],
    "group_size": Annotated[str | None, Option(help="Inputs that share a scale: 16 to 1024, or row.")],
    "symmetric": Annotated[bool | None, Option(help="For int: no zero points.")],
    "zeros": Annotated[str | None, Option(help="For int: zero points as int or float.")],
    "scale_dtype": Annotated[str | None, Option(help="float16, bfloat16, float32, log8, e8m0 or e4m3.")],
    "codebook": Annotated[str | None, Option(help="For codebook: one table per tensor or row.")],
    "transform": Annotated[
        str | None, Option(help="hadamard or hadamard-folded, to rotate what layers read. [default: none]")
    ],
    "preprocess": Annotated[str | None, Option(help="magr, to shrink the largest weights first. [default: none]")],
    "outliers": Annotated[float | None, Option(help="Percentage of columns that stay in float16. [default: none]")],
    "compensation": Annotated[
        str | None, Option(help="eora, for a low-rank correction beside each layer, by calibration. [default: none]")
    ],
    "compensation_rank": Annotated[int | None, Option(help="Rank of the corrections. [default: 16]")],
    "embeddings": Annotated[str | None, Option(help="Bits of embedding and output head, or float. [default: 8]")],
    "rules": Annotated[
        list[str] | None,
        Option("--rule", metavar="REGEX=OPTIONS", help="'.*down_proj=bits=6,format=int', 'lm_head=keep'; repeatable."),
    ],
    "method_options": Annotated[
        list[str] | None,
        Option("--method-option", metavar="KEY=VALUE", help="An option of the method, 'range=minmax'; repeatable."),
    ],
}
_RULE_KEYS = "bits|bits_stored|format|method|group_size|symmetric|zeros|scale_dtype|codebook|transform|outliers"
_RULE_KEYS += "|preprocess|compensation|compensation_rank"
_RULE_OPTION = rf"(?:{_RULE_KEYS})=[^=,]+"
_RULE = re.compile(rf"(?P<pattern>.+?)=(?P<options>keep|{_RULE_OPTION}(?:,{_RULE_OPTION})*)", re.DOTALL)


def parse_rule(text: str) -> tuple[str, dict[str, Any] | None]:
    """One rule of ``LowBitConfig`` from ``REGEX=key=value,...`` or ``REGEX=keep``; the regex may contain ``=``."""
    match = _RULE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is neither REGEX=KEY=VALUE,... nor REGEX=keep", param_hint="--rule")
    return match["pattern"], None if match["options"] == "keep" else parse_options(match["options"])


def parse_options(text: str) -> dict[str, Any]:
    """Arguments of ``LowBitConfig`` from ``key=value,...``."""
    if not re.fullmatch(rf"{_RULE_OPTION}(?:,{_RULE_OPTION})*", text):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE,... with keys of {_RULE_KEYS.replace('|', ', ')}")
    return {key: parse_value(value) for key, value in (item.split("=") for item in text.split(","))}


def parse_method_option(text: str) -> tuple[str, Any]:
    """``(key, value)`` from ``key=value``."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--method-option")
    return key, parse_value(value)


def parse_value(text: str) -> bool | int | float | str:
    """``text`` as the bool, int or float that it spells, or as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _config_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``LowBitConfig`` from the given ones of :data:`QUANTIZATION`."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    parsers = {"rules": parse_rule, "method_options": parse_method_option}
    for name, value in given.items():
        if name in parsers:
            given[name] = dict(parsers[name](text) for text in value)
        elif isinstance(value, str):
            given[name] = parse_value(value)
    return given


# -- what every command has --------------------------------------------------------------------------------------------


def command(function):
    """Makes ``function``, which returns a dict, a command of the same name, with the option ``--json``.

    A parameter named ``config`` stands for the options in :data:`QUANTIZATION`; the function gets a dict of those that
    were given, ready for ``LowBitConfig``.
    """
    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(function).parameters.values()]
    takes_config = "config" in signature(function).parameters
    if takes_config:
        shared = [Parameter(n, Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in QUANTIZATION.items()]
        parameters = [p for p in parameters if p.name != "config"] + shared
    json_option = Annotated[bool, Option("--json", help="Print the result as JSON on stdout, all else on stderr.")]
    parameters.append(Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=json_option))

    def run(*, as_json, **arguments):
        if takes_config:
            arguments["config"] = _config_arguments({name: arguments.pop(name) for name in QUANTIZATION})
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = function(**arguments)
        if as_json:
            print(json.dumps(_finite(result), indent=2, allow_nan=False))
        else:
            from . import tables

            console = Console(width=None if sys.stdout.isatty() else 160)
            getattr(tables, function.__name__)(console, result, arguments)

    functools.update_wrapper(run, function, assigned=("__name__", "__doc__", "__module__"))
    del run.__wrapped__
    run.__signature__ = Signature(parameters)
    app.command()(run)
    return function


def _finite(value):
    """``value`` with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress(line: str) -> None:
    Console(stderr=True).print(line, style="dim", highlight=False, markup=False)


PathOrId = Annotated[str, Argument(metavar="PATH", help="A folder, or a repo id on the Hub.")]
Dtype = Annotated[str, Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, ...")]
Backend = Annotated[str, Option(help="auto, torch, triton or native.")]
LoadBits = Annotated[int | None, Option(help="For a nested repo: the width to load. [default: all bits]")]


def _load(
    path: str,
    config: dict,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    load_bits: int | None = None,
):
    """The causal language model at ``path``, quantized on the fly if ``config`` says so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .config import QUANT_METHOD, LowBitConfig

    options = {}
    if config or backend != "auto" or load_bits is not None:
        saved = getattr(AutoConfig.from_pretrained(path), "quantization_config", None) or {}
        if not config and load_bits is None and saved.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"{path} is not packed, so backend={backend!r} has nothing to run: add --bits to quantize")
        options["quantization_config"] = LowBitConfig(**config, backend=backend, load_bits=load_bits)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device, **options).eval()


# -- the commands ------------------------------------------------------------------------------------------------------


@command
def quantize(
    source: Annotated[str, Argument(metavar="SRC", help="A folder, or a repo id on the Hub.")],
    destination: Annotated[Path, Argument(metavar="DST", help="The folder to write.")],
    config,
    dtype: Annotated[str | None, Option(help="Dtype of what stays in float. [default: as stored]")] = None,
    max_shard_size: Annotated[str, Option(help="Size of a file.")] = "5GB",
    storage: Annotated[str, Option(help="raw, entropy or zstd: coded without loss.")] = "raw",
    calibration: Annotated[
        str | None,
        Option(
            metavar="TEXT",
            help="For gptq, compensation and others: a text file, a .jsonl file, or NAME or NAME:CONFIG of a data set.",
        ),
    ] = None,
    windows: Annotated[int, Option(min=1, help="The most windows to calibrate on.")] = 128,
    length: Annotated[int, Option(min=2, help="Tokens in a window.")] = 512,
    seed: Annotated[int, Option(help="Chooses the windows.")] = 0,
    chat_template: Annotated[bool, Option("--chat-template", help="Put texts into the chat template.")] = False,
    device: Annotated[str, Option(help="Where to calibrate: cpu, cuda, ...")] = "cpu",
    max_activation_bytes: Annotated[
        int | None, Option(min=0, help="Calibration's activations above this lie on disk. [default: in memory]")
    ] = None,
):
    """Quantize a repo from disk to disk, shard by shard, without building the model."""
    from .calibration import Calibration
    from .config import LowBitConfig
    from .quantization import quantize as run

    start = time.perf_counter()
    data = None if calibration is None else Calibration(calibration, windows, length, seed, chat_template)
    repo = run(
        source, LowBitConfig(**config, storage=storage), output=destination, calibration=data, dtype=dtype,
        max_shard_size=max_shard_size, device=device, max_activation_bytes=max_activation_bytes,
    )  # fmt: skip
    seen = {"calibrated_modules": len(repo.tokens), "fewest_tokens": min(repo.tokens.values(), default=0)}
    return {"destination": str(destination), "seconds": time.perf_counter() - start, **repo.coverage, **seen}


@command
def plan(
    source: Annotated[str, Argument(metavar="SRC", help="A folder, or a repo id on the Hub.")],
    config,
    budget: Annotated[
        float | None, Option(help="Bits per weight, everything counted, if a whole number; others are --bits.")
    ] = None,
    output: Annotated[Path, Option(help="The file to write; `quantize --bits FILE` packs by it.")] = Path("plan.json"),
    calibration: Annotated[str | None, Option(metavar="TEXT", help="What to measure on, as for quantize.")] = None,
    length: Annotated[int, Option(min=2, help="Tokens in a window.")] = 512,
    seed: Annotated[int, Option(help="Chooses the windows.")] = 0,
    dtype: Annotated[str | None, Option(help="Dtype to cast weights to first. [default: as stored]")] = None,
):
    """Search a width for each layer under a budget of bits, such as --bits 2.6, and show and save it."""
    from dataclasses import asdict

    from .allocation import allocate
    from .allocation.budget import WINDOWS
    from .calibration import Calibration
    from .config import LowBitConfig

    start = time.perf_counter()
    data = None if calibration is None else Calibration(calibration, WINDOWS, length, seed)
    found = allocate(source, LowBitConfig(**config), bits=budget, calibration=data, dtype=dtype)
    found.save(output)
    return {"output": str(output), "seconds": time.perf_counter() - start, **asdict(found)}


@command
def inspect(
    path: PathOrId,
    every: Annotated[bool, Option("--all", help="A row for every layer, not one for layers that are alike.")] = False,
    entropy: Annotated[
        bool, Option("--entropy", help="Read the weights: what do their codes hold, and take coded?")
    ] = False,
):
    """Show how each layer of a packed repo is stored, and what was kept in float and why."""
    from .inspection import inspect_repo

    return inspect_repo(path, entropy)


@command
def compress(
    source: Annotated[str, Argument(metavar="SRC", help="A packed folder, or a repo id on the Hub.")],
    destination: Annotated[Path, Argument(metavar="DST", help="The folder to write.")],
    storage: Annotated[str, Option(help="entropy or zstd.")] = "entropy",
    fraction: Annotated[
        str, Option(help="Part of the layers to code, for streaming from a fast disk; auto measures what pays here.")
    ] = "1",
):
    """Code the tensors of a packed repo without loss; it loads like any other."""
    from .compress import compress_folder

    if storage == "raw":
        raise ValueError("storage='raw' is not compressed: use `hf-lowbit decompress`")
    try:
        part = "auto" if fraction == "auto" else float(fraction)
    except ValueError:
        raise ValueError(f"--fraction {fraction} is neither a number above 0, up to 1, nor auto") from None
    return compress_folder(source, destination, storage, fraction=part)


@command
def decompress(
    source: Annotated[str, Argument(metavar="SRC", help="A coded folder, or a repo id on the Hub.")],
    destination: Annotated[Path, Argument(metavar="DST", help="The folder to write.")],
):
    """Decode the tensors of a coded repo."""
    from .compress import compress_folder

    return compress_folder(source, destination, "raw")


@command
def generate(
    path: PathOrId,
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    config,
    max_new_tokens: Annotated[int, Option(min=1, help="The most tokens to write.")] = 256,
    sample: Annotated[bool, Option("--sample", help="Draw tokens at random instead of taking the likeliest.")] = False,
    seed: Annotated[int, Option(help="Seed for --sample.")] = 0,
    raw: Annotated[bool, Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    load_bits: LoadBits = None,
):
    """Write a text as it is generated; with --bits, from a float model that is quantized while it loads."""
    import torch
    from transformers import AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if raw or not tokenizer.chat_template:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise ValueError("the prompt is empty: there is nothing to continue")
    model = _load(path, config, dtype, device, backend, load_bits)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=sample, streamer=streamer
    )
    seconds = time.perf_counter() - start
    new = output[0, prompt_tokens:]
    return {
        "model": path,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": seconds,
    }


@command
def evaluate(
    path: PathOrId,
    text: Annotated[Path, Option(exists=True, dir_okay=False, help="A text file, UTF-8.")],
    config,
    reference: Annotated[str | None, Option(help="The unquantized model. [default: PATH, if quantized now]")] = None,
    length: Annotated[int, Option(min=2, help="Tokens in a window.")] = 512,
    limit: Annotated[int | None, Option(min=1, help="The most windows, spread over the text. [default: all]")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    load_bits: LoadBits = None,
):
    """Measure perplexity, and KL divergence to and top-1 agreement with the unquantized model, on a text."""
    from transformers import AutoTokenizer

    from .evaluate import evaluate as run
    from .evaluate import make_windows

    windows = make_windows(AutoTokenizer.from_pretrained(path), text.read_text(encoding="utf-8"), length, limit)
    model = _load(path, config, dtype, device, backend, load_bits)
    reference = reference or (path if config else None)
    compared = _load(reference, {}, dtype, device) if reference else None
    result = {"model": path, "reference": reference, "text": text.name, "length": length}
    return {**result, **run(model, windows, compared).to_dict()}


@command
def demo(
    model: Annotated[str | None, Option(help="A folder or repo id. [default: a small model of the demo extra]")] = None,
    output: Annotated[Path, Option(help="The folder to write.")] = Path("demo-output"),
    bits: Annotated[str, Option(help="Widths to compare.")] = "4,3,2",
    text: Annotated[Path | None, Option(exists=True, dir_okay=False, help="A text file to evaluate on.")] = None,
):
    """Quantize, save, reload and compare a model at several widths; needs no network by default."""
    from .demo import run_demo

    widths: Any = tuple(parse_value(item) for item in bits.split(","))
    content = None if text is None else text.read_text(encoding="utf-8")
    return run_demo(model, output, widths, text=content, say=_progress)


@command
def tradeoff(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder or repo id of a float model.")],
    output: Annotated[Path, Argument(metavar="OUTPUT", help="The folder for results and plot.")],
    text: Annotated[Path, Option(exists=True, dir_okay=False, help="A text file to evaluate on.")],
    setting: Annotated[
        list[str] | None,
        Option(metavar="OPTIONS", help="'bits=3,group_size=row', 'bits_stored=2.5'; repeatable. [default: 15 of them]"),
    ] = None,
    calibration: Annotated[str | None, Option(metavar="TEXT", help="As for quantize; adds gptq's settings.")] = None,
    windows: Annotated[int, Option(min=1, help="The most windows to evaluate on.")] = 12,
    length: Annotated[int, Option(min=2, help="Tokens in a window.")] = 512,
):
    """Measure size in memory, size of coded files and quality over many settings, with a plot; can be stopped."""
    from .tradeoff import measure_tradeoff

    settings = [parse_options(item) for item in setting or ()]
    content = text.read_text(encoding="utf-8")
    return measure_tradeoff(
        model, output, settings, text=content, calibration=calibration, windows=windows, length=length, say=_progress
    )


@command
def doctor():
    """Show what this machine can run, what would be chosen, and why not the rest."""
    from .doctor import diagnose

    return diagnose()


@command
def push(
    path: Annotated[Path, Argument(metavar="PATH", help="The folder of a packed model.")],
    repo_id: Annotated[str, Argument(metavar="REPO_ID", help="Where to, such as user/name.")],
    base_model: Annotated[str | None, Option(help="Repo id of the unquantized model, for the card.")] = None,
    evaluation: Annotated[
        Path | None, Option(exists=True, dir_okay=False, help="For the card: what `evaluate --json` printed.")
    ] = None,
    private: Annotated[bool | None, Option(help="Whether a new repo is private. [default: the account's]")] = None,
):
    """Publish a packed model on the Hub, with a model card."""
    from .hub import push_to_hub

    measured = None if evaluation is None else json.loads(evaluation.read_text(encoding="utf-8"))
    commit = push_to_hub(path, repo_id, base_model=base_model, evaluation=measured, private=private)
    return {"repo_id": repo_id, "url": commit.commit_url, "commit": commit.oid}
