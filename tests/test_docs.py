"""The code in the documents does what they say."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import hf_lowbit.methods as registry
from hf_lowbit import LowBitConfig
from hf_lowbit.formats import parse_format

DOCUMENT = Path(__file__).parents[1] / "docs" / "adding_a_method.md"


@pytest.fixture
def blocks():
    """The Python blocks of ``docs/adding_a_method.md``: the method's file, and its use."""
    file, use = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return file, use


@pytest.fixture
def percentile(blocks, tmp_path, monkeypatch):
    """The document's method, as if its one file lay in ``hf_lowbit/methods``."""
    path = blocks[0].splitlines()[0].removeprefix("# ")
    folder, name = path.rsplit("/", 1)
    assert folder == "hf_lowbit/methods" and "percentile" not in registry.methods()
    (tmp_path / name).write_text(blocks[0])
    monkeypatch.setattr(registry, "__path__", [*registry.__path__, str(tmp_path)])
    registry.methods.cache_clear()
    yield registry.methods()["percentile"]
    registry.methods.cache_clear()
    sys.modules.pop("hf_lowbit.methods.percentile")
    vars(registry).pop("percentile", None)
    importlib.invalidate_caches()


def heavy_tailed(rows=64, columns=320):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    return normal / torch.randn(3, rows, columns, generator=generator).square().sum(0).div(3).sqrt()


def errors(method, text, options=None):
    """Magnitudes of the errors of all weights."""
    weight, format = heavy_tailed(), parse_format(text)
    packed = format.pack(registry.make_method(method, options).quantize(weight, format))
    return (format.dequantize(packed, tuple(weight.shape)) - weight).abs()


def test_one_file_is_a_method(percentile, blocks):
    variables = {}
    exec(compile(blocks[1], str(DOCUMENT), "exec"), variables)
    assert type(variables["method"]) is percentile and variables["method"].keep == 0.97
    weight, restored = variables["weight"], variables["restored"]
    # Three bits of a normal weight leave well below a tenth of its power.
    assert (restored - weight).square().sum() < 0.1 * weight.square().sum()


def test_it_does_what_the_document_says_of_it(percentile):
    minmax = {"range": "minmax"}
    for text in ("int:bits=3", "nf:bits=3", "int:bits=3,symmetric=True"):
        assert torch.equal(errors("percentile", text, {"keep": 1.0}), errors("rtn", text, minmax))
        # Outliers are clipped, and the grid is finer for all the others.
        clipped, spanned = errors("percentile", text), errors("rtn", text, minmax)
        assert clipped.max() > spanned.max() and clipped.median() < spanned.median()


def test_its_options_and_formats_are_checked(percentile):
    for arguments, message in [
        ({"method_options": {"keep": 0}}, "keep=0 is not possible: method 'percentile' takes a share above 0"),
        ({"method_options": {"kept": 0.9}}, "method 'percentile' has no option 'kept': it takes keep"),
        ({"format": "codebook"}, "method 'percentile' does not make format 'codebook': use 'gptq' or 'lloyd'"),
    ]:
        with pytest.raises(ValueError) as caught:
            LowBitConfig(bits=3, method="percentile", **arguments)
        assert message in str(caught.value)


def test_it_quantizes_a_model(percentile, tiny):
    from conftest import load, logits

    model = load("llama", tiny("llama"), quantization_config=LowBitConfig(bits=4, method="percentile"))
    assert model.config.quantization_config.method == "percentile"
    assert torch.isfinite(logits(model, "llama")).all()


def test_names_that_the_document_mentions_exist():
    text = DOCUMENT.read_text()
    root = DOCUMENT.parents[1]
    for path in re.findall(r"`((?:hf_lowbit|tests)/[\w/]+\.py)`", text):
        assert (root / path).exists(), path
    tests = (root / "tests/methods/test_methods.py").read_text()
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    assert "OPTIONS = {" in tests


def test_ci_runs_the_test_command_of_the_readme():
    root = Path(__file__).parent.parent
    commands = re.findall(r"```bash\n(python3 -m venv .*)\n```", (root / "README.md").read_text())
    assert len(commands) == 2
    assert commands[1] in (root / ".ci" / "run").read_text()


def test_links_between_documents_lead_somewhere():
    root = Path(__file__).parent.parent
    for page in [
        root / "README.md",
        *root.glob("docs/*.md"),
        root / "benchmarks/README.md",
        root / "model_cards/README.md",
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
