"""Every example runs, on a tiny model, and stays short."""

import os
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


def test_every_example_is_run():
    tested = {"load_in_3_bits.py", "mixed_bits.py", "publish.py"}
    assert tested == {path.name for path in EXAMPLES}
