"""Pack a model from disk to disk, measure it, and publish it with a model card that says so.

python examples/publish.py MODEL USER/NAME [TEXT_FILE]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowbit import LowBitConfig
from hf_lowbit.convert import quantize_folder
from hf_lowbit.evaluate import evaluate, make_windows
from hf_lowbit.hub import push_to_hub
from hf_lowbit.smollm import sample_text

source, repo_id = sys.argv[1:3]
text = Path(sys.argv[3]).read_text("utf-8") if len(sys.argv) > 3 else sample_text()

with tempfile.TemporaryDirectory() as scratch:
    packed = f"{scratch}/packed"
    quantize_folder(source, packed, LowBitConfig(bits=4))

    windows = make_windows(AutoTokenizer.from_pretrained(source), text, length=128, limit=4)
    reference = AutoModelForCausalLM.from_pretrained(source)
    evaluation = evaluate(AutoModelForCausalLM.from_pretrained(packed), windows, reference)
    print(evaluation)

    print(push_to_hub(packed, repo_id, base_model=source, evaluation=evaluation.to_dict() | {"text": "sample text"}))
