"""The kernels as the Hub's ``kernels`` package loads them: from a folder, knowing nothing of this repository."""

import ast
import re
import sys

import pytest
import torch
from assemble import SOURCE, assemble
from problems import packed

from hf_lowbit.formats import parse_format


def test_the_sources_import_nothing_but_torch_and_triton():
    for file in SOURCE.rglob("*.py"):
        names = re.findall(r"^\s*(?:import|from) (\.?\w*)", file.read_text(), re.MULTILINE)
        outside = {n for n in names if not n.startswith(".") and n not in sys.stdlib_module_names}
        assert outside <= {"torch", "triton"}, file


def test_no_loop_unpacks_in_two_levels():
    """Triton before 3.8 fails to look through ``for a, (b, c) in ...`` in what a kernel uses."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.For) and isinstance(node.target, ast.Tuple):
                assert not any(isinstance(e, ast.Tuple) for e in node.target.elts), f"{file}, line {node.lineno}"


def test_every_backend_gets_a_build(tmp_path):
    folders = assemble(tmp_path)
    assert [f.name for f in folders] == ["torch-cuda", "torch-rocm", "torch-xpu"]
    for folder in folders:
        built = {f.relative_to(folder) for f in folder.rglob("*") if f.name != "metadata.json" and f.is_file()}
        sources = {f.relative_to(SOURCE) for e in ("*.py", "*.json") for f in SOURCE.rglob(e)}
        assert built == sources and any(f.match("tuning/*.json") for f in built)
    assert assemble(tmp_path) == folders  # again, over the old one


def test_a_build_loads_and_runs(tmp_path, device):
    kernels = pytest.importorskip("kernels", exc_type=ImportError)
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("the package 'kernels' is not installed: what was found is the folder of that name here")
    assemble(tmp_path, ["cpu"])
    loaded = kernels.get_local_kernel(tmp_path, backend="cpu")
    assert not loaded.__name__.startswith("hf_lowbit")
    format = parse_format("int:bits=3")
    weight, companions = packed(format, 7, 65, "cpu")
    x = torch.ones(2, 65)
    expected = loaded.plain.linear(x, weight, companions, None, format.spec, 65)
    got = loaded.linear(x.to(device), weight.to(device), [c.to(device) for c in companions], None, format.spec, 65)
    # A sum of 65 products of magnitude at most 8 * 2**-2: 66 roundings.
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=66 * 2**-24 * 65 * 2)
