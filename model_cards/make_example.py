"""Makes the example card: SmolLM2-135M-Instruct in 4 bits, measured against its float weights.

python model_cards/make_example.py [FOLDER]

FOLDER keeps the float model for another time.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.evaluate import evaluate, make_windows
from hf_lowbit.hub import write_model_card
from hf_lowbit.smollm import sample_text, save_smollm2

EXAMPLE = Path(__file__).parent / "examples" / "smollm2-135m-instruct-4bit.md"

with tempfile.TemporaryDirectory() as temporary:
    source, packed = Path(*sys.argv[1:2] or [temporary, "source"]), Path(temporary, "packed")
    save_smollm2(source)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=LowBitConfig(bits=4))
    model.save_pretrained(packed)
    windows = make_windows(AutoTokenizer.from_pretrained(source), sample_text(), length=256, limit=8)
    result = evaluate(model, windows, reference=AutoModelForCausalLM.from_pretrained(source))
    text = "Python's own language reference (pydoc_data.topics)"
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    write_model_card(packed, base_model=base, evaluation={**result.to_dict(), "text": text})
    EXAMPLE.parent.mkdir(exist_ok=True)
    shutil.copy(packed / "README.md", EXAMPLE)
