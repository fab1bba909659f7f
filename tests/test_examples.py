"""Every example runs, on a tiny model, and stays short."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_chat import save_tiny_chat

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_examples_are_short():
    assert EXAMPLES
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("examples") / "chat")


def run(name, *arguments, **environment):
    """The output of an example, which must succeed."""
    path = next(path for path in EXAMPLES if path.name == name)
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_in_3_bits(chat, tmp_path):
    assert "same logits: True" in run("load_in_3_bits.py", chat, tmp_path / "packed")
    assert (tmp_path / "packed" / "model.safetensors").exists()


def test_mixed_bits(chat):
    output = run("mixed_bits.py", chat)
    assert "rule '.*layers" in output and "nf:bits=3" in output and "int:bits=8" in output


def test_publish(chat, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the dog. " * 200)
    with HubServer() as hub:
        run("publish.py", chat, "me/packed", text, **hub.environment, HF_HOME=str(tmp_path / "home"))
        assert b"KL" in hub.repos["me/packed"]["README.md"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat sat on the mat and looked at the dog. " * 200)
    return file


def test_qlora_trainer(chat, text, tmp_path):
    output = run("qlora_trainer.py", text, tmp_path, "--model", chat, "--steps", "2", "--length", "32")
    assert "trainable params" in output and "same loss again: True" in output
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "checkpoint-2").exists()


def test_apiq_2bit(chat, text, tmp_path):
    few = ("--rank", "4", "--windows", "2", "--steps", "2", "--length", "32", "--method", "apiq-lw")
    output = run("apiq_2bit.py", chat, text, tmp_path / "made", *few)
    assert "2 bits alone:" in output and "apiq-lw:" in output and "after training:" in output
    assert (tmp_path / "made/adapter/adapter_model.safetensors").exists()


def test_sft_trl(chat, tmp_path):
    user, assistant = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat."}
    line = json.dumps({"prompt": [user], "completion": [assistant]})
    (tmp_path / "chats.jsonl").write_text((line + "\n") * 8)
    output = run("sft_trl.py", tmp_path / "chats.jsonl", tmp_path / "out", "--model", chat, "--steps", "10")
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert last < first
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_publish_adapter(chat, tmp_path):
    with HubServer() as hub:
        output = run("publish_adapter.py", chat, "me/adapted", **hub.environment, HF_HOME=str(tmp_path / "home"))
        assert "same logits: True" in output
        assert {"model.safetensors", "adapter/adapter_model.safetensors"} < set(hub.repos["me/adapted"])


def test_train_distributed(chat, text, tmp_path):
    """In one process; ``test_distributed.py`` has two."""
    run("train_distributed.py", chat, text, tmp_path / "out", "--steps", "2", "--length", "32", "--cpu")
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_compiled_decoding(processes, chat, tmp_path):
    """A second process finds what the first one compiled, and says the same."""
    few = ("--model", chat, "--cache", tmp_path, "--length", 64, "--tokens", 8)
    outputs = [run("compiled_decoding.py", "the cat", *few).splitlines() for _ in range(processes)]
    assert all(output[0].startswith("first answer: 8 tokens") for output in outputs)
    assert len({tuple(output[2:]) for output in outputs}) == 1
    assert any(tmp_path.iterdir())


def test_every_example_is_run():
    tested = {"load_in_3_bits.py", "mixed_bits.py", "publish.py", "qlora_trainer.py", "apiq_2bit.py", "sft_trl.py"}
    tested |= {"publish_adapter.py", "train_distributed.py", "compiled_decoding.py"}
    assert tested == {path.name for path in EXAMPLES}
