"""The command line: what it accepts, prints and returns; the work behind it is tested with the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tiny_chat import save_tiny_chat
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import cli, doctor, tables
from hf_lowbit.config import LAYER_OPTIONS

TEXT = "The quick brown fox jumps over the lazy dog, and then over it again. " * 12
COMMANDS = ("quantize", "inspect", "generate", "evaluate", "demo", "tradeoff", "doctor", "push")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("cli") / "packed"
    result = invoke("quantize", source, destination, "--bits", 3, "--rule", r".*\.down_proj=bits=6", "--json")
    assert result.exit_code == 0, result.output
    return destination, json.loads(result.stdout)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def run(program, *arguments):
    """``program`` of this environment in a new process."""
    command = [Path(sys.executable).with_name(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def one_line(result):
    """The single line on stderr of a failed command."""
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


# -- usage -------------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom hf_lowbit.cli import app\n"
        "try:\n    app(['--help'])\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"{hf_lowbit.__version__}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_every_option_of_a_layer_is_on_the_command_line():
    assert set(cli.QUANTIZATION) == {*LAYER_OPTIONS, "rules", "embeddings"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "somewhere"), "Missing argument 'DST'"),
        (("quantize", "a", "b", "--bitz", 4), "No such option: --bitz"),
        (("quantize", "a", "b", "--rule", "lm_head"), "'lm_head' is neither REGEX=KEY=VALUE,... nor REGEX=keep"),
        (("quantize", "a", "b", "--rule", "lm_head=width=4"), "'lm_head=width=4' is neither"),
        (("quantize", "a", "b", "--method-option", "range"), "'range' is not KEY=VALUE"),
        (("evaluate", "a", "--text", "/no/such/file"), "'/no/such/file' does not exist"),
        (("evaluate", "a"), "Missing option '--text'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lm_head=keep", ("lm_head", None)),
        (".*down_proj=bits=6,format=int", (".*down_proj", {"bits": 6, "format": "int"})),
        ("a(?=b).*=bits=1.58", ("a(?=b).*", {"bits": 1.58})),
        ("x=symmetric=true,group_size=row", ("x", {"symmetric": True, "group_size": "row"})),
    ],
)
def test_rules(text, rule):
    assert cli.parse_rule(text) == rule


def test_a_rule_that_says_nothing_is_refused():
    with pytest.raises(typer.BadParameter, match=r"'=keep' is neither"):
        cli.parse_rule("=keep")


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_of_the_library_are_one_line(source, tmp_path):
    result = invoke("quantize", source, tmp_path / "out", "--bits", 9)
    assert result.exit_code == 1
    assert one_line(result) == "error: bits=9 is out of range: use bits=1 to 8, or 1.58 for ternary weights"
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(source, tmp_path):
    result = invoke("--debug", "quantize", source, tmp_path / "out", "--bits", 9)
    assert isinstance(result.exception, ValueError)


def test_a_missing_folder_is_named():
    result = invoke("inspect", "/no/such/folder")
    assert result.exit_code == 1
    assert "/no/such/folder" in one_line(result)


def test_a_backend_without_anything_packed_is_refused(source):
    result = invoke("generate", source, "Hi", "--backend", "torch")
    assert result.exit_code == 1
    assert one_line(result) == (
        f"error: {source} is not packed, so backend='torch' has nothing to run: add --bits to quantize"
    )


def test_an_empty_prompt_is_refused(source):
    result = invoke("generate", source, "", "--raw")
    assert result.exit_code == 1
    assert one_line(result) == "error: the prompt is empty: there is nothing to continue"


def test_other_settings_than_the_repo_has_are_refused(packed):
    result = invoke("generate", packed[0], "Hi", "--bits", 2)
    assert result.exit_code == 1
    assert "bits=2 (the repo has 3)" in one_line(result)


def test_interrupting_says_how_to_resume(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "diagnose", interrupted)
    result = invoke("doctor")
    assert result.exit_code == 130
    assert one_line(result).startswith("interrupted: run the same command again to resume")


def test_json_stays_pure_and_has_no_nan(monkeypatch):
    def noisy():
        print("a stray line")
        return {"good": 1.5, "bad": [float("nan"), float("inf")], "nested": {"deep": (float("-inf"),)}}

    monkeypatch.setattr(doctor, "diagnose", noisy)
    result = invoke("doctor", "--json")
    assert json.loads(result.stdout) == {"good": 1.5, "bad": [None, None], "nested": {"deep": [None]}}
    assert result.stderr == "a stray line\n"


# -- the commands ------------------------------------------------------------------------------------------------------


def test_quantize_and_inspect(packed):
    destination, coverage = packed
    assert coverage["destination"] == str(destination)
    assert coverage["packed_modules"] == 16
    result = invoke("inspect", destination, "--json")
    layers = {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]}
    assert len(layers) == 15  # the head is tied
    assert layers["model.layers.0.mlp.down_proj"]["bits"] == 6
    assert layers["model.layers.1.mlp.up_proj"]["bits"] == 3
    assert sum(layer["bytes"] for layer in layers.values()) == coverage["packed_bytes"]


def test_inspect_collapses_layers_that_are_alike(packed):
    result = invoke("inspect", packed[0])
    assert result.exit_code == 0
    assert "model.layers.*.mlp" in result.stdout
    assert "layers.1." not in result.stdout
    assert "embed_tokens" in result.stdout
    assert "model.layers.1.mlp" in invoke("inspect", packed[0], "--all").stdout


@pytest.mark.parametrize("options", [(), ("--raw",), ("--sample", "--seed", 3)])
def test_generate(packed, options):
    arguments = ("generate", packed[0], "Hello", "--max-new-tokens", 6, *options)
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert 1 <= values["tokens"] <= 6
    templated = "<s>user: Hello</s><s>assistant: "
    specials = 3
    assert values["prompt_tokens"] == (5 if "--raw" in options else len(templated) - len("<s></s><s>") + specials)
    streamed = invoke(*arguments).stdout
    assert streamed.strip("\n") == values["text"].strip("\n")


def test_generate_quantizes_on_the_fly(source, packed):
    arguments = ("Hello", "--max-new-tokens", 6, "--raw", "--json")
    rule = ("--bits", 3, "--rule", r".*\.down_proj=bits=6")
    fly = json.loads(invoke("generate", source, *arguments, *rule).stdout)
    assert fly["text"] == json.loads(invoke("generate", packed[0], *arguments).stdout)["text"]


def test_evaluate(source, packed, text):
    common = ("--text", text, "--length", 64, "--limit", 4, "--json")
    compared = json.loads(invoke("evaluate", packed[0], "--reference", source, *common).stdout)
    assert (compared["windows"], compared["tokens"], compared["text"]) == (4, 4 * 63, "fox.txt")
    assert compared["kl"] > 0
    rule = ("--bits", 3, "--rule", r".*\.down_proj=bits=6")
    fly = json.loads(invoke("evaluate", source, *rule, *common).stdout)
    assert fly["reference"] == str(source)
    assert fly["kl"] == compared["kl"]
    alone = json.loads(invoke("evaluate", source, *common).stdout)
    assert alone["kl"] is None
    itself = json.loads(invoke("evaluate", source, "--reference", source, *common).stdout)
    assert (itself["kl"], itself["top1"]) == (0.0, 1.0)


def test_a_text_shorter_than_a_window_is_refused(source, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    result = invoke("evaluate", source, "--text", tmp_path / "short.txt")
    assert result.exit_code == 1
    assert "the text has 9 tokens, fewer than one window of 512" in one_line(result)


def test_doctor_runs_every_op_of_every_format():
    result = doctor.diagnose()
    kernels = [k for k in result["kernels"] if k["device"] == "cpu"]
    assert len(kernels) == len(doctor.DTYPES) * len(doctor.FORMATS) * len(doctor.OPS)
    assert {k["error"] for k in kernels} == {None}
    assert all(k["chosen"] not in k["passed_over"] for k in kernels)
    assert result["autoload"] == {"entry_point": True, "active": True}
    assert result["versions"]["hf_lowbit"] == hf_lowbit.__version__


def test_doctor_says_what_to_change(monkeypatch, capsys):
    monkeypatch.setenv("HF_LOWBIT_AUTOLOAD", "0")
    monkeypatch.setenv("HF_LOWBIT_BACKEND", "triton")
    result = doctor.diagnose()
    assert result["autoload"] == {"entry_point": True, "active": False}
    advice = " ".join(result["advice"])
    assert "unset HF_LOWBIT_AUTOLOAD" in advice
    assert "HF_LOWBIT_BACKEND forces a backend" in advice
    assert {k["passed_over"]["torch"] for k in result["kernels"]} == {"backend 'triton' was asked for"}
    tables.doctor(Console(width=200), result, {})
    printed = capsys.readouterr().out
    assert "FAILS: linear of int on cpu" in printed
    assert "backend 'triton' was asked for" in printed


# -- in new processes --------------------------------------------------------------------------------------------------


def test_end_to_end(source, tmp_path, text):
    destination = tmp_path / "packed"
    quantized = run("hf-lowbit", "quantize", source, destination, "--bits", 4, "--json")
    assert quantized.returncode == 0, quantized.stderr
    assert json.loads(quantized.stdout)["packed_modules"] == 16
    generated = run("hf-lowbit", "generate", destination, "Hello", "--max-new-tokens", 4)
    assert generated.returncode == 0, generated.stderr
    assert "tokens in" in generated.stderr
    evaluated = run("optimum-cli", "lowbit", "evaluate", destination, "--text", text, "--length", 64, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["perplexity"] > 1


def test_optimum_cli_is_the_same_app():
    for arguments in (("--help",), ("quantize", "-h"), ("quantize", "--bits", 4)):
        ours, theirs = run("hf-lowbit", *arguments), run("optimum-cli", "lowbit", *arguments)
        assert theirs.returncode == ours.returncode
        named = [(r.stdout + r.stderr).replace("optimum-cli lowbit", "hf-lowbit") for r in (ours, theirs)]
        assert named[0].split() == named[1].split()


def test_optimum_cli_doctor():
    result = run("optimum-cli", "lowbit", "doctor", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["optimum_cli"] is True
    assert found["kernels"]


def test_nothing_hides_the_commands_of_other_packages():
    import optimum

    for folder in optimum.__path__:
        assert not os.path.exists(Path(folder, "commands", "register", "__init__.py"))
