"""Assembles the folders that the Hub's ``kernels`` package loads: ``python kernels/assemble.py [DESTINATION]``.

There is nothing to compile, so a build is the Python files and a ``metadata.json`` for each backend of ``build.toml``,
in ``build/torch-<backend>/``; ``kernel-builder`` makes the same for a release. The default destination is this folder.
"""

import hashlib
import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "torch-ext" / "lowbit_kernels"


def assemble(destination: Path, backends: Sequence[str] | None = None) -> list[Path]:
    """Writes ``destination``/build/torch-<backend>/ for ``backends``, those of ``build.toml`` by default."""
    config = tomllib.loads((HERE / "build.toml").read_text())
    general, endings = config["general"], config["torch-noarch"]["pyext"]
    files = sorted(f for ending in endings for f in SOURCE.rglob(f"*.{ending}"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(SOURCE)}\0".encode() + file.read_bytes())
    written = []
    for backend in backends or general["backends"]:
        folder = destination / "build" / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for file in files:
            target = folder / file.relative_to(SOURCE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        metadata = {
            "id": f"_{SOURCE.name}_{backend}_{digest.hexdigest()[:8]}",
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        written.append(folder)
    return written


if __name__ == "__main__":
    for path in assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(path)
